"""Where transactions go: which stream takes which subject, and from what was read to a lane or to the dead letters.

What JetStream told of a subject is remembered until a connection or a chain fails. A remembered answer can be out of
date: the fence on each batch names the stream that is expected, so a wrong one is refused, never misplaced. A
transaction whose subject is in no stream holds all behind it: its stream is unknown, so anything behind it may be in
conflict with it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from uuid import UUID

from outbox.config import AcrossStreams, OnDead, OnUnrouted, Settings, StreamMode
from outbox.core.batch import POSITION
from outbox.core.chain import CHAINED, SHARED
from outbox.core.parts import Part, Parts, on_part, split
from outbox.core.plan import Seen
from outbox.core.requirements import of_subject
from outbox.core.transaction import NO_ROLLUPS, DeadReason, Transaction, Verdict, fits, invalid, verdict
from outbox.errors import Halt, Misconfigured, Weather
from outbox.event import matches
from outbox.jetstream.client import JetStream
from outbox.jetstream.stream import StreamInfo
from outbox.postgres.rows import Lead, Page, StreamRow
from outbox.postgres.store import Store
from outbox.relay.background import Errand
from outbox.relay.lanes import Lane

REMEMBERED_SUBJECTS = 10_000
TAIL = 100  # messages of a stream that tell whether others write there
# Judged by what JetStream said once.
REMEMBERED = (DeadReason.SPANS_STREAMS, DeadReason.MESSAGE_TOO_LARGE, DeadReason.TOO_LARGE_FOR_STREAM)


class Routes:
    """What is known of subjects and streams."""

    def __init__(self) -> None:
        self.mapped: set[str] = set()
        self._doubted = False
        self._infos: dict[str, StreamInfo] = {}
        self._tails: dict[str, dict[int, Seen | None]] = {}
        self._streams: dict[str, str] = {}

    def clear(self) -> None:
        """Forget everything: ask again."""
        self.mapped.clear()
        self._infos.clear()
        self._tails.clear()
        self._streams.clear()

    def doubt(self) -> None:
        """Forget everything, and the server's limits with it."""
        self.clear()
        self._doubted = True

    def info(self, stream: str) -> tuple[StreamInfo, Seen | None]:
        """What was learnt of a stream when it was asked for last, and its last message, if it has one."""
        info = self._infos[stream]
        return info, self._tails[stream].get(info.last_sequence)

    def shared(self, stream: str, outbox_id: UUID) -> bool:
        """True if any of the last messages of a stream is of another writer."""
        found = self._tails[stream].values()
        return any(each is not None and not each.marker and not each.is_of(str(outbox_id)) for each in found)

    def streams(self, transaction: Transaction) -> dict[str, str | None]:
        """The stream of each of its subjects; None where it is not known."""
        return {each: self._streams.get(each) or self._find(each) for each in transaction.subjects}

    def only_stream(self, transaction: Transaction) -> str | None:
        """The stream of all its subjects, which were asked for before; else None."""
        if transaction.count == 1:
            return self._streams.get(transaction.subjects[0])
        names = set(map(self._streams.get, transaction.subjects))
        return names.pop() if len(names) == 1 else None

    async def ask(self, jetstream: JetStream, subjects: Collection[str]) -> dict[str, str | None]:
        """Ask JetStream for the streams of these subjects; None where it says that there is none."""
        answers: dict[str, str | None] = {}
        if self._doubted:
            await jetstream.learn_limits()
            self._doubted = False
        for subject in subjects:
            answers[subject] = name = (
                self._streams.get(subject) or self._find(subject) or await jetstream.stream_of(subject)
            )
            if name is None and await jetstream.is_mapped(subject):
                self.mapped.add(subject)
            if name is not None and name not in self._infos:
                info = await jetstream.stream(name)
                if info is None:
                    raise Weather(f"stream {name} has just gone")
                end = info.last_sequence
                self._tails[name] = await jetstream.read(name, range(max(1, end - TAIL + 1), end + 1))
                self._infos[name] = info
            if name is not None:
                self._remember(subject, name)
        return answers

    def _find(self, subject: str) -> str | None:
        for name, info in self._infos.items():
            if any(matches(subject, pattern) for pattern in info.subjects):
                self._remember(subject, name)
                return name
        return None

    def _remember(self, subject: str, stream: str) -> None:
        if len(self._streams) >= REMEMBERED_SUBJECTS:
            del self._streams[next(iter(self._streams))]
        self._streams[subject] = stream


