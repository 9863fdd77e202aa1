"""Housekeeping beside the leader's loop, on a session of its own: the purge, and the search for strays and drift.

It stops nothing: what fails is told, noted for the status, and tried again after a back-off; the term goes on. Its cost
does not grow with what was deleted before: it goes on where it stopped, and looks from the beginning only now and then.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
from collections.abc import Callable
from itertools import accumulate

from outbox.config import Settings
from outbox.core.telemetry import Drifted, HousekeepingFailed, HousekeepingWorks, Listener, Purged, Strayed
from outbox.errors import Halt, OutboxError
from outbox.postgres.housekeeping import Findings, Housekeeping
from outbox.postgres.session import open_session
from outbox.postgres.store import Store
from outbox.relay.background import Backoff
from outbox.sources import current
from outbox.text import counted

LOOK_SECONDS = 2.0  # less than idle_session_timeout
STRAY_SECONDS, COUNTER_SECONDS = 60.0, 3.0
PURGE_SECONDS = 10.0
LOCKED_IN_A_ROW = 5  # then somebody has locked many
AGAIN_SECONDS, LOCKED_SECONDS, SHARE = 0.5, 3.0, 0.05  # from the beginning: so often, and of the time at most
FIRST_PAGE, LARGEST_PAGE, PAGE_EVENTS = 1000, 8000, 20_000
SLOW_SECONDS, QUICK_SECONDS = 0.5, 0.15  # a page that takes longer is halved, one that is quicker doubled
TOLD_AFTER = 3  # failures in a row: with the server's end the term ends too, and says why
END_SECONDS = 0.5
APPLICATION = "outbox housekeeping"


class Housekeeper:
    """`start` and `close` it with the term; `news` is called when it has ended by itself, which only a defect does."""

    def __init__(self, store: Store, settings: Settings, *, tell: Listener, news: Callable[[], None]) -> None:
        """`store` is the leader's: what fails is noted there when no session of its own can be had."""
        self._store, self._settings, self._tell, self._news = store, settings, tell, news
        self._clock = asyncio.get_running_loop().time
        self._marked = asyncio.Event()
        self._backoff = Backoff()
        self._found = Findings()
        self._noted: Findings | None = None
        self._task: asyncio.Task[None] | None = None
        self._session: Housekeeping | None = None
        self._failing = ""
        self._unsaid: str | None = None  # what fails, for the leader to note: it has no session of its own for that
        self._ends = False
        self._halt: Halt | None = None
        self._purge = Purge(settings.retention * 3600, tell, self._clock)

    def start(self) -> None:
        """Begin."""
        self._task = asyncio.create_task(self._run())
        self._task.add_done_callback(lambda _: self._news())

    def marked(self) -> None:
        """Something was marked: without a retention that is to go at once."""
        if self._settings.retention == 0:
            self._marked.set()

    async def check(self) -> None:
        """Note what fails; raise `Halt` if it has found what a relay cannot go on with, or what it died of.

        By the leader, whose session it is: its socket has one watcher at a time.
        """
        if self._halt is not None:
            raise self._halt
        if self._task is not None and self._task.done():
            self._task.result()
        if self._unsaid is not None:
            why, self._unsaid = self._unsaid, None
            with contextlib.suppress(OutboxError):  # the leader meets the same, and says so
                await self._store.housekeeping_fails(why)

    async def close(self) -> None:
        """Stop it; idempotent."""
        task, self._task, self._ends = self._task, None, True
        if task is None:
            return
        if self._session is not None:
            self._session.abandon()
            await asyncio.wait([task], timeout=END_SECONDS)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def _run(self) -> None:
        while not self._ends:
            try:
                url = current(self._settings, "database_").database_url
                connection = await open_session(url, APPLICATION)
                async with connection:
                    self._session = Housekeeping(connection, self._settings.schema)
                    await self._serve(self._session)
            except OutboxError as error:
                self._session = None
                if not self._ends:
                    await self._failed(error)

    async def _failed(self, error: OutboxError) -> None:
        self._backoff = self._backoff.failed()
        if self._backoff.failures >= TOLD_AFTER and error.line != self._failing:
            self._failing = error.line
            self._unsaid = error.line
            self._tell(HousekeepingFailed(why=error.line))
            self._news()
        self._noted = None
        await asyncio.sleep(self._backoff.delay(random.random()))

    async def _serve(self, session: Housekeeping) -> None:
        looks = strays = counts = 0.0
        while True:
            now = self._clock()
            if now >= strays:
                strays = now + STRAY_SECONDS
                await self._search(session)
            if now >= looks:
                looks = now + LOOK_SECONDS
                await self._look(session)
            if now >= counts:
                await self._reconcile(session)
                counts = self._clock() + max(COUNTER_SECONDS, (self._clock() - now) / SHARE)
            await self._purge.run_once(session)
            await self._note(session)
            self._backoff, self._failing = self._backoff.reset(), ""
            await self._rest(min(looks, strays, counts, self._purge.due) - self._clock())

    async def _rest(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._marked.wait(), max(0.0, seconds))
            self._purge.due = 0.0
        self._marked.clear()

    async def _search(self, session: Housekeeping) -> None:
        strays = await session.strays()
        if strays:
            self._tell(Strayed(txid=strays[0][0], events=strays[0][1]))
        self._found = Findings(stray_events=sum(events for _, events in strays), drift=self._found.drift)

    async def _reconcile(self, session: Housekeeping) -> None:
        """A TRUNCATE or a setval may come under a relay that leads."""
        if problem := await session.unreconciled():
            self._halt = Halt(problem.what, remedy=problem.remedy)
            self._news()

    async def _look(self, session: Housekeeping) -> None:
        drift = ", ".join(await session.drift()) or None
        if drift != self._found.drift:
            self._tell(Drifted(what=drift or ""))
        self._found = Findings(stray_events=self._found.stray_events, drift=drift)

    async def _note(self, session: Housekeeping) -> None:
        found = Findings(stray_events=self._found.stray_events, drift=self._found.drift, failing=self._purge.problem)
        if found == self._noted:
            return
        before = self._noted.failing if self._noted else None
        await session.note(found)
        self._noted = found
        if found.failing is not None and found.failing != before:
            self._tell(HousekeepingFailed(why=found.failing))
        elif found.failing is None:
            self._tell(HousekeepingWorks())


