"""The chain of one stream: what waits, what is planned, what is in flight, what is stored and not yet marked.

Pure: no IO, no clock; the leader does what the chain says. The invariant: a batch is sent only when the plan that was
committed last holds its transactions at that very place, and while the chain is in doubt nothing is sent. After any
failure the window is forgotten and the plan is settled against the stream; only then do new transactions join. The plan
reaches further than the window, so that what is acked makes room for what is committed already.

Where others write too, a head has a fence instead of a place, and one batch is in flight: see `outbox.core.fence`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain, islice
from typing import assert_never

from outbox.core.batch import COUNT, POSITION, SIZE, Batch, Packing, receipts, take
from outbox.core.fence import Fence, Fences, numbered
from outbox.core.outcome import (
    BATCH_INCOMPLETE,
    BATCH_TOO_LARGE,
    CUT,
    DUPLICATE_ID,
    IN_PROCESS,
    REASONS,
    ROOM,
    STREAM_FULL,
    Duplicate,
    Meaning,
    Outcome,
    Rejected,
    Stored,
    Unknown,
    meaning,
)
from outbox.core.parts import Part
from outbox.core.plan import Planned
from outbox.core.positions import Range, merged
from outbox.core.transaction import DeadReason, Receipt, Transaction, Verdict

CHAINED, SHARED = "chained", "shared"
UNSURE = "it can never be sent, but an attempt at it may still be stored: any message on the subject of its fence tells"
HANG_UPS, SILENT_HANG_UPS = 3, 5  # in a row that are no chance; more where nobody said why
AHEAD = 1.5  # how far the plan reaches, in windows
FENCED_AHEAD = 2  # and in batches, where one is in flight
MOVES = 32  # times that a fence has moved, after which that is written down
# Every attempt would meet these refusals, also one that nobody has answered yet.
FOR_ALL = frozenset(
    {
        DeadReason.MESSAGE_TOO_LARGE,
        DeadReason.HEADERS_TOO_LARGE,
        DeadReason.ROLLUP_NOT_PERMITTED,
        DeadReason.INVALID_TTL,
        DeadReason.TTL_NOT_PERMITTED,
    }
)


@dataclass(slots=True, kw_only=True)
class Chain:
    """One stream's chain. `base` is the sequence up to which everything is settled; `in_doubt` says why to look."""

    stream: str
    created: str
    packing: Packing
    base: int
    window: int = 8
    shared: bool = False
    never_shared: bool = False  # an operator says that nobody else writes here
    fencible: bool = False  # the stream lets a fence be by subject, as it is configured now
    removes: bool = False  # and what is old goes
    fences: Fences | None = None  # of the plan; None: its fence is the stream's last sequence
    in_doubt: str | None = "a new leader looks first"
    blocked: str | None = None
    waiting: deque[Transaction] = field(default_factory=deque)
    planned: deque[Planned | Transaction] = field(default_factory=deque)
    in_flight: deque[Batch] = field(default_factory=deque)
    receipts: list[Receipt] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    dirty: bool = False
    messages: int = 0  # of all that waits, is planned or is in flight
    size: int = 0  # and their bytes
    _unwritten: int = 0  # how many transactions at the end of the plan are not in the committed one, at that place
    unanswered: set[int] = field(default_factory=set)  # an attempt without an answer may store these, even late
    _alone: set[int] = field(default_factory=set)
    _upcoming: Batch | None = None  # what comes next, as far as one can tell
    _careful: bool = False
    squeezed: bool = False  # the last refusal was of a pack: half of it may go out at once
    no_room: int = 0  # the position of a transaction that was refused alone just now, because the stream is full
    _too_many: int = 0  # messages of a batch: for the stream's room, for an offender in it, or between two foreign ones
    _hang_ups: int = 0  # connections that ended while something was in flight, since all was well
    _deaths_alone: int = 0  # those of them with the head alone
    _suspected: Verdict | None = None
    _held: list[Range] = field(default_factory=list)
    _held_of: tuple[int, int, int] | None = None
    unsure: bool = False  # the head can never be sent, and yet may be stored
    told: int | None = None  # the last sequence that a refusal has told of the fence's subject, since all was well
    placed: tuple[int, str] | None = None  # where the first message with a fence is by its ack, and its subject
    checked: bool = False  # in this term: subjects are stored as they are sent
    _spoiled: dict[int, Verdict] = field(default_factory=dict)  # planned ones whose events do not fit
    _unloaded: int = 0  # how many planned transactions have no events yet

    @property
    def plan(self) -> list[Planned | Transaction]:
        """Everything that may be in flight, in order: the first of it follows the sequence `base`."""
        return [*chain.from_iterable(batch.transactions for batch in self.in_flight), *self.planned]

    @property
    def unloaded(self) -> list[Planned]:
        """What a former leader planned and this one is to load next, now that it is known not to be stored."""
        if self.in_doubt or not self._unloaded:
            return []
        planned = [each for each in self.planned if isinstance(each, Planned) and each.position not in self._spoiled]
        sizes = accumulate(map(SIZE, planned))
        most = self.packing.max_bytes
        return [each for each, size in zip(planned, sizes, strict=True) if each is planned[0] or size <= most]

    @property
    def ready(self) -> Iterator[Transaction]:
        """The head of the plan, as far as it is committed and its events are at hand; nothing while in doubt."""
        if self.in_doubt or (self.fences is not None and self._fence is None):
            return
        for each in islice(self.planned, len(self.planned) - self._unwritten):
            if isinstance(each, Planned):
                return
            yield each

    def block(self, why: str) -> None:
        """Say what holds this stream back, for the status."""
        self.dirty = self.dirty or self.blocked != why
        self.blocked = why

    def unblock(self) -> None:
        """Nothing holds it back any more."""
        self.dirty = self.dirty or self.blocked is not None
        self.blocked = None

    def join(self, transaction: Transaction) -> None:
        """One more that waits."""
        self.waiting.append(transaction)
        self.messages += transaction.count
        self.size += transaction.size

    def restore(self, plan: Sequence[Planned], fences: Fences | None = None) -> None:
        """Take over what a former leader planned, and may have sent. Its commit may not be durable: commit it again."""
        self.planned.extend(plan)
        self._unloaded = len(plan)
        self._count(plan)
        self.fences = fences
        self.unanswered = {each.position for each in plan if fences is None or each.position in fences.heads}
        self._replan()

    def load(self, transactions: Iterable[Transaction], spoiled: Iterable[Verdict] = ()) -> None:
        """Take in planned transactions with their events, and verdicts on those that cannot be loaded."""
        self._spoiled |= {verdict.position: verdict for verdict in spoiled}
        loaded = {transaction.position: transaction for transaction in transactions}
        before, self.planned = self.planned, deque(loaded.get(each.position, each) for each in self.planned)
        self._unloaded = sum(isinstance(each, Planned) for each in self.planned)
        self.size += sum(map(SIZE, self.planned)) - sum(map(SIZE, before))

    def condemn(self, verdict: Verdict) -> None:
        """Take the head out of the plan, which is settled up to it: it can never be sent."""
        self.verdicts.append(verdict)
        self._hang_ups = self._deaths_alone = 0
        self._gone([self.planned.popleft()])
        self._replan()

    def condemn_spoiled(self) -> bool:
        """Take the head out of the plan if it could not be loaded, and nothing is in flight before it; True if so."""
        if self.in_doubt or self.in_flight or not self.planned or self.planned[0].position not in self._spoiled:
            return False
        if self.open and self._spoiled[self.planned[0].position].reason not in FOR_ALL:
            self.unsure = True
            self.doubt(UNSURE)
            return False
        self.condemn(self._spoiled.pop(self.planned[0].position))
        return True

    @property
    def open(self) -> bool:
        """True if an attempt at the head may still be stored, wherever its fence is: no verdict on it is safe."""
        return self.fences is not None and bool(self.planned) and self.planned[0].position in self.unanswered

    @property
    def suspects(self) -> bool:
        """True if reading the stream back convicts a transaction, unless it is found there."""
        return self._suspected is not None

    @property
    def tip(self) -> int:
        """The predicted last sequence of the stream when all that is in flight is stored."""
        return self.in_flight[-1].last_sequence if self.in_flight else self.base

    @property
    def idle(self) -> bool:
        """True if nothing waits, flies or needs to be written down."""
        return not (self.waiting or self.planned or self.in_flight or self.dirty)

    def held(self) -> list[Range]:
        """The positions that wait, as ranges; told anew only when one has come or gone."""
        known = (len(self.waiting), self.waiting[0].position, self.waiting[-1].position) if self.waiting else None
        if known != self._held_of:
            self._held_of, self._held = known, merged((each.position, each.position) for each in self.waiting)
        return self._held

    def planned_between(self) -> list[Range]:
        """Between which positions all lies that is planned or in flight; none if nothing is."""
        positions = list(map(POSITION, self.plan))
        return [(min(positions), max(positions))] if positions else []

    def entries(self) -> list[Planned]:
        """The plan as it is judged against the stream."""
        return [
            each
            if isinstance(each, Planned)
            else Planned(
                position=each.position,
                count=each.count,
                last_message_id=each.message_ids[-1],
                part=each.row.part if isinstance(each, Part) else 0,
            )
            for each in self.plan
        ]

    def extend(self) -> None:
        """Let waiting transactions join the plan, as far as the window has room. Nothing joins a chain in doubt."""
        self._choose_fence()
        if not self.waiting or self.in_doubt or (self._one_by_one and self.plan):
            return
        ahead = AHEAD * self.window if self.fences is None else FENCED_AHEAD
        room = ahead - len(self.in_flight) - self._planned_batches()
        while room > 0 and self.waiting:
            joined = take(self.waiting, self.packing)
            full = len(joined) < len(self.waiting)
            if (self.in_flight or self.planned) and not full:
                return  # wait for more: nothing is sent behind a small batch, and a full one costs the server the same
            if self.fences is not None and self.fences.choose(joined[0], removes=self.removes) is None:
                return  # until the last sequence on its subject is known
            for _ in joined:
                self.planned.append(self.waiting.popleft())
            self._unwritten += len(joined)
            self.dirty = True
            room -= 1
            if not full or self._one_by_one:
                return

    @property
    def _one_by_one(self) -> bool:
        """True if a batch is planned only when the one before is settled."""
        return bool(self._alone) or (self.shared and self.fences is None)

    def _choose_fence(self) -> None:
        """The kind of fence, which changes only while nothing is open; and a fence for a head that has none."""
        wanted = self.shared and self.fencible
        if not (self.in_doubt or self.in_flight or self.unanswered):
            if self.fences is not None and not wanted:
                self.fences = None
                self._replan()
                self.doubt("the fence is the stream's last sequence from here on")
            elif self.fences is None and wanted:
                self.fences = Fences(since=self.base)
        head = self.planned[0] if self.planned and not (self.in_flight or self.in_doubt) else None
        if self.fences is None or not isinstance(head, Transaction) or head.position in self.fences.heads:
            return
        if self.fences.choose(head, removes=self.removes) is not None:
            self._replan()

    def launch(self, make_id: Iterable[str]) -> list[Batch]:
        """The batches to send now, in order, as far as the plan is committed; they are in flight from here on."""
        launched: list[Batch] = []
        ids = iter(make_id)
        while self.planned and not self.in_doubt and self._fenced:
            alone = self.planned[0].position in self._alone
            if self.in_flight and (alone or not self._may_pipeline()):
                break
            packing = replace(self.packing, one_transaction=True) if alone else self._packing()
            taken = take(self.ready, packing)
            if not taken:
                break
            batch = self._batch(ids, taken, careful=self._careful or alone)
            for _ in taken:
                self.planned.popleft()
            self.in_flight.append(batch)
            launched.append(batch)
        return launched

    @property
    def _fence(self) -> Fence | None:
        return self.fences.heads.get(self.planned[0].position) if self.fences is not None and self.planned else None

    @property
    def _fenced(self) -> bool:
        """True if the head has the fence that it needs, and this leader may use it."""
        return self.fences is None or (self._fence is not None and not self.fences.unconfirmed)

    def upcoming(self, make_id: Iterable[str]) -> Batch | None:
        """The batch that comes behind the one in flight, if that is stored: to be made ready meanwhile; once."""
        if self.fences is None or not self.in_flight or self._upcoming is not None:
            return None
        if not (taken := take(self.ready, self._packing())):
            return None
        self._upcoming = self._batch(make_id, taken, careful=self._careful)
        return self._upcoming

    def _batch(self, make_id: Iterable[str], taken: Sequence[Transaction], *, careful: bool) -> Batch:
        made, self._upcoming = self._upcoming, None
        these = tuple(taken)
        if self.fences is not None and made is not None and (made.transactions, made.careful) == (these, careful):
            return replace(made, base=self.tip, fence=self._fence)
        attempt = next(iter(make_id))
        return Batch(
            id=attempt if self.fences is None else f"{attempt}-{sum(map(COUNT, taken))}",
            stream=self.stream,
            base=self.tip,
            transactions=these,
            careful=careful,
            fence=self._fence,
        )

    def _planned_batches(self) -> float:
        """How many batches the plan makes that are not in flight, about."""
        if self.packing.one_transaction:
            return len(self.planned)
        messages: int = sum(map(COUNT, self.planned))
        return messages / self.packing.max_messages

    def _packing(self) -> Packing:
        """Half a batch after one that was refused as a whole, or that a foreign message has crossed."""
        return replace(self.packing, max_messages=max(1, self._too_many // 2)) if self._too_many else self.packing

    def _may_pipeline(self) -> bool:
        """True if a batch may be sent behind the last one in flight; see `Packing.pipeline_behind`."""
        large = self.in_flight[-1].count >= self.packing.pipeline_behind
        return large and not self.wary and not self.shared and not self._alone and len(self.in_flight) < self.window

    def learn(self, outcome: Outcome) -> None:
        """Take in the outcome of the oldest batch in flight."""
        batch = self.in_flight[0]
        self.squeezed, self.no_room, self.told = False, 0, None
        if not isinstance(outcome, Unknown):
            self._deaths_alone = 0  # it was read, and the connection stands
        match outcome:
            case Stored() if self._fits(batch, outcome):
                self.in_flight.popleft()
                self._place(batch, outcome.sequence - batch.count)
                self._stored(batch.transactions, outcome.sequence - batch.count)
                self._careful = False
                self.unblock()
                self._too_many = 0 if 2 * self._too_many > self.packing.max_messages else 2 * self._too_many
                self._hang_ups = self._hang_ups if self._too_many else 0
                if self.shared and self.fences is None:
                    self.doubt("the stream has other writers: look before each batch")
            case Stored():
                self.learn_nothing(f"the ack says {outcome.stream} {outcome.sequence}, not {batch.last_sequence}")
            case Rejected() if meaning(outcome) is Meaning.OFFENCE:
                self._offence(batch, outcome)
            case Duplicate():
                self._offence(
                    batch, Rejected(code=DUPLICATE_ID, description=f"message id is stored at {outcome.sequence}")
                )
            case Rejected() if self._crossed(batch, outcome):
                pass
            case Rejected():
                self.told = outcome.sequence
                self._rejected(batch, outcome)
            case Unknown():
                self.learn_nothing(outcome.why)
            case _:
                assert_never(outcome)

    def _fits(self, batch: Batch, stored: Stored) -> bool:
        """True if the ack is of this very batch."""
        if self.fences is None:
            return stored.stream == self.stream and stored.sequence == batch.last_sequence
        of_batch = (batch.id, batch.count) if batch.count > 1 else (None, 1)
        beyond = stored.sequence - batch.count >= self.fences.since
        return stored.stream == self.stream and (stored.batch, stored.count) == of_batch and beyond

    def _place(self, batch: Batch, base: int) -> None:
        """After the first ack of a term look at the message: a subject that is stored as another one fences nothing."""
        if batch.fence is not None and not self.checked:
            self.placed = base + numbered(batch.transactions[0], batch.fence.subject), batch.fence.subject
            self.doubt("whether subjects are stored as they are sent")

    def _stored(self, these: Sequence[Planned | Transaction], base: int) -> None:
        """These are stored, one behind the other, behind the sequence `base`."""
        self.receipts += receipts(self.stream, base, these)
        if self.fences is not None:
            self.fences.stored(base + 1, these)
        self._gone(these)
        self.base = base + sum(map(COUNT, these))
        self.dirty = True

    def _crossed(self, batch: Batch, outcome: Rejected) -> bool:
        """Take in that others have written to the subject of the fence; False if that is not all there is to it.

        While an attempt is open, a refusal says nothing: it may be due to that one.
        """
        fences, head = self.fences, batch.transactions[0]
        if fences is None or head.position in self.unanswered or batch.fence is None:
            return False
        if outcome.code != IN_PROCESS and (outcome.sequence or 0) <= batch.fence.sequence:
            return False
        self._too_many = min(batch.count, self._too_many or batch.count)
        self.told = outcome.sequence
        self.doubt(str(outcome))  # what is in between is read: it is others', or a rival's who takes the lead elsewhere
        if not fences.refused(head):
            self._replan()
        return True

    @property
    def unconfirmed(self) -> bool:
        """True if nothing is sent before this leader has shown that it leads still."""
        return self.fences is not None and self.fences.unconfirmed and not self.in_doubt and not self.in_flight

    def confirm(self) -> None:
        """This leader has led still when the last refusal had come: no other one's work is behind it."""
        if self.fences is not None:
            self.fences.unconfirmed = False

    def _rejected(self, batch: Batch, outcome: Rejected) -> None:
        # In a shared stream what is gone would then be taken for ours: there a limit that cuts is left to the look.
        if outcome.code in CUT or (outcome.code == STREAM_FULL and batch.count > 1 and not self.shared):
            self._unanswered_by([batch])
        # Only the last message asks for a reply, so the cause of an incomplete batch was told to nobody.
        self._careful = self._careful or outcome.code == BATCH_INCOMPLETE
        if outcome.code in ROOM and len(batch.transactions) > 1:
            self._squeeze(batch)  # there may be room for a part of it
        elif meaning(outcome) in (Meaning.WEATHER, Meaning.OPERATOR):
            self.block(str(outcome))
            self.no_room = batch.transactions[0].position if outcome.code == STREAM_FULL else 0
        if self.shared and meaning(outcome) is Meaning.CHAIN_BROKEN:
            self._too_many = min(batch.count, self._too_many or batch.count)
        self.doubt(str(outcome))

    def _squeeze(self, batch: Batch) -> None:
        """A pack was refused, and nobody knows for whose sake: the next batch has half as many messages."""
        self._too_many, self.squeezed = batch.count, True

    def learn_nothing(self, why: str) -> None:
        """Nobody answered, or not to the point: what was in flight may be stored, now or later."""
        self._unanswered_by(self.in_flight)
        self.doubt(why)

    def _unanswered_by(self, batches: Iterable[Batch]) -> None:
        """These may be stored, now or later: of a batch with a fence of its own as a whole, by its head."""
        for batch in batches:
            these = batch.transactions if batch.fence is None else batch.transactions[:1]
            self.unanswered |= set(map(POSITION, these))

    @property
    def wary(self) -> bool:
        """True while something in the plan may make the server hang up: nothing else is to be in flight with it."""
        return self._hang_ups >= HANG_UPS

    def hung_up(self, why: str, *, certain: bool) -> None:
        """The connection ended while batches were in flight; `certain` says that the server blames what it was sent.

        After a few times in a row the pack is halved, until the offender is alone, and then for a few times more.
        """
        self._hang_ups += 1
        batch = self.in_flight[0]
        if self.wary and len(batch.transactions) > 1:
            self._squeeze(batch)
        elif self.wary and batch.transactions[0].position not in self._alone:
            self._alone.add(batch.transactions[0].position)
            self._deaths_alone = 0
        elif self.wary:
            self._deaths_alone += 1
            if self._deaths_alone >= (HANG_UPS if certain else SILENT_HANG_UPS):
                detail = f"{self._deaths_alone} connections ended when it was sent alone: {why}"
                position = batch.transactions[0].position
                self._suspected = Verdict(position=position, reason=DeadReason.ENDS_CONNECTIONS, detail=detail)
        self.learn_nothing(why)

    def doubt(self, why: str) -> None:
        """Forget the window: what was in flight is planned again, in the same order, until the stream was read back.

        Only the first batch may have had an answer.
        """
        self._unanswered_by(islice(self.in_flight, 1, None))
        self._take_back()
        self.in_doubt = why

    def _take_back(self) -> None:
        self.planned = deque(self.plan)
        self.in_flight.clear()

    def settle(self, stored: int, last: int, *, foreign: bool = False) -> None:
        """The stream was read back: the first `stored` transactions of the plan are in it, and it ends at `last`."""
        reach = self.base + sum(map(COUNT, self.planned))
        if stored:
            self._stored([self.planned.popleft() for _ in range(stored)], self.base)
        self._convict()
        if stored or foreign or last != self.base:
            self._replan()
        self.shared = self.shared or (foreign and not self.never_shared)
        if self.shared and self.fencible and last > reach:
            # No attempt fits any more, whoever sent it and however packed: the heads may have fences of their own.
            self.fences = Fences(since=last)
            self.unanswered.clear()
        self.base = last
        self.in_doubt = None

    def settle_head(self, stored: int, base: int, sequence: int, *, others: bool) -> None:
        """What is behind the head's fence was read: the first `stored` of the plan are stored, behind `base`.

        If there are none: the last message on its subject is at `sequence`, and nothing of the head up to there;
        `others` have written behind the fence, so that attempts that knew of nothing there are void.
        """
        self.checked, self.placed = self.checked or self.placed is not None, None
        if self.fences is None or not self.planned:
            self.in_doubt = None
            return
        head = self.planned[0].position
        if stored:
            self._stored([self.planned.popleft() for _ in range(stored)], base)
            self._replan()
        elif head in self.fences.heads:
            # A former leader may have known as much as this look has found: only what comes behind it tells of those.
            if others and head not in self.fences.former:
                self.unanswered.discard(head)
            self.fences.former.discard(head)
            if sequence != self.fences.heads[head].sequence:
                self.fences.moved(self.fences.heads[head], sequence)
                self.dirty = self.dirty or self.open or self.fences.moves % MOVES == 0
        self._convict()
        self.in_doubt = None

    def _convict(self) -> None:
        """The stream was read back: what is suspected is not there. Not while an attempt may still be stored."""
        suspected, self._suspected, self.unsure = self._suspected, None, False
        if suspected is None or not self.planned or self.planned[0].position != suspected.position:
            return
        if not self.open or suspected.reason in FOR_ALL:
            self.condemn(suspected)
        else:
            self.unsure = True

    def written(self) -> Sequence[Receipt]:
        """Plan, receipts and verdicts are committed; returns the receipts."""
        written = self.receipts
        self.receipts, self.verdicts, self.dirty, self._unwritten = [], [], False, 0
        self.confirm()
        return written

    def _replan(self) -> None:
        """What is planned may have other places than in the committed plan: nothing goes out before a commit."""
        self._unwritten, self.dirty = len(self.planned), True

    def _count(self, these: Sequence[Planned | Transaction], sign: int = 1) -> None:
        self.messages += sign * sum(map(COUNT, these))
        self.size += sign * sum(map(SIZE, these))

    def _gone(self, settled: Sequence[Planned | Transaction]) -> None:
        """These are stored or dead: they are out of the plan."""
        self._count(settled, -1)
        self.unsure = False
        if self.fences is not None:
            for each in settled:
                self.fences.forget(each.position)
        if self._unloaded:
            self._unloaded -= sum(isinstance(each, Planned) for each in settled)
        if not self._alone and not self.unanswered:
            return
        positions = {each.position for each in settled}
        self._alone -= positions
        self.unanswered -= positions

    def _offence(self, batch: Batch, rejected: Rejected) -> None:
        # A packed batch convicts nobody: it is halved until the offender is alone, which is tried on a fresh chain.
        if len(batch.transactions) > 1 and rejected.code == BATCH_TOO_LARGE:
            half = max(1, batch.count // 2)
            self.packing = replace(self.packing, max_messages=min(half, self.packing.max_messages))
        elif len(batch.transactions) > 1:
            self._squeeze(batch)
        elif batch.transactions[0].position not in self._alone:
            self._alone.add(batch.transactions[0].position)
        else:
            # Convicted when the stream was read back: an unanswered attempt may have stored it, and look like that.
            (guilty,) = batch.transactions
            detail = f"{rejected} by stream {self.stream}"
            self._suspected = Verdict(position=guilty.position, reason=REASONS[rejected.code], detail=detail)
        self.doubt(str(rejected))
