"""A stream that others write to: other outboxes, copies, sources, and nats-server itself. Promises 1 to 3 and 5.

The faults of the relay and of nats-server beside a foreign writer are variants of their own tests: `[shared…]`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from outbox.config import Settings
from outbox.core.telemetry import InDoubt, Shared
from outbox.doctor.check import Colour
from outbox.doctor.examine import examine
from outbox.embedded import Nats, Postgres
from outbox.operate import status
from outbox.operate.verify import verify
from tests.support.bed import COPIED, Broker, ProcessRelay, Stored, ThreadRelay, rows, until, value, wait_until_sent
from tests.support.faults import add, assert_receipts_tile, more_sent, stream_of
from tests.support.foreign import Foreign, of_outbox
from tests.support.proxy import NatsProxy
from tests.support.servers import Stream, clone
from tests.support.workload import Writers, check

SECOND = 1_000_000_000


@pytest.fixture
def proxy(nats: Nats) -> Iterator[NatsProxy]:
    with NatsProxy(nats.port) as made:
        yield made


def assert_nobody_is_accused(settings: Settings) -> None:
    """Verify finds nothing, the doctor nothing red, and nothing is held back."""
    assert [each for one in asyncio.run(verify(settings)) for each in one.anomalies] == []
    assert [each for each in asyncio.run(examine(settings)) if each.colour is Colour.RED] == []
    found = status.status(settings.database_url)
    assert [found.blocked, *(each.blocked for each in found.streams)] == [None] * (1 + len(found.streams))


def assert_once(url: str, stream: str, mine: Sequence[Stored], foreign: set[int]) -> None:
    """Each event of the outbox that is for this stream is in it once, whole transactions in their places."""
    sent = "SELECT message_id::text FROM outbox.events JOIN outbox.transactions USING (txid) WHERE stream = %s"
    wanted = [each for (each,) in rows(url, f"{sent} ORDER BY position, id", stream)]
    assert [each.message_id for each in mine] == wanted
    assert_receipts_tile(url, stream, len(mine) + len(foreign), foreign)


@pytest.mark.long
def test_two_outboxes_with_overlapping_subjects_beside_a_foreign_writer(
    postgres: Postgres, nats: Nats, broker: Broker, stream: Stream, workplace: Path
) -> None:
    """Fault: two outboxes and a foreign writer write to the same subjects, and each relay is killed three times.

    Promise: each outbox has its own whole, once and in order; what is foreign stays where it is, copies included.
    """
    urls = [clone(postgres), clone(postgres)]
    environments = [{"OUTBOX_DATABASE_URL": url, "OUTBOX_NATS_URL": nats.url} for url in urls]
    with ExitStack() as stack:
        foreign = stack.enter_context(Foreign(workplace, nats.url, stream.name, stream.prefix, copies=True))
        writers = [Writers(url, stream.prefix, threads=2, endless=True, seed=90 + n) for n, url in enumerate(urls)]
        for each in writers:
            each.start()
        relays = [stack.enter_context(ProcessRelay(workplace, environment)) for environment in environments]
        for _ in range(3):
            for number, url in enumerate(urls):
                more_sent(url)
                relays[number].kill()
                relays[number] = stack.enter_context(ProcessRelay(workplace, environments[number]))
        for each in writers:
            each.stop()
        for url in urls:
            wait_until_sent(url)
        for relay in relays:
            assert relay.stop() == 0
    stored = broker.read(stream.name)
    foreign.assert_untouched(stored)
    for url, each in zip(urls, writers, strict=True):
        report = check(url, of_outbox(url, stored))
        assert report.anomalies == {}
        assert report.transactions == each.committed


def republish(broker: Broker, stream: str) -> int:
    """What a consumer of dead letters does: every message again, with its `Outbox-*` headers and without `Nats-*`."""
    for each in broker.read(stream):
        kept = {name: text for name, text in each.headers.items() if name.startswith("Outbox-")}
        broker.publish(each.subject, each.payload, {**kept, COPIED: "a consumer"})
    return broker.last_sequence(stream)


@pytest.mark.parametrize("when", ["under the relay", "before the next relay", "in doubt"])
def test_copies_of_our_messages_are_foreign(
    database: str, broker: Broker, proxy: NatsProxy, stream: Stream, when: str
) -> None:
    """Fault: a consumer republishes what it has from the stream into it, with the headers that say whose it was.

    Promise: the relay goes on, nobody is accused, and each event is there once besides its copies.
    """
    settings = Settings(database_url=database, nats_url=proxy.url, ack_timeout=60)
    subject = f"{stream.prefix}.x"
    with ThreadRelay(settings) as relay:
        for events in (3, 1, 2):
            add(database, subject, events)
        wait_until_sent(database)
        if when == "in doubt":
            proxy.acks = "drop"
            add(database, subject, 2)
            until(lambda: proxy.dropped)
        if when != "before the next relay":
            republish(broker, stream.name)
        if when == "in doubt":
            proxy.acks, after = "pass", len(relay.happenings)
            proxy.cut()
            relay.wait_for(InDoubt, after=after)
        if when != "before the next relay":
            add(database, subject, 2)
            wait_until_sent(database)
    if when == "before the next relay":
        republish(broker, stream.name)
    with ThreadRelay(settings):
        add(database, subject, 2)
        wait_until_sent(database)
        assert_nobody_is_accused(settings)
    stored = broker.read(stream.name)
    foreign = {each.sequence for each in stored if each.foreign}
    assert_once(database, stream.name, [each for each in stored if not each.foreign], foreign)


def test_stream_that_sources_a_stream_of_ours_and_has_subjects_of_ours(
    database: str, broker: Broker, settings: Settings
) -> None:
    """Fault: the messages of one stream of the outbox come into another one beside what the outbox sends to that.

    Promise: the relay goes on with both, nobody is accused, and each event is once in the stream that it is for.
    """
    with stream_of(broker, "ORDERS"), stream_of(broker, "SHOP", sources=[{"name": "ORDERS"}]):
        with ThreadRelay(settings):
            for number in range(10):
                add(database, "ORDERS.x", 1 + number % 3)
                add(database, "SHOP.x", 1 + number % 2)
                if number % 3 == 0:
                    wait_until_sent(database)
            wait_until_sent(database)
        with ThreadRelay(settings):
            add(database, "SHOP.last", 2)
            add(database, "ORDERS.last", 2)
            wait_until_sent(database)
            total = value(database, "SELECT count(*) FROM outbox.events")
            until(lambda: broker.last_sequence("SHOP") == total)
            assert_nobody_is_accused(settings)
        stored = broker.read("SHOP")
        sourced = {each.sequence for each in stored if "Nats-Stream-Source" in each.headers}
        assert_once(database, "SHOP", [each for each in stored if each.sequence not in sourced], sourced)
        assert_once(database, "ORDERS", broker.read("ORDERS"), set())


def test_delete_markers_are_no_other_writer(database: str, broker: Broker, settings: Settings) -> None:
    """Fault: events expire (`Nats-TTL`), and nats-server puts a marker of its own in the place of each subject's last.

    Promise: the relay goes on, nobody is accused, and each event has a place of its own.
    """
    seen: set[int] = set()

    def marked() -> bool:
        """They expire as well, after two seconds."""
        seen.update(each.sequence for each in broker.read("TTL") if "Nats-Marker-Reason" in each.headers)
        return len(seen) == 4

    with stream_of(broker, "TTL", allow_msg_ttl=True, subject_delete_marker_ttl=2 * SECOND):
        with ThreadRelay(settings) as relay:
            for number in range(4):
                expires = """SELECT outbox.add(%s, 'x', '{"Nats-TTL": "2s"}')"""
                rows(database, expires, f"TTL.{number}")
                add(database, "TTL.lasting", 2)
            wait_until_sent(database)
            until(marked, what="markers of nats-server")
            add(database, "TTL.lasting", 3)
            wait_until_sent(database)
            assert not any(isinstance(each, Shared) for each in relay.happenings)
        with ThreadRelay(settings) as relay:
            add(database, "TTL.lasting", 3)
            wait_until_sent(database)
            assert not any(isinstance(each, Shared) for each in relay.happenings)
            assert_nobody_is_accused(settings)
            assert "another writer" not in " ".join(each.found for each in asyncio.run(examine(settings)))
        last = broker.last_sequence("TTL")
        assert last == 4 + 8 + 4 + 3 + 3
        assert_receipts_tile(database, "TTL", last, seen)
