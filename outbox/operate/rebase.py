"""`outbox rebase`: after a halt, take a database or a stream as it is now, by an operator's order.

What the database does not know as sent and the stream holds whole is adopted: marked, and not sent again. Transactions
that the database has lost stay in the stream, under an outbox id or positions that never come again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import LiteralString
from uuid import UUID

import psycopg
from psycopg.rows import TupleRow

from outbox import schema
from outbox.config import Settings
from outbox.core.comparison import Comparison, Loose
from outbox.core.fence import removed
from outbox.core.transaction import DeadReason
from outbox.errors import Halt, Misconfigured
from outbox.event import matches, subject_problem
from outbox.jetstream.client import JetStream, connected
from outbox.jetstream.stream import StreamInfo
from outbox.operate import queries, txids
from outbox.operate.verify import Progress, known_rows, no_progress, read
from outbox.postgres.queries import STREAMS, WHOLE_SETTLED, compose
from outbox.postgres.rows import array
from outbox.postgres.session import command_session

WRITER_TRIES, WRITER_SECONDS, WRITER_PAUSE = 20, 0.3, 0.5
VACUUM_SECONDS = 1.2
LOCK_TRIES, LOCK_SECONDS = 50, 0.2  # a relay that a supervisor starts again and again holds the lock for moments


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebased:
    """What was found: `adopted` transactions were marked, `unknown` messages are of transactions nobody knows.

    `kept` is the position of a transaction that stays planned as it was: a former relay may have sent it.
    """

    outbox_id: UUID
    adopted: int
    unknown: int
    kept: int | None = None


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
    gone: list[str] = field(default_factory=list)
    parts: list[tuple[str, Loose]] = field(default_factory=list)  # by stream, that the database does not know


async def accept_stream(settings: Settings, stream: str) -> Rebased:
    """Accept a stream as it is now: what was planned for it and is not in it is sent again. Commits.

    Takes back one that was retired. Raises `Misconfigured` while a relay leads, or if the outbox does not know the
    stream, or if it does not exist.
    """
    return await _settle_stream(settings, stream, retire=False)


async def retire_stream(settings: Settings, stream: str) -> Rebased:
    """Forget a stream as a place to send to, which may be gone. Commits.

    What was planned for it and is not in it is pending again, to be sent where its subjects are by then; receipts stay.
    Open parts of transactions over several streams are dead letters. Raises `Misconfigured` while a relay leads, if the
    outbox does not know the stream, not even by receipts, or if it still takes what the outbox sends.
    """
    return await _settle_stream(settings, stream, retire=True)


async def _settle_stream(settings: Settings, stream: str, *, retire: bool) -> Rebased:
    name = settings.schema
    async with connected(settings) as jetstream:
        with command_session(settings.database_url) as connection:
            await _lock(connection, name)
            outbox_id = _outbox_id(connection, name)
            if retire:
                await _refuse_one_in_use(jetstream, connection, name, stream)
                connection.execute(compose(queries.KNOW_STREAM, name), {"name": stream})
            retired = () if retire else _streams(connection, name, queries.RETIRED)
            known = next((each for each in [*_streams(connection, name), *retired] if each.name == stream), None)
            if known is None:
                raise Misconfigured(f"the outbox does not know a stream {stream!r}", remedy="outbox status lists them")
            found = _Found()
            info = await _adopt(jetstream, connection, name, outbox_id, known, found)
            _adopt_unknown_parts(connection, name, found)
            if info is None and not retire:
                remedy = f"create it first, then accept it; or forget it: outbox rebase --stream {stream} --retire"
                raise Misconfigured(f"stream {stream} does not exist", remedy=remedy)
            same = info is not None and info.created == known.created and not retire
            head = None if not same else await _open_head(jetstream, connection, name, stream)
            settled = {
                "head": head,
                "name": stream,
                "created": info.created if info else known.created,
                "last": info.last_sequence if info else known.last_sequence,
                "retire": retire,
            }
            connection.execute(compose(queries.SETTLE_STREAM, name), settled)
            if retire:
                given = {"name": stream, "reason": str(DeadReason.STREAM_RETIRED)}
                gone = connection.execute(compose(queries.RETIRE_PARTS, name), given).fetchall()
                connection.execute(compose(WHOLE_SETTLED, name), {"positions": [position for (position,) in gone]})
            return Rebased(outbox_id=outbox_id, adopted=found.adopted, unknown=found.unknown, kept=head)


async def _open_head(
    jetstream: JetStream, connection: psycopg.Connection[TupleRow], name: str, stream: str
) -> int | None:
    """The planned transaction that an attempt of a former relay may still store; None if there is none.

    It is planned again as it was: a relay finds out by its fence. Not where what would tell is gone from the stream, or
    the stream has lost it: then the order is to send it again.
    """
    found = connection.execute(compose(queries.FENCED_HEAD, name), {"name": stream}).fetchone()
    info = await jetstream.stream(stream, deleted=True)
    if found is None or info is None:
        return None
    position, subject, sequence, since = found
    gone = removed(info.first_sequence, info.deleted, max(since, sequence))
    return None if gone or await jetstream.last_on(stream, subject) < sequence else position


async def _refuse_one_in_use(
    jetstream: JetStream, connection: psycopg.Connection[TupleRow], name: str, stream: str
) -> None:
    """A stream that takes the outbox's subjects would be met again at once, and halt the relay that forgot it."""
    info = await jetstream.stream(stream)
    if info is None:
        return
    for (subject,) in connection.execute(compose(queries.SUBJECTS, name), {"name": stream}):
        if any(matches(subject, each) for each in info.subjects):
            raise Misconfigured(
                f"stream {stream} still takes what the outbox sends, such as subject {subject}",
                remedy="give its subjects to another stream first (nats stream edit), or delete it; to go on with it "
                f"as it is: outbox rebase --stream {stream}",
            )


