"""The leader's loop: learn, settle, route, plan, commit, send, read; one coroutine, so that nothing races with itself.

Everything in memory belongs to one session of the store and is dropped with it. What takes long (connecting to NATS,
reading a stream back, asking where a subject goes) runs beside the loop as an errand and is taken in by the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator

from outbox.config import OnDead, OnUnrouted, Settings
from outbox.errand import Errand
from outbox.errors import Deposed, Halt, Misconfigured, OutboxError, Unusable, Weather
from outbox.jetstream import JetStream
from outbox.lane import Lane
from outbox.positions import Range, merged
from outbox.reader import Reader
from outbox.routing import Routes
from outbox.store import Decisions, Lead, Store, StreamRow
from outbox.telemetry import Blocked, Connected, Died, Listener, Marked, TookLead, Unreachable
from outbox.transaction import DeadReason, Transaction, Verdict, invalid, verdict

PING_SECONDS = 1.0
STRAY_SECONDS = 60.0
STOP_SECONDS = 4.0  # less than idle_session_timeout: the last mark needs the session


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
        self._proven_before = proven
        self._store, self._lead, self._settings = store, lead, settings
        self._connect, self._tell, self._stop, self._drain = connect, tell, stop, drain
        self._news = asyncio.Event()
        self._clock = asyncio.get_running_loop().time
        self._reader = Reader(store, lead, settings, tell)
        self._written = lead.cursor  # the highest position that was planned or settled: the cursor in the database
        self._incoming: deque[Transaction] = deque()
        self._lanes: dict[str, Lane] = {}
        self._verdicts: list[Verdict] = []
        self._routes = Routes()
        self._jetstream: JetStream | None = None
        self._connecting: Errand[JetStream] = Errand(self._news.set)
        self._asking: Errand[dict[str, str | None]] = Errand(self._news.set)
        self._blocked: str | None = None
        self._told: str | None = None
        self._spoke = self._strays_looked = self._clock()
        term = f"{str(lead.outbox_id)[:8]}-{secrets.token_hex(6)}"
        self._batch_ids = (f"{term}-{number}" for number in itertools.count(1))

    @property
    def proven(self) -> bool:
        """True if this process has published anything, in this term or before."""
        return self._proven_before or any(lane.proven for lane in self._lanes.values())

    async def run(self) -> None:
        """Lead until stopped, or drained. Raises `Deposed` or `Weather` when the lead is lost, else `Halt`."""
        self._tell(TookLead(epoch=self._lead.epoch))
        try:
            for row in await self._store.streams():
                await self._restore(row)
            while not self._stop.is_set():
                if await self.run_once() or self._news.is_set():
                    self._news.clear()
                elif self._drain and self._quiet and self._reader.dry:
                    return
                else:
                    await self._wait()
            await self._finish()
        except Halt as halt:
            # What contradicts a plan may be the work of a newer leader: it took the lead before it sent anything.
            await self._check_lead()
            await self._store.halted(self._lead.epoch, str(halt))
            raise
        finally:
            await self._close()

    async def run_once(self) -> bool:
        """One round of the loop; True if something moved, so that another round may find more to do."""
        now = self._clock()
        self._reach_nats(now)
        moved = self._learn(now)
        for lane in self._lanes.values():
            moved |= lane.settle(self._jetstream, now)
        await self._route(now)
        for lane in self._lanes.values():
            lane.chain.extend()
        moved |= await self._commit()
        if self._jetstream is not None and not self._stop.is_set():
            for lane in self._lanes.values():
                moved |= lane.send(self._jetstream, self._batch_ids, now)
        moved |= await self._read(now)
        await self._keep_alive(now)
        return moved

    # --- NATS: the connection and what came over it

    def _reach_nats(self, now: float) -> None:
        if self._jetstream is not None and (why := self._jetstream.lost) is not None:
            self._tell(Unreachable(server="nats", why=why, delay=0.0))
            closing = asyncio.ensure_future(self._jetstream.close())
            closing.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._jetstream = None
            self._asking.cancel()
            self._routes.clear()
            for lane in self._lanes.values():
                lane.lost("the connection to NATS was lost")
        if self._jetstream is None:
            self._connecting.start(lambda: self._connect(self._news.set), now)
            came = self._connecting.taken(now)
            if isinstance(came, Weather):
                self._tell(Unreachable(server="nats", why=came.message, delay=self._connecting.due - now))
            elif came is not None:
                self._jetstream = came
                self._connecting.reset()
                self._tell(Connected(server="nats", version=".".join(map(str, came.version))))

    def _learn(self, now: float) -> bool:
        forbidden = self._jetstream.forbidden if self._jetstream else None
        learned = False
        for lane in self._lanes.values():
            if lane.learn(now, forbidden):
                learned = True
                if lane.chain.in_doubt and not lane.chain.shared:
                    self._routes.clear()  # subjects may have moved: ask again
        return learned

    # --- where transactions go

    async def _restore(self, row: StreamRow) -> None:
        """A stream as the last leader left it: its plan is settled as it is before anything new joins."""
        lane = self._add_lane(row)
        if row.plan:
            lane.chain.planned.extend(await self._store.planned(row.plan))
            lane.chain.dirty = True  # its commit may not have reached the standbys: commit it before it is sent

    def _add_lane(self, row: StreamRow) -> Lane:
        lane = Lane(row, self._settings, str(self._lead.outbox_id), tell=self._tell, news=self._news.set)
        lane.proven = self._proven_before
        self._lanes[row.name] = lane
        return lane

    async def _route(self, now: float) -> None:
        """Give incoming transactions to their lanes, in order. One that is in no stream holds all behind it."""
        await self._take_routes(now)
        while self._incoming and (jetstream := self._jetstream) is not None:
            head = self._incoming[0]
            if (offence := invalid(head)) is None:
                streams = self._routes.streams(head)
                if unknown := {event.subject for event in head.events} - streams.keys():
                    self._asking.start(lambda: self._routes.ask(jetstream, unknown), now)
                    return
                lane = self._lanes.get(name := next(iter(streams.values()))) or await self._first_contact(name)
                offence = verdict(head, streams, lane.limits)
            if offence is None:
                lane.chain.waiting.append(head)
            elif self._settings.on_dead is OnDead.HALT and not self._settled:
                return  # all before it goes out first, then the relay halts behind it
            else:
                self._verdicts.append(offence)
            self._next_head()

    def _next_head(self) -> None:
        self._incoming.popleft()
        self._asking.reset()
        self._blocked = None

    async def _first_contact(self, name: str) -> Lane:
        info = self._routes.info(name)
        await self._store.add_stream(self._lead.epoch, name, info.created, info.last_sequence)
        row = StreamRow(name=name, created=info.created, mode="chained", last_sequence=info.last_sequence, plan=[])
        lane = self._add_lane(row)
        lane.limit(info, self._jetstream)
        return lane

    async def _take_routes(self, now: float) -> None:
        """Take in what JetStream said about the subjects of the head."""
        came = self._asking.taken(now)
        if isinstance(came, Unusable):
            if not self.proven:
                raise Misconfigured(came.message, remedy=came.remedy)
            self._blocked = came.message
        elif isinstance(came, dict) and self._incoming:
            nowhere = next((subject for subject, stream in came.items() if stream is None), None)
            if nowhere is not None:
                await self._unrouted(self._incoming[0], f"subject {nowhere} is in no stream", now)

    async def _unrouted(self, head: Transaction, why: str, now: float) -> None:
        if self._settings.on_unrouted is OnUnrouted.DEAD:
            self._verdicts.append(Verdict(position=head.position, reason=DeadReason.UNROUTED, detail=why))
        elif await self._store.still_pending(head.position):
            self._blocked = f"transaction {head.position}: {why}"
            self._asking.fail(now)
            return
        self._next_head()

    # --- Postgres: pages in, decisions out

    async def _read(self, now: float) -> bool:
        """Read the next page if there is room and reason; True if it held anything."""
        messages, size = self._room()
        if now < self._reader.due or self._stop.is_set() or min(messages, size) <= 0:
            return False
        page = await self._reader.read(now, messages=messages, size=size, quiet=self._quiet)
        self._incoming.extend(page or ())
        return page is not None

    def _held(self) -> Iterable[Transaction]:
        """What was read and is neither planned nor settled."""
        return itertools.chain(self._incoming, *(lane.chain.waiting for lane in self._lanes.values()))

    def _room(self) -> tuple[int, int]:
        """How many messages and bytes may still be read ahead."""
        messages, size = self._settings.read_ahead_messages, self._settings.read_ahead_bytes
        for transaction in itertools.chain(self._held(), *(lane.chain.plan for lane in self._lanes.values())):
            messages -= transaction.count
            size -= transaction.size
        return messages, size

    @property
    def _settled(self) -> bool:
        return not self._verdicts and all(lane.chain.idle for lane in self._lanes.values())

    @property
    def _quiet(self) -> bool:
        return not self._incoming and self._settled

    async def _commit(self) -> bool:
        """Write what was decided: plans before they are carried out, receipts, verdicts. The barrier."""
        dirty = [lane for lane in self._lanes.values() if lane.chain.dirty]
        verdicts = self._verdicts + [each for lane in dirty for each in lane.chain.verdicts]
        if not dirty and not verdicts and self._blocked == self._told:
            return False
        receipts = [receipt for lane in dirty for receipt in lane.chain.receipts]
        settled = [*(each.position for each in verdicts), *(each.position for each in receipts)]
        planned = [transaction.position for lane in dirty for transaction in lane.chain.planned]
        self._written = max([self._written, *planned, *settled])
        self._spoke = self._clock()
        await self._store.commit(
            self._lead.epoch,
            Decisions(
                cursor=self._written,
                open_positions=self._unsettled_below(self._written),
                receipts=receipts,
                verdicts=verdicts,
                streams=[lane.row() for lane in dirty],
                blocked=self._blocked,
            ),
        )
        self._verdicts = []
        for lane in dirty:
            lane.chain.written()
        if receipts:
            self._tell(Marked(transactions=len(receipts), last_position=receipts[-1].position))
        self._report(verdicts)
        return True

    def _unsettled_below(self, cursor: int) -> list[Range]:
        """Positions up to the cursor that are neither settled nor planned: open ones, and what still waits."""
        gaps = ((low, min(high, cursor)) for low, high in self._reader.open_positions if low <= cursor)
        held = ((each.position, each.position) for each in self._held() if each.position <= cursor)
        return merged(itertools.chain(gaps, held))

    def _report(self, verdicts: list[Verdict]) -> None:
        for each in verdicts:
            self._tell(Died(verdict=each))
        if self._blocked != self._told:
            self._told = self._blocked
            if self._blocked:
                self._tell(Blocked(stream="", why=self._blocked))
        for lane in self._lanes.values():
            lane.report()
        if verdicts and self._settings.on_dead is OnDead.HALT:
            raise Halt(
                f"transaction {verdicts[0].position} can never be sent ({verdicts[0]}), and this relay halts on that",
                remedy="settle it (outbox status shows it), then start the relay again; or use --on-dead continue",
            )

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

    async def _wait(self, longest: float = PING_SECONDS) -> None:
        """Wait for the first of: a reply, a notification, a lost session, the stop, or the next thing that is due."""
        timeout = min([longest, *(due - self._clock() for due in self._dues())])
        with self._store.watched(self._heard), contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), max(0.0, timeout))
        self._news.clear()

    def _heard(self) -> None:
        # Ask something in any case: what makes the socket readable must be taken in, or the wait spins.
        self._reader.due = self._spoke = 0.0
        self._news.set()

    def _dues(self) -> Iterator[float]:
        if min(self._room()) > 0:
            yield self._reader.due
        if self._jetstream is None:
            if not self._connecting.running:
                yield self._connecting.due
            return
        if self._incoming and self._asking.due > self._clock():
            yield self._asking.due
        for lane in self._lanes.values():
            yield from lane.dues()

    def stopping(self) -> None:
        """The stop has come: look up from the wait. Safe from a signal handler of the loop."""
        self._news.set()

    async def _finish(self) -> None:
        """Stop: send nothing more, wait a little for what is in flight, and mark what was acked."""
        deadline = self._clock() + STOP_SECONDS
        while any(lane.flying for lane in self._lanes.values()) and self._clock() < deadline:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), 0.1)
            self._news.clear()
            self._learn(self._clock())
            await self._commit()
        await self._commit()

    async def _close(self) -> None:
        with contextlib.suppress(OutboxError):
            if isinstance(came := self._connecting.taken(self._clock()), JetStream):
                await came.close()
        self._connecting.cancel()
        self._asking.cancel()
        for lane in self._lanes.values():
            lane.close()
        if self._jetstream is not None:
            await self._jetstream.close()
