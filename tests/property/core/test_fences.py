"""Promises 1 to 3 where others write too: rival leaders whose attempts are fenced by a subject, against a model.

The model is a stream that stores a batch whole if the last message on the subject of its fence is the one expected. It
loses acks, delays frames, lets batches of deposed leaders arrive late; strangers write to the same subjects, some of
them copies of what they have read; the oldest messages go. A leader that was replaced may go on until it looks at the
database, which it does at a commit, and before it uses what a refusal has told.
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass, field
from itertools import count
from random import Random
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outbox.core.batch import Batch, Packing, frames, refenced
from outbox.core.chain import Chain
from outbox.core.fence import Fence, Fences, Verge, attempt_at, covered, judge_attempt, numbered, removed
from outbox.core.outcome import Duplicate, Outcome, Rejected, Stored, Unknown
from outbox.core.plan import Look, Planned, Seen, judge, wanted
from outbox.core.transaction import DeadReason, Transaction, Verdict
from outbox.event import Event

OUTBOX = "outbox"
SUBJECTS = "abc"


def message_id(position: int, number: int) -> str:
    return str(UUID(int=position * 1000 + number))


def transaction(position: int, subjects: str) -> Transaction:
    return Transaction.of(
        position, [Event(message_id(position, n), subject, b"", {}) for n, subject in enumerate(subjects, 1)]
    )


@dataclass(frozen=True)
class Message:
    subject: str
    position: int = 0  # 0: a stranger's
    number: int = 0
    fence: int | None = None
    batch_id: str | None = None

    @property
    def seen(self) -> Seen:
        if not self.position:
            return Seen(outbox_id=None, message_id=None, position=None, number=None)
        return Seen(
            outbox_id=OUTBOX,
            message_id=message_id(self.position, self.number) if self.ours else None,
            position=self.position,
            number=self.number,
            fence=self.fence,
            batch_id=self.batch_id,
        )

    @property
    def ours(self) -> bool:
        return self.fence is not None or self.batch_id is not None


class Halted(Exception):
    """The leader halts: the stream may not tell any more."""


@dataclass
class Model:
    """The stream, the database, and the frames on their way."""

    transactions: list[str]  # subjects
    offenders: frozenset[int] = frozenset()  # a batch with one of them is refused, for every attempt
    repeated: frozenset[int] = frozenset()  # and here as a duplicate, which an attempt that is stored may look like
    fickle: frozenset[int] = frozenset()  # a batch of one of these alone is refused so
    forgets: bool = False  # message ids, at once
    stream: list[Message] = field(default_factory=list)
    first: int = 1
    epoch: int = 0
    base: int = 0
    plan: list[int] = field(default_factory=list)
    fences: Fences | None = None
    shared: bool = True
    marked: dict[int, tuple[int, int]] = field(default_factory=dict)
    dead: list[int] = field(default_factory=list)
    read: int = 0
    frames: deque[tuple[int, Batch]] = field(default_factory=deque)
    ids: count[int] = field(default_factory=count)

    @property
    def last(self) -> int:
        return len(self.stream)

    def transaction(self, position: int) -> Transaction:
        return transaction(position, self.transactions[position - 1])

    def last_on(self, subject: str) -> int:
        return max((n for n, m in enumerate(self.stream, 1) if m.subject == subject and n >= self.first), default=0)

    def next_on(self, subject: str, sequence: int) -> int | None:
        places = (n for n, m in enumerate(self.stream, 1) if m.subject == subject and n >= max(sequence, self.first))
        return next(places, None)

    def stored(self, position: int) -> bool:
        return any(message.position == position and message.ours for message in self.stream)

    def deliver(self, index: int, *, busy: bool) -> tuple[int, Batch, Outcome]:
        self.frames.rotate(-index)
        leader, batch = self.frames.popleft()
        self.frames.rotate(index if index <= len(self.frames) else 0)
        return leader, batch, self._publish(batch, busy=busy)

    def _publish(self, batch: Batch, *, busy: bool) -> Outcome:
        if (refusal := self._refusal(batch, busy=busy)) is not None:
            return refusal
        fence = batch.fence
        fenced = numbered(batch.transactions[0], fence.subject) if fence is not None else 1
        expected = fence.sequence if fence is not None else batch.base
        batch_id = batch.id if batch.count > 1 else None
        number = 0
        for each in batch.transactions:
            for place, subject in enumerate(each.subjects, 1):
                number += 1
                fence_here = expected if number == fenced else None
                self.stream.append(Message(subject, each.position, place, fence_here, batch_id))
        return Stored(stream="S", sequence=self.last, batch=batch_id, count=batch.count)

    def _refusal(self, batch: Batch, *, busy: bool) -> Outcome | None:
        positions, fence = {each.position for each in batch.transactions}, batch.fence
        repeated = not self.forgets and any(map(self.stored, positions))
        there = self.last if fence is None else self.last_on(fence.subject)
        if repeated and batch.count == 1:
            return Duplicate(sequence=1)
        if repeated or self.repeated & positions or (len(positions) == 1 and self.fickle & positions):
            return Rejected(code=10201, description="duplicate")
        if fence is not None and busy:
            there = -1
        if there != (batch.base if fence is None else fence.sequence):
            what = f"wrong last sequence: {there}" if there >= 0 else "wrong last sequence"
            return Rejected(code=10071 if there >= 0 else 10164, description=what)
        if fence is not None and not fence.sequence and self.stored(fence.position):
            return Unknown(why="its own message is gone, and it comes: the residual")
        if self.offenders & positions:
            return Rejected(code=10166, description="per-message TTL is disabled")
        return None


@dataclass
class Leader:
    epoch: int
    chain: Chain
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    pending: list[str] = field(default_factory=list)


class Play:
    """Leaders take turns; every step is one thing that can happen."""

    def __init__(self, model: Model, packings: list[Packing]) -> None:
        self.model, self.packings = model, packings
        self.leaders: list[Leader] = []
        self.elect(0)

    def elect(self, pick: int, *, sharing: bool = False) -> None:
        """A new leader; `sharing` says that an operator has told it that others write here."""
        model = self.model
        model.epoch += 1
        packing = self.packings[pick % len(self.packings)]
        chain = Chain(
            stream="S",
            created="x",
            packing=packing,
            base=model.base,
            shared=model.shared or sharing,
            fencible=True,
            window=3,
        )
        loaded = [model.transaction(position) for position in model.plan]
        fences = model.fences
        if fences is not None:
            fences = Fences(since=fences.since, heads=dict(fences.heads), former=set(fences.heads))
        chain.restore(
            [Planned(position=t.position, count=t.count, last_message_id=t.message_ids[-1]) for t in loaded], fences
        )
        self.leaders.append(Leader(model.epoch, chain))

    def commit(self, leader: Leader) -> bool:
        model, chain = self.model, leader.chain
        if leader.epoch != model.epoch:
            return False  # deposed: it will stand by; its frames are still on their way
        for receipt in chain.receipts:
            assert receipt.position not in model.marked
            model.marked[receipt.position] = (receipt.first_sequence, receipt.last_sequence)
        model.dead += [verdict.position for verdict in chain.verdicts]
        model.base, model.plan, model.shared = chain.base, [t.position for t in chain.plan], chain.shared
        fences = chain.fences
        model.fences = Fences(since=fences.since, heads=dict(fences.heads)) if fences is not None else None
        model.read = max([model.read, *model.plan, *model.dead])
        chain.written()
        return True

    def work(self, leader: Leader) -> None:
        """One round of the leader's loop."""
        model, chain = self.model, leader.chain
        while leader.pending and leader.pending[0] in leader.outcomes:
            chain.learn(leader.outcomes[leader.pending.pop(0)])
            if not chain.in_flight:
                leader.pending.clear()
        waits = chain.fences is None and chain.suspects and model.frames  # then a verdict waits until none can arrive
        if chain.in_doubt and not waits:
            self.settle(leader)
        chain.load(model.transaction(each.position) for each in chain.unloaded)
        while len(chain.waiting) < 6 and leader.epoch == model.epoch:
            held = [t.position for t in (*chain.waiting, *chain.plan)]
            following = max([model.read, *held]) + 1
            if following > len(model.transactions):
                break
            chain.join(model.transaction(following))
        self.send(leader)
        if chain.fences is not None:
            chain.fences.learn({subject: model.last_on(subject) for subject in chain.fences.wanted})
        chain.extend()
        if chain.dirty and not self.commit(leader):
            return
        if leader.epoch == model.epoch:
            chain.confirm()
        self.send(leader)

    def send(self, leader: Leader) -> None:
        ids = (str(n) for n in self.model.ids)
        for batch in leader.chain.launch(ids):
            leader.pending.append(batch.id)
            self.model.frames.append((leader.epoch, batch))
        leader.chain.upcoming(ids)

    def settle(self, leader: Leader) -> None:
        if leader.chain.fences is not None:
            self.settle_head(leader, leader.chain.fences)
            return
        chain, model = leader.chain, self.model
        plan = chain.entries()
        there = {place: self.seen(place) for place in wanted(chain.base, plan, model.last)}
        finding = judge(
            outbox_id=OUTBOX,
            shared=chain.shared,
            unanswered=chain.unanswered,
            base=chain.base,
            plan=plan,
            last=model.last,
            seen=there,
        )
        if finding.look is Look.AMBIGUOUS:
            raise Halted
        if finding.look in (Look.IMPOSTOR, Look.APPLYING):
            assert leader.epoch != model.epoch, "only a newer leader's work can look like that"
            return
        assert finding.look in (Look.SETTLED, Look.FOREIGN), finding
        chain.settle(finding.stored, model.last, foreign=finding.look is Look.FOREIGN)

    def seen(self, place: int) -> Seen | None:
        return self.model.stream[place - 1].seen if place >= self.model.first else None

    def settle_head(self, leader: Leader, fences: Fences) -> None:
        chain, model = leader.chain, self.model
        plan = chain.entries()
        fence = fences.heads.get(plan[0].position) if plan else None
        if fence is None:
            chain.settle_head(0, chain.base, 0, others=False)
            return
        place, others = fence.sequence, False
        while (following := model.next_on(fence.subject, place + 1)) is not None:
            attempt = attempt_at(following, model.stream[following - 1].seen, plan[0], OUTBOX)
            if attempt is not None:
                ends = {end: self.seen(end) for end in covered(attempt, plan) or ()}
                verge, stored = judge_attempt(
                    outbox_id=OUTBOX, attempt=attempt, plan=plan, settled=fences.since, last=model.last, seen=ends
                )
                if verge is not Verge.STORED:
                    assert leader.epoch != model.epoch, verge
                    return
                chain.settle_head(stored, attempt.first - 1, following, others=others)
                return
            place, others = following, True
        if chain.open and removed(model.first, (), fences.since):
            raise Halted
        there = model.last_on(fence.subject)
        chain.settle_head(0, chain.base, there, others=others or there < fence.sequence)

    def deliver(self, pick: int, *, ack: bool, busy: bool = False) -> None:
        if not self.model.frames:
            return
        epoch, batch, outcome = self.model.deliver(0 if pick < 7 else pick % len(self.model.frames), busy=busy)
        leader = next(each for each in self.leaders if each.epoch == epoch)
        if ack and batch.id in leader.pending and not isinstance(outcome, Unknown):
            leader.outcomes[batch.id] = outcome

    def silence(self, leader: Leader) -> None:
        """Nobody answers: the window is given up; its frames may still arrive."""
        if leader.pending and leader.chain.in_flight:
            leader.chain.learn(Unknown(why="silence"))
        leader.pending.clear()

    def finish(self) -> None:
        """The weather clears: one last leader carries everything out."""
        self.elect(0)
        last = self.leaders[-1]
        for turn in range(900):
            self.work(last)
            while self.model.frames:
                self.deliver(0, ack=True)
            if last.pending and not last.outcomes:
                self.silence(last)
            if len(self.model.marked) + len(self.model.dead) == len(self.model.transactions):
                return
            if turn % 20 == 19:  # whoever waits for the subject to move is freed by any message on it
                self.model.stream += [Message(subject) for subject in SUBJECTS]
        raise AssertionError(f"stuck: {last}")