async def rebase(settings: Settings, *, read_back: bool = True, progress: Progress = no_progress) -> Rebased:
    """Take a restored, copied or moved database as the outbox's home, with a new id. Commits; blocks writers briefly.

    With `read_back` the streams are read from the last sequence that the database knows, so that nothing in them is
    sent again, and no position that they hold is drawn again, and those that are gone are retired; without, everything
    pending is sent. What is committed and pending behind the cursor is pending for the relay too from here on. Raises
    `Misconfigured` while a relay leads, or while writers cannot be locked out; what was done until then stays, and it
    can be run again.
    """
    name = settings.schema
    with command_session(settings.database_url) as connection:
        await _lock(connection, name)
        outbox_id = _outbox_id(connection, name)
        txids.move(settings.database_url, name, lambda done, total: progress("transaction ids", done, total))
        found = _Found()
        if read_back:
            async with connected(settings) as jetstream:
                for known in await _all_streams(jetstream, connection, name):
                    await _adopt(jetstream, connection, name, outbox_id, known, found, progress)
                _adopt_unknown_parts(connection, name, found)
        if shared := connection.execute(compose(queries.SHARED_TXIDS, name)).fetchone():
            raise Halt(f"two transactions have the id {shared[0]}", remedy="end every writer, and run it again")
        before = connection.execute(compose(queries.BEFORE_REBASE, name)).fetchall()[0]
        given = dict(zip(("behind", "event_id", "oldest"), before, strict=True), highest=found.highest, gone=found.gone)
        connection.execute(queries.BY_INDEX)
        await _lock_out_writers(connection, name)
        for statement in queries.REBASE:
            connection.execute(compose(statement, name), given)
        return Rebased(outbox_id=_outbox_id(connection, name), adopted=found.adopted, unknown=found.unknown)


async def _lock(connection: psycopg.Connection[TupleRow], name: str) -> None:
    """Keep relays from leading until the transaction ends."""
    keys = {"lock": schema.LEADER_LOCK, "key": schema.lock_key(name)}
    for _ in range(LOCK_TRIES):
        if connection.execute(compose(queries.LOCK_OUT_LEADERS, name), keys).fetchone() == (True,):
            return
        await asyncio.sleep(LOCK_SECONDS)
    raise Misconfigured("a relay leads this outbox", remedy="stop every relay of it first")


