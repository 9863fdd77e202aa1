"""Fences by subject where they meet the server: rewritten subjects, removed messages, subjects of others, operators.

Promises 1 to 3 and 7. The rules themselves are in `tests/property/core/test_fences.py`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import nats as nats_client
import psycopg
import pytest

from outbox.config import Settings, StreamMode
from outbox.core.telemetry import InDoubt, Marked
from outbox.embedded import Nats
from outbox.errors import Halt
from outbox.operate import rebase, status
from outbox.operate.status import StreamStatus
from tests.support.bed import Broker, ThreadRelay, rows, until, wait_until_sent
from tests.support.faults import add
from tests.support.foreign import ours
from tests.support.proxy import NatsProxy
from tests.support.servers import Stream, own_nats

MAPPED = 'accounts { A { users [{user: a, password: a}], jetstream: enabled, mappings { "map.x": "mapped.x" } } }'


@pytest.fixture
def proxy(nats: Nats) -> Iterator[NatsProxy]:
    with NatsProxy(nats.port) as made:
        yield made


def shown(url: str) -> StreamStatus:
    (found,) = status.status(url).streams
    return found


def assert_whole(url: str, broker: Broker, stream: str) -> None:
    """Every event is in the stream, once and in order."""
    stored = [each.message_id for each in ours(broker.read(stream)) if "Outbox-Id" in each.headers]
    assert stored == [each for (each,) in rows(url, "SELECT message_id::text FROM outbox.events ORDER BY txid, id")]


@contextmanager
def mapped(directory: Path) -> Iterator[tuple[NatsProxy, Settings]]:
    with own_nats(directory, config=MAPPED) as server, NatsProxy(server.port) as proxy:
        yield proxy, Settings(nats_url=f"nats://a:a@127.0.0.1:{proxy.port}", stream_mode=StreamMode.SHARED)


@pytest.mark.parametrize("ack", ["pass", "drop"])
def test_subject_that_is_stored_as_another_one(database: str, workplace: Path, ack: str) -> None:
    """Fault: the account maps a subject to another one of the same stream. Promise: once, and the status says why slow.

    A fence by subject compares what is stored, so what is looked for under the subject that was sent is not found.
    """
    with mapped(workplace / "nats") as (proxy, settings):
        broker = Broker(settings.nats_url)
        broker.create_stream("MAP", "map.>", "mapped.>")
        broker.publish("mapped.x")
        proxy.acks = ack
        with ThreadRelay(settings.model_copy(update={"database_url": database, "ack_timeout": 1.0})) as relay:
            add(database, "map.x", 2)
            if ack == "drop":
                relay.wait_for(InDoubt)
                proxy.acks = "pass"
            wait_until_sent(database)
            add(database, "map.x", 2)
            wait_until_sent(database)
            until(lambda: shown(database).sharing)
        assert "stored as others than they are sent" in str(shown(database).sharing)
        assert_whole(database, broker, "MAP")


@pytest.mark.parametrize("kept", [100, 2], ids=["enough is left", "nothing is left"])
def test_stream_removes_what_would_tell(
    database: str, broker: Broker, nats: Nats, proxy: NatsProxy, stream: Stream, kept: int
) -> None:
    """Fault: an ack is lost, and what the stream has of the batch is removed. Promise: once, or a halt that says so."""
    broker.publish(f"{stream.prefix}.a")
    settings = Settings(database_url=database, nats_url=proxy.url, ack_timeout=1.0, stream_mode=StreamMode.SHARED)
    relay = ThreadRelay(settings)
    add(database, f"{stream.prefix}.a", 2)
    relay.wait_for(Marked)
    proxy.acks = "drop"
    add(database, f"{stream.prefix}.a", 2)
    until(lambda: broker.last_sequence(stream.name) == 5)
    for _ in range(3):
        broker.publish(f"{stream.prefix}.b")
    broker.api(f"STREAM.PURGE.{stream.name}", {"keep": kept})
    proxy.acks = "pass"
    if kept == 100:
        wait_until_sent(database)
        assert relay.stop() is None
        assert_whole(database, broker, stream.name)
        return
    error = relay.ended()
    assert isinstance(error, Halt)
    assert "that would tell whether a batch was stored are gone" in error.message
    assert f"outbox rebase --stream {stream.name}" in error.remedy
    # By the operator's order it is sent again, and nothing stands in the way.
    assert asyncio.run(rebase.accept_stream(settings, stream.name)).kept is None
    with ThreadRelay(settings):
        wait_until_sent(database)


@contextmanager
def written_to(url: str, subject: str, rate: int) -> Iterator[None]:
    """Somebody else writes to a subject all the time, so many messages a second."""
    stop = threading.Event()

    async def write() -> None:
        client = await nats_client.connect(url)
        while not stop.is_set():
            await client.publish(subject, b"foreign")
            await client.flush()
            await asyncio.sleep(1 / rate)
        await client.close()

    thread = threading.Thread(target=asyncio.run, args=[write()])
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_subject_that_others_write_to_all_the_time(database: str, nats: Nats, broker: Broker, stream: Stream) -> None:
    """Fault: others write hundreds of messages a second on the outbox's only subject. Promise: it goes on, and says so.

    No attempt is in doubt: each was refused in so many words.
    """
    with ThreadRelay(Settings(database_url=database, nats_url=nats.url, stream_mode=StreamMode.SHARED)) as relay:
        with written_to(nats.url, f"{stream.prefix}.x", 2000):
            for _ in range(30):
                add(database, f"{stream.prefix}.x", 300)
            until(lambda: shown(database).sharing, what="a share")
            assert f"others write to {stream.prefix}.x so often" in str(shown(database).sharing)
        wait_until_sent(database)
        assert not [each for each in relay.happenings if isinstance(each, InDoubt) and "(1" in each.why]
    assert_whole(database, broker, stream.name)


def test_subject_that_nobody_else_writes_to_is_the_fence(
    database: str, nats: Nats, broker: Broker, stream: Stream
) -> None:
    """Fault: others write all the time on the first subject of each transaction. Promise: the quiet one fences it."""
    settings = Settings(database_url=database, nats_url=nats.url, stream_mode=StreamMode.SHARED)
    with written_to(nats.url, f"{stream.prefix}.x", 500), ThreadRelay(settings):
        for _ in range(50):
            with psycopg.connect(database) as connection:
                for subject in ("x", "quiet"):
                    connection.execute("SELECT outbox.add(%s, ''::bytea)", [f"{stream.prefix}.{subject}"])
            wait_until_sent(database)
    stored = [each for each in ours(broker.read(stream.name)) if "Outbox-Id" in each.headers]
    fences = [each for each in stored if "Nats-Expected-Last-Subject-Sequence" in each.headers]
    assert len(stored) == 100
    assert sum(each.subject.endswith(".quiet") for each in fences) > len(fences) / 2
    assert_whole(database, broker, stream.name)


def test_stream_accepted_while_its_head_may_still_arrive(
    database: str, broker: Broker, nats: Nats, proxy: NatsProxy, stream: Stream
) -> None:
    """Fault: a batch is on its way for long, and an operator accepts the stream meanwhile. Promise: stored once."""
    broker.publish(f"{stream.prefix}.b")
    settings = Settings(database_url=database, nats_url=proxy.url, stream_mode=StreamMode.SHARED, ack_timeout=60)
    direct = settings.model_copy(update={"nats_url": nats.url})
    former = ThreadRelay(settings)
    for _ in range(2):  # after the first one of a term the stream is looked at
        add(database, f"{stream.prefix}.a", 2)
        wait_until_sent(database)
    proxy.change(proxy.up, holding=True)
    add(database, f"{stream.prefix}.a", 150, size=500)
    until(lambda: proxy.up.held > 150 * 500, what="a batch to be on its way")
    former.kill()
    done = asyncio.run(rebase.accept_stream(direct, stream.name))
    assert done.kept == 3
    assert rows(database, "SELECT mode, plan FROM outbox.streams")[0][0] == "shared"
    proxy.heal()
    until(lambda: broker.last_sequence(stream.name) == 155)
    with ThreadRelay(direct):
        add(database, f"{stream.prefix}.b", 2)
        wait_until_sent(database)
    assert_whole(database, broker, stream.name)
    assert asyncio.run(rebase.accept_stream(direct, stream.name)).kept is None


def has_mode(url: str, mode: str) -> bool:
    return shown(url).mode == mode


def test_mode_is_what_the_setting_says_when_nothing_is_open(
    database: str, broker: Broker, nats: Nats, stream: Stream
) -> None:
    """Fault: the setting is changed, to and fro, under writers. Promise: whole, once and in order."""
    stop = threading.Event()

    def write() -> None:
        while not stop.wait(0.005):
            add(database, f"{stream.prefix}.a", 3)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for mode in (StreamMode.CHAINED, StreamMode.SHARED, StreamMode.CHAINED, StreamMode.AUTO, StreamMode.SHARED):
            with ThreadRelay(Settings(database_url=database, nats_url=nats.url, stream_mode=mode)) as relay:
                relay.wait_for(Marked)
                until(partial(has_mode, database, "chained" if mode is StreamMode.AUTO else mode.value))
                relay.wait_for(Marked, after=len(relay.happenings))
                relay.kill()
    finally:
        stop.set()
        writer.join()
    with ThreadRelay(Settings(database_url=database, nats_url=nats.url)):
        wait_until_sent(database)
    assert_whole(database, broker, stream.name)
