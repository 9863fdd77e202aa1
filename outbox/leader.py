"""The leader's loop: read, plan, commit, send, learn, mark; one coroutine, so that nothing races with itself.

Everything in memory belongs to one session of the store and is dropped with it. What takes long (connecting to NATS,
reading a stream back, asking where a subject goes) runs beside the loop as an errand and is taken in by the loop.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import secrets
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from outbox import recovery
from outbox.backoff import Backoff
from outbox.batch import Packing
from outbox.chain import CHAINED, SHARED, Chain
from outbox.config import BatchMode, OnDead, OnUnrouted, Settings
from outbox.errors import Deposed, Halt, Misconfigured, Unusable, Weather
from outbox.jetstream import JetStream, StreamInfo
from outbox.outcome import Meaning, Outcome, Rejected, Stored, Unknown, meaning
from outbox.plan import Planned
from outbox.positions import Positions, merged
from outbox.routing import Routes
from outbox.store import Decisions, Lead, Store, StreamRow
from outbox.telemetry import (
    BatchSent,
    Blocked,
    Connected,
    Died,
    InDoubt,
    Listener,
    Marked,
    PageRead,
    Settled,
    Shared,
    Slept,
    TookLead,
    Unreachable,
)
from outbox.transaction import DeadReason, Limits, Transaction, Verdict, verdict

T = TypeVar("T")

PING_SECONDS = 1.0
POLL_SECONDS = (0.005, 0.01, 0.02, 0.05)
SLEEP_SECONDS = 1.0
STRAY_SECONDS = 60.0
STOP_SECONDS = 8.0
NO_LIMIT = 1 << 62


@dataclass(slots=True)
class Errand(Generic[T]):
    """Something slow that runs beside the loop, one at a time, and is tried again after its back-off."""

    news: Callable[[], None]
    backoff: Backoff = field(default_factory=Backoff)
    due: float = 0.0
    _task: asyncio.Task[T] | None = None

    @property
    def running(self) -> bool:
        return self._task is not None

    def start(self, work: Callable[[], Awaitable[T]], now: float) -> None:
        """Start it, unless it runs or its back-off is not over."""

        async def run() -> T:
            try:
                return await work()
            finally:
                self.news()

        if self._task is None and now >= self.due:
            self._task = asyncio.ensure_future(run())

    def taken(self, now: float) -> T | Weather | None:
        """What it came to, once: a value, or the weather that stopped it; None while it runs."""
        if self._task is None or not self._task.done():
            return None
        task, self._task = self._task, None
        try:
            value = task.result()
        except Weather as weather:
            self.backoff = self.backoff.failed()
            self.due = now + self.backoff.delay(random.random())
            return weather
        self.backoff = self.backoff.reset()
        return value

    def cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None


@dataclass(slots=True)
class Lane:
    """A chain, the futures of its batches in flight, and the errand that reads its stream back."""

    chain: Chain
    limits: Limits
    settling: Errand[recovery.Settlement]
    outcomes: deque[tuple[asyncio.Future[Outcome], float]] = field(default_factory=deque)
    told: str | None = None
    retry: Backoff = field(default_factory=Backoff)


class Leader:
    """One term of leadership; see the module. `run` ends with `Deposed` or `Weather` when the session is lost."""

    def __init__(
        self,
        store: Store,
        lead: Lead,
        settings: Settings,
        *,
        connect: Callable[[Callable[[], None]], Awaitable[JetStream]],
        tell: Listener,
        stop: asyncio.Event,
        drain: bool = False,
    ) -> None:
        self._store, self._lead, self._settings = store, lead, settings
        self._connect, self._tell, self._stop, self._drain = connect, tell, stop, drain
        self._outbox_id = str(lead.outbox_id)
        self._news = asyncio.Event()
        self._clock = asyncio.get_running_loop().time
        self._positions = Positions.restored(lead.cursor, lead.open_positions)
        self._written = lead.cursor  # the highest position that was planned or settled: the cursor in the database
        self._incoming: deque[Transaction] = deque()
        self._lanes: dict[str, Lane] = {}
        self._verdicts: list[Verdict] = []
        self._routes = Routes()
        self._jetstream: JetStream | None = None
        self._connecting: Errand[JetStream] = Errand(self._news.set)
        self._routing: Errand[dict[str, str | None]] = Errand(self._news.set)
        self._blocked: str | None = None
        self._told_blocked: str | None = None
        self._proven = False  # something was stored in this term: what fails from here on is weather, not set-up
        self._asleep = False
        self._idle_reads = 0
        self._read_due = 0.0
        self._spoke = self._strays_looked = self._clock()
        self._batch_ids = (f"{self._outbox_id[:8]}-{secrets.token_hex(6)}-{n}" for n in itertools.count(1))

    @property
    def _packing(self) -> Packing:
        return Packing(
            max_messages=self._settings.max_batch_messages,
            max_bytes=self._settings.max_batch_bytes,
            one_transaction=self._settings.batch is BatchMode.TRANSACTION,
        )

    async def run(self) -> None:
        """Lead until stopped, or drained. Raises `Deposed` or `Weather` when the lead is lost, `Halt` at a contradiction."""
        self._tell(TookLead(epoch=self._lead.epoch))
        try:
            for row in await self._store.streams():
                await self._restore(row)
            while not self._stop.is_set():
                if await self.run_once() or self._news.is_set():
                    self._news.clear()
                    continue
                if self._drain and self._drained:
                    return
                await self._wait()
            await self._finish()
        except Halt:
            # What contradicts a plan may be the work of a newer leader: it took the lead before it sent anything.
            await self._check_lead()
            raise
        finally:
            await self._close()

    async def run_once(self) -> bool:
        """One round of the loop; True if something moved, so that another round may find more to do."""
        now = self._clock()
        self._reach_nats(now)
        moved = self._learn(now)
        moved |= self._settle(now)
        await self._route(now)
        for lane in self._lanes.values():
            lane.chain.extend()
        moved |= await self._commit()
        moved |= self._send(now)
        moved |= await self._read(now)
        await self._keep_alive(now)
        return moved

    async def _restore(self, row: StreamRow) -> None:
        """A stream as the last leader left it: its plan is settled as it is before anything new joins."""
        lane = self._lane(row.name, row.created, row.last_sequence, shared=row.mode == SHARED)
        lane.chain.blocked = row.blocked
        if row.plan:
            lane.chain.planned.extend(await self._store.planned(row.plan))

    def _lane(self, name: str, created: str, base: int, *, shared: bool = False) -> Lane:
        chain = Chain(
            stream=name,
            created=created,
            packing=self._packing,
            base=base,
            window=self._settings.window,
            shared=shared,
        )
        limits = Limits(max_batch_messages=self._settings.max_batch_messages, max_message_bytes=NO_LIMIT)
        lane = self._lanes[name] = Lane(chain, limits, Errand(self._news.set))
        return lane

    # --- NATS: the connection, the replies, the streams read back

    def _reach_nats(self, now: float) -> None:
        if self._jetstream is not None and (why := self._jetstream.lost) is not None:
            self._tell(Unreachable(server="nats", why=why, delay=0.0))
            self._abandon(asyncio.ensure_future(self._jetstream.close()))
            self._jetstream = None
            self._routing.cancel()
            self._routes.clear()
            for lane in self._lanes.values():
                lane.settling.cancel()
                self._doubt(lane, "the connection to NATS was lost")
        if self._jetstream is None:
            self._connecting.start(lambda: self._connect(self._news.set), now)
            came = self._connecting.taken(now)
            if isinstance(came, Weather):
                self._tell(Unreachable(server="nats", why=came.message, delay=self._connecting.due - now))
            elif came is not None:
                self._jetstream = came
                self._tell(Connected(server="nats", version=".".join(map(str, came.version))))

    def _abandon(self, task: asyncio.Future[Any]) -> None:
        """Let a closing connection end by itself, without a complaint about a result that nobody fetched."""
        task.add_done_callback(lambda done: done.cancelled() or done.exception())

    def _learn(self, now: float) -> bool:
        learned = False
        for lane in self._lanes.values():
            while lane.outcomes:
                future, deadline = lane.outcomes[0]
                if future.done():
                    outcome = future.result()
                elif now >= deadline:
                    forbidden = self._jetstream.forbidden if self._jetstream else None
                    outcome = Unknown(why=forbidden or "no answer within the time limit")
                else:
                    break
                learned = True
                lane.outcomes.popleft()
                lane.chain.learn(outcome)
                if isinstance(outcome, Stored):
                    self._proven = True
                    lane.retry = lane.retry.reset()
                else:
                    self._failed(lane, outcome, now)
                if lane.chain.in_doubt:
                    lane.outcomes.clear()
        return learned

    def _failed(self, lane: Lane, outcome: Outcome, now: float) -> None:
        """A batch was not acked: where subjects go is asked again, and the weather waited out with a back-off."""
        chain = lane.chain
        self._routes.clear()
        crossed = isinstance(outcome, Rejected) and meaning(outcome) is Meaning.CHAIN_BROKEN and chain.shared
        if not crossed:
            self._tell(InDoubt(stream=chain.stream, why=chain.in_doubt or ""))
        if crossed or (isinstance(outcome, Rejected) and meaning(outcome) is Meaning.OFFENCE):
            return
        lane.retry = lane.retry.failed()
        lane.settling.due = now + lane.retry.delay(random.random())
        if lane.retry.failures > 2 and chain.blocked is None:
            chain.blocked, chain.dirty = chain.in_doubt, True

    def _doubt(self, lane: Lane, why: str) -> None:
        lane.outcomes.clear()
        if lane.chain.in_doubt is None:
            self._tell(InDoubt(stream=lane.chain.stream, why=why))
        lane.chain.doubt(why)

    def _settle(self, now: float) -> bool:
        """Read back the streams whose chains are in doubt, and take in what was found."""
        settled = False
        for lane in self._lanes.values():
            if lane.chain.in_doubt is None:
                continue
            came = lane.settling.taken(now)
            if isinstance(came, Unusable) and not self._proven:
                raise Misconfigured(came.message, remedy=came.remedy)
            if isinstance(came, Weather):
                if lane.chain.blocked != came.message:
                    lane.chain.blocked, lane.chain.dirty = came.message, True
            elif came is not None:
                self._take_in(lane, came)
                settled = True
                continue
            jetstream = self._jetstream
            if jetstream is not None and not lane.chain.verdicts:
                # By default arguments: the lambda runs later, when the loop variable may be another lane's.
                lane.settling.start(
                    lambda j=jetstream, k=self._known(lane): recovery.settle(j, k, self._outbox_id),  # type: ignore[misc]
                    now,
                )
        return settled

    def _known(self, lane: Lane) -> recovery.Known:
        chain = lane.chain
        plan: list[Planned] = chain.entries()
        return recovery.Known(
            stream=chain.stream, created=chain.created, shared=chain.shared, base=chain.base, plan=plan
        )

    def _take_in(self, lane: Lane, settlement: recovery.Settlement) -> None:
        chain, was_shared, doubted = lane.chain, lane.chain.shared, lane.chain.in_doubt
        chain.settle(settlement.stored, settlement.last, foreign=settlement.foreign)
        if chain.blocked is not None and not chain.planned:
            chain.blocked, chain.dirty = None, True
        lane.limits = self._limits(settlement.info)
        if chain.shared and not was_shared:
            self._tell(Shared(stream=chain.stream, sequence=settlement.last))
        if not was_shared or settlement.stored or doubted is None:
            self._tell(
                Settled(
                    stream=chain.stream,
                    last_sequence=settlement.last,
                    stored=settlement.stored,
                    remaining=len(chain.planned),
                )
            )

    # --- where transactions go

    async def _route(self, now: float) -> None:
        """Give incoming transactions to their chains, in order. One whose subject is in no stream holds all behind it."""
        came = self._routing.taken(now)
        if isinstance(came, Unusable):
            if not self._proven:
                raise Misconfigured(came.message, remedy=came.remedy)
            self._blocked = came.message
        elif isinstance(came, dict):
            await self._took_routes(came, now)
        while self._incoming and self._jetstream is not None:
            head = self._incoming[0]
            unknown = self._routes.unknown(head)
            if unknown:
                jetstream = self._jetstream
                self._routing.start(lambda: self._routes.ask(jetstream, unknown), now)
                return
            streams = self._routes.streams(head)
            lane = self._lanes.get(next(iter(streams.values())))
            if lane is None:
                await self._first_contact(next(iter(streams.values())))
                continue
            offence = verdict(head, streams, lane.limits)
            if offence is None:
                lane.chain.waiting.append(head)
            elif self._settings.on_dead is OnDead.HALT and not self._settled_before_head:
                return  # all before it goes out first, then the relay halts behind it
            else:
                self._verdicts.append(offence)
            self._incoming.popleft()
            self._blocked = None

    async def _took_routes(self, came: dict[str, str | None], now: float) -> None:
        nowhere = [subject for subject, stream in came.items() if stream is None]
        if not nowhere or not self._incoming:
            return
        head = self._incoming[0]
        self._blocked = f"transaction {head.position}: subject {nowhere[0]} is in no stream"
        if self._settings.on_unrouted is OnUnrouted.DEAD:
            self._incoming.popleft()
            detail = f"subject {nowhere[0]} is in no stream"
            self._verdicts.append(Verdict(position=head.position, reason=DeadReason.UNROUTED, detail=detail))
            self._blocked = None
            return
        self._routing.backoff = self._routing.backoff.failed()
        self._routing.due = now + self._routing.backoff.delay(random.random())
        page = await self._store.page(
            head.position - 1, [], transactions=1, messages=1, size=1
        )  # an operator may have set it aside
        if not any(t.position == head.position for t in page.transactions):
            self._incoming.popleft()
            self._blocked = None

    async def _first_contact(self, name: str) -> None:
        info = self._routes.info(name)
        await self._store.add_stream(self._lead.epoch, name, info.created, info.last_sequence)
        self._lane(name, info.created, info.last_sequence).limits = self._limits(info)

    def _limits(self, info: StreamInfo) -> Limits:
        sizes = [info.max_message_bytes, self._jetstream.max_payload if self._jetstream else None]
        return Limits(
            max_batch_messages=self._settings.max_batch_messages,
            max_message_bytes=min((size for size in sizes if size is not None), default=NO_LIMIT),
        )

    # --- Postgres: pages in, decisions out

    async def _read(self, now: float) -> bool:
        """Read the next page if there is room and reason; True if it held anything."""
        if now < self._read_due or self._stop.is_set():
            return False
        messages, size = self._room()
        if messages <= 0 or size <= 0:
            return False
        self._read_due = 0.0
        gaps = self._positions.open
        if gaps:
            self._positions.observe(await self._store.holders())
        page = await self._store.page(
            self._positions.cursor,
            gaps,
            transactions=messages,
            messages=min(messages, 2 * self._settings.max_batch_messages),
            size=size,
        )
        through = page.positions[-1] if page.positions else None
        self._positions.read(page.positions, through)
        self._incoming.extend(page.transactions)
        if page.transactions:
            events = sum(transaction.count for transaction in page.transactions)
            self._tell(PageRead(transactions=len(page.transactions), events=events))
        await self._rest(bool(page.positions), now)
        return bool(page.positions)

    def _room(self) -> tuple[int, int]:
        """How many messages and bytes may still be read ahead."""
        held = list(self._incoming)
        for lane in self._lanes.values():
            held += [*lane.chain.waiting, *lane.chain.plan]
        messages = self._settings.read_ahead_messages - sum(transaction.count for transaction in held)
        return messages, self._settings.read_ahead_bytes - sum(transaction.size for transaction in held)

    async def _rest(self, found: bool, now: float) -> None:
        """After a page: when to read again. An empty outbox is polled less and less, and then slept on."""
        if found:
            self._idle_reads = 0
            if self._asleep:
                self._asleep = False
                await self._store.wake_up()
            return
        self._idle_reads += 1
        if self._asleep:
            self._read_due = now + SLEEP_SECONDS
            return
        step = min(self._idle_reads, len(POLL_SECONDS)) - 1
        self._read_due = now + POLL_SECONDS[step]
        if self._idle_reads > len(POLL_SECONDS) and not self._positions.open and self._quiet:
            # Asked for while somebody is between sealing and commit, it is refused: no wake-up is lost.
            self._asleep = await self._store.fall_asleep()
            if self._asleep:
                self._read_due = now  # read once more before sleeping
                self._tell(Slept())

    @property
    def _settled_before_head(self) -> bool:
        return not self._verdicts and all(lane.chain.idle for lane in self._lanes.values())

    @property
    def _quiet(self) -> bool:
        return not self._incoming and self._settled_before_head

    @property
    def _drained(self) -> bool:
        return self._quiet and self._idle_reads > 0

    async def _commit(self) -> bool:
        """Write what was decided: plans before they are carried out, receipts, verdicts. The barrier of what was read."""
        dirty = [lane.chain for lane in self._lanes.values() if lane.chain.dirty]
        verdicts = self._verdicts + [verdict for chain in dirty for verdict in chain.verdicts]
        if not dirty and not verdicts and self._blocked == self._told_blocked:
            return False
        receipts = [receipt for chain in dirty for receipt in chain.receipts]
        planned = [transaction.position for chain in dirty for transaction in chain.planned]
        settled = [verdict.position for verdict in verdicts] + [receipt.position for receipt in receipts]
        self._written = max([self._written, *planned, *settled])
        self._spoke = self._clock()
        await self._store.commit(
            self._lead.epoch,
            Decisions(
                cursor=self._written,
                open_positions=self._unsettled_below(self._written),
                receipts=receipts,
                verdicts=verdicts,
                streams=[_row(chain) for chain in dirty],
                blocked=self._blocked,
            ),
        )
        self._verdicts = []
        for chain in dirty:
            chain.written()
        if receipts:
            self._tell(Marked(transactions=len(receipts), last_position=receipts[-1].position))
        self._report(verdicts)
        return True

    def _report(self, verdicts: list[Verdict]) -> None:
        for each in verdicts:
            self._tell(Died(verdict=each))
        if self._blocked != self._told_blocked:
            self._told_blocked = self._blocked
            if self._blocked:
                self._tell(Blocked(stream="", why=self._blocked))
        for lane in self._lanes.values():
            if lane.chain.blocked != lane.told:
                lane.told = lane.chain.blocked
                if lane.told:
                    self._tell(Blocked(stream=lane.chain.stream, why=lane.told))
        if verdicts and self._settings.on_dead is OnDead.HALT:
            raise Halt(
                f"transaction {verdicts[0].position} can never be sent ({verdicts[0]}), and the relay halts on a dead letter",
                remedy="settle it (outbox status shows it), then start the relay again; or start it with --on-dead continue",
            )

    def _unsettled_below(self, cursor: int) -> list[tuple[int, int]]:
        """Positions below the cursor that are neither settled nor planned: open ones, and what still waits."""
        held = [transaction.position for transaction in self._incoming]
        for lane in self._lanes.values():
            held += [transaction.position for transaction in lane.chain.waiting]
        gaps = [(low, min(high, cursor)) for low, high in self._positions.open if low <= cursor]
        return merged([*gaps, *((position, position) for position in held if position <= cursor)])

    def _send(self, now: float) -> bool:
        sent = False
        for lane in self._lanes.values():
            if self._jetstream is None or self._stop.is_set():
                break
            for batch in lane.chain.launch(self._batch_ids):
                future = self._jetstream.send(batch, self._outbox_id)
                lane.outcomes.append((future, now + self._settings.ack_timeout))
                sent = True
                self._tell(
                    BatchSent(
                        stream=batch.stream,
                        base=batch.base,
                        transactions=len(batch.transactions),
                        messages=batch.count,
                    )
                )
        return sent

    async def _keep_alive(self, now: float) -> None:
        """The session ends when it is idle for some seconds, so that a frozen leader's lock is freed: speak."""
        if now - self._strays_looked >= STRAY_SECONDS:
            self._strays_looked = now
            if strays := await self._store.strays():
                txid, count = strays[0]
                self._tell(Blocked(stream="", why=f"{count} events of txid {txid} belong to no transaction"))
        if now - self._spoke >= PING_SECONDS:
            self._spoke = now
            await self._check_lead()

    async def _check_lead(self) -> None:
        if await self._store.ping() != self._lead.epoch:
            raise Deposed("another relay has taken the lead")

    # --- waiting and ending

    async def _wait(self) -> None:
        """Wait for the first of: a reply, a notification, a lost session, the stop, or the next thing that is due."""
        due = [self._spoke + PING_SECONDS, *self._dues()]
        timeout = max(0.0, min(due) - self._clock())
        with self._store.watched(self._heard):
            try:
                await asyncio.wait_for(self._news.wait(), timeout)
            except TimeoutError:
                pass
        self._news.clear()

    def _heard(self) -> None:
        # Ask something in any case: what makes the socket readable must be taken in, or the wait spins.
        self._read_due = self._spoke = 0.0
        self._news.set()

    def _dues(self) -> Iterator[float]:
        messages, size = self._room()
        if messages > 0 and size > 0:
            yield self._read_due
        if self._jetstream is None and not self._connecting.running:
            yield self._connecting.due
        if self._incoming and not self._routing.running:
            yield self._routing.due
        for lane in self._lanes.values():
            if lane.outcomes:
                yield lane.outcomes[0][1]
            if lane.chain.in_doubt and not lane.settling.running and self._jetstream is not None:
                yield lane.settling.due

    async def _finish(self) -> None:
        """Stop: send nothing more, wait a little for what is in flight, and mark what was acked."""
        deadline = self._clock() + STOP_SECONDS
        while any(lane.outcomes for lane in self._lanes.values()) and self._clock() < deadline:
            if not self._learn(self._clock()):
                try:
                    await asyncio.wait_for(self._news.wait(), 0.1)
                except TimeoutError:
                    pass
                self._news.clear()
            await self._commit()
        await self._commit()

    async def _close(self) -> None:
        self._connecting.cancel()
        self._routing.cancel()
        for lane in self._lanes.values():
            lane.settling.cancel()
        if self._jetstream is not None:
            await self._jetstream.close()


def _row(chain: Chain) -> StreamRow:
    return StreamRow(
        name=chain.stream,
        created=chain.created,
        mode=SHARED if chain.shared else CHAINED,
        last_sequence=chain.base,
        plan=[transaction.position for transaction in chain.plan],
        blocked=chain.blocked,
    )
