"""Where transactions go: from what was read to the lane of their stream, in order, or among the dead letters.

Belongs to the leader's loop. A transaction whose subject is in no stream holds all behind it: its stream is unknown,
so anything behind it may be in conflict with it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping

from outbox.config import OnDead, OnUnrouted, Settings
from outbox.core.transaction import DeadReason, Transaction, Verdict, fits, invalid, verdict
from outbox.errors import Halt, Misconfigured, Unusable, Weather
from outbox.jetstream.client import JetStream
from outbox.postgres.rows import Lead, StreamRow
from outbox.postgres.store import Store
from outbox.relay.background import Errand
from outbox.relay.lane import Lane
from outbox.relay.routes import Routes

REMEMBERED = (DeadReason.SPANS_STREAMS, DeadReason.MESSAGE_TOO_LARGE)  # judged by what JetStream said once


class Router:
    """What was read and has no lane yet, the verdicts on it, and what holds its head back."""

    def __init__(self, store: Store, lead: Lead, settings: Settings, *, news: Callable[[], None]) -> None:
        self.incoming: deque[Transaction] = deque()
        self.verdicts: list[Verdict] = []
        self.blocked: str | None = None
        self._store, self._lead, self._settings = store, lead, settings
        self._routes = Routes()
        self._asking: Errand[dict[str, str | None]] = Errand(news)
        self._asked_again = 0  # the head for whose sake JetStream was asked again

    def forget(self) -> None:
        """Subjects may have moved: ask again."""
        self._routes.clear()

    def lost(self) -> None:
        """The connection is gone, and with it whatever was asked."""
        self._asking.cancel()
        self._routes.clear()

    def due(self, now: float) -> float | None:
        """The loop's time of the next question, if it is later than now."""
        return self._asking.due if self.incoming and self._asking.due > now else None

    async def route(
        self,
        jetstream: JetStream,
        lanes: dict[str, Lane],
        now: float,
        *,
        add_lane: Callable[[StreamRow], Lane],
        settled: Callable[[], bool],
        proven: bool,
    ) -> None:
        """Give incoming transactions to their lanes; `settled` tells whether all before the head is out and marked.

        Raises `Misconfigured` if a stream cannot be used from the start (`proven` says that it is not the start).
        """
        await self._take_answers(now, proven=proven)
        while self._pass_on(lanes):
            head = self.incoming[0]
            if (offence := invalid(head)) is None:
                streams = self._routes.streams(head)
                if None in streams.values():
                    self._ask(jetstream, [subject for subject, stream in streams.items() if stream is None], now)
                    return
                name = streams[head.subjects[0]] or ""
                if name not in lanes:
                    await self._first_contact(name, add_lane, jetstream)
                if self._asked_again == head.position:
                    lanes[name].limit(self._routes.info(name)[0], jetstream)
                offence = verdict(head, streams, lanes[name].limits)
            if offence is not None and offence.reason in REMEMBERED and self._asked_again != head.position:
                # An operator may have mended it since: never a dead letter by what is only remembered.
                self._asked_again = head.position
                self._routes.clear()
                continue
            if offence is None:
                lanes[name].chain.join(head)
            elif self._settings.on_dead is OnDead.HALT and not settled():
                return  # all before it goes out first, then the relay halts behind it
            else:
                self.verdicts.append(offence)
            self._next_head()

    def close(self) -> None:
        """Stop what runs beside the loop; idempotent."""
        self._asking.cancel()

    def _pass_on(self, lanes: Mapping[str, Lane]) -> bool:
        """Give on all that is told at a glance; True if there is one behind it that needs a closer look."""
        passed = 0
        for head in self.incoming:
            if (lane := self._quick(head, lanes)) is None:
                break
            lane.chain.join(head)
            passed += 1
        if passed:
            self._next_head(passed)
        return bool(self.incoming)

    def _quick(self, head: Transaction, lanes: Mapping[str, Lane]) -> Lane | None:
        """The lane of a transaction at a glance: no headers, known subjects of one stream, nothing out of size."""
        if head.headers:
            return None
        lane = lanes.get(self._routes.only_stream(head) or "")
        return lane if lane is not None and fits(head, lane.limits) else None

    def _ask(self, jetstream: JetStream, subjects: list[str], now: float) -> None:
        self._asking.start(lambda: self._routes.ask(jetstream, subjects), now)

    def _next_head(self, passed: int = 1) -> None:
        for _ in range(passed):
            self.incoming.popleft()
        self._asked_again = 0
        if self._asking.due or self.blocked is not None:
            self._asking.reset()
            self.blocked = None

    async def _first_contact(self, name: str, add_lane: Callable[[StreamRow], Lane], jetstream: JetStream) -> None:
        info, tail = self._routes.info(name)
        if tail is not None and tail.outbox_id == str(self._lead.outbox_id):
            raise Halt(
                f"stream {name} ends with transaction {tail.position} of this outbox, which does not know the stream: "
                "the database is older than the stream, or is a copy",
                remedy="make sure that only one copy of the database is in use, then run: outbox rebase",
            )
        await self._store.add_stream(self._lead.epoch, name, info.created, info.last_sequence)
        row = StreamRow(name=name, created=info.created, mode="chained", last_sequence=info.last_sequence, plan=[])
        add_lane(row).limit(info, jetstream)

    async def _take_answers(self, now: float, *, proven: bool) -> None:
        """Take in what JetStream said about the subjects of the head."""
        came = self._asking.taken(now)
        if isinstance(came, Unusable):
            if not proven:
                raise Misconfigured(came.message, remedy=came.remedy)
            self.blocked = came.message
        elif isinstance(came, Weather) and self.incoming:
            self.blocked = f"transaction {self.incoming[0].position}: nobody tells where it goes: {came.message}"
        elif isinstance(came, dict) and self.incoming:
            nowhere = next((subject for subject, stream in came.items() if stream is None), None)
            if nowhere is not None:
                await self._unrouted(self.incoming[0], f"subject {nowhere} is in no stream", now)

    async def _unrouted(self, head: Transaction, why: str, now: float) -> None:
        if self._settings.on_unrouted is OnUnrouted.DEAD:
            self.verdicts.append(Verdict(position=head.position, reason=DeadReason.UNROUTED, detail=why))
        elif await self._store.still_pending(head.position):
            self.blocked = f"transaction {head.position}: {why}"
            self._asking.fail(now)
            return
        self._next_head()
