"""Looks at the outbox's database, over and over, for metrics: by its clock, on a connection of its own.

Beside the relay, never in its way: what fails here is told by the age of the last look, and tried again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import psycopg
from psycopg.rows import TupleRow

from outbox import orders, schema
from outbox.config import Settings
from outbox.errors import OutboxError
from outbox.postgres import queries
from outbox.postgres.session import looked, observer_session

SECONDS = 2.0  # between two looks
SHARE, LONGEST = 0.05, 30.0  # of the time, at most, as with a very long backlog counting takes long; but so often


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamObservation:
    """A stream as the outbox knows it."""

    name: str
    last_sequence: int
    blocked: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What the database said. `lags` are seconds from commit to mark of transactions sent since the last look."""

    leader_present: bool
    blocked: bool
    paused: bool
    pending_transactions: int
    pending_events: int
    oldest_pending_seconds: float | None
    dead_letters: int
    open_positions: int
    settled: int
    streams: list[StreamObservation]
    lags: list[float]


async def observe_for_ever(settings: Settings, take: Callable[[Observation | None], None]) -> None:
    """Look every few seconds, until cancelled; `take` gets None for a look that failed.

    An outage, or a wrong setting that the relay tells of, is waited out.
    """
    settled: int | None = None
    clock = asyncio.get_running_loop().time
    while True:
        began = clock()
        try:
            async with observer_session(settings.database_url) as connection:
                while True:
                    seen = await _look(connection, settings.schema, settled)
                    settled = max(settled or 0, seen.settled)
                    take(seen)
                    await asyncio.sleep(min(LONGEST, max(SECONDS, (clock() - began) / SHARE)))
                    began = clock()
        except (OutboxError, psycopg.Error, ValueError):  # an empty table is told by the relay
            take(None)
            await asyncio.sleep(SECONDS)  # the relay meets the same, and says so


async def _look(connection: psycopg.AsyncConnection[TupleRow], name: str, after: int | None) -> Observation:
    keys = {"lock": schema.LEADER_LOCK, "key": schema.lock_key(name) % (1 << 32)}
    (row,) = await looked(connection, queries.compose(orders.OBSERVE, name), keys)
    streams = await looked(connection, queries.compose(orders.OBSERVE_STREAMS, name))
    since = {"after": row[8] if after is None else after, "to": row[8]}
    lags = await looked(connection, queries.compose(orders.OBSERVE_LAGS, name), since)
    return Observation(
        leader_present=row[0],
        blocked=row[1],
        paused=row[2],
        pending_transactions=row[3],
        pending_events=row[4],
        oldest_pending_seconds=row[5],
        dead_letters=row[6],
        open_positions=row[7],
        settled=row[8],
        streams=[StreamObservation(name=n, last_sequence=last, blocked=b) for n, last, b in streams],
        lags=[seconds for (seconds,) in lags],
    )
