"""The way out to each stream: its chain, the outcomes it waits for, the reading back; and all lanes together.

Belongs to the leader's loop, which calls `learn`, `settle` and `send` in every round; only the errand that reads a
stream back waits for NATS.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator

from outbox.config import BatchMode, Settings, StreamMode
from outbox.core.batch import POSITION, Batch, Packing, stored_bytes, trace_contexts
from outbox.core.chain import CHAINED, SHARED, UNSURE, Chain
from outbox.core.fence import Fences
from outbox.core.outcome import (
    IN_PROCESS,
    WRONG_LAST_SEQUENCE,
    Meaning,
    Outcome,
    Rejected,
    Stored,
    Unknown,
    meaning,
    word,
)
from outbox.core.parts import Parts
from outbox.core.plan import Planned
from outbox.core.telemetry import BatchEnded, BatchSent, Blocked, InDoubt, Listener, Settled, Shared, Unblocked
from outbox.core.transaction import NO_LIMIT, Limits, Room, Transaction, never_fits
from outbox.errors import Weather
from outbox.event import matches
from outbox.jetstream.client import JetStream, Sending
from outbox.jetstream.stream import StreamInfo
from outbox.postgres.rows import Lead, StreamRow
from outbox.postgres.store import Store
from outbox.relay import recovery
from outbox.relay.background import Backoff, Errand
from outbox.relay.caution import Caution
from outbox.text import counted

FRAME_SECONDS = SLOW_SECONDS = 3.0
OLD_SECONDS = 1.0  # after which what is known of subjects is asked for again
INFO_SECONDS = 10.0  # between two looks at the settings of a stream that is fenced by subjects
IN_PROCESS_SECONDS = 0.005  # until what others are storing on a subject is stored
BLOCKED_AFTER = 3  # failures in a row that are worth a word in the status


class Lane:
    """The lane of one stream for one term of leadership."""

    def __init__(
        self,
        row: StreamRow,
        settings: Settings,
        lead: Lead,
        *,
        moved: bool = False,
        fresh: bool = False,
        proven: bool = False,
        tell: Listener,
        news: Callable[[], None],
    ) -> None:
        """`moved` says that the database was promoted or restored since its streams were settled last, `fresh` that the
        row is a former leader's, and the stream was not looked at since.

        `proven` says that this process has published before: what fails from here on is weather, not set-up.
        """
        packing = Packing(
            max_messages=settings.max_batch_messages,
            max_bytes=settings.max_batch_bytes,
            one_transaction=settings.batch is BatchMode.TRANSACTION,
        )
        self.chain = Chain(
            stream=row.name,
            created=row.created,
            packing=packing,
            base=row.last_sequence,
            window=settings.window,
            shared=row.mode == SHARED,
            blocked=row.blocked,
        )
        self.chain.never_shared = settings.stream_mode is StreamMode.CHAINED
        self._shared_so: str | None = None
        self._rewritten = False  # subjects are stored as others than they are sent
        self._asking: Errand[tuple[dict[str, int], StreamInfo | None]] = Errand(news)
        self._asked = 0.0  # the loop's time
        self.limits = Limits(max_batch_messages=settings.max_batch_messages, max_message_bytes=NO_LIMIT)
        self.proven = proven
        self.moved, self.fresh = moved, fresh
        self._settings, self._outbox_id, self._tell = settings, str(lead.outbox_id), tell
        self._settling: Errand[recovery.Settlement | recovery.HeadSettlement] = Errand(news)
        self._outcomes: deque[Sending] = deque()
        self._info: StreamInfo | None = None
        self._retry = Backoff()
        self._stored_bytes: int | None = None  # of what was refused alone because the stream is full
        # Until then a batch of a former leader, or of a former connection, may still arrive.
        self._frames_gone = asyncio.get_running_loop().time() + FRAME_SECONDS if row.plan else 0.0
        self._told = row.blocked
        self.crossed = False  # what was learnt last is only that others write here too
        self.sent = 0.0  # the loop's time at which something went out last

    @property
    def flying(self) -> bool:
        """True while outcomes are awaited."""
        return bool(self._outcomes)

    @property
    def unanswered(self) -> bool:
        """True if something was sent and nobody has said what became of it."""
        return self.flying or bool(self.chain.unanswered)

    def row(self) -> StreamRow:
        """What the database is to remember of the stream."""
        chain = self.chain
        return StreamRow(
            name=chain.stream,
            created=chain.created,
            mode=SHARED if chain.shared else CHAINED,
            last_sequence=chain.base,
            plan=list(map(POSITION, chain.plan)),
            blocked=chain.blocked,
            since=chain.fences.since if chain.fences is not None else chain.base,
            fences=list(chain.fences.heads.values()) if chain.fences is not None else None,
            sharing=self.sharing,
        )

    @property
    def sharing(self) -> str | None:
        """What other writers cost, where they cost much; for the status."""
        chain = self.chain
        if not chain.shared:
            return None
        if chain.fences is not None and chain.fences.contended is not None:
            subject, share = chain.fences.contended
            return f"others write to {subject} so often that {round(share, 1):.0%} of the attempts come too late"
        if (why := self._unfencible) is not None:
            return f"{why}: any message of others makes an attempt come too late"
        return None

    @property
    def _unfencible(self) -> str | None:
        """Why a plan cannot be fenced by a subject, or None if it can."""
        if self._rewritten:
            return "subjects are stored as others than they are sent (a mapping of the account)"
        return self._info.unfencible if self._info is not None else None

    def learn(self, now: float, forbidden: tuple[str, str] | None) -> bool:
        """Take in the outcomes that have come, in order; `forbidden` is a subject, and what NATS has said of it."""
        subjects = self._info.subjects if self._info else ()
        if forbidden is not None and not any(matches(forbidden[0], each) for each in subjects):
            forbidden = None  # it is another stream's, or the API's
        learned = False
        while self._outcomes:
            sending = self._outcomes[0]
            if sending.outcome.done():
                outcome = sending.outcome.result()
            elif forbidden or now >= sending.since + self._settings.ack_timeout:
                outcome = Unknown(why=forbidden[1] if forbidden else "no answer within the time limit")
            else:
                break
            learned = True
            self._outcomes.popleft()
            sending.outcome.cancel()  # if nobody answered: what is not on the wire yet is not sent
            batch = self.chain.in_flight[0]
            self._ended(batch, outcome, now - sending.begun)
            self._stored_bytes = None
            self.crossed = self.chain.shared and (
                isinstance(outcome, Stored)
                or (isinstance(outcome, Rejected) and outcome.code in (WRONG_LAST_SEQUENCE, IN_PROCESS))
            )
            self.chain.learn(outcome)
            if self.chain.no_room:
                self._stored_bytes = stored_bytes(batch, self._outbox_id, self.limits.room.overhead)
            if isinstance(outcome, Stored) and not (self.chain.in_doubt and not self.chain.shared):
                self.proven = True
                self._retry = self._retry.reset()
            elif self.chain.in_doubt:
                self._failed(outcome, now, plain=bool(forbidden))
            if not self.chain.in_flight:
                self._give_up()
        return learned

    def _ended(self, batch: Batch, outcome: Outcome, seconds: float) -> None:
        contexts = trace_contexts(batch) if self._settings.traces else ()
        self._tell(
            BatchEnded(
                stream=batch.stream,
                outcome=word(outcome),
                transactions=len(batch.transactions),
                messages=batch.count,
                seconds=seconds,
                contexts=contexts,
            )
        )

    def _give_up(self) -> None:
        """Nobody waits for what is in flight any more; what is not on the wire yet is not sent."""
        for sending in self._outcomes:
            sending.outcome.cancel()
        self._outcomes.clear()

    def _failed(self, outcome: Outcome, now: float, *, plain: bool) -> None:
        """A batch was not acked: look at once if that helps, else after a back-off that grows until one is stored.

        `plain` says that the cause is: it is worth a word in the status at the first time.
        """
        chain = self.chain
        said = meaning(outcome) if isinstance(outcome, Rejected) else None
        if not self.crossed:
            self._tell(InDoubt(stream=chain.stream, why=chain.in_doubt or ""))
        if self.crossed and isinstance(outcome, Rejected) and outcome.code == IN_PROCESS:
            self._settling.postpone(now + IN_PROCESS_SECONDS)
        if (self.crossed or chain.squeezed or said is Meaning.OFFENCE) and not chain.open:
            return
        self._retry = self._retry.failed()
        self._settling.postpone(now + self._retry.delay(random.random()))
        if (plain or self._retry.failures >= BLOCKED_AFTER) and chain.blocked is None:
            chain.block(chain.in_doubt or "")

    def lost(self, why: str, now: float, *, blamed: bool | None) -> None:
        """The connection is gone: what was in flight is in doubt. `blamed` as in `JetStream.blames`."""
        chain = self.chain
        self._frames_gone = now + FRAME_SECONDS
        self._settling.cancel()
        self._asking.cancel()
        self._give_up()
        if chain.in_doubt is None:
            self._tell(InDoubt(stream=chain.stream, why=why))
        if not chain.in_flight or blamed is False:
            chain.learn_nothing(why)
            return
        chain.hung_up(why, certain=bool(blamed))
        if chain.wary:
            self._retry = self._retry.failed()
            self._settling.postpone(now + self._retry.delay(random.random()))
            chain.block(f"{why} (at least {BLOCKED_AFTER} times in a row, before anything was stored)")

    def settle(self, jetstream: JetStream | None, now: float) -> bool:
        """Read the stream back if the chain is in doubt; True when that told where it stands.

        Raises `Halt` if the stream contradicts the plan.
        """
        chain = self.chain
        if chain.in_doubt is None and now >= self._frames_gone:
            if chain.condemn_spoiled():
                return True
            if chain.unsure:
                self._wait_for_others(now)
        if chain.in_doubt is None:
            return self._ask(jetstream, now)
        came = self._settling.taken(now)
        if isinstance(came, Weather):
            chain.block(came.line)  # also a stream that does not suit any more: it holds only its own
        elif isinstance(came, recovery.HeadSettlement):
            self._take_in_head(jetstream, came, now)
            return True
        elif came is not None:
            self._take_in(jetstream, came, now)
            return True
        if jetstream is not None and not chain.verdicts and not self._settling.running and now >= self._looks:
            known = recovery.Remembered(
                stream=chain.stream,
                created=chain.created,
                shared=chain.shared,
                unanswered=frozenset(chain.unanswered),
                moved=self.moved,
                fresh=self.fresh,
                base=chain.base,
                plan=chain.entries(),
            )
            self._settling.start(self._look(jetstream, known), now)
        return False

    def _look(
        self, jetstream: JetStream, known: recovery.Remembered
    ) -> Callable[[], Awaitable[recovery.Settlement | recovery.HeadSettlement]]:
        chain = self.chain
        if chain.fences is None:
            return lambda: recovery.settle(jetstream, known, self._outbox_id)
        head = recovery.Head(
            fence=chain.fences.heads.get(known.plan[0].position) if known.plan else None,
            open=chain.open,
            since=chain.fences.since,
            told=chain.told,
            placed=chain.placed,
        )
        return lambda: recovery.settle_head(jetstream, known, head, self._outbox_id)

    def _ask(self, jetstream: JetStream | None, now: float) -> bool:
        """Ask for the last sequences that a fence needs; True when some have come."""
        fences = self.chain.fences
        came = self._asking.taken(now)
        if isinstance(came, Weather):
            self.chain.block(came.line)
        if isinstance(came, tuple) and fences is not None:
            self._asking.reset()
            sequences, info = came
            if sequences:
                self.chain.unblock()
            fences.learn(sequences)
            self.limit(info, jetstream)
            if not self.chain.plan and info is not None:
                fences.since = max(fences.since, info.last_sequence)  # nothing was tried yet
            return True
        asks = fences is not None and (bool(fences.wanted) or now - self._asked > INFO_SECONDS)
        if fences is not None and asks and jetstream is not None and not self._asking.running:
            stream, subjects, self._asked = self.chain.stream, list(fences.wanted), now
            self._asking.start(lambda: _last_sequences(jetstream, stream, subjects), now)
        return False

    @property
    def _looks(self) -> float:
        """The loop's time of the next reading back.

        Not before a verdict is safe: what a former connection has sent may still arrive, and would fit when those
        behind the dead letter have moved up.
        """
        return max(self._settling.due, self._frames_gone if self.chain.suspects else 0.0)

    def _take_in_head(self, jetstream: JetStream | None, found: recovery.HeadSettlement, now: float) -> None:
        chain = self.chain
        self.moved = self.fresh = False
        self._settling.reset()
        self._rewritten = self._rewritten or found.rewritten
        chain.settle_head(found.stored, found.base, found.sequence, others=found.others)
        if chain.unsure:
            self._wait_for_others(now)
        elif not chain.planned:
            chain.unblock()
        self.limit(found.info, jetstream)
        self._judge_head(now)
        if chain.verdicts:
            self._retry = self._retry.reset()
            chain.unblock()
        if found.stored:
            self._tell(
                Settled(
                    stream=chain.stream, last_sequence=chain.base, stored=found.stored, remaining=len(chain.planned)
                )
            )

    def _wait_for_others(self, now: float) -> None:
        """The head can never be sent, and an attempt at it may still be stored: only its subject tells."""
        fence = self.chain.fences.heads.get(self.chain.planned[0].position) if self.chain.fences is not None else None
        self.chain.block(f"{UNSURE}: {fence.subject if fence is not None else ''}")
        self._retry = self._retry.failed()
        self._settling.postpone(now + self._retry.delay(random.random()))

    def _take_in(self, jetstream: JetStream | None, settlement: recovery.Settlement, now: float) -> None:
        chain, was_shared = self.chain, self.chain.shared
        self.moved = self.fresh = False
        self._settling.reset()
        self.limit(settlement.info, jetstream)
        chain.settle(settlement.stored, settlement.last, foreign=settlement.foreign)
        if not chain.planned:
            chain.unblock()
        self._judge_head(now)
        if chain.verdicts:
            self._retry = self._retry.reset()
            chain.unblock()
        if chain.shared and not was_shared:
            self._tell(Shared(stream=chain.stream, sequence=settlement.last))
        if not was_shared or settlement.stored:
            self._tell(
                Settled(
                    stream=chain.stream,
                    last_sequence=settlement.last,
                    stored=settlement.stored,
                    remaining=len(chain.planned),
                )
            )

    def _judge_head(self, now: float) -> None:
        """What was refused alone because the stream is full may be too large for it, however empty it is.

        By what the stream says now: an operator may have made it smaller, or larger.
        """
        chain = self.chain
        head = chain.planned[0] if chain.planned else None
        if not isinstance(head, Transaction) or head.position != chain.no_room or now < self._frames_gone:
            return
        if (verdict := never_fits(head, self.limits.room, self._stored_bytes)) is not None:
            chain.condemn(verdict)

    def limit(self, info: StreamInfo | None, jetstream: JetStream | None) -> None:
        """Take in what the stream and its server accept; None where nothing new is known of the stream."""
        self._info = info or self._info
        self.chain.fencible = self._info is not None and self._unfencible is None
        self.chain.removes = self._info is not None and self._info.removes
        sizes = [self._info.max_message_bytes if self._info else None, jetstream.max_payload if jetstream else None]
        self.limits = Limits(
            max_batch_messages=self.limits.max_batch_messages,
            max_message_bytes=min((size for size in sizes if size is not None), default=NO_LIMIT),
            room=self._info.room if self._info else Room(),
        )

    def prepare(self, jetstream: JetStream, ids: Iterable[str]) -> None:
        """Make the next batch ready while one is in flight, where only one may be."""
        if (batch := self.chain.upcoming(ids)) is not None:
            jetstream.prepare(batch, self._outbox_id)

    def _forget_old(self, now: float) -> None:
        """What is known of subjects grows old while nothing is sent, and of the stream's end and settings too."""
        fences = self.chain.fences
        if fences is not None and not self.chain.plan and now - max(self.sent, self._asked) > OLD_SECONDS:
            fences.known.clear()

    def _choose_mode(self) -> None:
        """What the setting says, for plans that are made from here on, whoever made those before."""
        chain = self.chain
        if self._settings.stream_mode is StreamMode.SHARED:
            chain.shared = True
        elif chain.never_shared and not (chain.plan or chain.unanswered):
            chain.shared = False

    def send(self, jetstream: JetStream, ids: Iterable[str]) -> bool:
        """Send what the committed plan allows; True if anything went out."""
        batches = self.chain.launch(ids)
        if batches:
            self.sent = asyncio.get_running_loop().time()
        for batch in batches:
            self._outcomes.append(jetstream.send(batch, self._outbox_id))
            count = len(batch.transactions)
            self._tell(BatchSent(stream=batch.stream, base=batch.base, transactions=count, messages=batch.count))
        return bool(batches)

    def watch(self, now: float) -> None:
        """Say what has been on its way for long: a slow link, or a server that takes its time."""
        self._choose_mode()
        self._forget_old(now)
        if self.sharing != self._shared_so:
            self._shared_so, self.chain.dirty = self.sharing, True
        if self._asking.running and self.chain.blocked is None and now - self._asked >= SLOW_SECONDS:
            self.chain.block(f"no answer for {SLOW_SECONDS:.0f} s and more, where the last message on a subject is")
        if self._outcomes and self.chain.blocked is None and now - self._outcomes[0].begun >= SLOW_SECONDS:
            sent = counted(self.chain.in_flight[0].count, "message")
            self.chain.block(f"{sent} on the way for {SLOW_SECONDS:.0f} s and more, without an ack")

    def report(self) -> None:
        """Say it when something has begun, or ceased, to hold this stream back."""
        if self.chain.blocked != self._told:
            self._told = self.chain.blocked
            told, stream = self._told, self.chain.stream
            self._tell(Unblocked(stream=stream) if told is None else Blocked(stream=stream, why=told))

    def dues(self) -> Iterator[float]:
        """The loop's times at which this lane wants to be looked at."""
        if self._outcomes:
            yield self._outcomes[0].since + self._settings.ack_timeout
            if self.chain.blocked is None:
                yield self._outcomes[0].begun + SLOW_SECONDS
        if self.chain.in_doubt and not self._settling.running:
            yield self._looks
        if self._asking.running and self.chain.blocked is None:
            yield self._asked + SLOW_SECONDS
        wanted = self.chain.fences is not None and self.chain.fences.wanted and self.chain.in_doubt is None
        if wanted and not self._asking.running:
            yield self._asking.due

    def close(self) -> None:
        """Stop what runs beside the loop; idempotent."""
        self._settling.cancel()
        self._asking.cancel()


