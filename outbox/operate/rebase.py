"""`outbox rebase`: after a halt, take a database or a stream as it is now, by an operator's order.

What the database does not know as sent and the stream holds whole is adopted: marked, and not sent again. Transactions
that the database has lost stay in the stream, under an outbox id or positions that never come again.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from uuid import UUID

import psycopg
from psycopg.rows import TupleRow

from outbox import schema
from outbox.config import Settings
from outbox.core.comparison import Comparison
from outbox.errors import Misconfigured
from outbox.event import subject_problem
from outbox.jetstream.client import JetStream, connected
from outbox.jetstream.stream import StreamInfo
from outbox.operate import queries
from outbox.operate.verify import known_rows, read
from outbox.postgres.queries import STREAMS, compose
from outbox.postgres.session import command_session

LOCK_TRIES, LOCK_SECONDS = 50, 0.2  # a relay that a supervisor starts again and again holds the lock for moments


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebased:
    """What was found: `adopted` transactions were marked, `unknown` messages are of transactions nobody knows."""

    outbox_id: UUID
    adopted: int
    unknown: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    name: str
    created: str
    last_sequence: int


@dataclass(slots=True, kw_only=True)
class _Found:
    """What was read in the streams, added up."""

    adopted: int = 0
    unknown: int = 0
    highest: int = 0


async def accept_stream(settings: Settings, stream: str) -> Rebased:
    """Accept a stream as it is now: what was planned for it and is not in it is sent again. Commits.

    Raises `Misconfigured` while a relay leads, or if the outbox does not know the stream, or if it does not exist.
    """
    async with connected(settings) as jetstream:
        with command_session(settings.database_url) as connection:
            await _lock(connection, settings.schema)
            outbox_id = _outbox_id(connection, settings.schema)
            known = [each for each in _streams(connection, settings.schema) if each.name == stream]
            if not known:
                raise Misconfigured(f"the outbox does not know a stream {stream!r}", remedy="outbox status lists them")
            found = _Found()
            info = await _adopt(jetstream, connection, settings.schema, outbox_id, known[0], found)
            if info is None:
                raise Misconfigured(f"stream {stream} does not exist", remedy="create it first, then accept it")
            accepted = {"name": stream, "created": info.created, "last": info.last_sequence}
            connection.execute(compose(queries.ACCEPT_STREAM, settings.schema), accepted)
            return Rebased(outbox_id=outbox_id, adopted=found.adopted, unknown=found.unknown)


async def rebase(settings: Settings, *, read_back: bool = True) -> Rebased:
    """Take a restored, copied or moved database as the outbox's home, with a new id. Commits; blocks writers briefly.

    With `read_back` the streams are read from the last sequence that the database knows, so that nothing in them is
    sent again, and no position that they hold is drawn again; without, everything pending is sent. Raises
    `Misconfigured` while a relay leads.
    """
    with command_session(settings.database_url) as connection:
        await _lock(connection, settings.schema)
        outbox_id = _outbox_id(connection, settings.schema)
        found = _Found()
        if read_back:
            async with connected(settings) as jetstream:
                for known in await _all_streams(jetstream, connection, settings.schema):
                    await _adopt(jetstream, connection, settings.schema, outbox_id, known, found)
        locked = compose(queries.LOCK_OUT_WRITERS, settings.schema)
        connection.execute(locked)
        for statement in queries.REBASE:
            connection.execute(compose(statement, settings.schema))
        connection.execute(compose(queries.LIFT, settings.schema), {"highest": found.highest})
        new_id = _outbox_id(connection, settings.schema)
        return Rebased(outbox_id=new_id, adopted=found.adopted, unknown=found.unknown)


async def _lock(connection: psycopg.Connection[TupleRow], name: str) -> None:
    """Keep relays from leading until the transaction ends."""
    keys = {"lock": schema.LEADER_LOCK, "key": schema.lock_key(name)}
    for _ in range(LOCK_TRIES):
        if connection.execute(compose(queries.LOCK_OUT_LEADERS, name), keys).fetchone() == (True,):
            return
        await asyncio.sleep(LOCK_SECONDS)
    raise Misconfigured("a relay leads this outbox", remedy="stop every relay of it first")


async def _adopt(
    jetstream: JetStream,
    connection: psycopg.Connection[TupleRow],
    name: str,
    outbox_id: UUID,
    known: _Place,
    found: _Found,
) -> StreamInfo | None:
    """Mark what the stream holds whole and the database has as pending; the stream as it is, or None if it is gone."""
    info = await jetstream.stream(known.name)
    if info is None:
        return None
    same = info.created == known.created and info.last_sequence >= known.last_sequence
    comparison = Comparison(outbox_id=str(outbox_id), stream=known.name, shared=True, adopting=True)
    low = max(known.last_sequence + 1 if same else 1, info.first_sequence)
    highest = await read(
        jetstream, lambda positions: known_rows(connection, name, positions), comparison, low, info.last_sequence
    )
    adoptable = comparison.adoptable(known_rows(connection, name, comparison.unmarked))
    places = {
        "stream": known.name,
        "positions": [position for position, _ in adoptable],
        "firsts": [first for _, first in adoptable],
    }
    connection.execute(compose(queries.ADOPT, name), places)
    found.adopted += len(adoptable)
    found.unknown += sum(anomaly.kind == "phantom" for anomaly in comparison.anomalies)
    found.highest = max(found.highest, highest)
    return info


async def _all_streams(jetstream: JetStream, connection: psycopg.Connection[TupleRow], name: str) -> list[_Place]:
    """The streams that the outbox knows, and those that it may have known since the backup: to be read as a whole."""
    known = _streams(connection, name)
    others = {row[0] for row in connection.execute(compose(queries.RECEIPT_STREAMS, name))}
    for (subject,) in connection.execute(compose(queries.PENDING_SUBJECTS, name)).fetchall():
        if subject_problem(subject) is None and (stream := await jetstream.stream_of(subject)) is not None:
            others.add(stream)
    others -= {each.name for each in known}
    return [*known, *(_Place(name=other, created="", last_sequence=0) for other in sorted(others))]


def _outbox_id(connection: psycopg.Connection[TupleRow], name: str) -> UUID:
    row = connection.execute(compose(queries.OUTBOX_ID, name)).fetchone()
    if row is None:
        raise Misconfigured(f"the table {name}.relay is empty", remedy="restore its row from a backup")
    return UUID(str(row[0]))


def _streams(connection: psycopg.Connection[TupleRow], name: str) -> list[_Place]:
    rows = connection.execute(compose(STREAMS, name))
    return [_Place(name=name, created=created, last_sequence=last) for name, created, _, last, *_ in rows]
