"""A relay process with a stop point: it gets a signal from itself at one named place, which only tests can ask for.

`python -m tests.support.armed POINT SIGNAL N relay …` runs `outbox relay …` and sends itself SIGNAL the Nth time that
it comes to POINT. Nothing of this is in the package: the points are wrapped around its functions from outside.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from outbox.cli.app import main
from outbox.core import batch
from outbox.core.chain import Chain
from outbox.core.outcome import Outcome, Stored
from outbox.jetstream import client as jetstream
from outbox.jetstream.client import JetStream
from outbox.postgres import rows as pages
from outbox.postgres import store
from outbox.postgres.rows import Decisions, Home, Lead
from outbox.postgres.store import Store
from outbox.relay import recovery
from tests.support.bed import ProcessRelay, rows, until

Act = Callable[[], None]


def before_first_message(act: Act) -> None:
    """The plan is committed, and nothing of the batch is on the wire."""
    send = JetStream._send

    async def armed(self: JetStream, token: str, batch: Any, outbox_id: str) -> None:
        act()
        await send(self, token, batch, outbox_id)

    JetStream._send = armed  # type: ignore[method-assign]


def mid_batch(act: Act) -> None:
    """Some messages of a batch are at the server, its last one is not."""
    write = JetStream._write

    async def armed(self: JetStream, pieces: Sequence[bytes]) -> None:
        if len(pieces) > 3:
            await write(self, pieces[:-3])
            await self._nc.flush()
            act()
        await write(self, pieces[-3:])

    JetStream._write = armed  # type: ignore[method-assign]


def before_ack(act: Act) -> None:
    """The commit message is at the server; its ack was not read."""
    send = JetStream._send

    async def armed(self: JetStream, token: str, batch: Any, outbox_id: str) -> None:
        await send(self, token, batch, outbox_id)
        tell, held = JetStream._tell, list[tuple[Any, ...]]()
        JetStream._tell = lambda *told: held.append(told)  # type: ignore[method-assign]
        await self._nc.flush()
        act()
        JetStream._tell = tell  # type: ignore[method-assign]
        for told in held:
            tell(*told)

    JetStream._send = armed  # type: ignore[method-assign]


def after_ack(act: Act) -> None:
    """The ack was read, and nothing is marked."""
    learn = Chain.learn

    def armed(self: Chain, outcome: Outcome) -> None:
        learn(self, outcome)
        if isinstance(outcome, Stored):
            act()

    Chain.learn = armed  # type: ignore[method-assign]


def in_the_mark(act: Act) -> None:
    """The statement that marks is on its way to Postgres, or being carried out."""
    commit = Store.commit

    async def armed(self: Store, epoch: int, decisions: Decisions) -> None:
        if not decisions.receipts:
            return await commit(self, epoch, decisions)
        marking = asyncio.ensure_future(commit(self, epoch, decisions))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        act()
        return await marking

    Store.commit = armed  # type: ignore[method-assign]


def after_mark(act: Act) -> None:
    """The mark is committed, and the relay has not gone on."""
    commit = Store.commit

    async def armed(self: Store, epoch: int, decisions: Decisions) -> None:
        await commit(self, epoch, decisions)
        if decisions.receipts:
            act()

    Store.commit = armed  # type: ignore[method-assign]


def in_recovery(act: Act) -> None:
    """The stream was read back, and what that told is not written down."""
    settle, settle_head = recovery.settle, recovery.settle_head

    async def armed(jetstream: JetStream, known: recovery.Remembered, outbox_id: str) -> recovery.Settlement:
        found = await settle(jetstream, known, outbox_id)
        act()
        return found

    async def armed_head(
        jetstream: JetStream, known: recovery.Remembered, head: recovery.Head, outbox_id: str
    ) -> recovery.HeadSettlement:
        found = await settle_head(jetstream, known, head, outbox_id)
        act()
        return found

    recovery.settle, recovery.settle_head = armed, armed_head


def at_takeover(act: Act) -> None:
    """The epoch is raised, and nothing else was done."""
    lead = Store.lead

    async def armed(self: Store, leader: str, home: Home) -> Lead:
        found = await lead(self, leader, home)
        act()
        return found

    Store.lead = armed  # type: ignore[method-assign]


def poisoned_load(act: Act) -> None:
    """An event whose payload is `poison` is loaded."""
    read_page = pages.read_page

    def armed(found: Any, name: str) -> pages.Page:
        if any(row[-1] == b"poison" for row in found):
            act()
        return read_page(found, name)

    vars(store)["read_page"] = armed


def poisoned_send(act: Act) -> None:
    """An event whose payload is `poison` is put on the wire."""
    frames = batch.frames

    def armed(sent: batch.Batch, outbox_id: str, reply: str) -> batch.Frames:
        if any(event.payload == b"poison" for each in sent.transactions for event in each.events):
            act()
        return frames(sent, outbox_id, reply)

    vars(jetstream)["frames"] = armed


TERMINATE = (
    "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
    " WHERE application_name = 'outbox relay' AND datname = current_database()"
)
# A relay comes here once in each term of leadership; the others it passes with every batch.
ONCE_A_TERM = {"in-recovery", "at-takeover"}
POINTS: dict[str, Callable[[Act], None]] = {
    "before-first-message": before_first_message,
    "mid-batch": mid_batch,
    "before-ack": before_ack,
    "after-ack": after_ack,
    "in-the-mark": in_the_mark,
    "after-mark": after_mark,
    "in-recovery": in_recovery,
    "at-takeover": at_takeover,
}
POISONS: dict[str, Callable[[Act], None]] = {
    "poisoned-load": poisoned_load,
    "poisoned-send": poisoned_send,
}


def came_to(relay: ProcessRelay, point: str, name: str, database: str) -> None:
    """Wait until the relay has given itself the signal; where it passes seldom, it loses its lead until it has."""
    led = 0

    def there() -> bool:
        nonlocal led
        if f"at {point}: {name}" in relay.log.read_text():
            return True
        assert relay.running, relay.log.read_text()[-2000:]
        events = [each["event"] for each in relay.happenings()]
        terms = events.count("TookLead")
        if point in ONCE_A_TERM and terms > led and "Marked" in events[len(events) - events[::-1].index("TookLead") :]:
            led = terms
            rows(database, TERMINATE)
        return False

    until(there, what=f"{name} at {point}")


def arm(point: str, number: int, nth: int) -> None:
    """Send this process the signal at the nth time that it comes to this point, once."""
    times = 0

    def act() -> None:
        nonlocal times
        times += 1
        if times == nth:
            print(f"at {point}: {signal.Signals(number).name}", file=sys.stderr, flush=True)
            os.kill(os.getpid(), number)

    {**POINTS, **POISONS}[point](act)


if __name__ == "__main__":
    point, name, nth, *command = sys.argv[1:]
    arm(point, int(signal.Signals[name]), int(nth))
    sys.argv = ["outbox", *command]
    main()
