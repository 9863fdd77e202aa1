"""A transaction: the unit of atomicity, order, failure and receipt; and the reasons why one can never be sent.

Pure values. A transaction is here only when it is whole: the store checks the number of its events.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from uuid import UUID

from outbox.event import Event, event_problem


class DeadReason(StrEnum):
    """Why a transaction is set aside. A closed list: nothing that time can cure is on it."""

    SPANS_STREAMS = "spans-streams"
    UNROUTED = "unrouted"
    TOO_MANY_EVENTS = "too-many-events"
    MESSAGE_TOO_LARGE = "message-too-large"
    HEADERS_TOO_LARGE = "headers-too-large"
    DUPLICATE_MESSAGE_ID = "duplicate-message-id"
    ROLLUP_NOT_PERMITTED = "rollup-not-permitted"
    TTL_NOT_PERMITTED = "ttl-not-permitted"
    INVALID_TTL = "invalid-ttl"
    INVALID_EVENT = "invalid-event"
    KILLS_RELAY = "kills-relay"


@dataclass(frozen=True, slots=True, kw_only=True)
class Transaction:
    """A committed transaction with all its events, in the order in which they were added. `size` is in bytes."""

    position: int
    events: tuple[Event, ...]
    size: int

    @property
    def count(self) -> int:
        """How many events it has."""
        return len(self.events)


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """Where a transaction is: its messages are `first_sequence` to `last_sequence` of `stream`, without a gap."""

    position: int
    stream: str
    first_sequence: int
    last_sequence: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A transaction can never be sent: `reason` is from the closed list, `detail` says what was found."""

    position: int
    reason: DeadReason
    detail: str

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one stream and its server take: events in a batch, bytes of a message (payload and headers)."""

    max_batch_messages: int
    max_message_bytes: int


def invalid(transaction: Transaction) -> Verdict | None:
    """Why this transaction can never be sent, whatever the streams: its rows were written around the triggers; or None.

    Look before anybody is asked where its subjects go: a hostile header could end a batch, a hostile subject is a
    question that has no answer.
    """
    for number, event in enumerate(transaction.events, start=1):
        if problem := event_problem(event):
            detail = f"event {number}: {problem}"
            return Verdict(position=transaction.position, reason=DeadReason.INVALID_EVENT, detail=detail)
    return None


def verdict(transaction: Transaction, streams: Mapping[str, str], limits: Limits) -> Verdict | None:
    """Why this transaction can never be sent, as far as that can be seen before the first byte; or None.

    `streams` maps each of its subjects to the stream that takes it.
    """

    def dead(reason: DeadReason, detail: str) -> Verdict:
        return Verdict(position=transaction.position, reason=reason, detail=detail)

    taken_by = {streams[event.subject] for event in transaction.events}
    if len(taken_by) > 1:
        return dead(DeadReason.SPANS_STREAMS, "its subjects belong to " + ", ".join(sorted(taken_by)))
    if transaction.count > limits.max_batch_messages:
        return dead(DeadReason.TOO_MANY_EVENTS, f"{transaction.count} events, {limits.max_batch_messages} fit a batch")
    ids: set[UUID] = set()
    subjects: set[str] = set()
    for number, event in enumerate(transaction.events, start=1):
        if event.message_id in ids:
            return dead(DeadReason.DUPLICATE_MESSAGE_ID, f"event {number} repeats message id {event.message_id}")
        if event.is_rollup and event.subject in subjects:
            return dead(DeadReason.ROLLUP_NOT_PERMITTED, f"event {number} rolls up a subject of its own transaction")
        if (size := message_bytes(event)) > limits.max_message_bytes:
            return dead(
                DeadReason.MESSAGE_TOO_LARGE, f"event {number} has {size} bytes, {limits.max_message_bytes} are taken"
            )
        ids.add(event.message_id)
        subjects.add(event.subject)
    return None


def message_bytes(event: Event) -> int:
    """Bytes of payload and headers as the application gave them, a lower bound of the message on the wire."""
    return len(event.payload) + sum(len(name) + len(value) + 4 for name, value in event.headers.items())
