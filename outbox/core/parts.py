"""The parts of a transaction over several streams: how it is split, and which parts the leader has in hand.

Pure. The split is decided once, and from then on its rows say which events go together. Within a lane a part is a
transaction like any other. The one danger is to take a part twice: its position may be planned for one stream and open
for another at once, so a part is taken only if its row is open and the leader does not hold it. See decision 13.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from outbox.core.plan import Planned
from outbox.core.transaction import DeadReason, Receipt, Transaction, Verdict
from outbox.errors import Halt


@dataclass(frozen=True, slots=True, kw_only=True)
class PartRow:
    """Part `part` of `parts` of the transaction at a position: its events by their numbers there, from 1 on.

    `others` are the streams of its other parts. `open` says that it is neither sent nor dead; `moves` that it goes
    where its subjects are by now, as it was retried when nothing of its transaction was open.
    """

    position: int
    part: int
    parts: int
    stream: str
    numbers: Sequence[int]
    others: frozenset[str]
    open: bool = True
    moves: bool = False
    last_message_id: str = ""


@dataclass(slots=True)
class Part(Transaction):
    """What of a transaction goes to one stream: its place in the order, and its own events alone."""

    row: PartRow

    @classmethod
    def carved(cls, whole: Transaction, row: PartRow) -> Part:
        """The part of `whole` that this row is."""
        events = list(whole.events)
        own = Transaction.of(whole.position, [events[number - 1] for number in row.numbers], whole.replay_of)
        columns = own.message_ids, own.subjects, own.payloads, own.headers
        return cls(own.position, *columns, own.count, own.size, own.replay_of, own.rollups, row)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """What a commit writes of parts: rows that are new or have another stream, receipts by part, and verdicts."""

    rows: Sequence[PartRow] = ()
    receipts: Sequence[tuple[int, Receipt]] = ()
    verdicts: Sequence[Verdict] = ()

    def __bool__(self) -> bool:
        return bool(self.rows or self.receipts or self.verdicts)


class Progress(NamedTuple):
    """What a lane has come to since the last commit; `planned` are the positions that it has planned."""

    stream: str
    receipts: Sequence[Receipt]
    verdicts: Sequence[Verdict]
    planned: Iterable[int]


def split(whole: Transaction, streams: Mapping[str, str | None]) -> list[Part]:
    """The parts of a transaction whose subjects belong to these streams, in the order in which these occur first."""
    numbers: dict[str, list[int]] = defaultdict(list)
    for number, subject in enumerate(whole.subjects, start=1):
        numbers[streams[subject] or ""].append(number)
    return [
        Part.carved(
            whole,
            PartRow(
                position=whole.position,
                part=part,
                parts=len(numbers),
                stream=stream,
                numbers=mine,
                others=frozenset(numbers) - {stream},
            ),
        )
        for part, (stream, mine) in enumerate(numbers.items(), start=1)
    ]


def on_part(verdict: Verdict, row: PartRow, *, whole: bool = False) -> Verdict:
    """The verdict on this part; or on the `whole` transaction, for the sake of this part."""
    detail = f"part {row.part} of {row.parts}, for stream {row.stream}: {verdict.detail}"
    return replace(verdict, detail=detail, part=0 if whole else row.part)


@dataclass(slots=True)
class Parts:
    """The parts that the leader holds: from when they are read, or restored, until the commit that settles them."""

    _held: dict[int, dict[int, PartRow]] = field(default_factory=dict)  # by position and part
    _unwritten: dict[int, dict[int, PartRow]] = field(default_factory=dict)  # rows that go with the next plan

    def __bool__(self) -> bool:
        return bool(self._held)

    def __contains__(self, position: int) -> bool:
        return position in self._held

    def row(self, position: int, stream: str) -> PartRow | None:
        """The part of this transaction that is held for this stream; None if there is none."""
        return next((row for row in self._held.get(position, {}).values() if row.stream == stream), None)

    def join(self, parts: Sequence[Part]) -> None:
        """A transaction was split: its rows are to be written with the first plan that has one of them."""
        self._hold(part.row for part in parts)
        self._unwritten[parts[0].position] = {part.row.part: part.row for part in parts}

    def take(self, whole: Transaction, rows: Sequence[PartRow]) -> list[Part]:
        """What is to be sent of a transaction that was read and has these rows now: what is open and not held."""
        return [Part.carved(whole, row) for row in self._free(rows)]

    def condemn(self, verdict: Verdict, rows: Sequence[PartRow]) -> list[Verdict]:
        """A verdict on a transaction with these rows, on each of its parts that is open and not held."""
        return [on_part(verdict, row) for row in self._free(rows)]

    def _free(self, rows: Sequence[PartRow]) -> list[PartRow]:
        free = [row for row in rows if row.open and row.part not in self._held.get(row.position, {})]
        self._hold(free)
        return free

    def misplaced(self, part: Part, stream: str) -> Verdict | None:
        """Why a part cannot go to the stream where its subjects are by now; or None."""
        held = self._held.get(part.position, {}).values()
        moved = {row.stream for row in held if row.part != part.row.part}
        if stream not in part.row.others | moved:
            return None
        detail = f"its subjects are in stream {stream} by now, which has another part of the transaction"
        return Verdict(position=part.position, reason=DeadReason.SPANS_STREAMS, detail=detail)

    def move(self, part: Part, stream: str) -> None:
        """A part that moves goes to the stream where its subjects are, which is written with a plan."""
        if stream == part.row.stream:
            return
        part.row = replace(part.row, stream=stream)
        self._hold([part.row])
        self._unwritten.setdefault(part.position, {})[part.row.part] = part.row

    def restore(self, plan: Sequence[Planned], stream: str, rows: Mapping[int, Sequence[PartRow]]) -> Sequence[Planned]:
        """A former leader's plan for a stream, with the part that is planned in place of a whole transaction.

        Raises `Halt` where that part is not open.
        """
        if not rows:
            return plan
        planned = []
        for entry in plan:
            row = next((row for row in rows.get(entry.position, ()) if row.stream == stream and row.open), None)
            if row is None and entry.position in rows:
                raise Halt(
                    f"transaction {entry.position} is in the plan of stream {stream}, but its part there is not open",
                    remedy=f"look at position {entry.position} in the table parts: who changed it?",
                )
            if row is None:
                planned.append(entry)
            else:
                self._hold([row])
                planned.append(
                    replace(entry, count=len(row.numbers), last_message_id=row.last_message_id, part=row.part)
                )
        return planned

    def loaded(self, transactions: Sequence[Transaction], stream: str) -> Sequence[Transaction]:
        """Transactions of this stream's plan that were read, with the parts in their place."""
        if not self._held:
            return transactions
        return [
            Part.carved(each, row) if (row := self.row(each.position, stream)) is not None else each
            for each in transactions
        ]

    def settle(self, lanes: Iterable[Progress]) -> tuple[list[Receipt], list[Verdict], Settled]:
        """What lanes have come to, divided: receipts and verdicts of whole transactions, and what is of parts.

        With the first part that is planned the rows of all are written.
        """
        receipts: list[Receipt] = []
        verdicts: list[Verdict] = []
        sent: list[tuple[int, Receipt]] = []
        condemned: list[Verdict] = []
        rows: dict[tuple[int, int], PartRow] = {}
        for lane in lanes:
            for receipt in lane.receipts:
                if (row := self.row(receipt.position, lane.stream)) is None:
                    receipts.append(receipt)
                else:
                    sent.append((row.part, receipt))
            for verdict in lane.verdicts:
                if (row := self.row(verdict.position, lane.stream)) is not None:
                    condemned.append(on_part(verdict, row))
                else:
                    (condemned if verdict.part else verdicts).append(verdict)
            for position in self._unwritten and lane.planned:
                rows |= {(position, row.part): row for row in self._unwritten.get(position, {}).values()}
        return receipts, verdicts, Settled(rows=list(rows.values()), receipts=sent, verdicts=condemned)

    def written(self, settled: Settled) -> None:
        """It is committed."""
        for row in settled.rows:
            self._unwritten.pop(row.position, None)
        for part, receipt in settled.receipts:
            self._let_go(receipt.position, part)
        for verdict in settled.verdicts:
            self._let_go(verdict.position, verdict.part)

    def _hold(self, rows: Iterable[PartRow]) -> None:
        for row in rows:
            self._held.setdefault(row.position, {})[row.part] = row

    def _let_go(self, position: int, part: int) -> None:
        held = self._held.get(position, {})
        held.pop(part, None)
        if not held:
            self._held.pop(position, None)