class Router:
    """What was read and has no lane yet, the verdicts on it, and what holds its head back."""

    def __init__(self, store: Store, lead: Lead, settings: Settings, parts: Parts, *, news: Callable[[], None]) -> None:
        self.incoming: deque[Transaction] = deque()
        self.verdicts: list[Verdict] = []
        self.blocked: str | None = None
        self._store, self._lead, self._settings, self._parts = store, lead, settings, parts
        self._routes = Routes()
        self._spoiled: dict[int, Verdict] = {}
        self._asking: Errand[dict[str, str | None]] = Errand(news)
        self._asked_again = 0  # the head for whose sake JetStream was asked again

    def take(self, page: Page) -> None:
        """What was read, in commit order, parts in place of theirs; what is not whole takes its place in it."""
        self._spoiled |= {verdict.position: verdict for verdict in page.verdicts}
        spoiled = [Transaction(each.position, (), (), (), (), 0, 0, 0, NO_ROLLUPS) for each in page.verdicts]
        self.incoming.extend(sorted([*page.transactions, *spoiled], key=POSITION) if spoiled else page.transactions)

    def set_aside(self, verdict: Verdict) -> None:
        """One that can never be sent."""
        self.verdicts.append(verdict)

    def written(self) -> None:
        """The verdicts are committed."""
        self.verdicts = []

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
        await self._take_answers(lanes, now)
        while self._pass_on(lanes):
            head = self.incoming[0]
            pieces: Sequence[Transaction] = [head]
            if (offence := self._spoiled.get(head.position) or invalid(head)) is None:
                streams = self._routes.streams(head)
                if None in streams.values():
                    self._ask(jetstream, [subject for subject, stream in streams.items() if stream is None], now)
                    return
                pieces = self._pieces(head, streams)
                for name in dict.fromkeys(streams[each.subjects[0]] or "" for each in pieces):
                    if name not in lanes:
                        await self._first_contact(name, add_lane, jetstream, proven=proven)
                    if self._asked_again == head.position:
                        lanes[name].limit(self._routes.info(name)[0], jetstream)
                offence = next(filter(None, (self._offence(each, streams, lanes) for each in pieces)), None)
            if offence is not None and offence.reason in REMEMBERED and self._asked_again != head.position:
                # An operator may have mended it since: never a dead letter by what is only remembered.
                self._asked_again = head.position
                self._routes.doubt()
                continue
            if offence is None:
                self._join(head, pieces, streams, lanes)
            elif self._settings.on_dead is OnDead.HALT and not settled():
                return  # all before it goes out first, then the relay halts behind it
            else:
                self.set_aside(on_part(offence, head.row) if isinstance(head, Part) else offence)
            self._next_head()

    def _pieces(self, head: Transaction, streams: Mapping[str, str | None]) -> Sequence[Transaction]:
        """What goes to one stream each: the head, or where its subjects are in several streams its parts.

        A part is never divided again, and is a part whatever the settings say by now.
        """
        if isinstance(head, Part) or self._settings.across_streams is AcrossStreams.DEAD:
            return [head]
        return split(head, streams) if len(set(streams.values())) > 1 else [head]

    def _offence(
        self, piece: Transaction, streams: Mapping[str, str | None], lanes: Mapping[str, Lane]
    ) -> Verdict | None:
        """Why this can never be sent; of a part that is none yet, a verdict on the whole transaction."""
        name = streams[piece.subjects[0]] or ""
        found = verdict(piece, {each: streams[each] for each in piece.subjects}, lanes[name].limits)
        if not isinstance(piece, Part):
            return found
        found = found or self._parts.misplaced(piece, name)
        return on_part(found, piece.row, whole=True) if found and piece.position not in self._parts else found

    def _join(
        self,
        head: Transaction,
        pieces: Sequence[Transaction],
        streams: Mapping[str, str | None],
        lanes: Mapping[str, Lane],
    ) -> None:
        """Give the head, or its parts, to their lanes."""
        parts = [each for each in pieces if isinstance(each, Part)]
        if isinstance(head, Part):
            self._parts.move(head, streams[head.subjects[0]] or "")
        elif parts:
            self._parts.join(parts)
        for each in pieces:
            lanes[streams[each.subjects[0]] or ""].chain.join(each)

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
        if isinstance(head, Part):
            return None if head.row.moves else lanes.get(head.row.stream)  # wherever its subjects are by now
        if head.headers:
            return None
        lane = lanes.get(self._routes.only_stream(head) or "")
        return lane if lane is not None and fits(head, lane.limits) else None

    def _ask(self, jetstream: JetStream, subjects: list[str], now: float) -> None:
        self._asking.start(lambda: self._routes.ask(jetstream, subjects), now)

    def _next_head(self, passed: int = 1) -> None:
        for _ in range(passed):
            self._spoiled.pop(self.incoming.popleft().position, None)
        self._asked_again = 0
        if self._asking.due or self.blocked is not None:
            self._asking.reset()
            self.blocked = None

    async def _first_contact(
        self, name: str, add_lane: Callable[[StreamRow], Lane], jetstream: JetStream, *, proven: bool
    ) -> None:
        info, tail = self._routes.info(name)
        if info.problem is not None and not proven:  # later it holds only what is for it
            what = f"stream {name} cannot be used: {info.problem.what}"
            raise Misconfigured(what, remedy=info.problem.remedy)
        # A mirror strips what marks a batch, and a copy that a consumer makes has no message id.
        unsourced = tail is not None and not tail.sourced and tail.message_id is not None
        if tail is not None and unsourced and tail.outbox_id == str(self._lead.outbox_id):
            raise Halt(
                f"stream {name} ends with transaction {tail.position} of this outbox, which does not know the stream: "
                "the database is older than the stream, or a copy; or the stream is a copy of one that it knows, as is "
                "a mirror that was promoted",
                remedy="make sure that only one copy of the database is in use, then run: outbox rebase; a stream that "
                f"was retired is taken back by: outbox rebase --stream {name}",
            )
        shared = self._settings.stream_mode is not StreamMode.CHAINED and self._routes.shared(
            name, self._lead.outbox_id
        )
        mode, last = SHARED if shared else CHAINED, info.last_sequence
        row = StreamRow(name=name, created=info.created, mode=mode, last_sequence=last, plan=[], since=last)
        await self._store.add_stream(self._lead.epoch, row)
        add_lane(row).limit(info, jetstream)

    async def _take_answers(self, lanes: Mapping[str, Lane], now: float) -> None:
        """Take in what JetStream said about the subjects of the head."""
        came = self._asking.taken(now)
        if isinstance(came, Weather) and self.incoming:
            self.blocked = f"transaction {self.incoming[0].position}: nobody tells where it goes: {came.message}"
        elif isinstance(came, dict) and self.incoming:
            nowhere = next((subject for subject, stream in came.items() if stream is None), None)
            if nowhere is not None:
                what, remedy = of_subject(nowhere, mapped=nowhere in self._routes.mapped)
                told = f"{what}; remedy: {remedy}" if nowhere in self._routes.mapped else what
                await self._unrouted(self.incoming[0], lanes, told, now)

    async def _unrouted(self, head: Transaction, lanes: Mapping[str, Lane], why: str, now: float) -> None:
        if self._settings.on_unrouted is OnUnrouted.DEAD:
            offence = Verdict(position=head.position, reason=DeadReason.UNROUTED, detail=why)
            self.set_aside(on_part(offence, head.row) if isinstance(head, Part) else offence)
        elif isinstance(head, Part) and head.row.stream in lanes:
            lanes[head.row.stream].chain.join(head)  # it holds only its own lane up, not all behind it
        elif await self._store.still_pending(head.position):
            self.blocked = f"transaction {head.position}: {why}"
            self._asking.fail(now)
            return
        self._next_head()
