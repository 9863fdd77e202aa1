"""Promises 1 to 3 in the pure heart: chains of rival leaders against a model of an atomic stream.

The model stores a batch whole, and only where it is expected; it loses acks, delays frames, and lets batches of a
deposed leader arrive late. The leaders share a database row: the plan, written under an epoch.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from itertools import count
from uuid import UUID

from hypothesis import example, given, settings
from hypothesis import strategies as st

from outbox.core.batch import Batch, Packing, frames, take
from outbox.core.chain import Chain
from outbox.core.outcome import Rejected, Stored, Unknown
from outbox.core.plan import Planned, Seen, judge, wanted
from outbox.core.transaction import Transaction
from outbox.event import Event

OUTBOX = "outbox"


def transaction(position: int, size: int) -> Transaction:
    events = tuple(
        Event(message_id=str(UUID(int=position * 1000 + n)), subject="a", payload=b"", headers={}) for n in range(size)
    )
    return Transaction.of(position, events)


@dataclass
class Model:
    """The stream, the database, and the frames on their way."""

    sizes: list[int]
    room: int = 1 << 30  # a batch of more messages is refused
    offenders: frozenset[int] = frozenset()  # a batch with one of them is refused
    killers: frozenset[int] = frozenset()  # one with one of these ends the connection
    stream: list[tuple[int, int] | None] = field(default_factory=list)  # position and number; None is foreign
    epoch: int = 0
    base: int = 0
    plan: list[int] = field(default_factory=list)
    shared: bool = False
    marked: dict[int, tuple[int, int]] = field(default_factory=dict)
    dead: list[int] = field(default_factory=list)
    read: int = 0
    frames: deque[tuple[int, Batch]] = field(default_factory=deque)
    ids: count[int] = field(default_factory=count)

    def deliver(self, index: int) -> tuple[int, Batch, Stored | Rejected | None]:
        self.frames.rotate(-index)
        leader, batch = self.frames.popleft()
        self.frames.rotate(index if index <= len(self.frames) else 0)
        if self.killers & {t.position for t in batch.transactions}:
            self.frames = deque(each for each in self.frames if each[0] != leader)
            return leader, batch, None
        if batch.base != len(self.stream):
            return leader, batch, Rejected(code=10071, description="wrong last sequence")
        if self.offenders & {t.position for t in batch.transactions}:
            return leader, batch, Rejected(code=10166, description="per-message TTL is disabled")
        if batch.count > self.room:
            return leader, batch, Rejected(code=10077, description="maximum messages exceeded")
        self.stream += [(t.position, n) for t in batch.transactions for n in range(1, t.count + 1)]
        return leader, batch, Stored(stream="S", sequence=len(self.stream))

    def seen(self, place: int) -> Seen:
        there = self.stream[place - 1]
        if there is None:
            return Seen(outbox_id=None, message_id=None, position=None, number=None)
        position, number = there
        message_id = str(UUID(int=position * 1000 + number - 1))
        return Seen(outbox_id=OUTBOX, message_id=message_id, position=position, number=number)


@dataclass
class Leader:
    epoch: int
    chain: Chain
    outcomes: dict[str, Stored | Rejected] = field(default_factory=dict)
    pending: list[str] = field(default_factory=list)


class Play:
    """Leaders take turns; every step is one thing that can happen."""

    def __init__(self, model: Model, packings: list[Packing]) -> None:
        self.model = model
        self.packings = packings
        self.leaders: list[Leader] = []
        self.elect(0)

    def elect(self, pick: int) -> None:
        model = self.model
        model.epoch += 1
        chain = Chain(
            stream="S",
            created="x",
            packing=self.packings[pick % len(self.packings)],
            base=model.base,
            shared=model.shared,
        )
        loaded = [transaction(p, model.sizes[p - 1]) for p in model.plan]
        chain.restore([Planned(position=t.position, count=t.count, last_message_id=t.message_ids[-1]) for t in loaded])
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
        model.read = max([model.read, *model.plan, *model.dead])
        chain.written()
        return True

    def work(self, leader: Leader) -> None:
        """One round of the leader's loop."""
        chain = leader.chain
        while leader.pending and leader.pending[0] in leader.outcomes:
            chain.learn(leader.outcomes[leader.pending.pop(0)])
            if chain.in_doubt:
                leader.pending.clear()
        if chain.in_doubt and not (chain.suspects and self.model.frames):  # a verdict waits until none can arrive
            self.settle(leader)
        # Sometimes one by one, as a careful leader does.
        unloaded = chain.unloaded[: 1 if leader.epoch % 3 == 0 else None]
        chain.load(transaction(each.position, each.count) for each in unloaded)
        while len(chain.waiting) < 6 and leader.epoch == self.model.epoch:
            held = [t.position for t in (*chain.waiting, *chain.plan)]
            following = max([self.model.read, *held]) + 1
            if following > len(self.model.sizes):
                break
            chain.join(transaction(following, self.model.sizes[following - 1]))
        self.send(leader)  # what is committed need not wait for the next commit
        chain.extend()
        if chain.dirty and not self.commit(leader):
            return
        self.send(leader)
        inside = [*chain.waiting, *chain.plan]
        assert (chain.messages, chain.size) == (sum(t.count for t in inside), sum(t.size for t in inside))
        assert chain.in_doubt or not any(isinstance(each, Planned) for each in chain.planned) or chain.unloaded

    def send(self, leader: Leader) -> None:
        for batch in leader.chain.launch(str(n) for n in self.model.ids):
            leader.pending.append(batch.id)
            self.model.frames.append((leader.epoch, batch))

    def settle(self, leader: Leader) -> None:
        chain, last = leader.chain, len(self.model.stream)
        plan = chain.entries()
        seen = {place: self.model.seen(place) for place in wanted(chain.base, plan, last)}
        finding = judge(
            outbox_id=OUTBOX,
            shared=chain.shared,
            unanswered=chain.unanswered,
            base=chain.base,
            plan=plan,
            last=last,
            seen=seen,
        )
        if finding.look.name in ("IMPOSTOR", "APPLYING"):
            assert leader.epoch != self.model.epoch, "only a newer leader's work can look like that"
            return
        assert finding.look.name in ("SETTLED", "FOREIGN"), finding
        chain.settle(finding.stored, last, foreign=finding.look.name == "FOREIGN")

    def deliver(self, pick: int, *, ack: bool) -> None:
        if not self.model.frames:
            return
        epoch, batch, outcome = self.model.deliver(0 if pick < 8 else pick % len(self.model.frames))
        leader = next(each for each in self.leaders if each.epoch == epoch)
        if outcome is None:
            if leader.pending and leader.chain.in_flight:
                leader.chain.hung_up("the server hung up", certain=True)
            leader.pending.clear()
            return
        if ack and batch.id in leader.pending:
            leader.outcomes[batch.id] = outcome

    def silence(self, leader: Leader) -> None:
        """Nobody answers: the window is given up; its frames may still arrive."""
        if leader.pending:
            leader.chain.learn(Unknown(why="silence"))
            leader.pending.clear()

    def finish(self) -> None:
        """The weather clears: one last leader carries everything out."""
        self.elect(0)
        last = self.leaders[-1]
        for _ in range(800):
            self.work(last)
            while self.model.frames:
                self.deliver(0, ack=True)
            if len(self.model.marked) + len(self.model.dead) == len(self.model.sizes):
                return
        raise AssertionError(f"stuck: {last}")


