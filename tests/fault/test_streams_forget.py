"""What the stream holds goes: purged, consumed, rolled up, expired, restored, re-created. Promises 1, 2 and 5.

Where messages are gone, the receipts are the witness: they tile the stream's sequences, each of which was given once.
"""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from outbox.config import Settings
from outbox.core.telemetry import Marked, Settled
from outbox.embedded import Nats
from outbox.errors import Halt
from outbox.operate.rebase import accept_stream
from tests.support.bed import Broker, ThreadRelay, rows, until, value, wait_until_sent
from tests.support.faults import add, assert_ended_well, assert_receipts_tile, more_sent, sent, stream_of, unsent_ids
from tests.support.proxy import NatsProxy
from tests.support.servers import Stream, own_nats
from tests.support.workload import Writers, check

COMMITTED = "SELECT count(*) FROM ledger"


@pytest.fixture
def proxy(nats: Nats) -> Iterator[NatsProxy]:
    with NatsProxy(nats.port) as made:
        yield made


@pytest.fixture
def settings(database: str, proxy: NatsProxy) -> Settings:
    """A relay through the proxy, which waits for an ack for longer than the test."""
    return Settings(database_url=database, nats_url=proxy.url, ack_timeout=120)


def consume(broker: Broker, stream: str, number: int) -> list[str]:
    """Take and ack so many messages as a work queue's consumer; returns their ids."""

    async def take(client: Any) -> list[str]:
        subscription = await client.jetstream().pull_subscribe("", durable="worker", stream=stream)
        ids: list[str] = []
        while len(ids) < number:
            for message in await subscription.fetch(number - len(ids), timeout=10):
                await message.ack_sync()
                ids.append(message.headers["Nats-Msg-Id"])
        return ids

    ids: list[str] = broker._with(take)
    return ids


def all_ids(url: str) -> list[str]:
    return [each for (each,) in rows(url, "SELECT message_id::text FROM outbox.events ORDER BY id")]


@pytest.mark.core
@pytest.mark.parametrize("restarted", [False, True], ids=["same relay", "next relay"])
@pytest.mark.parametrize("left", [0, 1, 7])
def test_work_queue_is_worked_off_before_the_batch_is_known_as_stored(
    database: str, broker: Broker, proxy: NatsProxy, settings: Settings, left: int, *, restarted: bool
) -> None:
    """Fault: the ack is lost, and a consumer takes the batch, or most of it. Promise: it gets each event once."""
    with stream_of(broker, "WORK", retention="workqueue"):
        with ThreadRelay(settings) as relay:
            add(database, "WORK.first", 2)
            relay.wait_for(Marked)
            taken = consume(broker, "WORK", 2)
            proxy.acks = "drop"
            for _ in range(4):
                add(database, "WORK.x", 5)
            until(lambda: proxy.dropped)
            stored = broker.last_sequence("WORK") - 2
            taken += consume(broker, "WORK", stored - min(left, stored - 1))
            proxy.acks = "pass"
            if not restarted:
                proxy.cut()
                relay.wait_for(Settled, lambda each: each.stored > 0)
                wait_until_sent(database)
        with ThreadRelay(settings):
            add(database, "WORK.last", 3)
            wait_until_sent(database)
        taken += consume(broker, "WORK", 25 - len(taken))
        assert Counter(taken) == Counter(all_ids(database))
        assert_receipts_tile(database, "WORK", 25)
        assert broker.info("WORK")["state"]["messages"] == 0


@pytest.mark.parametrize("restarted", [False, True], ids=["same relay", "next relay"])
@pytest.mark.parametrize("way", ["rollup", "one per subject", "ttl", "age", "discard old"])
def test_stream_removes_a_batch_before_it_is_known_as_stored(
    database: str, broker: Broker, proxy: NatsProxy, settings: Settings, way: str, *, restarted: bool
) -> None:
    """Fault: the ack is lost, and the stream removes the batch, or the most of it. Promise: nothing is sent again."""
    second = 1_000_000_000
    configs: dict[str, dict[str, Any]] = {
        "rollup": {"allow_rollup_hdrs": True},
        "one per subject": {"max_msgs_per_subject": 1},
        "ttl": {"allow_msg_ttl": True},
        "age": {"max_age": second, "duplicate_window": second},
        "discard old": {"max_msgs": 1},
    }
    headers = {"rollup": '{"Nats-Rollup": "sub"}', "ttl": '{"Nats-TTL": "1s"}'}.get(way)
    # A transaction that rolls up goes alone, and none of its own: so three batches are in flight, one behind the other.
    # The last one waits: it may still grow.
    subjects, events, transactions = (250, 250, 4) if way == "rollup" else (1, 4, 3)
    remains = {"ttl": 0, "age": 0, "rollup": 250}.get(way, 1)
    add_events = "SELECT outbox.add('GOING.' || n %% %s, n::text, %s::jsonb) FROM generate_series(1, %s) AS n"
    with stream_of(broker, "GOING", **configs[way]):
        for _ in range(transactions):
            rows(database, add_events, subjects, headers, events)
        proxy.acks = "drop"
        with ThreadRelay(settings) as relay:
            until(lambda: proxy.dropped and broker.last_sequence("GOING") == 3 * events)
            until(lambda: broker.info("GOING")["state"]["messages"] == remains)
            proxy.acks = "pass"
            if not restarted:
                proxy.cut()
                relay.wait_for(Settled, lambda each: each.stored == 3)
                wait_until_sent(database)
        with ThreadRelay(settings):
            rows(database, add_events, subjects, headers, 2)
            wait_until_sent(database)
        assert broker.last_sequence("GOING") == transactions * events + 2
        assert_receipts_tile(database, "GOING", transactions * events + 2)


