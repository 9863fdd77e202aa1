"""What fails is the way to NATS: acks lost, late or out of order, stalled or cut connections. Promises 1 to 3 and 5."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from outbox.config import Settings
from outbox.core.batch import Batch
from outbox.core.telemetry import BatchSent, Blocked, Happening, InDoubt, Marked, Settled, Unreachable
from outbox.core.transaction import Transaction
from outbox.embedded import Nats
from outbox.event import Event
from outbox.jetstream.client import JetStream
from tests.support.bed import Broker, ThreadRelay, rows, until, wait_until_sent
from tests.support.faults import Breaks, add, assert_ended_well, assert_receipts_tile, more_sent, stream_of
from tests.support.foreign import Company, ours
from tests.support.proxy import NatsProxy
from tests.support.servers import Stream, own_nats
from tests.support.workload import Writers


@pytest.fixture
def proxy(nats: Nats) -> Iterator[NatsProxy]:
    with NatsProxy(nats.port) as made:
        yield made


@pytest.fixture
def impatient(database: str, proxy: NatsProxy) -> Settings:
    """A relay through the proxy that waits a second for an ack."""
    return Settings(database_url=database, nats_url=proxy.url, ack_timeout=1)


@pytest.mark.core
def test_lost_acks(
    database: str, broker: Broker, proxy: NatsProxy, stream: Stream, impatient: Settings, company: Company
) -> None:
    """Fault: every ack is lost, for a while, three times. Promise: read back and marked, nothing is sent twice."""
    company.joins(broker.url, stream.name, stream.prefix)
    writers = Writers(database, stream.prefix, threads=4, endless=True, seed=71).start()
    with ThreadRelay(impatient) as relay:
        relay.wait_for(Marked)
        for _ in range(3):
            after, dropped = len(relay.happenings), proxy.dropped
            proxy.acks = "drop"
            relay.wait_for(Settled, lambda each: each.stored > 0, after=after)
            proxy.acks = "pass"
            assert proxy.dropped > dropped
            more_sent(database)
        writers.stop()
        wait_until_sent(database)
    assert_ended_well(writers, broker, stream.name)


def late_acks(
    settings: Settings, broker: Broker, proxy: NatsProxy, stream: Stream, company: Company, delay: float
) -> ThreadRelay:
    company.joins(broker.url, stream.name, stream.prefix)
    writers = Writers(settings.database_url, stream.prefix, threads=4, endless=True, seed=73).start()
    with ThreadRelay(settings) as relay:
        relay.wait_for(Marked)
        for _ in range(2):
            proxy.acks = "hold"
            until(lambda: proxy.held)
            threading.Event().wait(delay)
            proxy.release()
            more_sent(settings.database_url)
        writers.stop()
        wait_until_sent(settings.database_url)
    assert_ended_well(writers, broker, stream.name)
    return relay


def test_acks_that_come_after_the_stream_was_read_back(
    broker: Broker, proxy: NatsProxy, stream: Stream, impatient: Settings, company: Company
) -> None:
    """Fault: acks are 3 s late, the relay waits for 1 s. Promise: what was settled without them stays so."""
    relay = late_acks(impatient, broker, proxy, stream, company, 3)
    assert any(isinstance(each, Settled) and each.stored for each in relay.happenings)


@pytest.mark.long
@pytest.mark.parametrize("patience", [10, 60])
def test_acks_that_are_thirty_seconds_late(
    broker: Broker, proxy: NatsProxy, stream: Stream, impatient: Settings, company: Company, patience: float
) -> None:
    """Fault: acks are 30 s late, and the relay gives up before, or does not. Promise: whole, once, in order."""
    patient = impatient.model_copy(update={"ack_timeout": patience})
    relay = late_acks(patient, broker, proxy, stream, company, 30)
    timed_out = any(isinstance(each, InDoubt) and "time limit" in each.why for each in relay.happenings)
    assert timed_out == (patience < 30)


def test_acks_in_the_opposite_order(
    database: str, broker: Broker, proxy: NatsProxy, stream: Stream, impatient: Settings
) -> None:
    """Fault: the acks of four large batches come in the opposite order. Promise: taken in order, none is in doubt."""
    writers = Writers(database, stream.prefix, threads=4, transactions=600, seed=79).start()
    writers.join()
    rows(database, "UPDATE outbox.limits SET max_transaction_events = 20")
    settings = impatient.model_copy(update={"ack_timeout": 20, "max_batch_messages": 300, "window": 4})
    proxy.acks = "hold"
    with ThreadRelay(settings) as relay:
        until(lambda: len(proxy.held) == 4)
        assert sum(isinstance(each, BatchSent) for each in relay.happenings) == 4
        proxy.release(reverse=True)
        wait_until_sent(database)
    assert not any(isinstance(each, InDoubt) for each in relay.happenings)
    assert_ended_well(writers, broker, stream.name)


@pytest.mark.parametrize("direction", ["up", "down"])
def test_stalled_connection(
    database: str,
    broker: Broker,
    proxy: NatsProxy,
    stream: Stream,
    impatient: Settings,
    company: Company,
    direction: str,
) -> None:
    """Fault: one direction of the connection stalls for seconds, and goes on with all that was written into it.

    Promise: what the relay had given up meanwhile and comes late is not stored besides what it sends then.
    """
    company.joins(broker.url, stream.name, stream.prefix)
    writers = Writers(database, stream.prefix, threads=4, endless=True, seed=83).start()
    flow = getattr(proxy, direction)
    with ThreadRelay(impatient) as relay:
        relay.wait_for(Marked)
        for _ in range(2):
            after = len(relay.happenings)
            proxy.change(flow, stalled=True)
            relay.wait_for(Happening, lambda each: isinstance(each, InDoubt | Blocked), after=after)
            threading.Event().wait(2)
            proxy.heal()
            more_sent(database)
        writers.stop()
        wait_until_sent(database)
    assert_ended_well(writers, broker, stream.name)


@pytest.mark.long
@pytest.mark.parametrize("direction", ["up", "down"])
def test_connection_that_stalls_until_it_is_given_up(
    database: str,
    broker: Broker,
    proxy: NatsProxy,
    stream: Stream,
    impatient: Settings,
    company: Company,
    direction: str,
) -> None:
    """Fault: a direction stalls until the pings find out; then it goes on, beside the relay's new connection."""
    company.joins(broker.url, stream.name, stream.prefix)
    writers = Writers(database, stream.prefix, threads=4, endless=True, seed=89, transactions=0).start()
    with ThreadRelay(impatient) as relay:
        relay.wait_for(Marked)
        proxy.change(getattr(proxy, direction), stalled=True)
        relay.wait_for(Unreachable)
        proxy.heal()
        more_sent(database)
        writers.stop()
        wait_until_sent(database)
    assert_ended_well(writers, broker, stream.name)