STEP = st.tuples(
    st.sampled_from(
        [
            "work",
            "work",
            "work",
            "deliver",
            "deliver",
            "lose",
            "silence",
            "elect",
            "drop",
            "foreign",
            "copy",
            "trim",
            "busy",
        ]
    ),
    st.integers(0, 9),
)


def play(model: Model, steps: list[tuple[str, int]]) -> bool:
    """What comes of these steps; False if a leader has halted."""
    packings = [Packing(max_messages=10), Packing(max_messages=4), Packing(one_transaction=True)]
    game, shared = Play(model, packings), model.shared
    try:
        for what, pick in steps:
            leader = game.leaders[-1 - pick % min(3, len(game.leaders))]  # the leader, or one before, thawed
            match what:
                case "work":
                    game.work(leader)
                case "deliver":
                    game.deliver(pick, ack=True)
                case "busy":
                    game.deliver(pick, ack=True, busy=True)
                case "lose":
                    game.deliver(pick, ack=False)
                case "silence":
                    game.silence(leader)
                case "elect":
                    game.elect(pick, sharing=pick > 6)
                case "drop" if model.frames:
                    model.frames.popleft()
                case "foreign":
                    model.stream.append(Message(SUBJECTS[pick % len(SUBJECTS)]))
                case "copy" if ours := [message for message in model.stream if message.position]:
                    copied = ours[pick % len(ours)]
                    model.stream.append(Message(copied.subject, copied.position, copied.number))
                case "trim" if shared:
                    model.first = max(model.first, model.last - pick)
        game.finish()
    except Halted:
        return False
    return True