STEP = st.tuples(
    st.sampled_from(["work", "work", "deliver", "deliver", "lose", "silence", "elect", "drop", "foreign"]),
    st.integers(0, 9),
)


@settings(max_examples=400, deadline=None)
# One foreign message in the place of a single-event batch would let the next batch in flight fit.
@example([1, 1], [("elect", 2), ("work", 0), ("foreign", 0)], True, 12, set(), set())
# A leader that was replaced finds its transaction behind a foreign message, where its successor has put it.
@example(
    [1],
    [(each, 0) for each in ["work", "elect", "foreign", "work", "deliver", "deliver"]] + [("work", 1)],
    True,
    12,
    set(),
    set(),
)
# Behind a dead letter those that follow move up, where an old batch with them would fit.
@example(
    [1] * 6,
    [
        *[("elect", 2), ("work", 0), ("drop", 0), ("elect", 0)],
        *[("work", 0), ("deliver", 9)] * 3,
        *[("work", 0), ("deliver", 8)] * 2,
    ],
    False,
    12,
    {2},
    set(),
)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=25),
    st.lists(STEP, max_size=120),
    st.booleans(),
    st.integers(4, 12),
    st.sets(st.integers(1, 25), max_size=3),
    st.sets(st.integers(1, 25), max_size=2),
)
def test_rival_leaders_keep_every_transaction_whole_once_and_in_order(
    sizes: list[int], steps: list[tuple[str, int]], foreigners: bool, room: int, bad: set[int], killing: set[int]
) -> None:
    """The stream has room for any one transaction and not for any pack, and refuses a pack with an offender in it.

    And the server hangs up over some.
    """
    killers = frozenset(each for each in killing if each <= len(sizes))
    offenders = frozenset(each for each in bad if each <= len(sizes)) - killers
    # Alone in the stream anything may be pipelined; with foreigners only behind what they will not match by chance.
    behind = 1000 if foreigners else 0
    packings = [Packing(max_messages=10), Packing(max_messages=4), Packing(one_transaction=True)]
    model = Model(sizes, room, offenders, killers)
    play = Play(model, [replace(packing, pipeline_behind=behind) for packing in packings])
    for what, pick in steps:
        leader = play.leaders[-1 - pick % min(2, len(play.leaders))]  # the leader, or the one before, thawed
        match what:
            case "work":
                play.work(leader)
            case "deliver":
                play.deliver(pick, ack=True)
            case "lose":
                play.deliver(pick, ack=False)
            case "silence":
                play.silence(leader)
            case "elect":
                play.elect(pick)
            case "drop" if play.model.frames:
                play.model.frames.popleft()
            case "foreign" if foreigners:
                play.model.stream.append(None)
    play.finish()
    ours = [there for there in play.model.stream if there is not None]
    wanted = [(position, n) for position, size in enumerate(sizes, 1) for n in range(1, size + 1)]
    assert ours == [(position, n) for position, n in wanted if position not in offenders | killers]
    assert sorted(play.model.dead) == sorted(offenders | killers)
    for position, (first, last) in play.model.marked.items():
        assert [there for there in play.model.stream[first - 1 : last] if there] == [
            (position, n) for n in range(1, sizes[position - 1] + 1)
        ]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=30), st.integers(1, 20), st.booleans())