@pytest.mark.core
@pytest.mark.parametrize("point", ["mid-batch", "before-ack"])
def test_connection_is_cut_around_a_batch(
    database: str,
    broker: Broker,
    proxy: NatsProxy,
    stream: Stream,
    impatient: Settings,
    monkeypatch: pytest.MonkeyPatch,
    company: Company,
    point: str,
) -> None:
    """Fault: the connection is reset inside a batch, or behind its last message, eight times; once for a while."""
    breaks = Breaks(monkeypatch, point, proxy.cut)
    company.joins(broker.url, stream.name, stream.prefix)
    writers = Writers(database, stream.prefix, threads=4, endless=True, seed=97).start()
    with ThreadRelay(impatient) as relay:
        relay.wait_for(Marked)
        for number in range(8):
            proxy.refusing = number == 4
            after = len(relay.happenings)
            breaks.now()
            relay.wait_for(Unreachable, lambda each, n=number: n != 4 or each.delay > 0, after=after)  # type: ignore[misc]
            proxy.refusing = False
            more_sent(database)
        writers.stop()
        wait_until_sent(database)
    assert_ended_well(writers, broker, stream.name)


def test_commit_that_arrives_after_it_was_given_up(
    database: str, broker: Broker, proxy: NatsProxy, stream: Stream, impatient: Settings, company: Company
) -> None:
    """Fault: a large batch waits in a stalled connection until the relay gives it up. Promise: stored once, whole."""
    company.joins(broker.url, stream.name, stream.prefix, subjects=["warm", "large"])
    with ThreadRelay(impatient) as relay:
        add(database, f"{stream.prefix}.warm", 2)
        relay.wait_for(Marked)
        proxy.change(proxy.up, stalled=True)
        after = len(relay.happenings)
        for _ in range(5):
            add(database, f"{stream.prefix}.large", 150, size=1000)
        relay.wait_for(InDoubt, after=after)
        proxy.heal()
        wait_until_sent(database)
    stored = ours(broker.read(stream.name))
    assert len({each.message_id for each in stored}) == len(stored) == 752
    assert [each.number for each in stored] == [1, 2, *list(range(1, 151)) * 5]