TRANSACTIONS = st.lists(st.text(SUBJECTS, min_size=1, max_size=4), min_size=1, max_size=12)


@settings(max_examples=1500, deadline=None)
@given(
    TRANSACTIONS,
    st.lists(STEP, max_size=120),
    st.booleans(),
    st.booleans(),
    st.sets(st.integers(1, 12), max_size=2),
    st.sets(st.integers(1, 12), max_size=1),
)
def test_attempts_fenced_by_a_subject_exclude_each_other(
    transactions: list[str],
    steps: list[tuple[str, int]],
    shared: bool,
    forgets: bool,
    bad: set[int],
    twice: set[int],
) -> None:
    """Each transaction whole, once and in order, whoever writes between; or a halt where messages are gone."""
    offenders = frozenset(each for each in bad if each <= len(transactions))
    repeated = frozenset(each for each in twice if each <= len(transactions)) - offenders
    model = Model(transactions, offenders, repeated, forgets=forgets, shared=shared)
    check(model, done=play(model, steps))


def check(model: Model, *, done: bool) -> None:
    """The promises, of what came of a play."""
    ours = [(each.position, each.number) for each in model.stream if each.ours]
    whole = [
        (position, n)
        for position, subjects in enumerate(model.transactions, 1)
        if position not in (model.offenders | model.repeated | (model.fickle & set(model.dead)))
        for n in range(1, len(subjects) + 1)
    ]
    if not done:
        assert ours == whole[: len(ours)]
        assert model.first > 1, "it halts only where messages are gone"
        return
    assert ours == whole
    assert sorted(set(model.dead) - model.fickle) == sorted(model.offenders | model.repeated)
    assert set(model.dead) <= model.offenders | model.repeated | model.fickle
    for position, (first, last) in model.marked.items():
        stored = model.stream[first - 1 : last]
        assert [(each.position, each.number) for each in stored] == [
            (position, n) for n in range(1, len(model.transactions[position - 1]) + 1)
        ]
        assert all(each.ours for each in stored)


