"""The leader's loop: learn, settle, send, route, plan, commit, read; one coroutine, which alone decides.

Everything in memory belongs to one session of the store and is dropped with it. What takes long (connecting to NATS,
reading a stream back, asking where a subject goes, a page) runs beside the loop and is taken in by the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence

from outbox.config import OnDead, Settings
from outbox.core.batch import COUNT, POSITION, SIZE
from outbox.core.parts import Progress, Settled
from outbox.core.positions import Range, below, coarse, merged, outside
from outbox.core.telemetry import Blocked, Careful, Died, Listener, Marked, TookLead, Unblocked
from outbox.core.transaction import Receipt, Transaction, Verdict
from outbox.errors import Halt, Locked, Misconfigured
from outbox.jetstream.client import JetStream
from outbox.postgres.rows import Decisions, Lead, Page
from outbox.postgres.store import Store
from outbox.relay.caution import Caution
from outbox.relay.connection import Connection
from outbox.relay.duties import PING_SECONDS, Pulse
from outbox.relay.housekeeping import Housekeeper
from outbox.relay.lanes import Lane, Lanes
from outbox.relay.reader import Reader
from outbox.relay.routing import Router

OPEN_RANGES = 20
LOCK_SECONDS, LOCK_GONE_SECONDS = 0.2, 2.0  # between two tries, which wait for lock_timeout; and until it is over
REPLICA_SECONDS, REPLICA_POLL_SECONDS = 1.0, 0.01  # until it is said that they are waited for, and between two looks
NOT_REPLICATED = "no standby that could take over, or not every one, has what is planned (--durability replicas)"
SOUND_SECONDS = 1.0  # a leader that has marked something and is older than this does not die of the next transaction
STOP_SECONDS = 3.0  # less than idle_session_timeout: the last mark needs the session


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
        proven: bool = False,
    ) -> None:
        """`proven` says that this process has published before: what cannot be used now is weather, not set-up."""
        store.notified = self._heard
        self._caution = Caution(store, lead, settings)
        settings = self._caution.settings
        self._store, self._lead, self._settings = store, lead, settings
        self._tell, self._stop, self._drain = tell, stop, drain
        self._news = asyncio.Event()
        self._clock = asyncio.get_running_loop().time
        self._reader = Reader(store, lead, settings, tell=tell, news=self._news.set)
        self._written = lead.cursor  # the highest position that was planned or settled: the cursor in the database
        self._lanes = Lanes(settings, lead, proven=proven, tell=tell, news=self._news.set)
        self._parts = self._lanes.parts
        self._router = Router(store, lead, settings, self._parts, news=self._news.set)
        self._retried: list[Range] = []
        self._wishes: list[Range] = []  # dead letters that are to be retried, and are not looked at yet
        self._connection = Connection(connect, tell=tell, news=self._news.set)
        self._housekeeper = Housekeeper(store, settings, tell=tell, news=self._news.set)
        self._told: str | None = None
        self._unsecured: tuple[str, float] | None = None  # what the standbys must have first, and since when
        self._insecure: str | None = None
        self._lock: str | None = None  # that somebody else holds, and that is waited for
        self._lock_told = 0.0  # the loop's time at which it was met last
        self._began = self._clock()
        self._pulse = Pulse(store, lead, tell=tell)
        self._arrived = False
        term = f"{str(lead.outbox_id)[:8]}-{secrets.token_hex(6)}"
        self._batch_ids = (f"{term}-{number}" for number in itertools.count(1))

    @property
    def _held_back(self) -> bool:
        """True if nothing more is to be read, planned or sent: the relay ends, or an operator has paused it."""
        return self._stop.is_set() or self._pulse.paused is not None

    @property
    def _blocked(self) -> str | None:
        """What holds the head of the outbox back, for the status."""
        return self._lock or self._connection.problem(self._clock()) or self._insecure or self._router.blocked

    @property
    def _jetstream(self) -> JetStream | None:
        return self._connection.jetstream

    @property
    def proven(self) -> bool:
        """True if this process has published anything, in this term or before."""
        return self._lanes.proven

    async def run(self) -> bool:
        """Lead until stopped or drained: True; or until care is no longer needed, and a new term is: False.

        Raises `Deposed` or `Weather` when the lead is lost, else `Halt` or `Misconfigured`.
        """
        self._tell(TookLead(epoch=self._lead.epoch))
        if self._caution.active:
            self._tell(Careful())
        self._housekeeper.start()
        try:
            await self._begin()
            while not self._stop.is_set():
                if await self._round() or self._news.is_set():
                    self._news.clear()
                elif self._quiet and (self._caution.over or (self._drain and await self._drained())):
                    break
                else:
                    await self._wait()
            await self._finish()
            return self._stop.is_set() or not self._caution.over
        except (Halt, Misconfigured) as error:
            # What contradicts a plan may be the work of a newer leader: it took the lead before it sent anything.
            await self._store.ping(self._lead.epoch)
            await self._store.resign(self._lead.epoch, f"halted: {error}")
            raise
        finally:
            await self._close()

    async def _begin(self) -> None:
        """Take over what a former leader has left; waits for who holds a lock that it needs."""
        while not self._stop.is_set():
            try:
                await self._store.reconcile()
                for row in await self._store.streams():
                    await self._lanes.restore(row, self._store)
            except Locked as error:
                await self._locked_out(error)
            else:
                return

    async def _round(self) -> bool:
        """`run_once`, unless somebody holds a lock that it needs: that is waited for, and the lead is kept."""
        try:
            moved = await self.run_once()
        except Locked as error:
            await self._locked_out(error)
            return False
        if self._clock() >= self._lock_told + LOCK_GONE_SECONDS:
            self._lock = None
        return moved

    async def _locked_out(self, error: Locked) -> None:
        self._lock_told = self._clock()
        if self._lock is None:
            self._lock = await self._store.locked_by(error.line)
            with contextlib.suppress(Locked):  # then status finds that out by itself
                await self._store.blocks(self._lead.epoch, self._lock)
        self._report([], self._lock)
        await asyncio.sleep(LOCK_SECONDS)

    async def _drained(self) -> bool:
        return self._reader.dry or bool(self._pulse.paused and not await self._store.pending())

    async def run_once(self) -> bool:
        """One round of the loop; True if something moved, so that another round may find more to do."""
        now = self._clock()
        self._reach_nats(now)
        moved = self._learn(now)
        for lane in self._lanes.values():
            moved |= lane.settle(self._jetstream, now)
            lane.watch(now)
        moved |= await self._send()
        await self._arrive()
        await self._lanes.load(self._store, self._caution, busy=self._caution.active and self._busy)
        await self._route(now)
        self._lanes.extend(held_back=self._held_back)
        moved |= await self._commit()
        moved |= self._learn(self._clock())  # an ack that came meanwhile makes room at once
        moved |= await self._send()
        moved |= await self._read(now)
        self._prepare()
        await self._housekeeper.check()
        await self._keep_alive(now)
        return moved

    # --- NATS: the connection and what came over it

    def _reach_nats(self, now: float) -> None:
        if (why := self._connection.lost(now, sent=self._lanes.unanswered)) is not None:
            self._router.lost()
            self._lanes.lost(why, now, blamed=self._connection.blamed)
        self._connection.reach(now, sent=self._lanes.flying)
        if self._jetstream is not None:
            self._lanes.suit(self._jetstream)

    def _learn(self, now: float) -> bool:
        forbidden = self._jetstream.forbidden() if self._jetstream else None
        learned = False
        for lane in self._lanes.values():
            if lane.learn(now, forbidden):
                learned = True
                if lane.chain.in_doubt and not lane.crossed and not lane.chain.squeezed:
                    self._router.forget()
        return learned

    async def _send(self) -> bool:
        """Send what is planned and committed, as far as the windows have room; True if anything went out."""
        sent = False
        if self._jetstream is not None and not self._held_back and await self._secured():
            for lane in self._lanes.in_turn:
                if lane.chain.unconfirmed:
                    await self._store.ping(self._lead.epoch)
                    lane.chain.confirm()
                if self._caution.active:
                    await self._caution.note_head(lane.chain)
                sent |= lane.send(self._jetstream, self._batch_ids)
        return sent

    def _prepare(self) -> None:
        """Make ready what comes next. Not before what was sent last is on the wire."""
        if self._jetstream is not None and not self._held_back:
            for lane in self._lanes.values():
                lane.prepare(self._jetstream, self._batch_ids)

    async def _secured(self) -> bool:
        """True if the standbys have what was planned last, where they must. They are waited for, and so said."""
        if self._unsecured is None:
            return True
        lsn, since = self._unsecured
        if await self._store.replicated(lsn):
            self._unsecured = self._insecure = None
            return True
        if self._clock() - since > REPLICA_SECONDS:
            self._insecure = NOT_REPLICATED
        return False

    # --- streams

    @property
    def _busy(self) -> bool:
        """True if any transaction's events are in memory."""
        return any(isinstance(each, Transaction) for each in itertools.chain(self._held(), self._lanes.planned))

    async def _route(self, now: float) -> None:
        if self._jetstream is not None:
            await self._router.route(
                self._jetstream,
                self._lanes,
                now,
                add_lane=self._lanes.add,
                settled=self._settled,
                proven=self.proven,
            )

    # --- Postgres: pages in, decisions out

    async def _read(self, now: float) -> bool:
        """Take in the page that was asked for, and ask for the next one if there is room; True if it held anything."""
        page = await self._reader.page(now, quiet=self._quiet and not self._held_back)
        if page is not None:
            self._router.take(await self._in_parts(page))
        self._reopen()
        # A short page is on its way before anybody asks for more.
        may_ask = now >= self._reader.due and (page is None or self._reader.full)
        if may_ask and (room := self._next_page()) is not None:
            messages, size = room
            if not self._caution.active:
                self._reader.begin(messages=messages, size=size)
            elif (verdict := await self._caution.next_alone(self._reader, size=size)) is not None:
                unread = Page(transactions=[], positions=[verdict.position], verdicts=[verdict])
                for each in (await self._in_parts(unread)).verdicts:
                    self._router.set_aside(each)
                return True
            if self._reader.reading:
                self._pulse.attended()
                await asyncio.sleep(0)  # so that the question is on its way
        return page is not None

    async def _in_parts(self, page: Page) -> Page:
        """The page with parts in place of what has any: those of them that are open, and that nobody has in hand.

        They are asked for now, and not with the page, which may be older than what was settled since.
        """
        parts = await self._store.parts(page.positions)
        if not parts and not self._parts:
            return page
        transactions: list[Transaction] = []
        for each in page.transactions:
            if each.position in parts:
                transactions += self._parts.take(each, parts[each.position])
            elif each.position not in self._parts:  # else it was split, and nothing of it is planned
                transactions.append(each)
        verdicts = [each for each in page.verdicts if each.position not in parts]
        for spoilt in page.verdicts:
            for verdict in self._parts.condemn(spoilt, parts.get(spoilt.position, ())):
                self._router.set_aside(verdict)
        return Page(transactions=transactions, positions=page.positions, verdicts=verdicts)

    def _next_page(self) -> tuple[int, int] | None:
        """How many messages and bytes may be asked for now; None if nothing may be."""
        if self._reader.reading or self._held_back:
            return None
        if self._caution.active and (self._jetstream is None or not self._quiet or self._caution.over):
            return None
        room = self._room()
        return room if min(room) > 0 else None

    def _held(self) -> Iterable[Transaction]:
        """What was read and is neither planned nor settled."""
        return itertools.chain(self._router.incoming, self._lanes.waiting)

    def _room(self) -> tuple[int, int]:
        """How many messages and bytes may still be read ahead."""
        messages, size = self._lanes.read_ahead
        messages += sum(map(COUNT, self._router.incoming))
        size += sum(map(SIZE, self._router.incoming))
        return self._settings.read_ahead_messages - messages, self._settings.read_ahead_bytes - size

    def _settled(self) -> bool:
        return not self._router.verdicts and self._lanes.idle

    @property
    def _quiet(self) -> bool:
        return not self._router.incoming and self._settled()

    async def _commit(self) -> bool:
        """Write what was decided: plans before they are carried out, receipts, verdicts. The barrier."""
        dirty = self._lanes.dirty
        verdicts = self._router.verdicts + [each for lane in dirty for each in lane.chain.verdicts]
        blocked = self._blocked
        if not dirty and not verdicts and not self._retried and blocked == self._told:
            return False
        receipts = list(itertools.chain.from_iterable(lane.chain.receipts for lane in dirty))
        whole, settled, parts = receipts, verdicts, None
        if self._parts or any(each.part for each in verdicts):
            whole, settled, parts = self._divided(dirty)
            verdicts = [*settled, *parts.verdicts]
        planned = itertools.chain.from_iterable(lane.chain.planned for lane in dirty)
        self._written = max([self._written, *map(POSITION, itertools.chain(verdicts, receipts, planned))])
        await self._store.commit(
            self._lead.epoch,
            Decisions(
                cursor=self._written,
                open_positions=self._open_positions(),
                receipts=whole,
                verdicts=settled,
                streams=[lane.row() for lane in dirty],
                blocked=blocked,
                retried=self._retried,
                sound=bool(receipts) and not self._caution.active and self._clock() - self._began > SOUND_SECONDS,
                parts=parts or None,
            ),
        )
        if parts is not None:
            self._parts.written(parts)
        if any(lane.chain.planned for lane in dirty) and (lsn := await self._store.written()) is not None:
            self._unsecured = (lsn, self._unsecured[1] if self._unsecured else self._clock())
        self._router.written()
        self._retried = []
        for lane in dirty:
            self._marked(lane.chain.written())
        if receipts:
            self._connection.sound()
            self._housekeeper.marked()
            self._reader.hurry()
        self._report(verdicts, blocked)
        return True

    def _divided(self, dirty: Sequence[Lane]) -> tuple[list[Receipt], list[Verdict], Settled]:
        """What is settled of whole transactions, and of parts."""
        lanes = [
            Progress(lane.chain.stream, lane.chain.receipts, lane.chain.verdicts, map(POSITION, lane.chain.planned))
            for lane in dirty
        ]
        return self._parts.settle([*lanes, Progress("", (), self._router.verdicts, ())])

    def _open_positions(self) -> list[Range]:
        """Positions up to the cursor that are neither settled nor planned, in few words: what a blocked stream holds
        may lie scattered among thousands that others have sent.
        """
        incoming = ((each.position, each.position) for each in self._router.incoming)
        held = itertools.chain.from_iterable(chain.held() for chain in self._lanes.chains)
        found = below(self._written, [*self._reader.open_positions, *incoming, *held])
        if len(found) <= OPEN_RANGES:
            return found
        apart = itertools.chain.from_iterable(chain.planned_between() for chain in self._lanes.chains)
        return coarse(found, OPEN_RANGES, list(apart))

    def _marked(self, receipts: Sequence[Receipt]) -> None:
        if receipts:
            _, _, firsts, lasts = zip(*receipts, strict=True)
            events = sum(lasts) - sum(firsts) + len(receipts)
            self._caution.through(events)
            stream, last = receipts[-1].stream, receipts[-1].position
            self._tell(Marked(stream=stream, transactions=len(receipts), events=events, last_position=last))

    def _report(self, verdicts: list[Verdict], blocked: str | None) -> None:
        for each in verdicts:
            self._tell(Died(verdict=each))
        if blocked != self._told:
            self._told = blocked
            self._tell(Blocked(stream="", why=self._told) if self._told else Unblocked(stream=""))
        for lane in self._lanes.values():
            lane.report()
        if verdicts and self._settings.on_dead is OnDead.HALT:
            raise Halt(
                f"transaction {verdicts[0].position} can never be sent ({verdicts[0]}), and this relay halts on that",
                remedy="settle it (outbox status shows it), then start the relay again; or use --on-dead continue",
            )

    async def _keep_alive(self, now: float) -> None:
        before = self._pulse.paused
        self._wishes = merged([*self._wishes, *await self._pulse.run_once(now)])
        self._reopen()
        if before is None and self._pulse.paused is not None:
            await self._reader.rouse()
        elif before is not None and self._pulse.paused is None:
            self._heard()

    def _reopen(self) -> None:
        """Look again at retried dead letters: not while a page is on its way, which may be older than the retry and
        would pass them by; and not at those that were read already, as they lay among the open positions.
        """
        if not self._wishes or self._reader.reading:
            return
        had = itertools.chain(self._held(), self._lanes.planned)
        # Of a transaction in parts one may be had, and another one retried.
        known = merged((each.position, each.position) for each in had if each.position not in self._parts)
        self._reader.reopen(outside(self._wishes, known))
        self._retried, self._wishes = self._wishes, []
        self._news.set()

    async def _arrive(self) -> None:
        """After a promotion or a restore: once every stream was settled, this is where the outbox is at home."""
        if self._lead.moved and not self._arrived and not self._lanes.moved:
            await self._store.arrived(self._lead.epoch, self._lead.home)
            self._arrived = True

    # --- waiting and ending

    async def _wait(self, longest: float = PING_SECONDS) -> None:
        """Wait for the first of: a reply, a notification, a lost session, the stop, or the next thing that is due."""
        if not self._reader.reading:
            await self._caution.rest(self._jetstream)
        timeout = min([longest, *(due - self._clock() for due in self._dues())])
        # While a page is being read, its coming is the news; the socket has one watcher at a time.
        watched = contextlib.nullcontext() if self._reader.reading else self._store.watched(self._heard)
        with watched, contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), max(0.0, timeout))
        self._news.clear()

    def _heard(self) -> None:
        # Ask something in any case: what makes the socket readable must be taken in, or the wait spins.
        self._reader.look_again()
        self._pulse.hear()
        self._news.set()

    def _dues(self) -> Iterator[float]:
        if self._unsecured is not None and self._jetstream is not None and not self._held_back:
            yield self._clock() + REPLICA_POLL_SECONDS
        if self._next_page() is not None:
            yield self._reader.due
        if self._jetstream is None:
            yield from self._connection.dues(self._clock())
            return
        if (due := self._router.due(self._clock())) is not None:
            yield due
        yield from self._lanes.dues()

    def stopping(self) -> None:
        """The stop has come: look up from the wait. Safe from a signal handler of the loop."""
        self._news.set()

    async def _finish(self) -> None:
        """Stop: send nothing more, wait a little for what is in flight, mark what was acked, and lay the lead down."""
        deadline = self._clock() + STOP_SECONDS
        while self._lanes.flying and self._clock() < deadline:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), 0.1)
            self._news.clear()
            self._learn(self._clock())
            await self._patiently(self._commit, deadline)
        await self._patiently(self._commit, deadline)
        await self._patiently(lambda: self._store.resign(self._lead.epoch), deadline)

    async def _patiently(self, work: Callable[[], Awaitable[object]], deadline: float) -> None:
        """Do it, again while somebody holds a lock that it needs; raises `Locked` if that is so until the deadline."""
        while True:
            try:
                await work()
            except Locked as error:
                if self._clock() >= deadline:
                    raise
                await self._locked_out(error)
            else:
                return

    async def _close(self) -> None:
        await self._housekeeper.close()
        await self._reader.close()
        self._router.close()
        self._lanes.close()
        await self._connection.close()
