"""What a stream holds, compared with what the outbox's database knows: message by message, transaction by transaction.

Pure. The one place that says what missing, duplicated, split, phantom and misplaced mean: `outbox verify`, `outbox
rebase` and the fault tests all stand on it. Messages are taken in by sequence, each with the transaction that it names;
memory grows with what is wrong, not with the stream.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from hashlib import sha256
from itertools import chain, islice
from types import MappingProxyType
from typing import NamedTuple

from outbox.core.plan import Seen
from outbox.core.positions import Range, merged

ALONE = "a message of somebody else, in a stream of the relay alone"
UNKNOWN = "the database has no such transaction"
NOTHING: Mapping[int, bytes] = MappingProxyType({})
STRANDED = "committed and pending, and behind all that a relay looks at; remedy: outbox rebase"


class Row(NamedTuple):
    """A transaction as the database has it; `stream` to `last` are its receipt. Digests are SHA-256 of the payloads.

    Where it is sent to several streams its `parts` are rows, too, with the number of the `part`, and have the receipts.
    """

    position: int
    message_ids: Sequence[str]
    digests: Sequence[bytes] = ()
    dead: bool = False
    stream: str | None = None
    first: int = 0
    last: int = 0
    part: int = 0
    parts: Sequence[Row] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Anomaly:
    """Something that is promised not to be, at one place or at many of one kind: the first and the last ones.

    Of the sequences each is meant; of the positions, those that the outbox has.
    """

    kind: str
    position: int | None
    sequence: int | None
    what: str
    last_position: int | None
    last_sequence: int | None


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


class _Found(NamedTuple):
    """A message of a transaction that is not marked: which of its events, where, and whether a relay fenced it."""

    number: int
    sequence: int
    fenced: bool


@dataclass(slots=True, kw_only=True)
class Comparison:
    """One stream against the outbox. Call `take` for its messages in order, then `recheck`, then `confirm`.

    A message is of this outbox by its `Outbox-Id`; `adopting`, also by its message id and payload, since a backup may
    be older than an id that the outbox had. By its subject nothing is judged: the server may have rewritten that. What
    was sent and is there once more, without a trace of the batch or the fence that a relay sends with, is somebody's
    copy, and foreign. Others may write to a `shared` stream; in any other a foreign message is an anomaly, unless
    nats-server itself wrote it. `removed` counts messages that the stream itself has removed (limits, rollup, purge, a
    work queue), `unknown` those whose transaction was purged, or that have one of the `former` ids that the outbox had,
    and were not in the database that was restored; `highest` is the highest position that this outbox has there;
    `loose` are messages of parts that a backup is too old to know.
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
    highest: int = 0
    loose: list[Loose] = field(default_factory=list)
    _good: list[Range] = field(default_factory=list)
    _other: list[Range] = field(default_factory=list)
    # By position and part.
    _unmarked: dict[tuple[int, int], list[_Found]] = field(default_factory=lambda: defaultdict(list))
    _phantoms: list[tuple[int, int]] = field(default_factory=list)
    _last: dict[tuple[str, str], int] = field(default_factory=dict)

    def take(
        self, seen: Mapping[int, Seen | None], rows: Mapping[int, Row], payloads: Mapping[int, bytes] = NOTHING
    ) -> None:
        """Compare the next messages, by sequence, with the transactions that they name, as far as there are any."""
        good = self._good
        for sequence, message in seen.items():
            if message is None:
                continue
            self.messages += 1
            ours = message.outbox_id == self.outbox_id or self.knows(message.outbox_id)
            position, number = message.position or 0, message.number or 0
            if ours:
                self.replayed += message.replayed
                self.highest = max(self.highest, position)
            row = _row(rows, position, message.part)
            same = row is not None and _is_of(message, row, payloads.get(sequence))
            if row is None or not same or not (ours or self.adopting) or row.stream != self.stream:
                told = self._judge(sequence, message, row, ours=ours, same=same)
            elif sequence == row.first + number - 1:
                _extend(good, sequence)
                continue
            else:
                told = self._judge(sequence, message, row, ours=ours, same=same)
            if told:
                _extend(self._other, sequence)

    def knows(self, outbox_id: str | None) -> bool:
        """True if this is or was the id of the outbox."""
        return outbox_id == self.outbox_id or outbox_id in self.former

    def _is_place(self, sequence: int, message: Seen, row: Row) -> bool:
        return row.stream == self.stream and sequence == row.first + (message.number or 0) - 1

    def _judge(self, sequence: int, message: Seen, row: Row | None, *, ours: bool, same: bool) -> bool:
        """Say what is wrong with a message; False if that cannot be said yet, because its transaction is not marked."""
        position = message.position
        if position is None or not (ours or (self.adopting and same)):
            self._foreign(sequence, marker=message.marker)
        elif message.outbox_id != self.outbox_id and not same:
            self.unknown += 1
        elif row is None:
            self._phantoms.append((position, sequence))
        elif self.adopting and _is_loose(message, row):
            number = row.message_ids.index(message.message_id or "") + 1
            self.loose.append(Loose(position, message.part or 0, number, message.count or 0, sequence))
        elif row.stream in self.gone and same:
            pass  # a copy of a stream that is gone, such as its mirror, has what was sent there
        elif row.stream is not None and not (self._covers(row, sequence) or _is_fenced(sequence, message)):
            self._foreign(sequence)
        elif not same:
            what = f"event {message.number} of {message.count} was not committed so"
            self._add("phantom", position, sequence, what, many="events that were not committed so")
        elif row.stream is None:
            self._unmarked[position, message.part or 0].append(
                _Found(message.number or 0, sequence, _is_fenced(sequence, message))
            )
            return False
        else:
            what = f"its receipt says {row.first} to {row.last} of {row.stream}"
            many = f"their receipts are of other places in {row.stream}"
            self._add("duplicated", position, sequence, what, many=many)
        return True

    def _foreign(self, sequence: int, *, marker: bool = False) -> None:
        self.foreign += 1
        if not (self.shared or marker):
            self._add("foreign", None, sequence, ALONE)

    def _covers(self, row: Row, sequence: int) -> bool:
        return row.stream == self.stream and row.first <= sequence <= row.last

    @property
    def phantoms(self) -> int:
        """Messages of this outbox that the database does not have, or has otherwise."""
        told = (each for each in self.anomalies if each.kind == "phantom")
        return len(self._phantoms) + sum((each.last_sequence or 0) - (each.sequence or 0) + 1 for each in told)

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
            row = _row(rows, position, part)
            ours = next((each for each in _readings(found) if self._problem(row, each, last) is None), found)
            for each in found:
                if each not in ours:
                    self._foreign(each.sequence)
                    self._other.append((each.sequence, each.sequence))
            places = [(each.sequence, each.sequence) for each in ours]
            if (problem := self._problem(row, ours, last)) is None:
                self._good += places
            else:
                self._other += places
                self._add(problem[0], position, found[0].sequence, problem[1], last=found[-1].sequence)
        self._good, self._other = merged(self._good), merged(self._other)
        for position, sequence in self._phantoms:
            if position > purged:
                self._add("phantom", position, sequence, UNKNOWN)
            else:
                self.unknown += 1
        self._phantoms = []

    def _problem(self, row: Row | None, found: list[_Found], last: int) -> tuple[str, str] | None:
        """What is wrong with a transaction of which these messages were found, unmarked; or None."""
        if row is None:
            return None  # it was purged meanwhile
        if row.dead:
            return "phantom", "it is a dead letter, and yet stored"
        first = row.first if row.stream == self.stream else found[0].sequence
        ends = len(found) == len(row.message_ids) or found[-1].sequence == last
        if _places(found) == _whole(row, first)[: len(found)] and ends and row.stream in (None, self.stream):
            return None
        if row.stream is not None:
            return "duplicated", f"its receipt begins at {row.first} of {row.stream}"
        numbers = [each.number for each in found]
        if len(set(numbers)) < len(numbers):
            return "duplicated", f"pending, and its events {numbers} are stored"
        return "split", f"pending, and its events {numbers} alone are stored"

    def adoptable(self, rows: Mapping[int, Row]) -> list[tuple[int, int, int]]:
        """Position, part and first sequence of what is pending, and stored whole and once: the mark was lost."""
        firsts: dict[tuple[int, int], int] = {}
        for (position, part), found in sorted(self._unmarked.items()):
            row = _row(rows, position, part)
            if row is None or row.stream is not None or row.dead:
                continue
            for each in _readings(found):
                if _places(each) == _whole(row, each[0].sequence):
                    firsts[position, part] = each[0].sequence
        return [(*which, first) for which, first in firsts.items()]

    def confirm(self, rows: Iterable[Row], *, first: int, last: int, end: int) -> None:
        """Compare receipts with what was found; the stream was read from `first` to `last`, and ends at `end` now."""
        for row in rows:
            if row.stream != self.stream or last < row.last <= end:
                continue
            self.transactions += 1
            low, high = max(row.first, first), min(row.last, last)
            good = _held(self._good, low, high)
            taken = _held(self._other, low, high) if self._other else 0
            lost = max(0, row.last - max(end, row.first - 1))
            self.removed += row.last - row.first + 1 - good - taken - lost
            if taken or lost:
                kind = "split" if good else "missing"
                what = f"its receipt says {row.first} to {row.last}, and {good} of its messages are there"
                many = "their receipts say so, and none of their messages are there" if not good else ""
                self._add(kind, row.position, row.first, what, last=row.last, many=many)

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

    def _add(
        self,
        kind: str,
        position: int | None,
        sequence: int | None,
        what: str,
        *,
        last: int | None = None,
        many: str = "",
    ) -> None:
        """An anomaly more; or the last one of its kind goes on, if it ends right before: then it says `many`."""
        last = last or sequence
        key = kind, many or what
        number = self._last.get(key)
        if number is not None and _goes_on(before := self.anomalies[number], position, sequence):
            same = position == before.position == before.last_position and what == before.what
            what = what if same else many or what
            self.anomalies[number] = replace(before, what=what, last_position=position, last_sequence=last)
            return
        self._last[key] = len(self.anomalies)
        self.anomalies.append(
            Anomaly(
                kind=kind, position=position, sequence=sequence, what=what, last_position=position, last_sequence=last
            )
        )


