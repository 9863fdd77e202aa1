"""`outbox verify`, and what `outbox rebase` adopts: a stream read message by message beside the outbox's database.

Reads only, on both sides: messages one by one from the stream's leader, no consumer (on a work queue a consumer would
remove what it reads). What is wrong is decided in `outbox.core.comparison`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import psycopg
from psycopg.rows import TupleRow

from outbox.config import Settings
from outbox.core.chain import SHARED
from outbox.core.comparison import Comparison, Row
from outbox.core.positions import HIGHEST
from outbox.core.requirements import Counters, of_counters
from outbox.errors import Misconfigured
from outbox.jetstream.client import JetStream, connected
from outbox.jetstream.stream import StreamInfo
from outbox.operate import queries
from outbox.postgres.queries import COUNTERS, STREAMS, compose
from outbox.postgres.session import step, stepping_session

T = TypeVar("T")
READ_AT_ONCE = 512
Progress = Callable[[str, int, int], None]  # stream, messages read, messages in all


def no_progress(stream: str, done: int, total: int) -> None:
    """The progress that nobody looks at."""


async def verify(
    settings: Settings,
    *,
    first: int = 1,
    last: int = HIGHEST,
    stream: str | None = None,
    progress: Progress = no_progress,
) -> list[Comparison]:
    """Compare the transactions from position `first` to `last` with every stream they are in, or with one.

    Without bounds the whole of each stream is read, so that what nobody knows of is found too. What no relay could
    reconcile comes last, as the comparison with a stream without a name. Works while relays and writers are at work.
    Raises `Misconfigured` if a stream is unknown, `Weather` if a server cannot be reached.
    """
    bounded = first > 1 or last < HIGHEST
    async with connected(settings) as jetstream:
        with stepping_session(settings.database_url, reads=True) as connection:
            outbox = _Outbox(connection, settings.schema)
            outbox_id, former, _, highest = outbox.one(queries.EXTENT)
            positions = first, min(last, highest)
            streams = outbox.streams(stream)
            infos = {name: await jetstream.stream(name) for name in outbox.streams(None)}
            gone = frozenset(name for name, info in infos.items() if info is None)
            compared = []
            for name, shared in streams.items():
                comparison = Comparison(
                    outbox_id=str(outbox_id),
                    former=frozenset(map(str, former)),
                    gone=gone,
                    stream=name,
                    shared=shared,
                )
                if (info := infos[name]) is not None:
                    await _compare(jetstream, outbox, comparison, info, positions, progress, bounded=bounded)
                else:
                    comparison.count_gone(outbox.receipts(*positions), meant=name in outbox.retired)
                compared.append(comparison)
            nowhere = Comparison(outbox_id=str(outbox_id), stream="")
            if stream is None:
                counters = Counters(*outbox.one(COUNTERS))._replace(stranded=None)
                problems = (each.line for each in of_counters(counters))
                nowhere.unreconciled(problems, outbox.stranded(*positions))
            return [*compared, nowhere] if nowhere.anomalies else compared


async def _compare(
    jetstream: JetStream,
    outbox: _Outbox,
    comparison: Comparison,
    info: StreamInfo,
    positions: tuple[int, int],
    progress: Progress,
    *,
    bounded: bool,
) -> None:
    """Compare one stream, message by message and receipt by receipt."""
    low, high = info.first_sequence, info.last_sequence
    if bounded:
        bounds = dict(zip(("from", "to"), positions, strict=True))
        least, most = outbox.one(queries.SENT_RANGE, stream=comparison.stream, **bounds)
        low, high = max(low, least or high + 1), min(high, most or 0)
    await read(jetstream, outbox.rows, comparison, low, high, progress)
    comparison.recheck(outbox.rows(comparison.unmarked), outbox.one(queries.EXTENT)[2], high)
    for receipts in outbox.receipts(*positions):
        end = await jetstream.stream(comparison.stream)
        comparison.confirm(receipts, first=low, last=high, end=end.last_sequence if end else high)


async def read(
    jetstream: JetStream,
    rows: Callable[[Sequence[int]], dict[int, Row]],
    comparison: Comparison,
    low: int,
    high: int,
    progress: Progress = no_progress,
) -> int:
    """Take the messages from `low` to `high` into the comparison; the highest position that this outbox has there."""
    highest = 0
    for start in range(low, high + 1, READ_AT_ONCE):
        end = min(start + READ_AT_ONCE, high + 1)
        seen = await jetstream.read(comparison.stream, range(start, end))
        positions = {each.position for each in seen.values() if each is not None and each.position is not None}
        comparison.take(seen, rows(sorted(positions)))
        ours = [each.position for each in seen.values() if each is not None and comparison.knows(each.outbox_id)]
        highest = max([highest, *(position for position in ours if position is not None)])
        progress(comparison.stream, end - low, high + 1 - low)
    return highest


class _Outbox:
    """The database's side; every statement reads what is committed at that moment."""

    def __init__(self, connection: psycopg.Connection[TupleRow], name: str) -> None:
        self._connection, self._name = connection, name
        self.retired = {name for name, *_ in self._all(queries.RETIRED)}

    def one(self, query: str, **parameters: object) -> TupleRow:
        return self._all(query, **parameters)[0]

    def streams(self, only: str | None) -> dict[str, bool]:
        """Each stream that the outbox knows, or has known by a receipt, or one; and whether others may write there."""
        known = {name: mode == SHARED for name, _, mode, *_ in self._all(STREAMS)}
        known |= {name: True for (name,) in self._all(queries.RECEIPT_STREAMS) if name not in known}
        known |= dict.fromkeys(self.retired - set(known), True)
        if only is not None and only not in known:
            raise Misconfigured(f"the outbox does not know a stream {only!r}", remedy="outbox status lists them")
        return {name: shared for name, shared in known.items() if only in (None, name)}

    def rows(self, positions: Sequence[int]) -> dict[int, Row]:
        with step(self._connection):
            return known_rows(self._connection, self._name, positions)

    def receipts(self, first: int, to: int) -> Iterator[list[Row]]:
        """The receipts of these positions, a page at a time."""
        for query in (queries.RECEIPTS, queries.RECEIPTS_OF_PARTS):
            for rows in self._pages(query, first, to):
                yield [Row(position=p, message_ids=(), stream=s, first=low, last=high) for p, s, low, high in rows]

    def stranded(self, first: int, to: int) -> Iterator[int]:
        """Those of these positions that are pending, and that no relay looks at."""
        return (position for rows in self._pages(queries.STRANDED, first, to) for (position,) in rows)

    def _pages(self, query: str, first: int, to: int) -> Iterator[list[TupleRow]]:
        after = first - 1
        while rows := self._all(query, after=after, to=to):
            yield rows
            after = rows[-1][0]

    def _all(self, query: str, **parameters: object) -> list[TupleRow]:
        with step(self._connection):
            return self._connection.execute(compose(query, self._name), parameters).fetchall()