ORDINARY = ["work"] * 3 + ["deliver"] * 3 + ["lose", "silence", "elect", "drop", "foreign", "copy", "busy"]
DUEL = ["work"] * 6 + ["deliver"] * 4 + ["silence", "elect", "foreign", "foreign"]


def drawn(seed: int) -> tuple[Model, list[tuple[str, int]]]:
    """A play by chance: small ones, in which few leaders quarrel over few transactions, and longer ones."""
    chance = Random(seed)
    duel = bool(seed % 3)
    subjects = "ab" if duel else SUBJECTS
    size = chance.randint(1, 3 if duel else 8)
    transactions = ["".join(chance.choices(subjects, k=chance.randint(1, 3))) for _ in range(size)]
    one = frozenset({chance.randint(1, size)})
    model = Model(
        transactions,
        offenders=one if chance.random() < 0.15 else frozenset(),
        forgets=chance.random() < 0.7,
        shared=chance.random() < 0.7,
    )
    if not model.offenders and chance.random() < 0.3:
        model.repeated, model.fickle = (one, model.fickle) if chance.random() < 0.4 else (model.repeated, one)
    trims = model.shared and chance.random() < 0.2  # where strangers are not known, what is gone counts as ours
    steps = (DUEL if duel else ORDINARY) + (["trim"] if trims else [])
    return model, [(chance.choice(steps), chance.randint(0, 9)) for _ in range(chance.randint(10, 60 if duel else 120))]


RUNS = int(os.environ.get("OUTBOX_TESTS_RUNS", "4000"))


def test_thousands_of_quarrels() -> None:
    """The same by chance, many times; OUTBOX_TESTS_RUNS says how many."""
    for seed in range(RUNS):
        model, steps = drawn(seed)
        try:
            check(model, done=play(model, steps))
        except AssertionError as error:
            raise AssertionError(f"drawn({seed}): {steps}") from error