class Purge:
    """Deletes old transactions in pages. `due` is the loop's time of the next, `problem` why some are passed by."""

    def __init__(self, seconds: float, tell: Listener, clock: Callable[[], float]) -> None:
        """What was sent more than so many seconds ago goes; with 0 as soon as it is marked, with infinity never."""
        self._seconds, self._tell, self._clock = seconds, tell, clock
        self._after, self._page = 0, FIRST_PAGE
        self._front = 0  # the highest position that was old
        self._pass: bool | None = None  # under way, from the beginning or from where the last one ended
        self._beginning = self._looked = 0.0  # when to go from the beginning again, and how long that looked last
        self._left = False  # something that was passed by may go later
        self._locked: str | None = None
        self._in_a_row = 0
        self.problem: str | None = None
        self.due = math.inf if math.isinf(seconds) else 0.0

    async def run_once(self, session: Housekeeping) -> int:
        """Delete a page if it is time; how many transactions."""
        now = self._clock()
        if now < self.due:
            return 0
        if self._pass is None:
            self._begin(now)
        old = await session.old(self._after, self._seconds, self._page)
        self._looked += self._clock() - now if self._pass else 0.0
        self._left = self._left or old.passed
        total = accumulate(old.events)
        going = [each for each, events in zip(old.positions, total, strict=True) if events <= PAGE_EVENTS]
        going = going or old.positions[:1]
        cut = len(going) < len(old.positions)
        gone = await self._delete(session, going) if going else 0
        if gone is None:
            return 0  # again at once, with a smaller page
        self._after = going[-1] if cut else old.after
        if going:
            self._front = max(self._front, going[-1])
        # Only from the beginning it goes on where nothing is old: what is pending may be followed by what was sent.
        more = cut or (old.more and (bool(going) or self._pass))
        if more and self._in_a_row < LOCKED_IN_A_ROW:
            self.due = self._clock() + (self._clock() - now) / 8
        else:
            self._end(self._clock())
        return gone

    def _begin(self, now: float) -> None:
        self._pass = now >= self._beginning
        self._left, self._in_a_row = False, 0
        self._after = 0 if self._pass else self._front
        if self._pass:
            self._looked, self._locked = 0.0, None

    def _end(self, now: float) -> None:
        """Again after a while, and sooner where something was left behind; from the beginning, if not too often."""
        if self._pass:
            self.problem = self._locked
            wait = LOCKED_SECONDS if self._locked else AGAIN_SECONDS
            self._beginning = now + max(wait, self._looked / SHARE)
        soon = self._locked or (self._left and self._seconds == 0)
        self.due = max(now, self._beginning) if soon else now + PURGE_SECONDS
        self._pass = None

    async def _delete(self, session: Housekeeping, positions: list[int]) -> int | None:
        """Delete these; None if that failed and may not with fewer."""
        began = self._clock()
        try:
            gone = await session.purge(positions, self._seconds)
        except OutboxError as error:
            if session.closed:
                raise
            self._page = max(1, len(positions) // 2)
            if len(positions) > 1:
                return None
            self._in_a_row += 1
            self._skip(f"transaction {positions[0]} cannot be deleted: {error.line}")
            return 0
        self._in_a_row = 0
        if gone < len(positions):
            rest = counted(len(positions) - gone, "old transaction")
            self._skip(f"{rest} cannot be deleted: somebody holds their rows locked: see pg_locks, pg_stat_activity")
        if gone:
            self._tell(Purged(transactions=gone))
        took = self._clock() - began
        if took > SLOW_SECONDS:
            self._page = max(1, self._page // 2)
        elif took < QUICK_SECONDS:
            self._page = min(LARGEST_PAGE, 2 * self._page)
        return gone

    def _skip(self, why: str) -> None:
        self._locked = self.problem = why
