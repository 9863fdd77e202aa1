"""What a stream holds, compared with what the outbox's database knows: message by message, transaction by transaction.

Pure. The one place that says what missing, duplicated, split, phantom and misplaced mean: `outbox verify`, `outbox
rebase` and the fault tests all stand on it. Messages are taken in by sequence, each with the transaction that it names;
memory grows with what is wrong, not with the stream.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
from typing import NamedTuple

from outbox.core.plan import Seen
from outbox.core.positions import Range, merged

UNKNOWN = "the database has no such transaction"
STRANDED = "committed and pending, and behind all that a relay looks at; remedy: outbox rebase"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A transaction as the database has it; `stream` to `last` are its receipt. Digests are of subject and payload.

    Where it is sent to several streams its `parts` are rows, too, with the number of the `part`, and have the receipts.
    """

    position: int
    message_ids: Sequence[str]
    digests: Sequence[bytes | None] = ()
    dead: bool = False
    stream: str | None = None
    first: int = 0
    last: int = 0
    part: int = 0
    parts: Sequence[Row] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Anomaly:
    """Something that is promised not to be."""

    kind: str
    position: int | None
    sequence: int | None
    what: str


class Loose(NamedTuple):
    """A message of a part that the database does not know: event `number` of the transaction at this position.

    The part has so many `messages`.
    """

    position: int
    part: int
    number: int
    messages: int
    sequence: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a comparison came to: counts of transactions and of messages, as `Comparison` has them, and anomalies."""

    stream: str
    transactions: int
    messages: int
    foreign: int
    replayed: int
    removed: int
    unknown: int
    anomalies: list[Anomaly]


@dataclass(slots=True, kw_only=True)
class Comparison:
    """One stream against the outbox. Call `take` for its messages in order, then `recheck`, then `confirm`.

    A message is of this outbox by its `Outbox-Id`; `adopting`, also by its message id, subject and payload, since a
    backup may be older than an id that the outbox had. Others may write to a `shared` stream; in any other a foreign
    message is an anomaly. `removed` counts messages that the stream itself has removed (limits, rollup, purge, a work
    queue), `unknown` those whose transaction was purged, or that have one of the `former` ids that the outbox had, and
    were not in the database that was restored. `loose` are messages of parts that a backup is too old to know.
    """

    outbox_id: str
    stream: str
    former: frozenset[str] = frozenset()
    gone: frozenset[str] = frozenset()
    adopting: bool = False
    shared: bool = False
    anomalies: list[Anomaly] = field(default_factory=list)
    messages: int = 0
    transactions: int = 0
    foreign: int = 0
    replayed: int = 0
    removed: int = 0
    unknown: int = 0
    loose: list[Loose] = field(default_factory=list)
    _good: list[Range] = field(default_factory=list)
    _other: list[Range] = field(default_factory=list)
    # By position and part.
    _unmarked: dict[tuple[int, int], list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))

    def take(self, seen: Mapping[int, Seen | None], rows: Mapping[int, Row]) -> None:
        """Compare the next messages, by sequence, with the transactions that they name, as far as there are any."""
        for sequence, message in seen.items():
            if message is None:
                continue
            self.messages += 1
            self.replayed += message.replayed and self.knows(message.outbox_id)
            row = _row(rows, message.position, message.part)
            if self._is_good(sequence, message, row):
                _extend(self._good, sequence)
            elif self._judge(sequence, message, row):
                _extend(self._other, sequence)

    def knows(self, outbox_id: str | None) -> bool:
        """True if this is or was the id of the outbox."""
        return outbox_id == self.outbox_id or outbox_id in self.former

    def _is_good(self, sequence: int, message: Seen, row: Row | None) -> bool:
        if row is None or row.stream != self.stream or not self._is_ours(message, row) or not _is_of(message, row):
            return False
        return sequence == row.first + (message.number or 0) - 1

    def _is_ours(self, message: Seen, row: Row | None) -> bool:
        return self.knows(message.outbox_id) or (self.adopting and row is not None and _is_of(message, row))

    def _judge(self, sequence: int, message: Seen, row: Row | None) -> bool:
        """Say what is wrong with a message; False if that cannot be said yet, because its transaction is not marked."""
        position = message.position
        if position is None or not (self.knows(message.outbox_id) or self._is_ours(message, row)):
            self.foreign += 1
            if not self.shared:
                self._add("foreign", None, sequence, "a message of somebody else, in a stream of the relay alone")
        elif message.outbox_id != self.outbox_id and (row is None or not _is_of(message, row)):
            self.unknown += 1
        elif row is None:
            self._add("phantom", position, sequence, UNKNOWN)
        elif self.adopting and _is_loose(message, row):
            number = row.message_ids.index(message.message_id or "") + 1
            self.loose.append(Loose(position, message.part or 0, number, message.count or 0, sequence))
        elif not _is_of(message, row):
            self._add("phantom", position, sequence, f"event {message.number} of {message.count} was not committed so")
        elif row.stream is None:
            self._unmarked[position, message.part or 0].append((message.number or 0, sequence))
            return False
        elif row.stream in self.gone:
            pass  # a copy of a stream that is gone, such as its mirror, has what was sent there
        else:
            self._add("duplicated", position, sequence, f"its receipt says {row.first} to {row.last} of {row.stream}")
        return True

    @property
    def unmarked(self) -> list[int]:
        """Positions that are in the stream and were not marked when they were looked up."""
        return sorted({position for position, _ in self._unmarked})

    def recheck(self, rows: Mapping[int, Row], purged: int, last: int) -> None:
        """Judge the unmarked ones by what the database says of them now: a relay at work has marked them meanwhile.

        Up to the position `purged` transactions may have been deleted, with their receipts. The stream was read up to
        `last`: a transaction whose beginning is there may go on behind it.
        """
        for (position, part), found in sorted(self._unmarked.items()):
            places = [(place, place) for _, place in found]
            problem = self._problem(_row(rows, position, part), found, last)
            if problem is None:
                self._good += places
            else:
                self._other = merged([*self._other, *places])
                self._add(problem[0], position, found[0][1], problem[1])
        self._good = merged(self._good)
        known = [each for each in self.anomalies if each.what != UNKNOWN or (each.position or 0) > purged]
        self.unknown, self.anomalies = self.unknown + len(self.anomalies) - len(known), known

    def _problem(self, row: Row | None, found: list[tuple[int, int]], last: int) -> tuple[str, str] | None:
        """What is wrong with a transaction of which these numbers and sequences were found, unmarked; or None."""
        if row is None:
            return None  # it was purged meanwhile
        if row.dead:
            return "phantom", "it is a dead letter, and yet stored"
        first = row.first if row.stream == self.stream else found[0][1]
        ends = len(found) == len(row.message_ids) or found[-1][1] == last
        if found == _whole(row, first)[: len(found)] and ends and row.stream in (None, self.stream):
            return None
        if row.stream is not None:
            return "duplicated", f"its receipt begins at {row.first} of {row.stream}"
        numbers = [number for number, _ in found]
        if len(set(numbers)) < len(numbers):
            return "duplicated", f"pending, and its events {numbers} are stored"
        return "split", f"pending, and its events {numbers} alone are stored"

    def adoptable(self, rows: Mapping[int, Row]) -> list[tuple[int, int, int]]:
        """Position, part and first sequence of what is pending, and stored whole and once: the mark was lost."""
        found = ((*which, _row(rows, *which), places) for which, places in sorted(self._unmarked.items()))
        return [
            (position, part, places[0][1])
            for position, part, row, places in found
            if row is not None and row.stream is None and not row.dead and places == _whole(row, places[0][1])
        ]

    def confirm(self, rows: Iterable[Row], *, first: int, last: int, end: int) -> None:
        """Compare receipts with what was found; the stream was read from `first` to `last`, and ends at `end` now."""
        for row in rows:
            if row.stream != self.stream or last < row.last <= end:
                continue
            self.transactions += 1
            expected = range(max(row.first, first), min(row.last, last) + 1)
            good = sum(1 for place in expected if _holds(self._good, place))
            taken = sum(1 for place in expected if _holds(self._other, place))
            lost = max(0, row.last - max(end, row.first - 1))
            self.removed += row.last - row.first + 1 - good - taken - lost
            if taken or lost:
                kind = "split" if good else "missing"
                what = f"its receipt says {row.first} to {row.last}, and {good} of its messages are there"
                self._add(kind, row.position, row.first, what)

    def count_gone(self, pages: Iterable[Iterable[Row]], *, meant: bool) -> None:
        """The stream does not exist, and all that receipts say of it is removed; unless that is `meant`, say so."""
        for row in chain.from_iterable(pages):
            if row.stream == self.stream:
                self.transactions += 1
                self.removed += row.last - row.first + 1
        if not meant:
            what = f"the stream does not exist; {self.transactions} transactions have their receipts in it"
            self._add("missing", None, None, what)

    def unreconciled(self, problems: Iterable[str], stranded: Iterable[int]) -> None:
        """What is the matter with the outbox itself, and what is pending out of a relay's sight: in no stream."""
        for problem in problems:
            self._add("counters", None, None, problem)
        for position in stranded:
            self._add("stranded", position, None, STRANDED)

    def summary(self) -> Summary:
        """Counts and anomalies, for machines."""
        return Summary(**{each.name: getattr(self, each.name) for each in fields(Summary)})

    def _add(self, kind: str, position: int | None, sequence: int | None, what: str) -> None:
        self.anomalies.append(Anomaly(kind=kind, position=position, sequence=sequence, what=what))