@pytest.mark.core
@pytest.mark.parametrize("when", ["before", "after"])
def test_batch_of_a_former_leader_arrives_late(
    database: str,
    broker: Broker,
    nats: Nats,
    proxy: NatsProxy,
    impatient: Settings,
    company: Company,
    when: str,
) -> None:
    """Fault: a batch waits in the network until another relay leads, and longer than the duplicate window.

    Promise: it is stored once, by one of the two, be it before or after the new leader has sent the same events.
    """
    with stream_of(broker, "LATE", duplicate_window=100_000_000):
        company.joins(nats.url, "LATE", "LATE", subjects=[str(number) for number in range(4)])
        with ThreadRelay(impatient.model_copy(update={"ack_timeout": 60})) as former:
            for _ in range(2):  # so that in the shared variant nothing need be asked before the batch
                add(database, "LATE.0", 1)
                wait_until_sent(database)
            proxy.change(proxy.up, holding=True)
            before, after = proxy.up.bytes, len(former.happenings)
            for number in range(4):
                add(database, f"LATE.{number}", 250, size=300)
            former.wait_for(BatchSent, after=after)
            until(lambda: proxy.up.held > 250 * 500, what="a batch to be on its way")
        if when == "before":
            proxy.heal()
        with ThreadRelay(Settings(database_url=database, nats_url=nats.url)):
            wait_until_sent(database)
            threading.Event().wait(0.3)
            proxy.heal()
            until(lambda: proxy.up.bytes - before > 250 * 500)
            add(database, "LATE.last", 2)
            wait_until_sent(database)
        company.leaves()
        everything = broker.read("LATE")
        stored = ours(everything)
        assert [each.subject for each in stored[2:-2:250]] == [f"LATE.{number}" for number in range(4)]
        foreign = {each.sequence for each in everything if each.foreign}
        assert_receipts_tile(database, "LATE", len(everything), foreign)
        assert len({each.message_id for each in stored}) == len(stored) == 1004


def test_connection_to_a_frozen_server_is_closed_with_what_it_could_not_send(workplace: Path) -> None:
    """Fault: nats-server is frozen with megabytes before it. Promise: none of them reach it after the connection."""

    async def give_up(server: Nats) -> None:
        jetstream = await JetStream.connect(Settings(nats_url=server.url))
        connection: Any = jetstream._nc._transport
        transport = connection._io_writer.transport
        events = [Event(str(number), "a", bytes(900_000), {}) for number in range(20)]
        server.send_signal(signal.SIGSTOP)
        jetstream.send(Batch(id="b", stream="S", base=0, transactions=(Transaction.of(1, events),)), "outbox")
        await asyncio.to_thread(until, lambda: transport.get_write_buffer_size() > 0)
        await jetstream.close()
        assert transport.is_closing()
        assert transport.get_write_buffer_size() == 0

    with own_nats(workplace / "frozen") as server:
        try:
            asyncio.run(asyncio.wait_for(give_up(server), 15))
        finally:
            server.send_signal(signal.SIGCONT)
