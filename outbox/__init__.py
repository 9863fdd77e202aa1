"""Transactional outbox for Postgres and NATS JetStream: each transaction's events are published atomically.

The application's door: `Outbox`, `event`, and the errors they raise. Importing it loads nothing that only the relay
needs.
"""

from outbox.errors import InvalidEvent, OutboxError
from outbox.event import Event
from outbox.writer import Outbox, event

__all__ = ["Event", "InvalidEvent", "Outbox", "OutboxError", "event"]
