"""`outbox replay`: send sent transactions again on purpose, as new messages that say what they repeat.

A replay is a new transaction of the outbox: copies of the events with new message ids, at a new position, marked with
the position that it repeats. So the leader publishes it like any other, with every promise, and a command never
publishes by itself: it would be a foreign writer in the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import psycopg
from psycopg.rows import TupleRow

from outbox.errors import Misconfigured
from outbox.event import matches
from outbox.operate import queries
from outbox.postgres.queries import compose
from outbox.postgres.session import step, stepping_session

PAGE = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which transactions: positions from `first` to `last`, both included, with an event on `subject` (wildcards).

    With `stream`, what went there: whole transactions, and of others their part for it.
    """

    first: int
    last: int
    subject: str | None = None
    stream: str | None = None


@dataclass(slots=True, kw_only=True)
class Replayed:
    """What was, or with `dry_run` would be, sent again: whole transactions, and how many events they have.

    Passed over: what is `pending` (it is sent anyway), what is `dead` (see `outbox dead retry`), and what has lost its
    events. `last` is the last position that was replayed: after an interruption go on behind it. Up to the position
    `purged` transactions may be gone. `rollups` have events with Nats-Rollup, which remove newer messages. All that
    was sent to `streams` before.
    """

    transactions: int = 0
    events: int = 0
    pending: int = 0
    dead: int = 0
    last: int | None = None
    purged: int = 0
    rollups: int = 0
    streams: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sent:
    position: int
    txid: str
    count: int
    rollup: bool
    streams: Sequence[str]
    numbers: list[int] | None = None  # of the events that are meant, None for all


def replay(
    url: str,
    name: str,
    wanted: Wanted,
    *,
    dry_run: bool = False,
    progress: Callable[[Replayed], None] = lambda _: None,
) -> Replayed:
    """Add the transactions in this range again, in their order; one commit each; but what is itself a replay.

    Interrupted, it has added whole transactions only. Needs what the operator's role may. May raise `Weather`.
    """
    done = Replayed()
    with stepping_session(url) as connection:
        with step(connection):
            ((done.purged,),) = connection.execute(compose(queries.PURGED, name)).fetchall()
            # Only up to what is there now: a replay must not meet its own work.
            ((highest,),) = connection.execute(compose(queries.HIGHEST, name)).fetchall()
        for each in _chosen(connection, name, replace(wanted, last=min(wanted.last, highest)), done):
            if dry_run or _again(connection, name, each):
                done.transactions += 1
                done.events += each.count
                done.rollups += each.rollup
                done.last = each.position
                done.streams = sorted({*done.streams, *each.streams})
                progress(done)
    return done


def _chosen(connection: psycopg.Connection[TupleRow], name: str, wanted: Wanted, done: Replayed) -> Iterator[_Sent]:
    after = wanted.first - 1
    while True:
        given = {"after": after, "to": wanted.last, "page": PAGE}
        with step(connection):
            rows = connection.execute(compose(queries.REPLAYABLE, name), given).fetchall()
        if not rows:
            return
        for position, txid, count, sent, dead, subjects, rollup, stream, parts in rows:
            if wanted.subject is not None and not any(matches(subject, wanted.subject) for subject in subjects):
                continue
            streams: dict[str, list[int] | None] = parts or {stream: None}
            if sent and wanted.stream is None:
                yield _Sent(position=position, txid=txid, count=count, rollup=rollup, streams=list(streams))
            elif sent and wanted.stream in streams:
                numbers = streams[wanted.stream]
                yield _Sent(
                    position=position,
                    txid=txid,
                    count=count if numbers is None else len(numbers),
                    rollup=rollup,
                    streams=[wanted.stream],
                    numbers=numbers,
                )
            done.dead += dead
            done.pending += not sent and not dead
        after, *_ = rows[-1]


def _again(connection: psycopg.Connection[TupleRow], name: str, sent: _Sent) -> bool:
    """Add one transaction again, in a transaction of its own; False if it was purged meanwhile."""
    try:
        with step(connection):
            given = {"txid": sent.txid, "numbers": sent.numbers}
            copied = connection.execute(compose(queries.REPLAY_EVENTS, name), given)
            if copied.rowcount == 0:
                return False
            if copied.rowcount != sent.count:
                raise Misconfigured(
                    f"transaction {sent.position} has {sent.count} events, but {copied.rowcount} are in {name}.events",
                    remedy="find out who changed the table; replay what lies before and behind it",
                )
            connection.execute(compose(queries.SEAL_NOW, name))
            connection.execute(compose(queries.REPLAY_OF, name), {"position": sent.position})
    except psycopg.errors.CheckViolation as error:
        raise Misconfigured(
            f"transaction {sent.position} cannot be added again: {error.diag.message_primary}",
            remedy=error.diag.message_hint or f"look at the limits in {name}.limits",
        ) from error
    return True
