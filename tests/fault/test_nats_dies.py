"""What dies is nats-server, at the worst moments. Promises 1 to 3 and 5: whole, once, in order, waited out."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from outbox.config import Settings
from outbox.core.telemetry import Blocked, Marked, Unreachable
from outbox.embedded import Nats
from outbox.errors import Halt
from outbox.jetstream.client import JetStream
from outbox.operate import status
from outbox.operate.rebase import accept_stream
from tests.support.bed import Broker, ThreadRelay, until, value, wait_until_sent
from tests.support.faults import Breaks, add, assert_ended_well, assert_receipts_tile, more_sent, sent, unsent_ids
from tests.support.foreign import Company, ours
from tests.support.proxy import NatsProxy
from tests.support.servers import own_nats
from tests.support.workload import Writers


@pytest.fixture
def server(workplace: Path) -> Iterator[Nats]:
    """A server of the test's own."""
    with own_nats(workplace / "nats") as made:
        assert isinstance(made, Nats)
        yield made


@pytest.mark.core
@pytest.mark.parametrize("point", ["mid-batch", "before-ack"])
def test_killed_around_a_batch(
    database: str, server: Nats, monkeypatch: pytest.MonkeyPatch, company: Company, point: str
) -> None:
    """Fault: SIGKILL and restart of nats-server inside a batch, or between its commit and the ack, under load.

    Promise: the batch is in the file stream whole and once, or is sent again; never a part, never twice.
    """
    breaks = Breaks(monkeypatch, point, lambda: server.restart(kill=True))
    broker = Broker(server.url)
    broker.create_stream("S", "s.>")
    company.joins(server.url, "S", "s")
    writers = Writers(database, "s", threads=4, endless=True, seed=101).start()
    with ThreadRelay(Settings(database_url=database, nats_url=server.url)) as relay:
        relay.wait_for(Marked)
        for _ in range(6):
            breaks.now()
            more_sent(database)
        writers.stop()
        wait_until_sent(database)
    assert_ended_well(writers, broker, "S")


def test_killed_while_it_stores_large_batches(
    database: str, server: Nats, monkeypatch: pytest.MonkeyPatch, company: Company
) -> None:
    """Fault: SIGKILL while batches of 4 MB are being stored. Promise: none is cut, doubled or lost."""
    breaks = Breaks(monkeypatch, "before-ack", lambda: server.restart(kill=True))
    broker = Broker(server.url)
    broker.create_stream("S", "s.>")
    company.joins(server.url, "S", "s", subjects=[str(number) for number in range(6)])
    with ThreadRelay(Settings(database_url=database, nats_url=server.url)):
        for number in range(6):
            add(database, f"s.{number}", 900, size=4500)
            breaks.now()
        wait_until_sent(database)
    stored = broker.read("S")
    sent = [(each.subject, each.number) for each in ours(stored)]
    assert sent == [(f"s.{b}", n) for b in range(6) for n in range(1, 901)]
    assert_receipts_tile(database, "S", len(stored), {each.sequence for each in stored if each.foreign})


def test_killed_while_its_acks_are_held_back(database: str, server: Nats, company: Company) -> None:
    """Fault: batches are stored, their acks are on the way, the server is killed. Promise: read back, not resent."""
    broker = Broker(server.url)
    broker.create_stream("S", "s.>")
    company.joins(server.url, "S", "s")
    writers = Writers(database, "s", threads=4, endless=True, seed=103).start()
    with NatsProxy(server.port) as proxy, ThreadRelay(Settings(database_url=database, nats_url=proxy.url)) as relay:
        relay.wait_for(Marked)
        for _ in range(4):
            proxy.acks = "hold"
            until(lambda: proxy.held)
            server.restart(kill=True)
            proxy.release()
            more_sent(database)
        writers.stop()
        wait_until_sent(database)
    assert_ended_well(writers, broker, "S")


@pytest.mark.parametrize("point", ["mid-batch", "before-ack"])
def test_memory_stream_dies_with_its_server(
    database: str, server: Nats, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """Fault: the server is killed around a batch, and its memory stream with it.

    Promise: blocked and visible while there is no stream, halted when there is another one; marked is what was acked.
    """
    breaks = Breaks(monkeypatch, point, lambda: server.restart(kill=True))
    broker = Broker(server.url)
    broker.create_stream("M", "m.>", storage="memory")
    writers = Writers(database, "m", threads=4, endless=True, seed=107).start()
    settings = Settings(database_url=database, nats_url=server.url)
    relay = ThreadRelay(settings)
    relay.wait_for(Marked)
    breaks.now()
    relay.wait_for(Blocked, lambda each: "does not exist" in each.why)
    until(lambda: any("does not exist" in str(each.blocked) for each in status.status(database).streams))
    marked = sent(database)
    acked = value(database, "SELECT last_sequence FROM outbox.streams")
    writers.stop()
    broker.create_stream("M", "m.>", storage="memory")
    error = relay.ended()
    assert isinstance(error, Halt)
    assert "outbox rebase --stream M" in error.remedy
    assert sent(database) == marked
    assert_receipts_tile(database, "M", acked)
    assert broker.read("M") == []
    left = unsent_ids(database)
    asyncio.run(accept_stream(settings, "M"))
    with ThreadRelay(settings, drain=True) as after:
        assert after.ended() is None
    assert [each.message_id for each in broker.read("M")] == left


def test_killed_while_the_relay_connects(database: str, server: Nats, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: nats-server dies between the handshake and the relay's subscription. Promise: an outage like any other."""
    listen, kills = JetStream._listen, iter([True])

    async def killed(jetstream: JetStream) -> None:
        if next(kills, False):
            await asyncio.to_thread(server.restart, kill=True)
            while not jetstream._nc.is_closed:  # noqa: ASYNC110 - nats-py has no event for it
                await asyncio.sleep(0.01)
        await listen(jetstream)

    monkeypatch.setattr(JetStream, "_listen", killed)
    broker = Broker(server.url)
    broker.create_stream("S", "s.>")
    add(database, "s.x")
    with ThreadRelay(Settings(database_url=database, nats_url=server.url)) as relay:
        assert "lost at once" in relay.wait_for(Unreachable).why
        wait_until_sent(database)
    assert len(broker.read("S")) == 1
