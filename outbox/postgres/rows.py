"""What the store reads and writes, as values: who leads and where, pages, and what one commit decides.

Pure: rows of psycopg become domain values here, and a transaction is a value only when it is whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any
from uuid import UUID

from psycopg.types.range import Range as NumberRange

from outbox.core.fence import Fence
from outbox.core.parts import PartRow, Settled
from outbox.core.positions import Range
from outbox.core.transaction import EVENT_OVERHEAD, NO_ROLLUPS, DeadReason, Receipt, Transaction, Verdict
from outbox.event import NO_HEADERS, Event


@dataclass(frozen=True, slots=True, kw_only=True)
class Home:
    """Where the database is: system identifier of its cluster, its oid in there, and the timeline of its history."""

    cluster: int
    database: int
    timeline: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lead:
    """What a new leader finds: its epoch, the outbox's id, the cursor and the open positions."""

    epoch: int
    outbox_id: UUID
    cursor: int
    open_positions: list[Range]
    home: Home
    moved: bool  # the database was promoted or restored since a leader last settled its streams
    careful: bool  # leaders have died here: one transaction at a time, until it is known which one they die of
    paused: str | None  # why an operator has paused the outbox; None if nobody has


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What operators want of the leader: positions of dead letters to retry, and why to pause; None: go on."""

    retried: list[Range]
    paused: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamRow:
    """What the outbox remembers of a stream. `last_sequence` is the last settled one; `plan` are positions.

    `fences` are those of the plan's heads, none of which is stored up to the sequence `since`; None where the plan is
    fenced by the last sequence of the stream. `sharing` is what other writers cost.
    """

    name: str
    created: str
    mode: str
    last_sequence: int
    plan: list[int]
    blocked: str | None = None
    since: int = 0
    fences: Sequence[Fence] | None = None
    sharing: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Transactions in commit order, and all positions that the page covers, settled ones included.

    `verdicts` are on those that are not whole: their events do not fit their count.
    """

    transactions: list[Transaction]
    positions: list[int]
    verdicts: list[Verdict]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decisions:
    """What one commit writes: how far was read, the receipts and verdicts, and the plan of each changed stream.

    Receipts and verdicts are on whole transactions; those on parts are in `parts`.
    """

    cursor: int
    open_positions: Sequence[Range]
    receipts: Sequence[Receipt]
    verdicts: Sequence[Verdict]
    streams: Sequence[StreamRow]
    blocked: str | None
    retried: Sequence[Range] = ()  # dead letters that are among the open positions now
    sound: bool = False  # the leader has shown that it lives
    parts: Settled | None = None


def read_page(rows: Sequence[tuple[Any, ...]], name: str) -> Page:
    """A page from the rows of PAGE or PLANNED, of the schema of this name."""
    transactions: list[Transaction] = []
    verdicts: list[Verdict] = []
    positions: list[int] = []
    start, total = 0, len(rows)
    places, counts, replayed, ids, subjects, headers, payloads = zip(*rows, strict=True) if rows else [()] * 7
    plain = not any(headers)
    sizes = [0, *accumulate(len(each) if each else 0 for each in payloads)]
    while start < total:
        position, count, replay_of = places[start], counts[start], replayed[start]
        end = start + count
        if end > total or places[end - 1] != position or (end < total and places[end] == position):
            # Settled, or not whole: as many rows as there are.
            end = start + 1
            while end < total and places[end] == position:
                end += 1
        positions.append(position)
        if replay_of is not None:
            found = end - start if ids[start] is not None else 0
            if found != count:
                verdicts.append(_not_whole(position, count, found, name))
                start = end
                continue
            columns = ids[start:end], subjects[start:end], payloads[start:end]
            if plain or not any(headers[start:end]):
                size = EVENT_OVERHEAD * count + sizes[end] - sizes[start]
                transactions.append(Transaction(position, *columns, (), count, size, replay_of, NO_ROLLUPS))
            else:
                given = [_decoded(each) if each else NO_HEADERS for each in headers[start:end]]
                events = list(map(Event, *columns, given))
                transactions.append(Transaction.of(position, events, replay_of))
        start = end
    return Page(transactions=transactions, positions=positions, verdicts=verdicts)


def read_parts(rows: Iterable[tuple[Any, ...]]) -> dict[int, list[PartRow]]:
    """The parts of transactions by position, from the rows of PARTS_OF."""
    found: dict[int, list[tuple[Any, ...]]] = {}
    for row in rows:
        found.setdefault(row[0], []).append(row)
    return {
        position: [
            PartRow(
                position=position,
                part=part,
                parts=len(parts),
                stream=stream,
                numbers=numbers,
                others=frozenset(other[2] for other in parts) - {stream},
                open=still_open,
                moves=moves,
                last_message_id=last or "",
            )
            for _, part, stream, numbers, still_open, moves, last in parts
        ]
        for position, parts in found.items()
    }


def _decoded(headers: str) -> Any:
    """Headers as an object of Python; None, which is invalid, for what jsonb can hold and Python will not read."""
    try:
        return json.loads(headers)
    except (ValueError, RecursionError):  # a number of more than 4,300 digits, or a thousand brackets
        return None


def _not_whole(position: int, count: int, found: int, name: str) -> Verdict:
    """It is never published in part, and it holds nobody up. One more is read than are counted, and not more."""
    detail = f"{count} events are counted, but {'only ' if found < count else ''}{found} are in {name}.events"
    return Verdict(position=position, reason=DeadReason.WRONG_COUNT, detail=detail)


def multirange(ranges: Sequence[Range]) -> str:
    """Ranges as PostgreSQL reads an int8multirange."""
    return "{" + ",".join(f"[{low},{high}]" for low, high in ranges) + "}"


def written_fences(fences: Sequence[Fence] | None) -> str | None:
    """Fences as PostgreSQL reads them."""
    if fences is None:
        return None
    return json.dumps({each.position: [each.subject, each.sequence] for each in fences})


def read_fences(found: Mapping[str, Any] | None) -> list[Fence] | None:
    """Fences as they come back."""
    if found is None:
        return None
    return [Fence(position=int(p), subject=subject, sequence=last) for p, (subject, last) in found.items()]


def array(numbers: Iterable[int]) -> str:
    """Numbers as PostgreSQL reads an array."""
    return "{" + ",".join(map(str, numbers)) + "}"


def ranges(positions: list[int]) -> str:
    """Positions, in their order, as PostgreSQL reads an array of int8range: those that follow each other joined."""
    # A plan is written with every commit, and is one run nearly always: that is told without walking it.
    if positions and positions[-1] - positions[0] == len(positions) - 1 and positions == sorted(positions):
        return f'{{"[{positions[0]},{positions[-1] + 1})"}}'
    runs: list[list[int]] = []
    for position in positions:
        if runs and runs[-1][1] == position:
            runs[-1][1] = position + 1
        else:
            runs.append([position, position + 1])
    return "{" + ",".join(f'"[{low},{high})"' for low, high in runs) + "}"


def places(found: Iterable[NumberRange[int]]) -> list[int]:
    """The positions of `ranges`, as they come back."""
    return [position for each in found for position in range(each.lower or 0, each.upper or 0)]