async def _lock_out_writers(connection: psycopg.Connection[TupleRow], name: str) -> None:
    """Wait for the end of those who write, a moment at a time: whoever wants to write meanwhile waits behind it."""
    seconds = WRITER_SECONDS
    holders: list[TupleRow] = []
    for _ in range(WRITER_TRIES):
        try:
            with connection.transaction():
                connection.execute(compose(queries.LOCK_TIMEOUT, name), {"milliseconds": int(seconds * 1000)})
                connection.execute(compose(queries.LOCK_OUT_WRITERS, name))
        except psycopg.errors.LockNotAvailable:
            holders = connection.execute(compose(queries.LOCK_HOLDERS, name)).fetchall() or holders
            # An autovacuum steps aside for who has waited for deadlock_timeout.
            seconds = VACUUM_SECONDS if any(vacuums for _, vacuums in holders) else WRITER_SECONDS
        else:
            return
        await asyncio.sleep(WRITER_PAUSE)
    who = ", ".join(who for who, _ in holders) or "somebody"
    raise Misconfigured(
        f"writers could not be locked out for a moment, as {who} did not end a transaction that wrote to the outbox",
        remedy="end it (COMMIT PREPARED or ROLLBACK PREPARED, pg_terminate_backend), then run it again",
    )


async def _adopt(
    jetstream: JetStream,
    connection: psycopg.Connection[TupleRow],
    name: str,
    outbox_id: UUID,
    known: _Place,
    found: _Found,
    progress: Progress = no_progress,
) -> StreamInfo | None:
    """Mark what the stream holds whole and the database has as pending; the stream as it is, or None if it is gone."""
    info = await jetstream.stream(known.name)
    if info is None:
        found.gone.append(known.name)
        return None
    same = info.created == known.created and info.last_sequence >= known.last_sequence
    comparison = Comparison(outbox_id=str(outbox_id), stream=known.name, shared=True, adopting=True)
    low = max(known.last_sequence + 1 if same else 1, info.first_sequence)
    await read(
        jetstream,
        lambda positions: known_rows(connection, name, positions),
        comparison,
        info,
        (low, info.last_sequence),
        progress,
    )
    adoptable = comparison.adoptable(known_rows(connection, name, comparison.unmarked))
    whole = [each for each in adoptable if not each[1]]
    places = {
        "stream": known.name,
        "positions": [position for position, _, _ in whole],
        "firsts": [first for _, _, first in whole],
    }
    connection.execute(compose(queries.ADOPT, name), places)
    if len(whole) < len(adoptable):
        positions, parts, firsts = map(list, zip(*(each for each in adoptable if each[1]), strict=True))
        given = {"stream": known.name, "positions": positions, "parts": parts, "firsts": firsts}
        connection.execute(compose(queries.ADOPT_PARTS, name), given)
        connection.execute(compose(WHOLE_SETTLED, name), {"positions": positions})
    found.adopted += len(adoptable)
    found.unknown += comparison.phantoms
    found.highest = max(found.highest, comparison.highest)
    found.parts += [(known.name, each) for each in comparison.loose]
    return info


def _adopt_unknown_parts(connection: psycopg.Connection[TupleRow], name: str, found: _Found) -> None:
    """Write down parts that were stored after the backup was made, and leave what else their transactions have."""
    parts: dict[tuple[int, int, str], list[Loose]] = {}
    for stream, each in found.parts:
        parts.setdefault((each.position, each.part, stream), []).append(each)
    parts = {which: messages for which, messages in parts.items() if _is_whole(messages)}
    if not parts:
        return
    given = {
        "positions": [position for position, _, _ in parts],
        "parts": [part for _, part, _ in parts],
        "streams": [stream for _, _, stream in parts],
        "numbers": [array(each.number for each in messages) for messages in parts.values()],
        "firsts": [messages[0].sequence for messages in parts.values()],
    }
    found.adopted += len(parts)
    for statement in (queries.FOUND_PARTS, queries.LEFT_PARTS, WHOLE_SETTLED):
        connection.execute(compose(statement, name), given)


def _is_whole(messages: Sequence[Loose]) -> bool:
    """True if these are all messages of a part, one behind the other."""
    first = messages[0]
    return [each.sequence for each in messages] == list(range(first.sequence, first.sequence + first.messages))


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


def _streams(connection: psycopg.Connection[TupleRow], name: str, query: LiteralString = STREAMS) -> list[_Place]:
    rows = connection.execute(compose(query, name))
    return [_Place(name=name, created=created, last_sequence=last) for name, created, _, last, *_ in rows]
