"""The leader's periodic duties: its word to its session, the search for strays, and retention.

The word comes in time, so that a frozen leader's lock is freed, and after whatever the session heard. What was sent and
is old is deleted a page at a time, between the leader's other work. Belongs to the leader's loop.
"""

from __future__ import annotations

import math

from outbox.core.positions import Range
from outbox.core.telemetry import Listener, Paused, Purged, Resumed, Strayed
from outbox.postgres.rows import Lead
from outbox.postgres.store import Store

PING_SECONDS = 1.0
RECONCILE_SECONDS = 10.0
STRAY_SECONDS = 60.0
PURGE_SECONDS = 10.0
PAUSE_SECONDS = 0.1  # between two pages, so that a purge is never the outage


class Pulse:
    """The word, and what comes back with it. `paused` is why an operator has paused the outbox, or None."""

    def __init__(self, store: Store, lead: Lead, *, now: float, tell: Listener) -> None:
        self._heard = False
        self.paused: str | None = None
        self._store, self._epoch, self._tell = store, lead.epoch, tell
        self._spoke, self._strays_looked = 0.0, now
        self._reconciled = 0.0
        self._pause(lead.paused)

    def hear(self) -> None:
        """The session's socket has something to read, which only a statement takes in: speak at the next occasion."""
        self._heard = True

    def attended(self) -> None:
        """A statement is on its way: it takes in what was heard."""
        self._heard = False

    async def run_once(self, now: float) -> list[Range]:
        """Speak if it is time; the dead letters that are to be retried.

        Raises `Deposed` if another relay leads, `Halt` if the counters contradict the rows.
        """
        if now - self._strays_looked >= STRAY_SECONDS:
            self._strays_looked = now
            if strays := await self._store.strays():
                txid, count = strays[0]
                self._tell(Strayed(txid=txid, events=count))
        if now - self._reconciled >= RECONCILE_SECONDS:
            self._reconciled = now
            await self._store.reconcile()  # a TRUNCATE or a setval may come under a relay that leads
        if not self._heard and now - self._spoke < PING_SECONDS:
            return []
        self._heard, self._spoke = False, now
        wishes = await self._store.ping(self._epoch)
        self._pause(wishes.paused)
        return wishes.retried

    def _pause(self, why: str | None) -> None:
        if why != self.paused:
            self.paused = why
            self._tell(Resumed() if why is None else Paused(why=why))


class Purger:
    """`due` is the loop's time of the next page. Belongs to the leader's loop."""

    def __init__(self, store: Store, hours: float, tell: Listener) -> None:
        """What was sent more than so many hours ago goes; with 0 as soon as it is marked, with infinity never."""
        self._store, self._hours, self._tell = store, hours, tell
        self._after = 0
        self.due = math.inf if math.isinf(hours) else 0.0

    def marked(self) -> None:
        """Something was marked: without a retention that is to go at once."""
        if self._hours == 0:
            self.due = 0.0

    async def run_once(self, now: float) -> None:
        """Delete a page if it is time. One statement, one commit; never a pending or a dead transaction."""
        if now < self.due:
            return
        gone, last, more = await self._store.purge(self._after, self._hours * 3600)
        self._after = last if more else 0
        self.due = now + (PAUSE_SECONDS if more else PURGE_SECONDS)
        if gone:
            self._tell(Purged(transactions=gone))
