"""`outbox verify`: it sees what is promised not to be, message by message, and nothing else; on live systems too."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import pytest

from outbox.config import Settings
from outbox.core.positions import HIGHEST
from outbox.embedded import Nats
from outbox.operate.verify import verify
from tests.support.bed import Broker, ThreadRelay, rows, value, wait_until_sent
from tests.support.commands import outbox
from tests.support.servers import Stream
from tests.support.workload import Writers


def found(settings: Settings, first: int = 1, last: int = HIGHEST) -> list[str]:
    compared = asyncio.run(verify(settings, first=first, last=last))
    return [f"{each.kind} {each.position}" for one in compared for each in one.anomalies]


@pytest.fixture
def sent(database: str, stream: Stream, settings: Settings) -> Settings:
    """Five transactions of three events, sent; sequences 1 to 15."""
    for _ in range(5):
        rows(database, "SELECT outbox.add(%s, n::text) FROM generate_series(1, 3) AS n", f"{stream.prefix}.x")
    assert ThreadRelay(settings, drain=True).ended() is None
    return settings


def copied(broker: Broker, stream: Stream, sequence: int, **changed: str) -> None:
    """Publish a message of the stream once more, with some of its headers changed."""
    original = broker.read(stream.name)[sequence - 1]
    kept = {name: text for name, text in original.headers.items() if not name.startswith("Nats-")}
    headers = {**kept, "Nats-Msg-Id": original.message_id}
    changes = {name.replace("_", "-"): text for name, text in changed.items()}
    config = {**broker.info(stream.name)["config"], "duplicate_window": 100_000_000}
    broker.api(f"STREAM.UPDATE.{stream.name}", config)
    before = broker.last_sequence(stream.name)
    while broker.last_sequence(stream.name) == before:  # until the id is out of the duplicate window
        broker.publish(original.subject, original.payload, {**headers, **changes})


def test_nothing_is_found_where_nothing_is_wrong(sent: Settings) -> None:
    (compared,) = asyncio.run(verify(sent))
    assert (compared.anomalies, compared.messages, compared.transactions) == ([], 15, 5)
    assert found(sent, first=2, last=3) == []


ANOMALIES: dict[str, Callable[[str, Broker, Stream], object]] = {
    "duplicated 2": lambda _, broker, stream: copied(broker, stream, 4),
    "phantom 99": lambda _, broker, stream: copied(broker, stream, 4, Outbox_Transaction="99"),
    "phantom 2": lambda _, broker, stream: copied(broker, stream, 4, Outbox_Transaction_Sequence="2"),
    "foreign None": lambda _, broker, stream: broker.publish(f"{stream.prefix}.x", b"hello"),
    "foreign": lambda _, broker, stream: copied(broker, stream, 4, Outbox_Id="another"),
    "missing 5": lambda url, *_: add_to_receipts(url, 5, 100),
    "phantom 3": lambda url, *_: rows(url, "UPDATE outbox.events SET payload = 'other' WHERE id = 8"),
    "split 4": lambda url, broker, stream: unmark(url, broker, stream, 4),
}


def add_to_receipts(url: str, position: int, by: int) -> None:
    rows(
        url,
        "UPDATE outbox.transactions SET first_sequence = first_sequence + %s, last_sequence = last_sequence + %s "
        "WHERE position = %s",
        by,
        by,
        position,
    )


def unmark(url: str, broker: Broker, stream: Stream, position: int) -> None:
    """Pending, and its second message is gone."""
    rows(
        url,
        "UPDATE outbox.transactions SET sent_at = NULL, stream = NULL, first_sequence = NULL, last_sequence = NULL "
        "WHERE position = %s",
        position,
    )
    broker.api(f"STREAM.MSG.DELETE.{stream.name}", {"seq": 3 * position - 1})


@pytest.mark.parametrize("kind", ANOMALIES)
def test_each_anomaly_is_seen(kind: str, sent: Settings, broker: Broker, stream: Stream) -> None:
    ANOMALIES[kind](sent.database_url, broker, stream)
    assert any(each.startswith(kind) for each in found(sent)), found(sent)


def test_what_the_stream_removes_is_no_anomaly(sent: Settings, broker: Broker, stream: Stream) -> None:
    broker.api(f"STREAM.MSG.DELETE.{stream.name}", {"seq": 8})
    broker.api(f"STREAM.PURGE.{stream.name}", {"seq": 5})
    (compared,) = asyncio.run(verify(sent))
    assert (compared.anomalies, compared.removed) == ([], 5)


def test_live_system_under_load(database: str, broker: Broker, stream: Stream, settings: Settings) -> None:
    writers = Writers(database, stream.prefix, threads=2, endless=True, seed=4).start()
    with ThreadRelay(settings):
        for _ in range(8):
            assert found(settings) == []
        writers.stop()
        wait_until_sent(database)
    (compared,) = asyncio.run(verify(settings))
    assert compared.transactions == value(database, "SELECT count(*) FROM outbox.transactions") > 0


def test_command_exits_with_1_and_reads_only(
    sent: Settings, environment: dict[str, str], nats: Nats, broker: Broker, stream: Stream
) -> None:
    before = broker.info(stream.name)["state"]
    done = outbox(environment, "verify")
    assert (done.returncode, stream.name in done.stdout) == (0, True)
    assert broker.info(stream.name)["state"] == before
    broker.publish(f"{stream.prefix}.x", b"hello")
    done = outbox(environment, "verify", "--json")
    assert done.returncode == 1
    assert [each["kind"] for each in json.loads(done.stdout)[0]["anomalies"]] == ["foreign"]
    assert "message of somebody else" in outbox(environment, "verify").stdout
    assert outbox(environment, "verify", "--stream", "NONE").returncode == 1
