"""`outbox verify`, and what `outbox rebase` adopts: a stream read message by message beside the outbox's database.

Reads only, on both sides; how a stream is read is known to `outbox.jetstream.reader`. What is wrong is decided in
`outbox.core.comparison`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import TypeVar

import psycopg
from psycopg.rows import TupleRow

from outbox.config import Settings
from outbox.core.chain import SHARED
from outbox.core.comparison import Comparison, Row
from outbox.core.outcome import STREAM_NOT_FOUND
from outbox.core.positions import HIGHEST
from outbox.core.requirements import Counters, of_counters
from outbox.errors import Misconfigured
from outbox.jetstream.client import JetStream, Refused, connected
from outbox.jetstream.reader import pages
from outbox.jetstream.stream import Message, StreamInfo, seen
from outbox.operate import queries
from outbox.postgres.queries import COUNTERS, STREAMS, compose
from outbox.postgres.session import step, stepping_session

T = TypeVar("T")
END_SECONDS = 1.0
DIGEST_BYTES = 32
_row = partial(tuple.__new__, Row)  # of a tuple, without a call in Python
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
            blank = partial(
                Comparison,
                outbox_id=str(outbox_id),
                former=frozenset(map(str, former)),
                gone=frozenset(name for name, info in infos.items() if info is None),
            )
            look = partial(_compared, jetstream, outbox, positions, progress, bounded=bounded)
            compared = [await look(partial(blank, stream=n, shared=shared)) for n, shared in streams.items()]
            nowhere = Comparison(outbox_id=str(outbox_id), stream="")
            if stream is None:
                counters = Counters(*outbox.one(COUNTERS))._replace(stranded=None)
                problems = (each.line for each in of_counters(counters))
                nowhere.unreconciled(problems, outbox.stranded(*positions))
            return [*compared, nowhere] if nowhere.anomalies else compared


async def _compared(
    jetstream: JetStream,
    outbox: _Outbox,
    positions: tuple[int, int],
    progress: Progress,
    blank: Callable[[], Comparison],
    *,
    bounded: bool,
) -> Comparison:
    """One stream beside its receipts; once more if it is deleted or made again meanwhile."""
    while True:
        comparison = blank()
        info = await jetstream.stream(comparison.stream)
        if info is None:
            comparison.count_gone(outbox.receipts(*positions), meant=comparison.stream in outbox.retired)
            return comparison
        low, high = info.first_sequence, info.last_sequence
        if bounded:
            bounds = dict(zip(("from", "to"), positions, strict=True))
            least, most = outbox.one(queries.SENT_RANGE, stream=comparison.stream, **bounds)
            low, high = max(low, least or high + 1), min(high, most or 0)
        try:
            await read(jetstream, outbox.rows, comparison, info, (low, high), progress)
        except Refused as refused:
            if refused.code != STREAM_NOT_FOUND:
                raise
        comparison.recheck(outbox.rows(comparison.unmarked), outbox.one(queries.EXTENT)[2], high)
        for receipts in chain(outbox.receipts(*positions), [[]]):
            end = await jetstream.stream(comparison.stream)
            if end is None or end.created != info.created:
                break
            comparison.confirm(receipts, first=low, last=high, end=end.last_sequence)
        else:
            return comparison


async def read(
    jetstream: JetStream,
    rows: Callable[[Sequence[int]], dict[int, Row]],
    comparison: Comparison,
    info: StreamInfo,
    places: tuple[int, int],
    progress: Progress = no_progress,
) -> None:
    """Take the messages at these places into the comparison.

    While the database looks a page's transactions up, in a thread, the one before is compared and the next one read.
    """
    low, high = places

    def take(page: _Page) -> None:
        page.take(comparison)
        if page.end >= low:
            progress(info.name, page.end + 1 - low, high + 1 - low)

    looking = _Page(end=low - 1)
    try:
        async with contextlib.aclosing(pages(jetstream, info, low, high)) as found:
            async for messages, end in found:
                page = _Page(end=end, messages=messages)
                await looking.known()
                page.look_up(rows)
                take(looking)
                looking = page
        await looking.known()
    finally:
        await looking.ended()
    take(looking)


class _Page:
    """Some messages, and whose they are; then what the database knows of their transactions."""

    def __init__(self, *, end: int, messages: Sequence[Message] = ()) -> None:
        self.end = end
        self._seen = {each.sequence: seen(each) for each in messages}
        self._payloads = {each.sequence: each.payload for each in messages}
        self._rows: asyncio.Future[dict[int, Row]] | None = None

    def look_up(self, rows: Callable[[Sequence[int]], dict[int, Row]]) -> None:
        """Ask the database, in a thread; one page at a time."""
        positions = sorted({each.position for each in self._seen.values() if each.position is not None})
        if positions:
            self._rows = asyncio.ensure_future(asyncio.to_thread(rows, positions))

    async def known(self) -> None:
        """Wait until the database has answered."""
        if self._rows is not None:
            await asyncio.shield(self._rows)

    async def ended(self) -> None:
        """Leave the connection to nobody who still uses it, unless that takes long."""
        if self._rows is not None:
            await asyncio.wait({self._rows}, timeout=END_SECONDS)

    def take(self, comparison: Comparison) -> None:
        """Compare."""
        comparison.take(self._seen, self._rows.result() if self._rows else {}, self._payloads)


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
                yield [_row((position, (), (), False, *receipt, 0, ())) for position, *receipt in rows]

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
    # In binary, and one value for all events: arrays and hexadecimal digits take several times as long.
    found = connection.cursor(binary=True).execute(compose(queries.KNOWN, name), {"positions": list(positions)})
    rows: dict[int, Row] = {
        position: _row(
            (position, (ids or "").split(), _parted(digests or b""), dead, stream, first or 0, last or 0, 0, ())
        )
        for position, ids, digests, dead, stream, first, last in found.fetchall()
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
            rows[position] = whole._replace(parts=(*whole.parts, part))
    return rows


def _parted(digests: bytes) -> list[bytes]:
    return [digests[begin : begin + DIGEST_BYTES] for begin in range(0, len(digests), DIGEST_BYTES)]


def _picked(each: Sequence[T], numbers: Sequence[int]) -> Sequence[T]:
    """Those with these numbers, from 1 on, as far as there are any."""
    return [each[number - 1] for number in numbers if number <= len(each)]