def known_rows(connection: psycopg.Connection[TupleRow], name: str, positions: Sequence[int]) -> dict[int, Row]:
    """These transactions as the database has them now, as far as it has them."""
    found = connection.execute(compose(queries.KNOWN, name), {"positions": list(positions)}).fetchall()
    rows = {
        position: Row(
            position=position,
            message_ids=ids or (),
            digests=digests or (),
            dead=dead,
            stream=stream,
            first=first or 0,
            last=last or 0,
        )
        for position, ids, digests, dead, stream, first, last in found
    }
    if parted := [position for position, row in rows.items() if row.stream in (None, "*")]:
        parts = connection.execute(compose(queries.KNOWN_PARTS, name), {"positions": parted}).fetchall()
        for position, number, numbers, dead, stream, first, last in parts:
            whole = rows[position]
            part = Row(
                position=position,
                part=number,
                message_ids=_picked(whole.message_ids, numbers),
                digests=_picked(whole.digests, numbers),
                dead=dead,
                stream=stream,
                first=first or 0,
                last=last or 0,
            )
            rows[position] = replace(whole, parts=(*whole.parts, part))
    return rows


def _picked(each: Sequence[T], numbers: Sequence[int]) -> Sequence[T]:
    """Those with these numbers, from 1 on, as far as there are any."""
    return [each[number - 1] for number in numbers if number <= len(each)]
