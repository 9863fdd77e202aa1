"""The cursor and the open positions below it: which positions were read, and which still may appear.

Pure. Positions are drawn within the commit, so a position that is missing below the highest one seen is a commit in
progress, a prepared transaction, or a rollback. It stays open until it is *proven* empty: it is invisible in a
snapshot by which every transaction that could own it has ended. A time-out would skip a slow commit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Range = tuple[int, int]  # both ends belong to it
HIGHEST = (1 << 63) - 1  # no position is above it: a bigint


def merged(ranges: Iterable[Range]) -> list[Range]:
    """The ranges sorted, adjacent and overlapping ones joined."""
    result: list[Range] = []
    for low, high in sorted(ranges):
        if result and low <= result[-1][1] + 1:
            result[-1] = (result[-1][0], max(high, result[-1][1]))
        else:
            result.append((low, high))
    return result


def without(ranges: Iterable[Range], positions: Sequence[int]) -> list[Range]:
    """The ranges without some positions; both are sorted."""
    result: list[Range] = []
    index = 0
    for first, high in ranges:
        low = first
        while index < len(positions) and positions[index] <= high:
            if positions[index] >= low:
                if positions[index] > low:
                    result.append((low, positions[index] - 1))
                low = positions[index] + 1
            index += 1
        if low <= high:
            result.append((low, high))
    return result


def outside(ranges: Iterable[Range], others: Sequence[Range]) -> list[Range]:
    """What of the ranges lies in none of the others; both are sorted and do not overlap."""
    result: list[Range] = []
    index = 0
    for first, high in ranges:
        low = first
        while index < len(others) and others[index][0] <= high:
            other_low, other_high = others[index]
            if other_low > low:
                result.append((low, other_low - 1))
            low = max(low, other_high + 1)
            if other_high > high:
                break  # it reaches into the next one, too
            index += 1
        if low <= high:
            result.append((low, high))
    return result


def below(cursor: int, open_positions: Iterable[Range], held: Iterable[int]) -> list[Range]:
    """Positions up to the cursor that are neither settled nor planned: open ones, and what is held."""
    gaps = ((low, min(high, cursor)) for low, high in open_positions if low <= cursor)
    return merged([*gaps, *[(position, position) for position in held if position <= cursor]])


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A transaction that holds a write lock on `transactions`: a virtual transaction id, -1/… when prepared."""

    id: str

    @property
    def prepared(self) -> bool:
        """True for a prepared transaction."""
        return self.id.startswith("-1/")


@dataclass(slots=True, kw_only=True)
class _Cohort:
    """Open positions that were first missed together, and the transactions that could own one of them."""

    ranges: list[Range]
    owners: frozenset[Holder] | None = None
    prepared_too: bool = False
    ended: bool = False

    def observe(self, holders: frozenset[Holder]) -> None:
        # An owner took its lock before it drew the position, so the first look sees it, or it has ended.
        if self.owners is None:
            self.owners = frozenset(holder for holder in holders if not holder.prepared)
        if not self.owners & holders and not self.prepared_too:
            # PREPARE gives a transaction a new virtual id: those prepared by now are the second set.
            self.owners = frozenset(holder for holder in holders if holder.prepared)
            self.prepared_too = True
        self.ended = not self.owners & holders


@dataclass(slots=True)
class Positions:
    """How far the leader has read: every position up to `cursor` was seen, is open, or is proven empty."""

    cursor: int = 0
    _cohorts: list[_Cohort] = field(default_factory=list)

    @classmethod
    def restored(cls, cursor: int, open_positions: Sequence[Range]) -> Positions:
        """As a new leader finds them in the database."""
        cohorts = [_Cohort(ranges=list(open_positions))] if open_positions else []
        return cls(cursor, cohorts)

    @property
    def open(self) -> list[Range]:
        """The open positions, sorted."""
        return merged(piece for cohort in self._cohorts for piece in cohort.ranges)

    def reopen(self, ranges: Iterable[Range]) -> None:
        """Look again at positions that were passed: retried dead letters. What lies beyond the cursor comes anyway."""
        passed = merged((low, min(high, self.cursor)) for low, high in ranges if low <= self.cursor)
        if again := outside(passed, self.open):
            self._cohorts.append(_Cohort(ranges=again))

    def observe(self, holders: Iterable[Holder]) -> None:
        """Take in who holds a write lock on `transactions` now. Call it before the page that may prove a gap."""
        now = frozenset(holders)
        for cohort in self._cohorts:
            cohort.observe(now)

    def read(self, positions: Iterable[int], through: int | None = None) -> None:
        """Take in a page: sorted, open positions included, read in one snapshot younger than the last `observe`.

        `through` is the position up to which the page is complete, None if it holds all that is visible.
        """
        proven = [
            cohort
            for cohort in self._cohorts
            if cohort.ended and (through is None or max(high for _, high in cohort.ranges) <= through)
        ]
        page = list(positions)
        late = [position for position in page if position <= self.cursor]
        for cohort in self._cohorts:
            cohort.ranges = without(cohort.ranges, late)
        missed: list[Range] = []
        new = page[len(late) :]
        if new and new[-1] - self.cursor == len(new):
            self.cursor = new[-1]  # none is missing, as nearly always
            new = []
        for position in new:
            if position > self.cursor + 1:
                missed.append((self.cursor + 1, position - 1))
            self.cursor = position
        self._cohorts = [cohort for cohort in self._cohorts if cohort.ranges and cohort not in proven]
        if missed:
            self._cohorts.append(_Cohort(ranges=missed))