def test_packing_keeps_transactions_whole_and_in_order(sizes: list[int], most: int, single: bool) -> None:
    queue = deque(transaction(position, size) for position, size in enumerate(sizes, 1))
    order = []
    while queue:
        taken = take(queue, Packing(max_messages=most, one_transaction=single))
        assert taken
        assert len(taken) == 1 or sum(t.count for t in taken) <= most
        order += [t.position for t in taken]
        for _ in taken:
            queue.popleft()
    assert order == list(range(1, len(sizes) + 1))


def test_nothing_is_sent_before_its_plan_is_committed_or_while_in_doubt() -> None:
    chain = Chain(stream="S", created="x", packing=Packing(), base=0)
    chain.join(transaction(1, 2))
    chain.extend()
    assert chain.plan == []  # in doubt: nothing joins
    chain.settle(0, 0)
    chain.extend()
    assert chain.dirty
    assert chain.launch(iter("a")) == []
    chain.written()
    chain.doubt("a doubt between the commit and the sending")
    assert chain.launch(iter("a")) == []
    chain.settle(0, 0)
    assert [batch.count for batch in chain.launch(iter("a"))] == [2]


def test_only_the_first_batch_in_flight_can_have_been_refused_in_so_many_words() -> None:
    chain = Chain(stream="S", created="x", packing=Packing(max_messages=2, pipeline_behind=0), base=0)
    chain.settle(0, 0)
    for position in (1, 2, 3):
        chain.join(transaction(position, 2))
    chain.extend()
    chain.written()
    assert len(chain.launch(iter("ab"))) == 2  # the third waits for company
    chain.learn(Rejected(code=10167, description="unsupported"))
    assert chain.unanswered == {2}


