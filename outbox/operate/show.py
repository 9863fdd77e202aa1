"""`outbox show`: one transaction as a whole story: its state, its events, its receipt, and what is in the stream now.

Reads only. The database tells the story; the stream is asked what it still holds, and where it cannot be asked that is
said, and nothing else is missing.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from psycopg.rows import class_row, dict_row

from outbox.config import Settings
from outbox.core.plan import Seen
from outbox.errors import Misconfigured, OutboxError
from outbox.jetstream.client import connected
from outbox.operate import queries
from outbox.postgres.queries import compose
from outbox.postgres.session import command_session

RECEIPT = ("first_sequence", "last_sequence", "sent_at", "dead_at", "dead_reason", "discarded_at")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownEvent:
    """An event as it was added. `stream` and `sequence` are its place by the receipt.

    `in_stream` says what is at that place now: there, removed (by the stream's own limits, rollup or purge), or other;
    null where there is no receipt, or the stream could not be asked.
    """

    message_id: UUID
    subject: str
    headers: dict[str, str] | None
    payload: bytes
    created_at: datetime
    stream: str | None
    sequence: int | None
    in_stream: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownPart:
    """What of a transaction over several streams is for one of them: the events with these numbers, from 1 on.

    `state` is pending, sent or dead.
    """

    part: int
    stream: str
    state: str
    numbers: list[int]
    first_sequence: int | None
    last_sequence: int | None
    sent_at: datetime | None
    dead_at: datetime | None
    dead_reason: str | None
    discarded_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """A transaction. `state` is pending, sent, dead or discarded; `problem` is why a stream could not be asked.

    With `parts` it has no receipt of its own, but each of them has.
    """

    position: int
    txid: str
    state: str
    event_count: int
    sealed_at: datetime
    attempts: int
    stream: str | None
    first_sequence: int | None
    last_sequence: int | None
    sent_at: datetime | None
    dead_at: datetime | None
    dead_reason: str | None
    discarded_at: datetime | None
    retried_at: datetime | None
    replay_of: int | None
    replays: list[int]
    parts: list[ShownPart]
    events: list[ShownEvent]
    problem: str | None


async def show(settings: Settings, position: int) -> Shown:
    """Everything about one transaction. Raises `Misconfigured` if there is none at this position."""
    with command_session(settings.database_url, reads=True) as connection:
        given = {"position": position}
        rows = connection.cursor(row_factory=dict_row)
        row = rows.execute(compose(queries.SHOW, settings.schema), given).fetchone()
        events = rows.execute(compose(queries.SHOW_EVENTS, settings.schema), given).fetchall()
        if row is None:
            ((purged,),) = connection.execute(compose(queries.PURGED, settings.schema))
            raise _nothing_at(position, int(purged))
        known = connection.cursor(row_factory=class_row(ShownPart))
        parts = known.execute(compose(queries.SHOW_PARTS, settings.schema), given).fetchall()
    outbox_ids, retired = {str(each) for each in row.pop("outbox_ids")}, row.pop("stream_retired_at")
    receipts = parts or [_only_part(row)]
    places: dict[int, _Place] = {}
    problems = []
    for each in receipts:
        seen, problem = await _in_stream(settings, each.stream, each.first_sequence, len(each.numbers))
        if problem:
            problems.append(f"{problem}; it was retired at {retired:%F %T}" if retired else problem)
        for nth, number in enumerate(each.numbers if each.first_sequence is not None else ()):
            places[number] = _Place(each.stream, (each.first_sequence or 0) + nth, seen)
    shown = [
        ShownEvent(
            **event,
            stream=place.stream if place else None,
            sequence=place.sequence if place else None,
            in_stream=place.holds(event["message_id"], outbox_ids) if place else None,
        )
        for number, event in enumerate(events, start=1)
        for place in [places.get(number)]
    ]
    return Shown(**row, parts=parts, events=shown, problem="; ".join(problems) or None)


def _only_part(row: dict[str, Any]) -> ShownPart:
    """A transaction in one stream, as if it were a part of itself."""
    receipt = {name: row[name] for name in RECEIPT}
    numbers = list(range(1, row["event_count"] + 1))
    return ShownPart(part=0, stream=row["stream"] or "", state=row["state"], numbers=numbers, **receipt)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an event is by its receipt, and what is in that stream now, as far as it could be asked."""

    stream: str
    sequence: int
    seen: dict[int, Seen | None] | None

    def holds(self, message_id: UUID, outbox_ids: Collection[str]) -> str | None:
        if self.seen is None:
            return None
        message = self.seen.get(self.sequence)
        if message is None:
            return "removed"
        return "there" if message.outbox_id in outbox_ids and message.message_id == str(message_id) else "other"


def _nothing_at(position: int, purged: int) -> Misconfigured:
    if position <= purged:
        return Misconfigured(
            f"there is no transaction at position {position}: it was rolled back, or sent and purged",
            remedy=f"keep what was sent for longer (OUTBOX_RETENTION); positions up to {purged} may be purged",
        )
    return Misconfigured(
        f"there is no transaction at position {position}: it was rolled back, or is not committed",
        remedy="outbox status names the oldest pending position; the view pending has all of them",
    )


async def _in_stream(
    settings: Settings, stream: str, first: int | None, count: int
) -> tuple[dict[int, Seen | None] | None, str | None]:
    """What is at the places of the receipt; None, and why, if that cannot be known."""
    if first is None:
        return None, None
    try:
        async with connected(settings) as jetstream:
            if await jetstream.stream(stream) is None:
                return None, f"stream {stream} does not exist"
            return await jetstream.read(stream, range(first, first + count)), None
    except OutboxError as error:
        return None, error.message
