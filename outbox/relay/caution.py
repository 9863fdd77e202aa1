"""A leader's caution after deaths: one transaction at a time, until it is known which one the relay dies of.

A transaction that is too large for the relay's memory, or that runs into a defect, kills every relay that touches it.
After two deaths in a row the next leader is careful: it notes each transaction before it loads it and before it sends
it, and takes the note away while it waits. The leader after a death finds the note. Only such deaths are attempts:
no outage, and no kill at a time when nothing was worked on.
"""

from __future__ import annotations

from outbox.core.transaction import DeadReason, Verdict
from outbox.jetstream.client import JetStream
from outbox.postgres.rows import Lead
from outbox.postgres.store import Store

ATTEMPTS = 3


class Caution:
    """The care of one term. `left` counts the messages that are still handled one transaction at a time."""

    def __init__(self, store: Store, lead: Lead, messages: int) -> None:
        self._store, self._epoch = store, lead.epoch
        self._suspect: int | None = None
        self.active = lead.careful
        self.left = messages if lead.careful else 0

    @property
    def over(self) -> bool:
        """True when what former leaders can have had in memory is through: a new term begins, without care."""
        return self.active and self.left <= 0

    async def suspect(self, position: int | None) -> None:
        """Note what is worked on from here on, in the database, before anything can happen."""
        if self.active and position != self._suspect:
            await self._store.suspect(self._epoch, position)
            self._suspect = position

    def verdict(self, position: int, attempts: int) -> Verdict | None:
        """Why a transaction that too many relays have died of is set aside, or None."""
        if attempts < ATTEMPTS:
            return None
        detail = f"{attempts} relays died while they had it alone in hand"
        return Verdict(position=position, reason=DeadReason.KILLS_RELAY, detail=detail)

    async def rest(self, jetstream: JetStream | None) -> None:
        """Nothing is worked on while the leader waits and all is on its way: no death is then anybody's doing."""
        if self.active and (jetstream is None or await jetstream.sent()):
            await self.suspect(None)