def test_restored_plan_counts_its_bytes_and_is_loaded_in_parts() -> None:
    chain = Chain(stream="S", created="x", packing=Packing(max_bytes=100), base=0)
    sizes = enumerate([150, 40, 60, 1], 1)
    chain.restore([Planned(position=n, count=1, last_message_id=str(n), size=size) for n, size in sizes])
    assert (chain.messages, chain.size) == (4, 251)
    chain.settle(0, 0)
    assert [each.position for each in chain.unloaded] == [1]
    chain.load([transaction(1, 1)])
    assert [each.position for each in chain.unloaded] == [2, 3]
    chain.load([transaction(2, 1), transaction(3, 1)])
    assert [each.position for each in chain.unloaded] == [4]
    chain.load([transaction(4, 1)])
    assert chain.unloaded == []
    assert chain.size == sum(each.size for each in chain.planned)


def read(frame: bytes) -> tuple[str, dict[str, str], bytes]:
    """A frame as nats-server reads it: the command, the first of each header, the payload."""
    command, _, rest = frame.partition(b"\r\n")
    *_, head, total = command.split()
    lines = rest[: int(head)].decode().split("\r\n")
    assert lines[0] == "NATS/1.0"
    assert lines[-2:] == ["", ""]
    assert rest[int(total) :] == b"\r\n"
    headers: dict[str, str] = {}
    for name, _, value in (line.partition(": ") for line in lines[1:-2]):
        headers.setdefault(name, value)
    return command.decode(), headers, rest[int(head) : int(total)]


def on_the_wire(batch: Batch) -> list[bytes]:
    pieces = frames(batch, OUTBOX, "inbox").pieces
    return [b"".join(pieces[start : start + 3]) for start in range(0, len(pieces), 3)]


def test_messages_of_a_batch_carry_the_fence_once_and_the_boundary_always() -> None:
    batch = Batch(id="b", stream="S", base=7, transactions=(transaction(1, 2), transaction(2, 1)))
    read_back = [read(frame) for frame in on_the_wire(batch)]
    headers = [each for _, each, _ in read_back]
    assert [h.get("Nats-Expected-Last-Sequence") for h in headers] == ["7", None, None]
    assert [h.get("Nats-Expected-Stream") for h in headers] == ["S", None, None]
    assert [h["Nats-Batch-Id"] for h in headers] == ["b", "b", "b"]
    assert [h["Nats-Batch-Sequence"] for h in headers] == ["1", "2", "3"]
    assert [h.get("Nats-Batch-Commit") for h in headers] == [None, None, "1"]
    assert [h["Nats-Msg-Id"] for h in headers] == [e.message_id for t in batch.transactions for e in t.events]
    assert [
        (h["Outbox-Transaction"], h["Outbox-Transaction-Sequence"], h["Outbox-Transaction-Count"]) for h in headers
    ] == [("1", "1", "2"), ("1", "2", "2"), ("2", "1", "1")]
    assert ["inbox" in command for command, _, _ in read_back] == [False, False, True]
    careful = on_the_wire(replace(batch, careful=True))
    assert all(read(frame)[0].split()[2] == "inbox" for frame in careful)
    alone = replace(batch, transactions=(transaction(3, 1),))
    (frame,) = on_the_wire(alone)
    _, only, _ = read(frame)
    assert not [name for name in only if name.startswith("Nats-Batch")]
    assert only["Nats-Expected-Last-Sequence"] == "7"


@given(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters=" \t\r\n\0"), min_size=1, max_size=40),
    st.binary(max_size=100),
    st.dictionaries(
        st.from_regex(r"[A-Za-z][A-Za-z0-9-]{0,15}", fullmatch=True),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
    ),
)
def test_frames_say_what_the_event_says_and_no_header_gets_out_of_its_line(
    subject: str, payload: bytes, given_headers: dict[str, str]
) -> None:
    event = Event(message_id="m", subject=subject, payload=payload, headers=given_headers)
    batch = Batch(id="b", stream="S", base=7, transactions=(Transaction.of(1, (event,)),))
    pieces, (size,) = frames(batch, OUTBOX, "inbox")
    frame = b"".join(pieces)
    command, headers, stored = read(frame)
    assert command.split(" ")[1] == subject
    assert stored == payload
    assert size == int(command.split(" ")[-1])
    ours = {"Nats-Msg-Id": "m", "Outbox-Id": OUTBOX, "Nats-Expected-Last-Sequence": "7", "Outbox-Transaction": "1"}
    assert ours.items() <= headers.items()
    for name, value in given_headers.items():
        assert headers[name] in (ours.get(name), value.strip().replace("\r", " ").replace("\n", " ")), name