def test_duplicate_window_ends_before_the_outage(
    database: str, broker: Broker, proxy: NatsProxy, settings: Settings
) -> None:
    """Fault: acks are lost, and the relay comes back long after the duplicate window. Promise: nothing is doubled."""
    with stream_of(broker, "WINDOW", duplicate_window=100_000_000):
        writers = Writers(database, "WINDOW", threads=4, endless=True, seed=139).start()
        for _ in range(2):
            with ThreadRelay(settings) as relay:
                more_sent(database)
                dropped, proxy.acks = proxy.dropped, "drop"
                until(lambda d=dropped: proxy.dropped > d)  # type: ignore[misc]
                proxy.cut()
                after = len(relay.happenings)
                relay.wait_for(Settled, after=after)
                until(lambda d=proxy.dropped: proxy.dropped > d)  # type: ignore[misc]
            threading.Event().wait(0.5)
            proxy.acks = "pass"
        with ThreadRelay(settings):
            writers.stop()
            wait_until_sent(database)
        assert_ended_well(writers, broker, "WINDOW")


def test_purged_under_load(database: str, broker: Broker, stream: Stream, settings: Settings) -> None:
    """Fault: the stream is purged again and again. Promise: no halt; missing is what was purged, doubled is nothing."""
    writers = Writers(database, stream.prefix, threads=4, endless=True, seed=149).start()
    with ThreadRelay(settings.model_copy(update={"ack_timeout": 2})) as relay:
        relay.wait_for(Marked)
        for _ in range(8):
            more_sent(database)
            broker.api(f"STREAM.PURGE.{stream.name}")
        purged = broker.info(stream.name)["state"]["first_seq"]
        writers.stop()
        wait_until_sent(database)
    last = broker.last_sequence(stream.name)
    assert last == value(database, COMMITTED)
    assert_receipts_tile(database, stream.name, last)
    report = check(database, broker.read(stream.name))
    assert report.anomalies.keys() <= {"missing", "disordered", "receipts", "split"}
    assert len(report.missing) == purged - 1


def test_recreated_under_load(database: str, broker: Broker, settings: Settings) -> None:
    """Fault: the stream is deleted and made again under load. Promise: a halt that names the remedy, and it works."""
    with stream_of(broker, "AGAIN"):
        writers = Writers(database, "AGAIN", threads=4, endless=True, seed=151).start()
        relay = ThreadRelay(settings.model_copy(update={"ack_timeout": 2}))
        relay.wait_for(Marked)
        more_sent(database)
        broker.api("STREAM.DELETE.AGAIN")
        broker.create_stream("AGAIN", "AGAIN.>")
        error = relay.ended()
        writers.stop()
        assert isinstance(error, Halt)
        assert "is not the one that the outbox knows" in error.message
        assert "outbox rebase --stream AGAIN" in error.remedy
        assert broker.read("AGAIN") == []
        left = unsent_ids(database)
        assert left
        assert_receipts_tile(database, "AGAIN", value(database, "SELECT last_sequence FROM outbox.streams"))
        asyncio.run(accept_stream(settings, "AGAIN"))
        with ThreadRelay(settings, drain=True) as after:
            assert after.ended() is None
        assert [each.message_id for each in broker.read("AGAIN")] == left


@pytest.mark.parametrize("running", [True, False], ids=["under the relay", "before the relay"])
def test_stream_restored_from_an_older_snapshot(database: str, workplace: Path, *, running: bool) -> None:
    """Fault: the server's files are replaced by older ones. Promise: a halt with its remedy, nothing more is marked."""
    files, older = workplace / "nats" / "jetstream", workplace / "older"
    with own_nats(workplace / "nats") as server:
        assert isinstance(server, Nats)
        broker = Broker(server.url)
        broker.create_stream("OLD", "old.>")
        settings = Settings(database_url=database, nats_url=server.url)
        relay = ThreadRelay(settings)
        add(database, "old.one", 3)
        wait_until_sent(database)
        server.stop()
        shutil.copytree(files, older)
        server.start()
        add(database, "old.two", 3)
        relay.wait_for(Marked, lambda each: each.last_position == 2)
        if not running:
            assert relay.stop() is None
        server.stop()
        shutil.rmtree(files)
        shutil.copytree(older, files)
        server.start()
        add(database, "old.three", 3)
        if not running:
            relay = ThreadRelay(settings)
        error = relay.ended()
        assert isinstance(error, Halt)
        assert "it ends at 3, before the last receipt at 6" in error.message
        assert "outbox rebase --stream OLD" in error.remedy
        assert sent(database) == 2
        left = unsent_ids(database)
        asyncio.run(accept_stream(settings, "OLD"))
        with ThreadRelay(settings, drain=True) as after:
            assert after.ended() is None
        assert [each.message_id for each in broker.read("OLD")[3:]] == left
