"""`outbox status`: the state of an outbox, and how fast it moves. Reads the database only."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import LiteralString
from uuid import UUID

import psycopg
from psycopg.rows import TupleRow, class_row, dict_row

from outbox import schema
from outbox.core.requirements import Counters, of_counters
from outbox.errors import Locked, Weather
from outbox.operate import queries
from outbox.postgres.denials import READ_ONLY, UNWRITABLE
from outbox.postgres.hindrances import END_SESSION, usurped
from outbox.postgres.queries import COUNTERS, LOCKERS, WHO_LEADS, compose
from outbox.postgres.session import command_session

BLOCKS = " ▁▂▃▄▅▆▇█"
LOOKS, LOOK_SECONDS = 6, 0.1  # for who keeps a relay waiting, which in between two tries waits for nobody


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamStatus:
    """One stream as the outbox knows it; `mode` is chained or shared, `planned` counts what may be in flight.

    `fence` is what excludes two attempts at the same place: the last sequence of the `stream`, or of a `subject` of
    what is sent; `sharing` is what other writers cost, where they cost much. After `retired_at` nothing is sent there
    any more.
    """

    name: str
    mode: str
    last_sequence: int
    sent_transactions: int
    sent_events: int
    planned: int
    blocked: str | None
    blocked_since: datetime | None
    retired_at: datetime | None
    fence: str
    sharing: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RecentDead:
    """One of the transactions that were set aside last."""

    position: int
    event_count: int
    dead_at: datetime
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """The state of an outbox. Ages are in seconds, by the database's clock.

    `stray_events` belong to no transaction and are never sent, `drift` is what of the schema is missing or disabled, as
    the last leader saw them.
    `unreconciled` says what of the database a relay halts on, as it may leave what is pending out of sight.
    """

    schema: str
    schema_version: int
    outbox_id: UUID
    leader: str | None
    leader_since: datetime | None
    epoch: int
    cursor: int
    blocked: str | None
    blocked_since: datetime | None
    unreconciled: str | None
    paused_at: datetime | None
    paused_why: str | None
    observed_at: datetime
    pending_transactions: int
    pending_events: int
    oldest_pending_seconds: float | None
    oldest_pending_position: int | None
    sent_transactions: int
    sent_events: int
    stray_events: int
    drift: str | None
    housekeeping_failing: str | None
    housekeeping_failing_since: datetime | None
    dead_transactions: int
    dead: list[RecentDead]
    streams: list[StreamStatus]


def status(url: str, name: str = schema.DEFAULT_SCHEMA) -> Status:
    """Read the state; the cost grows with what is pending, not with what was sent. May raise `Weather`."""
    try:
        with command_session(url, reads=True) as connection:
            return read(connection, name)
    except Locked as error:
        with command_session(url, reads=True) as connection:
            who = _first(connection, LOCKERS, name) or "somebody"
        raise Locked(f"{who} holds a lock that is needed to look: {error.message}", remedy=END_SESSION) from error


def read(connection: psycopg.Connection[TupleRow], name: str) -> Status:
    """The same, within a transaction that only reads."""
    keys = {"lock": schema.LEADER_LOCK, "key": schema.lock_key(name) % (1 << 32)}
    ((there, comment),) = connection.execute(compose(queries.TOLD_VERSION, name), {"events": f"{name}.events"})
    if there:  # of another version not all may be
        schema.check_version(comment, name)
    row = connection.cursor(row_factory=dict_row).execute(compose(queries.STATUS, name), keys).fetchone()
    assert row is not None  # noqa: S101 - the table relay has one row, by its constraints
    comment, led, frozen = (row.pop(name) for name in ("comment", "led", "frozen"))
    schema.check_version(comment, name)
    counters = connection.execute(compose(COUNTERS, name)).fetchall()
    streams = connection.cursor(row_factory=class_row(StreamStatus)).execute(compose(queries.STATUS_STREAMS, name))
    dead = connection.cursor(row_factory=class_row(RecentDead)).execute(compose(queries.STATUS_DEAD, name))
    found = {**row, "streams": streams.fetchall(), "dead": dead.fetchall()}
    if (why := _unwritable(connection, name, keys, led=led, frozen=frozen)) is not None:
        found["blocked"] = str(why)
        found["blocked_since"] = found["blocked_since"] or found["observed_at"]
    return Status(
        schema=name,
        schema_version=schema.version_of(comment),
        unreconciled=next((each.line for each in of_counters(Counters(*counters[0]))), None),
        sent_transactions=sum(stream.sent_transactions for stream in found["streams"]),
        sent_events=sum(stream.sent_events for stream in found["streams"]),
        **(found if led else {**found, "leader": None, "leader_since": None}),
    )


def _unwritable(
    connection: psycopg.Connection[TupleRow], name: str, keys: dict[str, int], *, led: bool, frozen: bool
) -> Weather | None:
    """What is in the way of relays just now, and may be in the way of writing that down."""
    if frozen:
        return Weather(READ_ONLY, remedy=UNWRITABLE)
    for _ in range(LOOKS):
        if holder := _first(connection, queries.LOCKED_OUT, name):
            return Weather(f"{holder} holds a lock that the relay needs", remedy=END_SESSION)
        if not _first(connection, LOCKERS, name):
            break
        time.sleep(LOOK_SECONDS)
    leads = connection.execute(compose(WHO_LEADS, name), keys).fetchone()
    return usurped(leads[1]) if not led and leads is not None and leads[1] else None


def _first(connection: psycopg.Connection[TupleRow], query: LiteralString, name: str) -> str | None:
    row = connection.execute(compose(query, name)).fetchone()
    return row[0] if row else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Per second, by the database's clock, between two looks: transactions and events sent, transactions added."""

    sent_transactions: float
    sent_events: float
    added_transactions: float


def rates(before: Status, after: Status) -> Rates | None:
    """The rates between two looks; None where they tell nothing: the clock stands, or the counts began anew."""
    seconds = (after.observed_at - before.observed_at).total_seconds()
    sent = after.sent_transactions - before.sent_transactions
    if seconds <= 0 or sent < 0 or after.outbox_id != before.outbox_id:
        return None
    pending = after.pending_transactions - before.pending_transactions
    dead = after.dead_transactions - before.dead_transactions
    return Rates(
        sent_transactions=sent / seconds,
        sent_events=(after.sent_events - before.sent_events) / seconds,
        added_transactions=max(0.0, (sent + pending + dead) / seconds),
    )


@dataclass(slots=True, kw_only=True)
class History:
    """The looks of a watch: the rates since the last one, and the backlog of the last ones as a line of blocks."""

    width: int = 40
    last: Status | None = None
    backlog: deque[int] = field(default_factory=deque)

    def take(self, found: Status) -> Rates | None:
        """Take in a look; the rates since the one before."""
        before, self.last = self.last, found
        self.backlog.append(found.pending_transactions)
        if len(self.backlog) > self.width:
            self.backlog.popleft()
        return rates(before, found) if before is not None else None

    def line(self) -> str:
        """The backlog over time, newest at the right; full height is its highest value in there."""
        return "".join(self._blocks())

    def _blocks(self) -> Iterator[str]:
        highest = max(self.backlog, default=0)
        for each in self.backlog:
            yield BLOCKS[0 if highest == 0 else -(-each * (len(BLOCKS) - 1) // highest)]