def _goes_on(before: Anomaly, position: int | None, sequence: int | None) -> bool:
    """True if this is right behind: of places the next sequence, at no earlier position; else the next position."""
    if sequence is not None and before.last_sequence is not None:
        return sequence == before.last_sequence + 1 and (position or 0) >= (before.last_position or 0)
    return position is not None and position == (before.last_position or 0) + 1


def _row(rows: Mapping[int, Row], position: int, part: int | None) -> Row | None:
    """The transaction, or the part of it, that a message names."""
    row = rows.get(position)
    return next((each for each in row.parts if each.part == part), row) if row is not None and row.parts else row


def _is_of(message: Seen, row: Row, payload: bytes | None) -> bool:
    """True if the message is the very event that the transaction has at that place."""
    number, ids = message.number or 0, row.message_ids
    if not 1 <= number <= len(ids) == message.count or message.message_id != ids[number - 1]:
        return False
    return not row.digests or payload is None or sha256(payload).digest() == row.digests[number - 1]


def _is_fenced(sequence: int, message: Seen) -> bool:
    """True if a relay, and nobody who copies, has stored it there: such an expectation fits at one place only."""
    return message.batch_id is not None or message.fence is not None or message.follows == sequence - 1


def _readings(found: list[_Found]) -> Iterator[list[_Found]]:
    """What may be the transaction itself: all that was found; or what a relay sent, and the rest is somebody's copy."""
    yield found
    if fenced := [each for each in found if each.fenced]:
        yield fenced


def _places(found: Iterable[_Found]) -> list[tuple[int, int]]:
    return [(each.number, each.sequence) for each in found]


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


def _held(ranges: Sequence[Range], low: int, high: int) -> int:
    """How many of the places from `low` to `high` the ranges hold."""
    held = 0
    for begin, end in islice(ranges, max(0, bisect_right(ranges, (low, sys.maxsize)) - 1), None):
        if begin > high:
            break
        held += max(0, min(end, high) - max(begin, low) + 1)
    return held
