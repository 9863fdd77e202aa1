"""The leader's word to its session, which comes in time, so that a frozen leader's lock is freed, and after whatever
the session heard. Belongs to the leader's loop.
"""

from __future__ import annotations

from outbox.core.positions import Range
from outbox.core.telemetry import Listener, Paused, Resumed
from outbox.postgres.rows import Lead
from outbox.postgres.store import Store

PING_SECONDS = 1.0


class Pulse:
    """The word, and what comes back with it. `paused` is why an operator has paused the outbox, or None."""

    def __init__(self, store: Store, lead: Lead, *, tell: Listener) -> None:
        self._heard = False
        self.paused: str | None = None
        self._store, self._epoch, self._tell = store, lead.epoch, tell
        self._spoke = 0.0
        self._pause(lead.paused)

    def hear(self) -> None:
        """The session's socket has something to read, which only a statement takes in: speak at the next occasion."""
        self._heard = True

    def attended(self) -> None:
        """A statement is on its way: it takes in what was heard."""
        self._heard = False

    async def run_once(self, now: float) -> list[Range]:
        """Speak if it is time; the dead letters that are to be retried. Raises `Deposed` if another relay leads."""
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
