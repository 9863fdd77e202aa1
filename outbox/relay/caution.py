"""The careful way, after deaths: one transaction at a time, until it is known which one the relay dies of.

A transaction that is too large for the relay's memory, or that runs into a defect, kills every relay that touches it.
After two deaths in a row the next leader is careful: it notes each transaction before it loads it and before it sends
it, and takes the note away while it waits. The leader after a death finds the note. Only such deaths are attempts:
no outage, and no kill at a time when nothing was worked on.
"""

from __future__ import annotations

from collections.abc import Iterable

from outbox.config import BatchMode, Settings
from outbox.core.chain import Chain
from outbox.core.parts import Parts
from outbox.core.plan import Planned
from outbox.core.transaction import DeadReason, Verdict
from outbox.jetstream.client import JetStream
from outbox.postgres.rows import Lead
from outbox.postgres.store import Store
from outbox.relay.reader import Reader

ATTEMPTS = 3


class Caution:
    """The care of one term. `active` says that it is taken; what it then does stands in for the leader's quick way.

    `settings` are what the whole term goes by: with care one transaction a batch, and one batch in flight.
    """

    def __init__(self, store: Store, lead: Lead, settings: Settings) -> None:
        self._store, self._epoch = store, lead.epoch
        self._suspect: int | None = None
        self.active = lead.careful
        # What former leaders can have had in memory: so many messages are still handled one transaction at a time.
        self._left = settings.read_ahead_messages if lead.careful else 0
        self.settings = settings
        if lead.careful:
            self.settings = settings.model_copy(update={"batch": BatchMode.TRANSACTION, "window": 1})

    @property
    def over(self) -> bool:
        """True when what former leaders can have had in memory is through: a new term begins, without care."""
        return self.active and self._left <= 0

    def through(self, messages: int) -> None:
        """So many are marked: that many fewer are suspicious."""
        self._left -= messages

    async def next_alone(self, reader: Reader, *, size: int) -> Verdict | None:
        """Ask for the next transaction alone, after its position was noted; or the verdict on it, unread."""
        head = await reader.head()
        if head is None:
            self._left = 0
            return None
        if (verdict := self._verdict(*head)) is not None:
            reader.skip(verdict.position)
            return verdict
        await self._note(head[0])
        reader.begin(messages=1, size=size)
        return None

    async def load(self, chains: Iterable[Chain], parts: Parts, *, busy: bool) -> None:
        """Load one transaction that a former leader planned, unless the leader is `busy` with another one."""
        for chain in chains:
            head = chain.planned[0]
            if busy or not isinstance(head, Planned):
                continue
            if (verdict := self._verdict(head.position, head.attempts)) is not None:
                chain.load([], [verdict])  # set aside when nothing of a former connection can arrive any more
                continue
            await self._note(head.position)
            page = await self._store.planned([head.position])
            chain.load(parts.loaded(page.transactions, chain.stream), page.verdicts)
            busy = True

    async def note_head(self, chain: Chain) -> None:
        """Note what goes out next, before it does."""
        if not chain.in_flight and (head := next(chain.ready, None)) is not None:
            await self._note(head.position)

    async def rest(self, jetstream: JetStream | None) -> None:
        """Nothing is worked on while the leader waits and all is on its way: no death is then anybody's doing."""
        if self.active and (jetstream is None or await jetstream.sent()):
            await self._note(None)

    async def _note(self, position: int | None) -> None:
        if position != self._suspect:
            await self._store.suspect(self._epoch, position)
            self._suspect = position

    def _verdict(self, position: int, attempts: int) -> Verdict | None:
        """Why a transaction that too many relays have died of is set aside, or None."""
        if attempts < ATTEMPTS:
            return None
        detail = f"{attempts} relays died while they had it alone in hand"
        return Verdict(position=position, reason=DeadReason.KILLS_RELAY, detail=detail)