def test_verdict_waits_while_an_attempt_is_open() -> None:
    """A packed batch of a former leader comes late, when its head was refused alone: nothing of it is sent again."""
    model = Model(["a", "b"], fickle=frozenset({1}), forgets=True)
    alone = [("deliver", 7), ("work", 0), ("work", 0)]
    steps = [("work", 0), ("work", 0), ("elect", 2), ("work", 0), ("work", 0), *alone * 4, ("deliver", 0)]
    check(model, done=play(model, steps))
    assert [(each.position, each.number) for each in model.stream if each.ours] == [(1, 1), (2, 1)]
    assert not model.dead


@pytest.mark.parametrize(
    "ack",
    [
        Stored(stream="T", sequence=9, batch="b-2", count=2),
        Stored(stream="S", sequence=9, batch="other", count=2),
        Stored(stream="S", sequence=9, batch="b-2", count=1),
        Stored(stream="S", sequence=1, batch="b-2", count=2),
    ],
    ids=["another stream", "another batch", "another count", "before what is settled"],
)
def test_ack_is_of_this_very_batch(ack: Stored) -> None:
    chain = Chain(stream="S", created="x", packing=Packing(), base=3, shared=True, fencible=True)
    chain.settle(0, 3)
    chain.join(transaction(1, "ab"))
    chain.extend()
    assert chain.fences is not None
    assert chain.fences.wanted == ["a"]
    chain.fences.learn({"a": 2})
    chain.extend()
    chain.written()
    (batch,) = chain.launch(iter("b"))
    assert batch.id == "b-2"
    chain.learn(ack)
    assert chain.in_doubt
    assert chain.unanswered == {1}
    assert not chain.receipts


def test_what_was_asked_for_another_head_moves_no_fence() -> None:
    """It may be a rival's message of this very head that was last there."""
    fences = Fences(since=2, heads={2: Fence(position=2, subject="b", sequence=2)})
    fences.learn({"b": 4})
    fences.stored(3, [transaction(1, "a")])
    assert fences.heads[2].sequence == 2
    fences.heads[3] = Fence(position=3, subject="a", sequence=3)
    fences.stored(5, [transaction(2, "ba")])
    assert fences.heads[3].sequence == 6


def test_stream_that_removes_is_fenced_by_a_subject_that_is_not_empty() -> None:
    fences = Fences(since=0)
    head = transaction(1, "ab")
    assert fences.choose(head, removes=True) is None
    assert fences.wanted == ["a", "b"]
    fences.learn({"a": 0, "b": 4})
    assert fences.choose(head, removes=True) == Fence(position=1, subject="b", sequence=4)


def test_dead_letter_is_no_head_any_more() -> None:
    heads = {1: Fence(position=1, subject="a", sequence=0)}
    chain = Chain(stream="S", created="x", packing=Packing(), base=0, shared=True, fencible=True)
    chain.restore([Planned(position=1, count=1, last_message_id=message_id(1, 1))], Fences(since=0, heads=heads))
    chain.settle_head(0, 0, 3, others=True)
    chain.load([transaction(1, "a")], [Verdict(position=1, reason=DeadReason.WRONG_COUNT, detail="x")])
    assert chain.fences is not None
    chain.fences.former.clear()
    chain.unanswered.clear()
    assert chain.condemn_spoiled()
    assert (chain.fences.heads, chain.unanswered) == ({}, set())


@given(st.text(SUBJECTS, min_size=1, max_size=4), st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 3))
def test_frames_that_were_made_before_are_those_of_the_batch(subjects: str, old: int, new: int, which: int) -> None:
    subject = subjects[which % len(subjects)]
    before, batch = (
        Batch(
            id="b-1",
            stream="S",
            base=0,
            transactions=(transaction(1, subjects), transaction(2, "ab")),
            fence=Fence(position=1, subject=subject, sequence=sequence),
        )
        for sequence in (old, new)
    )
    assert refenced(frames(before, OUTBOX, "inbox"), before, batch) == frames(batch, OUTBOX, "inbox")


def test_fence_is_on_the_first_message_with_its_subject() -> None:
    batch = Batch(
        id="b-3",
        stream="S",
        base=0,
        transactions=(transaction(1, "aba"),),
        fence=Fence(position=1, subject="b", sequence=7),
    )
    pieces, _ = frames(batch, OUTBOX, "inbox")
    messages = [b"".join(pieces[n : n + 3]).decode() for n in range(0, 9, 3)]
    assert ["Nats-Expected-Last-Subject-Sequence: 7\r\n" in each for each in messages] == [False, True, False]
    assert ["Nats-Expected-Stream: S\r\n" in each for each in messages] == [True, False, False]
    assert not any("Nats-Expected-Last-Sequence" in each for each in messages)
