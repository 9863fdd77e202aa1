"""What changes is the stream: other writers, another stream of the same name, one that is gone. Promises 1, 2 and 5."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

from outbox.config import Settings
from outbox.core.telemetry import Blocked, Marked, Shared
from outbox.embedded import Nats, Postgres
from outbox.errors import Halt
from outbox.operate import rebase, status
from tests.support.bed import Broker, ThreadRelay, rows, until, value, wait_until_sent
from tests.support.servers import Stream, clone, own_nats
from tests.support.workload import Writers, check


def add(url: str, subject: str, events: int = 1) -> None:
    rows(url, "SELECT outbox.add(%s, n::text) FROM generate_series(1, %s) AS n", subject, events)


def test_another_writer_is_detected_and_served_one_batch_in_flight(
    database: str, broker: Broker, nats: Nats, stream: Stream
) -> None:
    """Fault: somebody else publishes to the stream, now and then. Promise: whole, once, in order all the same."""
    writers = Writers(database, stream.prefix, threads=4, transactions=800, seed=41).start()
    with ThreadRelay(Settings(database_url=database, nats_url=nats.url)) as relay:
        relay.wait_for(Marked)
        for _ in range(15):
            broker.publish(f"{stream.prefix}.foreign")
        relay.wait_for(Shared)
        for _ in range(15):
            broker.publish(f"{stream.prefix}.foreign")
        writers.join()
        wait_until_sent(database)
        after = len(relay.happenings)
        add(database, f"{stream.prefix}.last")
        relay.wait_for(Marked, after=after)
    assert value(database, "SELECT mode FROM outbox.streams") == "shared"
    stored = broker.read(stream.name)
    foreign = [each for each in stored if each.payload == b"foreign"]
    ours = [each for each in stored if each.payload != b"foreign"]
    assert len(foreign) == 30
    assert check(database, ours[:-1]).anomalies.keys() <= {"receipts"}  # the last event is not in the ledger
    by_sequence = {each.sequence: each for each in ours}
    for position, first, last in rows(
        database, "SELECT position, first_sequence, last_sequence FROM outbox.transactions"
    ):
        assert all(by_sequence[place].position == position for place in range(first, last + 1))


def test_two_outboxes_that_share_a_stream(postgres: Postgres, broker: Broker, nats: Nats, stream: Stream) -> None:
    """Fault: two outboxes write to one stream. Promise: each is a foreigner to the other, both keep theirs."""
    urls = [clone(postgres), clone(postgres)]
    writers = [
        Writers(url, stream.prefix, threads=2, transactions=400, seed=50 + n).start() for n, url in enumerate(urls)
    ]
    one, other = (Settings(database_url=url, nats_url=nats.url) for url in urls)
    with ThreadRelay(one), ThreadRelay(other):
        for each in writers:
            each.join()
        for url in urls:
            wait_until_sent(url)
    stored = broker.read(stream.name)
    for url in urls:
        mine = str(value(url, "SELECT outbox_id FROM outbox.relay"))
        ours = [each for each in stored if each.headers["Outbox-Id"] == mine]
        report = check(url, ours)
        assert report.anomalies == {}
        assert report.transactions >= 400
        assert value(url, "SELECT mode FROM outbox.streams") == "shared"


def test_stream_recreated_under_a_running_relay_halts_it(database: str, broker: Broker, nats: Nats) -> None:
    """Fault: the stream is deleted and made again. Promise: the relay halts, nothing is marked that is not there."""
    broker.create_stream("RECREATED", "recreated.>")
    settings = Settings(database_url=database, nats_url=nats.url)
    relay = ThreadRelay(settings)
    add(database, "recreated.one", 3)
    relay.wait_for(Marked)
    broker.api("STREAM.DELETE.RECREATED")
    broker.create_stream("RECREATED", "recreated.>")
    add(database, "recreated.two", 2)
    error = relay.ended()
    assert isinstance(error, Halt)
    assert "outbox rebase --stream RECREATED" in error.remedy
    assert "outbox rebase --stream RECREATED" in str(status.status(database).blocked)
    assert rows(database, "SELECT event_count FROM outbox.pending") == [(2,)]
    assert broker.read("RECREATED") == []
    asyncio.run(rebase.accept_stream(settings, "RECREATED"))
    with ThreadRelay(settings, drain=True) as after:
        assert after.ended() is None
    assert [each.payload for each in broker.read("RECREATED")] == [b"1", b"2"]
    broker.api("STREAM.DELETE.RECREATED")


def test_memory_stream_that_a_restart_lost_is_waited_for_and_then_asked_about(database: str, workplace: Path) -> None:
    """Fault: a server restart loses a memory stream. Promise: blocked and visible; nothing is marked meanwhile, and
    other streams flow.
    """
    with own_nats(workplace / "nats") as server:
        broker = Broker(server.url)
        broker.create_stream("MEMORY", "m.>", storage="memory")
        broker.create_stream("FILE", "f.>")
        settings = Settings(database_url=database, nats_url=server.url)
        with ThreadRelay(settings) as relay:
            add(database, "m.one")
            relay.wait_for(Marked)
            server.restart(kill=True)
            add(database, "m.two")
            relay.wait_for(Blocked, lambda each: "does not exist" in each.why)
            until(lambda: any("does not exist" in str(each.blocked) for each in status.status(database).streams))
            broker.create_stream("MEMORY", "m.>", storage="memory")
            relay.wait_for(Blocked, lambda each: "outbox rebase --stream MEMORY" in each.why)
            add(database, "f.one")
            until(lambda: broker.last_sequence("FILE") == 1)
        assert broker.last_sequence("MEMORY") == 0
        assert value(database, "SELECT count(*) FROM outbox.pending") == 1
        asyncio.run(rebase.accept_stream(settings, "MEMORY"))
        with ThreadRelay(settings, drain=True) as after:
            assert after.ended() is None
        assert broker.last_sequence("MEMORY") == 1


def test_stream_made_again_holds_only_its_own_at_a_start(
    database: str, settings: Settings, broker: Broker, stream: Stream
) -> None:
    """Fault: a stream was made again while no relay led, and nothing was on its way there. The others flow, and what is
    for it waits; with something on its way the relay halts.
    """
    broker.create_stream("AGAIN", "again.>")
    add(database, "again.one")
    assert ThreadRelay(settings, drain=True).ended() is None
    broker.api("STREAM.DELETE.AGAIN")
    broker.create_stream("AGAIN", "again.>")
    with ThreadRelay(settings) as relay:
        relay.wait_for(Blocked, lambda each: each.stream == "AGAIN" and "outbox rebase --stream AGAIN" in each.why)
        add(database, "again.two")
        add(database, f"{stream.prefix}.x")
        relay.wait_for(Marked, lambda each: each.last_position == 3)
        until(lambda: any("made again" in str(each.blocked) for each in status.status(database).streams))
    assert rows(database, "SELECT position FROM outbox.pending") == [(2,)]
    assert broker.last_sequence("AGAIN") == 0
    asyncio.run(rebase.accept_stream(settings, "AGAIN"))
    assert ThreadRelay(settings, drain=True).ended() is None
    assert broker.last_sequence("AGAIN") == 1
    broker.api("STREAM.DELETE.AGAIN")


def test_message_of_this_outbox_that_cannot_be_there_halts(
    database: str, broker: Broker, nats: Nats, stream: Stream
) -> None:
    """Fault: the stream knows more than the database, as after a restore. Promise: it is never written over or past."""
    relay = ThreadRelay(Settings(database_url=database, nats_url=nats.url))
    add(database, f"{stream.prefix}.one")
    relay.wait_for(Marked)
    mine = str(value(database, "SELECT outbox_id FROM outbox.relay"))
    sent = {"Outbox-Id": mine, "Outbox-Transaction": "99", "Nats-Expected-Last-Sequence": "1"}
    broker.publish(f"{stream.prefix}.two", b"", sent)
    add(database, f"{stream.prefix}.three")
    error = relay.ended()
    assert isinstance(error, Halt)
    assert "that cannot be there" in error.message
    assert value(database, "SELECT count(*) FROM outbox.pending") == 1


def test_foreign_messages_that_are_gone_are_not_taken_for_ours(database: str, broker: Broker, nats: Nats) -> None:
    """Fault: a stream's first foreign messages are removed before the relay looks. Promise: nothing is lost for it."""
    broker.create_stream("QUEUE", "queue.>")
    with ThreadRelay(Settings(database_url=database, nats_url=nats.url)) as relay:
        add(database, "queue.x")
        relay.wait_for(Marked)
        for _ in range(2):
            broker.publish("queue.foreign")
        broker.api("STREAM.PURGE.QUEUE")
        after = len(relay.happenings)
        add(database, "queue.x", 2)
        relay.wait_for(Marked, after=after)
        wait_until_sent(database)
    assert [each.number for each in broker.read("QUEUE")] == [1, 2]
    broker.api("STREAM.DELETE.QUEUE")


def test_constant_foreign_traffic_does_not_starve_or_split(
    database: str, broker: Broker, nats: Nats, stream: Stream
) -> None:
    """Fault: another publisher writes all the time. Promise: transactions get through, whole and once."""
    stop = threading.Event()

    def traffic() -> None:
        while not stop.is_set():
            broker.publish(f"{stream.prefix}.foreign")

    thread = threading.Thread(target=traffic, daemon=True)
    thread.start()
    writers = Writers(database, stream.prefix, threads=2, transactions=200, seed=61).start()
    try:
        with ThreadRelay(Settings(database_url=database, nats_url=nats.url)):
            writers.join()
            wait_until_sent(database, patience=120)
    finally:
        stop.set()
        thread.join()
    ours = [each for each in broker.read(stream.name) if each.payload != b"foreign"]
    assert check(database, ours).anomalies == {}