async def _last_sequences(
    jetstream: JetStream, stream: str, subjects: list[str]
) -> tuple[dict[str, int], StreamInfo | None]:
    """The last sequences on these subjects, and what the stream was before any of them was asked for."""
    info = await jetstream.stream(stream)
    last = await asyncio.gather(*(jetstream.last_on(stream, subject) for subject in subjects))
    return dict(zip(subjects, last, strict=True)), info


class Lanes(dict[str, Lane]):
    """The lanes by the names of their streams."""

    def __init__(
        self, settings: Settings, lead: Lead, *, proven: bool, tell: Listener, news: Callable[[], None]
    ) -> None:
        """`proven` says that this process has published before."""
        super().__init__()
        self._settings, self._lead, self._proven, self._tell, self._news = settings, lead, proven, tell, news
        self._max_payload = 0
        self.parts = Parts()

    def add(self, row: StreamRow, *, fresh: bool = False) -> Lane:
        """A lane for this stream; `fresh` as in `Lane`."""
        lane = Lane(
            row,
            self._settings,
            self._lead,
            moved=fresh and self._lead.moved,
            fresh=fresh,
            proven=self._proven,
            tell=self._tell,
            news=self._news,
        )
        self[row.name] = lane
        return lane

    async def restore(self, row: StreamRow, store: Store) -> None:
        """A stream as the last leader left it: its plan is settled as it is before anything new joins. Idempotent."""
        if row.name in self:
            return
        plan = await store.entries(row.plan) if row.plan else []
        parts = await store.parts(row.plan) if row.plan else {}
        lane = self.add(row, fresh=True)
        if plan:
            heads = None if row.fences is None else {each.position: each for each in row.fences}
            fences = Fences(since=row.since, heads=heads, former=set(heads)) if heads is not None else None
            lane.chain.restore(self.parts.restore(plan, row.name, parts), fences)

    def extend(self, *, held_back: bool) -> None:
        """Let what waits join the plans, unless nothing more is to be sent."""
        for lane in () if held_back else self.values():
            lane.chain.extend()

    @property
    def chains(self) -> Iterator[Chain]:
        """Their chains."""
        return (lane.chain for lane in self.values())

    @property
    def waiting(self) -> Iterator[Transaction]:
        """What was read and is not planned."""
        return (transaction for chain in self.chains for transaction in chain.waiting)

    @property
    def planned(self) -> Iterator[Planned | Transaction]:
        """What is planned or in flight."""
        return (transaction for chain in self.chains for transaction in chain.plan)

    @property
    def read_ahead(self) -> tuple[int, int]:
        """Messages and bytes of all that waits, is planned or is in flight."""
        return sum(chain.messages for chain in self.chains), sum(chain.size for chain in self.chains)

    @property
    def idle(self) -> bool:
        """True if nothing waits, flies or needs to be written down."""
        return all(chain.idle for chain in self.chains)

    @property
    def flying(self) -> bool:
        """True while outcomes are awaited."""
        return any(lane.flying for lane in self.values())

    @property
    def unanswered(self) -> bool:
        """True if something was sent and nobody has said what became of it."""
        return any(lane.unanswered for lane in self.values())

    @property
    def proven(self) -> bool:
        """True if this process has published anything, in this term or before."""
        return self._proven or any(lane.proven for lane in self.values())

    @property
    def moved(self) -> bool:
        """True until every stream was settled after a promotion or a restore of the database."""
        return any(lane.moved for lane in self.values())

    @property
    def dirty(self) -> list[Lane]:
        """Those with something to write down."""
        return [lane for lane in self.values() if lane.chain.dirty]

    def lost(self, why: str, now: float, *, blamed: bool | None) -> None:
        """The connection is gone; `blamed` as in `JetStream.blames`."""
        for lane in self.values():
            lane.lost(f"the connection to NATS was lost: {why}", now, blamed=blamed)

    @property
    def in_turn(self) -> list[Lane]:
        """Those that may send: all, but where a server hangs up over something one at a time, who waits longest."""
        if not any(chain.wary for chain in self.chains):
            return list(self.values())
        able = [lane for lane in self.values() if next(lane.chain.ready, None) is not None]
        following = min(able, key=lambda lane: lane.sent, default=None)
        if following is None or any(lane.flying for lane in self.values() if lane is not following):
            return []
        return [following]

    def suit(self, jetstream: JetStream) -> None:
        """Take in what the server accepts now: its limits change while the connection stands."""
        if self._max_payload != (size := jetstream.max_payload):
            self._max_payload = size
            for lane in self.values():
                lane.limit(None, jetstream)

    def dues(self) -> Iterator[float]:
        """The loop's times at which one of them wants to be looked at."""
        return (due for lane in self.values() for due in lane.dues())

    def close(self) -> None:
        """Stop what runs beside the loop; idempotent."""
        for lane in self.values():
            lane.close()

    async def load(self, store: Store, caution: Caution, *, busy: bool) -> None:
        """Load what a former leader planned and what is known not to be stored; `busy` as in `Caution.load`."""
        chains = [chain for chain in self.chains if chain.unloaded]
        if caution.active:
            await caution.load(chains, self.parts, busy=busy)
            return
        for chain in chains:
            page = await store.planned([each.position for each in chain.unloaded])
            chain.load(self.parts.loaded(page.transactions, chain.stream), page.verdicts)
