"""The leader's word to its session: in time, so that a frozen leader's lock is freed, and after whatever it heard.

Belongs to the leader's loop. Slow checks that nobody waits for go along.
"""

from __future__ import annotations

from outbox.core.positions import Range
from outbox.core.telemetry import Listener, Paused, Resumed, Strayed
from outbox.postgres.rows import Lead
from outbox.postgres.store import Store

PING_SECONDS = 1.0
STRAY_SECONDS = 60.0


class Pulse:
    """`heard` says that the session's socket has something to read, which only a statement takes in. `paused` is why an
    operator has paused the outbox, or None.
    """

    def __init__(self, store: Store, lead: Lead, *, now: float, tell: Listener) -> None:
        self.heard = False
        self.paused: str | None = None
        self._store, self._epoch, self._tell = store, lead.epoch, tell
        self._spoke, self._strays_looked = 0.0, now
        self._pause(lead.paused)

    async def run_once(self, now: float) -> list[Range]:
        """Speak if it is time; the dead letters that are to be retried. Raises `Deposed` if another relay leads."""
        if now - self._strays_looked >= STRAY_SECONDS:
            self._strays_looked = now
            if strays := await self._store.strays():
                txid, count = strays[0]
                self._tell(Strayed(txid=txid, events=count))
        if not self.heard and now - self._spoke < PING_SECONDS:
            return []
        self.heard, self._spoke = False, now
        wishes = await self._store.ping(self._epoch)
        self._pause(wishes.paused)
        return wishes.retried

    def _pause(self, why: str | None) -> None:
        if why != self.paused:
            self.paused = why
            self._tell(Resumed() if why is None else Paused(why=why))
