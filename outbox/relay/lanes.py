"""All streams of the outbox: what their lanes have in common, for the leader's loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from outbox.config import Settings
from outbox.core.plan import Planned
from outbox.core.telemetry import Listener
from outbox.core.transaction import Transaction
from outbox.postgres.rows import Lead, StreamRow
from outbox.postgres.store import Store
from outbox.relay.caution import Caution
from outbox.relay.lane import Lane


class Lanes(dict[str, Lane]):
    """The lanes by the names of their streams."""

    def __init__(
        self, settings: Settings, lead: Lead, *, proven: bool, tell: Listener, news: Callable[[], None]
    ) -> None:
        """`proven` says that this process has published before."""
        super().__init__()
        self._settings, self._lead, self._proven, self._tell, self._news = settings, lead, proven, tell, news

    def add(self, row: StreamRow, *, moved: bool = False) -> Lane:
        """A lane for this stream; `moved` as in `Lane`."""
        lane = Lane(row, self._settings, self._lead, moved=moved, tell=self._tell, news=self._news)
        lane.proven = self._proven
        self[row.name] = lane
        return lane

    async def restore(self, row: StreamRow, store: Store) -> None:
        """A stream as the last leader left it: its plan is settled as it is before anything new joins."""
        lane = self.add(row, moved=self._lead.moved)
        if row.plan:
            lane.chain.restore(await store.entries(row.plan))

    def extend(self, *, held_back: bool) -> None:
        """Let what waits join the plans, unless nothing more is to be sent."""
        for lane in () if held_back else self.values():
            lane.chain.extend()

    @property
    def waiting(self) -> Iterator[Transaction]:
        """What was read and is not planned."""
        return (transaction for lane in self.values() for transaction in lane.chain.waiting)

    @property
    def planned(self) -> Iterator[Planned | Transaction]:
        """What is planned or in flight."""
        return (transaction for lane in self.values() for transaction in lane.chain.plan)

    @property
    def read_ahead(self) -> tuple[int, int]:
        """Messages and bytes of all that waits, is planned or is in flight."""
        chains = [lane.chain for lane in self.values()]
        return sum(chain.messages for chain in chains), sum(chain.size for chain in chains)

    @property
    def idle(self) -> bool:
        """True if nothing waits, flies or needs to be written down."""
        return all(lane.chain.idle for lane in self.values())

    @property
    def flying(self) -> bool:
        """True while outcomes are awaited."""
        return any(lane.flying for lane in self.values())

    @property
    def proven(self) -> bool:
        """True if this process has published anything, in this term or before."""
        return self._proven or any(lane.proven for lane in self.values())

    @property
    def moved(self) -> bool:
        """True until every stream was settled after a promotion or a restore of the database."""
        return any(lane.moved for lane in self.values())

    @property
    def dirty(self) -> list[Lane]:
        """Those with something to write down."""
        return [lane for lane in self.values() if lane.chain.dirty]

    def lost(self, why: str) -> None:
        """The connection is gone."""
        for lane in self.values():
            lane.lost(f"the connection to NATS was lost: {why}")

    def dues(self) -> Iterator[float]:
        """The loop's times at which one of them wants to be looked at."""
        return (due for lane in self.values() for due in lane.dues())

    def close(self) -> None:
        """Stop what runs beside the loop; idempotent."""
        for lane in self.values():
            lane.close()

    async def load(self, store: Store, caution: Caution, *, busy: bool) -> None:
        """Load what a former leader planned and what is known not to be stored.

        With caution it is one transaction at a time, and none while the leader is `busy` with another one.
        """
        for chain in [lane.chain for lane in self.values() if lane.chain.unloaded]:
            positions = [each.position for each in chain.unloaded]
            if caution.active:
                head = chain.planned[0]
                if busy or not isinstance(head, Planned):
                    continue
                if offence := caution.verdict(head.position, head.attempts):
                    chain.condemn(offence)
                    continue
                await caution.suspect(head.position)
                positions, busy = [head.position], True
            chain.load(await store.planned(positions))
