"""`outbox show`: one transaction as a whole story: its state, its events, its receipt, and what is in the stream now.

Reads only. The database tells the story; the stream is asked what it still holds, and where it cannot be asked that is
said, and nothing else is missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from psycopg.rows import dict_row

from outbox.config import Settings
from outbox.core.plan import Seen
from outbox.errors import Misconfigured, OutboxError
from outbox.jetstream.client import connected
from outbox.operate import queries
from outbox.postgres.queries import compose
from outbox.postgres.session import command_session


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownEvent:
    """An event as it was added. `sequence` is its place by the receipt.

    `in_stream` says what is at that place now: there, removed (by the stream's own limits, rollup or purge), or other;
    null where there is no receipt, or the stream could not be asked.
    """

    message_id: UUID
    subject: str
    headers: dict[str, str] | None
    payload: bytes
    created_at: datetime
    sequence: int | None
    in_stream: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """A transaction. `state` is pending, sent, dead or discarded; `problem` is why the stream could not be asked."""

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
    outbox_ids, first, retired = row.pop("outbox_ids"), row["first_sequence"], row.pop("stream_retired_at")
    seen, problem = await _in_stream(settings, row["stream"], first, len(events))
    if problem and retired:
        problem = f"{problem}; it was retired at {retired:%F %T}"
    shown = [
        ShownEvent(
            **event,
            sequence=first + number if first is not None else None,
            in_stream=_place(seen, first + number, event["message_id"], outbox_ids) if first is not None else None,
        )
        for number, event in enumerate(events)
    ]
    return Shown(**row, events=shown, problem=problem)


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
    settings: Settings, stream: str | None, first: int | None, count: int
) -> tuple[dict[int, Seen | None] | None, str | None]:
    """What is at the places of the receipt; None, and why, if that cannot be known."""
    if stream is None or first is None:
        return None, None
    try:
        async with connected(settings) as jetstream:
            if await jetstream.stream(stream) is None:
                return None, f"stream {stream} does not exist"
            return await jetstream.read(stream, range(first, first + count)), None
    except OutboxError as error:
        return None, error.message


def _place(seen: dict[int, Seen | None] | None, sequence: int, message_id: UUID, outbox_ids: list[UUID]) -> str | None:
    if seen is None:
        return None
    message = seen.get(sequence)
    if message is None:
        return "removed"
    ours = message.outbox_id in {str(each) for each in outbox_ids} and message.message_id == str(message_id)
    return "there" if ours else "other"
