"""The reader of streams: every message once and in order, by each way, whatever befalls the way."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import nats as natspy
import pytest

from outbox.config import Settings
from outbox.core.outcome import STREAM_NOT_FOUND
from outbox.embedded import Nats
from outbox.jetstream import reader
from outbox.jetstream.client import JetStream, Refused, connected
from outbox.jetstream.stream import Message
from tests.support.authority import Authority
from tests.support.bed import Broker
from tests.support.proxy import NatsProxy
from tests.support.servers import Stream, own_nats

CONSUMER, DIRECT, LEADER = reader._by_consumer, reader._by_direct_gets, None
WAYS = [CONSUMER, DIRECT, LEADER]
OTHERS: dict[str, dict[str, Any]] = {
    "limits": {},
    "limits, direct": {"allow_direct": True},
    "work queue": {"retention": "workqueue", "allow_direct": True},
    "work queue, leader": {"retention": "workqueue"},
    "interest": {"retention": "interest", "allow_direct": True},
}


def settings_of(url: str, **more: Any) -> Settings:
    return Settings(database_url="postgresql://nowhere", nats_url=url, **more)


def fill(url: str, subject: str, count: int, *, size: int = 10, **options: Any) -> None:
    """Messages on the subject, numbered from 0; each second one has a header."""

    async def work() -> None:
        client = await natspy.connect(url, **options)
        js = client.jetstream()
        for number in range(count):
            headers = {"A": str(number), "Nats-Sequence": "7"} if number % 2 else None
            await js.publish(subject, str(number).encode().ljust(size), headers=headers)
        await client.close()

    asyncio.run(work())


async def everything(
    jetstream: JetStream, name: str, last: int | None = None, then: Callable[[int], object] = lambda _: None
) -> list[Message]:
    """All of a stream; `then` is called between two pages with the number of messages so far."""
    info = await jetstream.stream(name)
    assert info is not None
    found: list[Message] = []
    end = info.first_sequence - 1
    async with contextlib.aclosing(reader.pages(jetstream, info, end + 1, last or info.last_sequence)) as pages:
        async for page in pages:
            assert [each for each in page.messages if not end < each.sequence <= page.end] == []
            end = page.end
            found += page.messages
            await asyncio.to_thread(then, len(found))
    assert end == (last or info.last_sequence)
    return found


def read(settings: Settings, name: str, then: Callable[[int], object] = lambda _: None) -> list[Message]:
    async def work() -> list[Message]:
        async with connected(settings) as jetstream:
            return await everything(jetstream, name, then=then)

    return asyncio.run(work())


def places(found: list[Message]) -> list[int]:
    return [each.sequence for each in found]


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "PAGE_MESSAGES", 20)
    monkeypatch.setattr(reader, "FEW", 0)
    monkeypatch.setattr(reader, "SILENT_SECONDS", 1.0)


@pytest.fixture(params=WAYS, ids=["consumer", "direct", "leader"])
def only(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> object:
    """Reading by one way alone: who falls back to another one fails."""
    way = request.param
    monkeypatch.setattr(reader, "_ways", lambda *_: iter([way] if way else []))
    if way:

        async def never(_: object, __: str, first: int, last: int) -> AsyncGenerator[reader.Page, None]:
            assert first > last, "it was left to the leader"
            return
            yield

        monkeypatch.setattr(reader, "_by_leader", never)
    return way


@pytest.fixture
def filled(broker: Broker, stream: Stream, nats: Nats) -> Stream:
    broker.api(f"STREAM.UPDATE.{stream.name}", {**broker.info(stream.name)["config"], "allow_direct": True})
    fill(nats.url, f"{stream.prefix}.x", 90)
    return stream


def test_messages_are_what_they_are_by_every_way(only: object, filled: Stream, nats: Nats, broker: Broker) -> None:
    before = broker.info(filled.name)["state"]
    found = read(settings_of(nats.url), filled.name)
    stored = broker.read(filled.name)
    assert [each.payload for each in found] == [str(number).encode().ljust(10) for number in range(90)]
    assert places(found) == list(range(1, 91))
    assert {each.subject for each in found} == {f"{filled.prefix}.x".encode()}
    assert found[0].headers == b""
    assert b"\r\nA: 1\r\n" in found[1].headers
    assert found[1].headers.count(b"Nats-Sequence: ") == 1  # the message's own
    assert [each.stored_at.timestamp() for each in found] == pytest.approx([each.time for each in stored])
    after = broker.info(filled.name)["state"]
    assert {**before, "consumer_count": 0} == {**after, "consumer_count": 0}


def test_gaps_and_ends(only: object, filled: Stream, nats: Nats, broker: Broker) -> None:
    broker.api(f"STREAM.PURGE.{filled.name}", {"seq": 11})
    gone = {12, 20, 21, 40, *range(50, 75), 90}
    for sequence in gone:
        broker.api(f"STREAM.MSG.DELETE.{filled.name}", {"seq": sequence})
    left = [place for place in range(11, 91) if place not in gone]
    assert places(read(settings_of(nats.url), filled.name)) == left
    broker.api(f"STREAM.PURGE.{filled.name}")
    assert read(settings_of(nats.url), filled.name) == []


def test_empty_stream(only: object, stream: Stream, nats: Nats) -> None:
    assert read(settings_of(nats.url), stream.name) == []


def test_part_of_a_stream(only: object, filled: Stream, nats: Nats) -> None:
    async def work() -> list[Message]:
        async with connected(settings_of(nats.url)) as jetstream:
            return await everything(jetstream, filled.name, last=47)

    assert places(asyncio.run(work())) == list(range(1, 48))


@pytest.mark.parametrize("kind", OTHERS)
def test_streams_that_a_consumer_would_change_have_none(
    kind: str, broker: Broker, stream: Stream, nats: Nats, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []

    def noted(name: str) -> Callable[..., object]:
        way = getattr(reader, name)

        def take(*given: Any) -> object:
            taken.append(name)
            return way(*given)

        return take

    for name in ("_by_consumer", "_by_direct_gets"):
        monkeypatch.setattr(reader, name, noted(name))
    broker.api(f"STREAM.DELETE.{stream.name}")
    broker.create_stream(stream.name, f"{stream.prefix}.>", **OTHERS[kind])
    config = {"durable_name": "d", "name": "d", "ack_policy": "explicit"}
    broker.api(f"CONSUMER.CREATE.{stream.name}.d", {"stream_name": stream.name, "config": config})
    fill(nats.url, f"{stream.prefix}.x", 45)
    before = broker.info(stream.name)["state"]
    assert places(read(settings_of(nats.url), stream.name)) == list(range(1, 46))
    assert broker.info(stream.name)["state"] == before
    expected = {"limits": ["_by_consumer"], "limits, direct": ["_by_consumer"], "work queue, leader": []}
    assert taken == expected.get(kind, ["_by_direct_gets"])


def test_what_a_replica_lacks_is_asked_of_the_leader(
    filled: Stream, nats: Nats, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica that lags has not the last messages yet, or, having missed some, others neither."""

    async def lagging(*given: Any) -> AsyncGenerator[list[Message], None]:
        async for found in CONSUMER(*given):
            if kept := [each for each in found if each.sequence < 70 and each.sequence not in (3, 30, 31, 32, 41)]:
                yield kept

    monkeypatch.setattr(reader, "_ways", lambda *_: iter([lagging]))
    assert places(read(settings_of(nats.url), filled.name)) == list(range(1, 91))


