"""The fence of a stream with other writers: a compare-and-set on a subject of the plan's head.

Pure. Every attempt to store the head carries an event on the subject of its fence, and is stored only where the last
message on that subject is the one that its sender knows of. So two attempts exclude each other, if each sender knows
every message on the subject up to its own sequence, and none of them is of the head.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import accumulate

from outbox.core.plan import Planned, Seen, is_end_of
from outbox.core.transaction import Transaction

CANDIDATES = 3  # subjects of a head that are looked at
KNOWN_SUBJECTS, SHUNNED_SUBJECTS = 50_000, 1_000
ATTEMPTS, MOST = 50, 0.5  # over which the share of the refused ones is told, and from which on


@dataclass(frozen=True, slots=True, kw_only=True)
class Fence:
    """The fence of the transaction at `position`: no attempt of it is stored up to `sequence`, the last message on
    `subject`, 0 if there is none.
    """

    position: int
    subject: str
    sequence: int


class Verge(Enum):
    """What became of an attempt that is found in the stream."""

    STORED = "it is stored"
    APPLYING = "it is not whole yet, or a part of it was lost"
    IMPOSTOR = "it fits no attempt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """A batch that is stored: it begins at the sequence `first`, and has this many messages."""

    first: int
    count: int

    @property
    def last(self) -> int:
        """The sequence of its last message."""
        return self.first + self.count - 1


def numbered(transaction: Transaction, subject: str) -> int:
    """The number of the first event on this subject, from 1: the one that carries the fence."""
    return list(transaction.subjects).index(subject) + 1


def _candidates(head: Transaction) -> list[str]:
    return list(dict.fromkeys(head.subjects))[:CANDIDATES]


def attempt_at(place: int, message: Seen, head: Planned, outbox_id: str) -> Attempt | None:
    """The attempt at the head that this message, on the subject of its fence, shows to be stored; None if none.

    A batch id ends in the number of its messages; without one it is a plain publish. Who copies our messages copies
    neither that nor a fence, which the server would obey.
    """
    which = message.position, message.part or 0
    ours = message.is_of(outbox_id) and which == (head.position, head.part) and message.fence is not None
    if not ours or message.number is None or not 1 <= message.number <= head.count:
        return None
    count = message.batch_id.rpartition("-")[2] if message.batch_id is not None else "1"
    return Attempt(first=place - message.number + 1, count=int(count)) if count.isdigit() else None


def covered(attempt: Attempt, plan: Sequence[Planned]) -> list[int] | None:
    """Where the transactions end that the attempt has stored; None if they are not the first ones of the plan."""
    ends = list(accumulate((entry.count for entry in plan), initial=attempt.first - 1))[1:]
    return [end for end in ends if end <= attempt.last] if attempt.last in ends else None


def judge_attempt(
    *,
    outbox_id: str,
    attempt: Attempt,
    plan: Sequence[Planned],
    settled: int,
    last: int,
    seen: Mapping[int, Seen | None],
) -> tuple[Verge, int]:
    """What became of an attempt that is stored, and how many transactions of the plan it has.

    `seen` are the messages at the ends of those that it covers, in a stream that ends at `last`; None for one that is
    gone. All that is `settled` lies before it.
    """
    ends = covered(attempt, plan)
    if ends is None or attempt.first <= settled:
        return Verge.IMPOSTOR, 0
    if last < attempt.last:
        return Verge.APPLYING, 0
    for entry, end in zip(plan, ends, strict=False):
        message = seen.get(end)
        if message is not None and not is_end_of(message, entry, outbox_id):
            return Verge.APPLYING, 0
    return Verge.STORED, len(ends)


def removed(first: int, deleted: Iterable[int], since: int) -> bool:
    """True if a message behind the sequence `since` is gone, from a stream that begins at `first`."""
    return first > since + 1 or any(place > since for place in deleted)


@dataclass(slots=True, kw_only=True)
class Fences:
    """The fences of a plan's heads, and what is known of their subjects. Nothing of the plan that an attempt without
    an answer may have stored lies at or before the sequence `since`.
    """

    since: int
    heads: dict[int, Fence] = field(default_factory=dict)  # by position
    known: dict[str, int] = field(default_factory=dict)  # last sequences; only the server's word is exact
    shunned: dict[str, int] = field(default_factory=dict)  # others have written to these; the higher, the later
    wanted: list[str] = field(default_factory=list)  # whose last sequence is to be asked for
    former: set[int] = field(default_factory=set)  # heads that a former leader may have tried, and nobody looked since
    unconfirmed: bool = False  # what was found is used only by who leads still, after that
    refusals: list[bool] = field(default_factory=list)
    refused_on: str = ""
    moves: int = 0

    def choose(self, head: Transaction, *, removes: bool) -> Fence | None:
        """The fence for a head that nobody has tried; None as long as the last sequence on its subject is `wanted`.

        From a stream that `removes` what is old, a sequence of 0 may come again: only where there is no other.
        """
        if head.position in self.heads:
            return self.heads[head.position]
        subjects = _candidates(head)
        subjects.sort(key=lambda subject: self.shunned.get(subject, 0))
        self.wanted = [each for each in (subjects if removes else subjects[:1]) if each not in self.known]
        if self.wanted:
            return None
        subject = subjects[0]
        if removes:
            subject = next((each for each in subjects if self.known.get(each)), subject)
        fence = self.heads[head.position] = Fence(position=head.position, subject=subject, sequence=self.known[subject])
        return fence

    def learn(self, sequences: Mapping[str, int]) -> None:
        """These are the last sequences on their subjects, as far as anybody has read."""
        if len(self.known) > KNOWN_SUBJECTS:
            self.known.clear()
        self.known.update(sequences)
        self.wanted = [each for each in self.wanted if each not in self.known]

    def stored(self, first: int, transactions: Sequence[Planned | Transaction]) -> None:
        """These are stored by an attempt of ours, one behind the other, from this sequence on."""
        moved: dict[str, int] = {}
        for each in transactions:
            if isinstance(each, Transaction):
                moved.update(zip(each.subjects, range(first, first + each.count), strict=True))
            if (fence := self.forget(each.position)) is not None:
                self.shunned.pop(fence.subject, None)
            first += each.count
        self.learn(moved)
        # Nobody has tried the next ones before these were stored, so what these have moved is known to hold none.
        for fence in self.heads.values():
            if moved.get(fence.subject, 0) > fence.sequence:
                self.heads[fence.position] = replace(fence, sequence=moved[fence.subject])
        self.since = first - 1
        self._tried(refused=False)

    def forget(self, position: int) -> Fence | None:
        """This one is no head any more; returns the fence that it had."""
        self.former.discard(position)
        return self.heads.pop(position, None)

    def refused(self, head: Transaction) -> bool:
        """An attempt came too late: others have written to the subject. True if the fence is the same still."""
        fence = self.heads[head.position]
        self.refused_on = fence.subject
        self._tried(refused=True)
        if fence.subject not in self.shunned and len(self.shunned) >= SHUNNED_SUBJECTS:
            del self.shunned[next(iter(self.shunned))]
        self.shunned[fence.subject] = max(self.shunned.values(), default=0) + 1
        self.known.pop(fence.subject, None)
        if all(subject in self.shunned for subject in _candidates(head)):
            return True
        del self.heads[head.position]
        return False

    def moved(self, fence: Fence, sequence: int) -> None:
        """The last message on the subject of a head's fence is at `sequence`, and nothing of the head up to there.

        Used only by who leads still when that was found: so that a new leader knows up to where former ones may know.
        """
        self.unconfirmed = True
        self.moves += 1
        self.known[fence.subject] = sequence
        self.heads[fence.position] = replace(fence, sequence=sequence)

    @property
    def contended(self) -> tuple[str, float] | None:
        """The subject that others write to so often that most attempts are refused, and how many of them; or None."""
        share = sum(self.refusals) / ATTEMPTS
        return (self.refused_on, share) if share > MOST else None

    def _tried(self, *, refused: bool) -> None:
        self.refusals = [*self.refusals[-ATTEMPTS + 1 :], refused]
