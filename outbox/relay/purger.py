"""The leader's retention: what was sent and is old is deleted, a page at a time, between its other work."""

from __future__ import annotations

import math

from outbox.core.telemetry import Listener, Purged
from outbox.postgres.store import Store

PURGE_SECONDS = 10.0
PAUSE_SECONDS = 0.1  # between two pages, so that a purge is never the outage


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