def _row(rows: Mapping[int, Row], position: int | None, part: int | None) -> Row | None:
    """The transaction, or the part of it, that a message names."""
    row = rows.get(position or 0)
    return next((each for each in row.parts if each.part == part), row) if row is not None else None


def _is_of(message: Seen, row: Row) -> bool:
    """True if the message is the very event that the transaction has at that place."""
    number = message.number or 0
    if not 1 <= number <= len(row.message_ids) == message.count:
        return False
    same = message.message_id == row.message_ids[number - 1]
    return same and (not row.digests or message.digest is None or message.digest == row.digests[number - 1])


def _is_loose(message: Seen, row: Row) -> bool:
    """True if the message is of a part of a transaction that is pending, and that the database does not know to have
    any: a backup may be older than the split.
    """
    return row.stream is None and not row.parts and bool(message.part) and message.message_id in row.message_ids


def _whole(row: Row, first: int) -> list[tuple[int, int]]:
    """Number and sequence of each event of the transaction, if it begins at the sequence `first`."""
    return [(number, first + number - 1) for number in range(1, len(row.message_ids) + 1)]


def _extend(ranges: list[Range], place: int) -> None:
    """Add a place behind all others."""
    if ranges and ranges[-1][1] == place - 1:
        ranges[-1] = (ranges[-1][0], place)
    else:
        ranges.append((place, place))


def _holds(ranges: Sequence[Range], place: int) -> bool:
    index = bisect_right(ranges, (place, sys.maxsize))
    return index > 0 and ranges[index - 1][0] <= place <= ranges[index - 1][1]
