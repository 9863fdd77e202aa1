"""Reading pages of transactions in commit order, and when to read again: at once, after a pause, or when woken.

Polling is the truth; a notification only shortens the wait. Belongs to the leader's loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from outbox.config import Settings
from outbox.core.positions import Positions, Range
from outbox.core.telemetry import Listener, PageRead, Slept
from outbox.postgres.rows import Lead, Page
from outbox.postgres.store import Store

POLL_SECONDS = (0.005, 0.01, 0.02, 0.05)
SLEEP_SECONDS = 1.0
PAGE_BATCHES = 2  # how many full batches a page may hold


class Reader:
    """How far was read, what is open below that, and the rhythm. `due` is the loop's time of the next page."""

    def __init__(
        self, store: Store, lead: Lead, settings: Settings, *, tell: Listener, news: Callable[[], None]
    ) -> None:
        self.due = 0.0
        self.full = False  # the last page was: it pays to ask for the next one before this one is sent
        self._store, self._settings, self._tell, self._news = store, settings, tell, news
        self._reading: asyncio.Task[Page] | None = None
        self._asked = 0
        self._stale = False
        self._positions = Positions.restored(lead.cursor, lead.open_positions)
        self._empty_pages = 0
        self._asleep = False

    @property
    def open_positions(self) -> list[Range]:
        """Positions that were passed by, and may still appear."""
        return self._positions.open

    @property
    def dry(self) -> bool:
        """True if the last page was empty."""
        return self._empty_pages > 0 and not self.reading

    @property
    def reading(self) -> bool:
        """True from `begin` until the page is taken."""
        return self._reading is not None

    def reopen(self, ranges: list[Range]) -> None:
        """Look again at positions that were passed: retried dead letters."""
        self._positions.reopen(ranges)
        self._empty_pages = 0
        self.look_again()

    async def head(self) -> tuple[int, int] | None:
        """Position and attempts of the next pending transaction, which is not loaded; None if there is none."""
        return await self._store.head(self._positions.cursor, self._positions.open)

    def look_again(self) -> None:
        """A commit was heard of: a page that is on its way may have been too early for it."""
        self.hurry()
        self._stale = self._stale or self.reading

    def hurry(self) -> None:
        """There is room for more, or time to look for it: read as soon as the loop may."""
        self.due = 0.0

    async def rouse(self) -> None:
        """Commits need not notify for now: nothing will be read for long."""
        if self._asleep:
            self._asleep = False
            await self._store.wake_up()

    def skip(self, position: int) -> None:
        """Pass a transaction by that is not to be loaded."""
        self._positions.read([position], position)

    def begin(self, *, messages: int, size: int) -> None:
        """Ask for the next page, bounded by messages and bytes, while the loop goes on; one at a time.

        What the session is asked meanwhile comes after the page.
        """
        self._asked = messages = min(messages, PAGE_BATCHES * self._settings.max_batch_messages)
        self._reading = asyncio.ensure_future(self._fetch(messages, size))
        self._reading.add_done_callback(lambda _: self._news())

    async def _fetch(self, messages: int, size: int) -> Page:
        async with self._store.turn():
            if self._asleep and self._empty_pages == 0:
                # Woken: what was found is on its way by now, and commits need not notify any more.
                self._asleep = False
                await self._store.wake_up()
            if self._positions.open:
                # Who may own a gap is asked before the page whose snapshot may prove it empty. What is reopened from
                # here on was not asked for, and so cannot be proven by this page.
                self._positions.observe(*await self._store.holders())
            gaps = self._positions.open
            return await self._store.page(self._positions.cursor, gaps, messages=messages, size=size)

    async def page(self, now: float, *, quiet: bool) -> Page | None:
        """The page that was asked for, once it is there; None if it is not, or if there was nothing, settled or not.

        `quiet` says that the leader has nothing else to do, so that an empty outbox may be slept on.
        """
        if self._reading is None or not self._reading.done():
            return None
        reading, self._reading = self._reading, None
        page = reading.result()
        self._positions.read(page.positions, page.positions[-1] if page.positions else None)
        stale, self._stale = self._stale, False
        if not page.positions and stale:
            return None  # it was asked for before there was anything to look at: look again
        if not page.positions:
            await self._rest(now, quiet=quiet)
            return None
        self._empty_pages, self.due = 0, 0.0
        events = sum(transaction.count for transaction in page.transactions)
        self.full = 2 * events > self._asked
        if page.transactions:
            self._tell(PageRead(transactions=len(page.transactions), events=events))
        return page

    async def close(self) -> None:
        """Stop what was asked for; idempotent."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
            self._reading = None

    async def _rest(self, now: float, *, quiet: bool) -> None:
        """An empty outbox is slept on, or polled less and less where that cannot be."""
        self._empty_pages += 1
        if self._asleep:
            self.due = now + SLEEP_SECONDS
            return
        self.due = now + POLL_SECONDS[min(self._empty_pages, len(POLL_SECONDS)) - 1]
        # Refused while somebody is between sealing and commit: so no wake-up is lost. Read once more before sleeping.
        if quiet and not self._positions.open and await self._store.fall_asleep():
            self._asleep, self.due = True, now
            self._tell(Slept())