@pytest.mark.parametrize("only", WAYS[:2], ids=["consumer", "direct"], indirect=True)
@pytest.mark.parametrize("trouble", ["cut", "consumer deleted"])
def test_doubt_throws_the_way_away_and_loses_nothing(
    only: object, trouble: str, filled: Stream, nats: Nats, broker: Broker
) -> None:
    with NatsProxy(nats.port) as proxy:

        def befall(count: int) -> None:
            if count != 40:
                return
            if trouble == "cut":
                cut_readers(proxy)
            for name in broker.api(f"CONSUMER.NAMES.{filled.name}")["consumers"] if trouble != "cut" else ():
                broker.api(f"CONSUMER.DELETE.{filled.name}.{name}")

        assert places(read(settings_of(proxy.url), filled.name, befall)) == list(range(1, 91))


def cut_readers(proxy: NatsProxy) -> None:
    """Cut all connections but the first one, which asks the leader."""
    for pair in list(proxy._pairs)[1:]:
        pair.reset()


def test_messages_larger_than_a_request(
    only: object, stream: Stream, nats: Nats, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker.api(f"STREAM.UPDATE.{stream.name}", {**broker.info(stream.name)["config"], "allow_direct": True})
    monkeypatch.setattr(reader, "PAGE_BYTES", 1000)
    monkeypatch.setattr(reader, "BESIDE_BYTES", -1_000_000)
    fill(nats.url, f"{stream.prefix}.x", 12, size=200_000)
    assert places(read(settings_of(nats.url), stream.name)) == list(range(1, 13))


def test_stream_that_is_deleted_while_it_is_read(filled: Stream, nats: Nats, broker: Broker) -> None:
    def befall(count: int) -> None:
        if count == 20:
            broker.api(f"STREAM.DELETE.{filled.name}")

    with pytest.raises(Refused) as refused:
        read(settings_of(nats.url), filled.name, befall)
    assert refused.value.code == STREAM_NOT_FOUND


@pytest.fixture
def forbidding(workplace: Path) -> Iterator[Nats]:
    allowed = '"$JS.API.STREAM.>", "t.>"'
    config = f"""
accounts {{ A {{ jetstream: enabled, users: [
  {{ user: all, password: x }},
  {{ user: few, password: x, permissions {{ publish: [{allowed}], subscribe: "_INBOX.>" }} }} ] }} }}
"""
    with own_nats(workplace / "nats", config=config) as server:
        yield server


def test_who_may_use_no_consumer_and_no_direct_get_reads_from_the_leader(forbidding: Nats) -> None:
    url = forbidding.url.replace("nats://", "nats://all:x@")
    Broker(url).create_stream("S", "t.>", allow_direct=True)
    fill(url, "t.x", 50)
    assert places(read(settings_of(forbidding.url.replace("nats://", "nats://few:x@")), "S")) == list(range(1, 51))


def test_over_tls(only: object, workplace: Path) -> None:
    authority = Authority(workplace / "authority")
    pair = authority.issue("127.0.0.1")
    config = f'tls {{ cert_file: "{pair.cert}", key_file: "{pair.key}" }}'
    with own_nats(workplace / "nats", config=config) as server:
        given = settings_of(server.url.replace("nats://", "tls://"), nats_tls_ca=authority.ca)

        async def prepare() -> None:
            async with connected(given) as jetstream:
                await jetstream.ensure_stream("S", ["t.>"])

        asyncio.run(prepare())
        fill(server.url, "t.x", 45, size=20_000, tls=ssl.create_default_context(cafile=authority.ca))
        found = read(given, "S")
    assert [each.payload for each in found] == [str(number).encode().ljust(20_000) for number in range(45)]
