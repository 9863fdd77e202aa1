"""The application's hand: adds events to the transaction that the caller has open, and never commits.

Knows the table `events` and nothing of the relay; SQLAlchemy is loaded only by who uses it. Statements are Core or
plain SQL, never ORM objects, which a unit of work would reorder; and without RETURNING, which a role that may only
insert could not run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import psycopg
from psycopg.pq import TransactionStatus

from outbox.errors import InvalidEvent, OutboxError
from outbox.event import MAX_EVENT_BYTES, Event, check_event, check_size, encode_payload
from outbox.schema import DEFAULT_SCHEMA, checked_name

if TYPE_CHECKING:
    import sqlalchemy as sa
    from sqlalchemy.orm import Session

# A statement takes at most 65,535 parameters, four an event: more events than this take another round trip.
EVENTS_PER_STATEMENT = 10_000


def event(
    subject: str,
    payload: object,
    *,
    headers: Mapping[str, str] | None = None,
    message_id: UUID | None = None,
) -> Event:
    """An event for `add_many`. `payload`: bytes as they are, str as UTF-8, anything else as JSON.

    `message_id` is made here if it is not given. Raises `InvalidEvent` with what to change.
    """
    if not isinstance(subject, str):
        raise InvalidEvent(f"outbox: subject is of type {type(subject).__name__}", remedy="give a str")
    made = Event(str(message_id or uuid4()), subject, encode_payload(payload), dict(headers or {}))
    return check_event(made)


class Outbox:
    """The outbox in one schema. Cheap, without state or IO of its own: make one and share it between threads."""

    def __init__(
        self, schema: str = DEFAULT_SCHEMA, *, max_event_bytes: int = MAX_EVENT_BYTES, traces: bool = False
    ) -> None:
        """`max_event_bytes`: payload and headers of an event, at most; raise it with the limit in the database.

        `traces`: give each event a span `create` in the caller's trace (OpenTelemetry, extra `traces`), and its context
        to the consumers, as the header `traceparent`.
        """
        self.schema = checked_name(schema)
        self.max_event_bytes = max_event_bytes
        self._traced = _tracer() if traces else None

    def _checked(self, events: Iterable[Event]) -> list[Event]:
        added = [self._traced(each) for each in events] if self._traced else list(events)
        for each in added:
            check_size(each, self.max_event_bytes)
        return added

    def add(
        self,
        connection: Session | sa.Connection | psycopg.Connection[Any],
        subject: str,
        payload: object,
        *,
        headers: Mapping[str, str] | None = None,
        message_id: UUID | None = None,
    ) -> UUID:
        """Add an event to the transaction that is open on `connection`, and return its message id. Does not commit.

        `connection` is a SQLAlchemy `Session` or `Connection`, or a psycopg `Connection`; a savepoint works too: what
        is rolled back is never sent. One round trip. Raises `InvalidEvent` before anything is sent; the database
        refuses what breaks its limits, and more events than fit a batch when the transaction commits.
        """
        return self.add_many(connection, [event(subject, payload, headers=headers, message_id=message_id)])[0]

    def add_many(
        self, connection: Session | sa.Connection | psycopg.Connection[Any], events: Iterable[Event]
    ) -> list[UUID]:
        """Add several events, made by `outbox.event`, in order and in one round trip; returns their message ids.

        Does not commit. All or none: if the database refuses one, the statement fails as a whole.
        """
        added = self._checked(events)
        for part in _parts(added):
            if isinstance(connection, psycopg.Connection):
                _refuse_autocommit(connection)
                connection.execute(_psycopg_text(self.schema, len(part)), _psycopg_values(part))
            else:
                connection.execute(_core_text(self.schema, len(part)), _core_values(part))
        return [UUID(each.message_id) for each in added]

    async def add_async(
        self,
        connection: Any,
        subject: str,
        payload: object,
        *,
        headers: Mapping[str, str] | None = None,
        message_id: UUID | None = None,
    ) -> UUID:
        """As `add`, on a SQLAlchemy `AsyncSession` or `AsyncConnection`, or a psycopg `AsyncConnection`."""
        made = event(subject, payload, headers=headers, message_id=message_id)
        return (await self.add_many_async(connection, [made]))[0]

    async def add_many_async(self, connection: Any, events: Iterable[Event]) -> list[UUID]:
        """As `add_many`, on a SQLAlchemy `AsyncSession` or `AsyncConnection`, or a psycopg `AsyncConnection`."""
        added = self._checked(events)
        for part in _parts(added):
            if isinstance(connection, psycopg.AsyncConnection):
                _refuse_autocommit(connection)
                await connection.execute(_psycopg_text(self.schema, len(part)), _psycopg_values(part))
            else:
                await connection.execute(_core_text(self.schema, len(part)), _core_values(part))
        return [UUID(each.message_id) for each in added]


def _tracer() -> Callable[[Event], Event]:
    try:
        from outbox.tracing import created
    except ImportError as error:
        raise OutboxError(
            f"outbox: traces need a package that is not installed: {error.name}",
            remedy="pip install 'outbox-relay[traces]'",
        ) from error
    return created


def _refuse_autocommit(connection: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> None:
    if connection.autocommit and connection.info.transaction_status == TransactionStatus.IDLE:
        raise OutboxError(
            "outbox: no transaction is open on this connection, which is in autocommit mode",
            remedy="add events inside `with connection.transaction():`, together with the change that they tell of",
        )


def _parts(events: Sequence[Event]) -> Iterator[Sequence[Event]]:
    for start in range(0, len(events), EVENTS_PER_STATEMENT):
        yield events[start : start + EVENTS_PER_STATEMENT]


def _insert(schema: str, rows: Iterable[str]) -> str:
    # The schema's name is checked to be a plain lower-case identifier, so quoting it is enough.
    columns = "message_id, subject, headers, payload"
    return f'INSERT INTO "{checked_name(schema)}".events ({columns}) VALUES ' + ", ".join(rows)  # noqa: S608 - as above


@lru_cache(maxsize=64)
def _psycopg_text(schema: str, count: int) -> bytes:
    return _insert(schema, ["(%s::uuid, %s, %s::jsonb, %s)"] * count).encode()


@lru_cache(maxsize=64)
def _core_text(schema: str, count: int) -> sa.TextClause:
    import sqlalchemy as sa

    row = "(CAST(:m{0} AS uuid), :s{0}, CAST(:h{0} AS jsonb), :p{0})"
    return sa.text(_insert(schema, [row.format(number) for number in range(count)]))


def _headers(added: Event) -> str | None:
    return json.dumps(added.headers) if added.headers else None


def _psycopg_values(events: Sequence[Event]) -> list[object]:
    return [value for e in events for value in (e.message_id, e.subject, _headers(e), e.payload)]


def _core_values(events: Sequence[Event]) -> dict[str, object]:
    values: dict[str, object] = {}
    for number, e in enumerate(events):
        values |= {
            f"m{number}": e.message_id,
            f"s{number}": e.subject,
            f"h{number}": _headers(e),
            f"p{number}": e.payload,
        }
    return values
