"""Looks at the outbox's database, over and over, for metrics: by its clock, on a connection of its own.

Beside the relay, never in its way: what fails here is told by the age of the last look, and tried again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import psycopg
from psycopg.rows import TupleRow, class_row, dict_row

from outbox import schema
from outbox.config import Settings
from outbox.errors import OutboxError
from outbox.postgres.queries import compose
from outbox.postgres.session import looking, observer_session
from outbox.sources import current

SECONDS = 2.0  # between two looks
SHARE, LONGEST = 0.05, 30.0  # of the time, at most, as with a very long backlog counting takes long; but so often

# What metrics show, every few seconds. What is pending is counted as in STATUS.
OBSERVE = """
SELECT (SELECT count(*) > 0 FROM pg_locks AS l JOIN pg_stat_activity AS a ON a.pid = l.pid
         WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 2 AND l.classid = %(lock)s::bigint::oid
           AND l.objid = %(key)s::bigint::oid AND a.application_name = 'outbox relay'
           AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())) AS leader_present,
       r.blocked IS NOT NULL AS blocked, r.paused_at IS NOT NULL AS paused, p.pending_transactions, p.pending_events,
       p.oldest_pending_seconds::float8,
       (SELECT count(*) FROM {schema}.dead WHERE discarded_at IS NULL) AS dead_letters,
       (SELECT coalesce(sum(upper(gap) - lower(gap)), 0)::bigint FROM unnest(r.open_positions) AS gap)
         AS open_positions,
       h.stray_events, h.drift IS NOT NULL AS drift, h.failing IS NOT NULL AS housekeeping_failing,
       least(r.cursor, (SELECT min(lower(places)) - 1 FROM {schema}.streams, unnest(plan) AS places)) AS settled
  FROM {schema}.relay AS r CROSS JOIN {schema}.housekeeping AS h CROSS JOIN (
    SELECT count(*) AS pending_transactions, coalesce(sum(event_count), 0) AS pending_events,
           extract(epoch FROM clock_timestamp() - min(sealed_at)) AS oldest_pending_seconds FROM {schema}.pending
  ) AS p
"""

OBSERVE_STREAMS = """
SELECT name, last_sequence, blocked IS NOT NULL AS blocked, mode = 'shared' AS shared, sharing IS NOT NULL AS contended
  FROM {schema}.streams WHERE retired_at IS NULL ORDER BY name
"""

# How long it took those that were settled since the last look: all of them, or about 200 spread over them.
OBSERVE_LAGS = """
SELECT extract(epoch FROM sent_at - sealed_at)::float8 FROM {schema}.transactions
 WHERE position > %(after)s AND position <= %(to)s AND sent_at IS NOT NULL
   AND position %% greatest(1, (%(to)s::bigint - %(after)s::bigint) / 200) = 0
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamObservation:
    """A stream as the outbox knows it."""

    name: str
    last_sequence: int
    blocked: bool
    shared: bool
    contended: bool


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
    stray_events: int
    drift: bool
    housekeeping_failing: bool
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
            async with observer_session(current(settings, "database_").database_url) as connection:
                while True:
                    seen = await _observed(connection, settings.schema, settled)
                    settled = max(settled or 0, seen.settled)
                    take(seen)
                    await asyncio.sleep(min(LONGEST, max(SECONDS, (clock() - began) / SHARE)))
                    began = clock()
        except (OutboxError, psycopg.Error, ValueError):  # an empty table is told by the relay
            take(None)
            await asyncio.sleep(SECONDS)  # the relay meets the same, and says so


async def _observed(connection: psycopg.AsyncConnection[TupleRow], name: str, after: int | None) -> Observation:
    keys = {"lock": schema.LEADER_LOCK, "key": schema.lock_key(name) % (1 << 32)}
    async with looking(connection):
        (row,) = await (await connection.cursor(row_factory=dict_row).execute(compose(OBSERVE, name), keys)).fetchall()
        known = connection.cursor(row_factory=class_row(StreamObservation))
        streams = await (await known.execute(compose(OBSERVE_STREAMS, name))).fetchall()
        settled = row["settled"]
        since = {"after": settled if after is None else after, "to": settled}
        lags = await (await connection.execute(compose(OBSERVE_LAGS, name), since)).fetchall()
    return Observation(**row, streams=streams, lags=[seconds for (seconds,) in lags])
