"""How fast an outbox moves: two looks at its state, and the history of its backlog. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from outbox.admin import Status

BLOCKS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Per second, by the database's clock, between two looks: transactions and events sent, transactions added."""

    sent_transactions: float
    sent_events: float
    added_transactions: float


def rates(before: Status, after: Status) -> Rates | None:
    """The rates between two looks; None where they tell nothing: the clock stands, or the counts began anew."""
    seconds = (after.observed_at - before.observed_at).total_seconds()
    sent = after.sent_transactions - before.sent_transactions
    if seconds <= 0 or sent < 0 or after.outbox_id != before.outbox_id:
        return None
    pending = after.pending_transactions - before.pending_transactions
    dead = after.dead_transactions - before.dead_transactions
    return Rates(
        sent_transactions=sent / seconds,
        sent_events=(after.sent_events - before.sent_events) / seconds,
        added_transactions=max(0.0, (sent + pending + dead) / seconds),
    )


@dataclass(slots=True, kw_only=True)
class History:
    """The looks of a watch: the rates since the last one, and the backlog of the last ones as a line of blocks."""

    width: int = 40
    last: Status | None = None
    backlog: deque[int] = field(default_factory=deque)

    def take(self, found: Status) -> Rates | None:
        """Take in a look; the rates since the one before."""
        before, self.last = self.last, found
        self.backlog.append(found.pending_transactions)
        if len(self.backlog) > self.width:
            self.backlog.popleft()
        return rates(before, found) if before is not None else None

    def line(self) -> str:
        """The backlog over time, newest at the right; full height is its highest value in there."""
        return "".join(self._blocks())

    def _blocks(self) -> Iterator[str]:
        highest = max(self.backlog, default=0)
        for each in self.backlog:
            yield BLOCKS[0 if highest == 0 else -(-each * (len(BLOCKS) - 1) // highest)]
