"""`outbox verify`: it sees what is promised not to be, message by message, and nothing else; on live systems too."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any

import pytest

from outbox.config import Settings
from outbox.core.comparison import Comparison
from outbox.core.positions import HIGHEST
from outbox.embedded import Nats
from outbox.operate.verify import verify
from tests.support.bed import Broker, ThreadRelay, rows, until, value, wait_until_sent
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
    "duplicated 2": lambda url, *_: add_to_receipts(url, 2, 100),
    "phantom 99": lambda _, broker, stream: copied(broker, stream, 4, Outbox_Transaction="99"),
    "phantom 2": lambda url, *_: rows(url, "UPDATE outbox.events SET message_id = gen_random_uuid() WHERE id = 4"),
    "foreign None": lambda _, broker, stream: broker.publish(f"{stream.prefix}.x", b"hello"),
    "foreign": lambda _, broker, stream: copied(broker, stream, 4, Outbox_Id="another"),
    "foreign N": lambda _, broker, stream: copied(broker, stream, 4),
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


def only(compared: list[Comparison]) -> Comparison:
    (one,) = compared
    return one


def test_copies_by_whoever_consumes_are_foreign(sent: Settings, broker: Broker, stream: Stream) -> None:
    """Republished with their headers, and with some changed or left out: nobody is accused."""
    rows(sent.database_url, "UPDATE outbox.streams SET mode = 'shared'")
    copied(broker, stream, 4)
    copied(broker, stream, 5, Nats_Msg_Id="another")
    copied(broker, stream, 6, Outbox_Transaction_Sequence="1")
    original = broker.read(stream.name)[0]
    kept = {name: text for name, text in original.headers.items() if not name.startswith("Nats-")}
    broker.publish(f"{stream.prefix}.dead", b"other", kept)
    compared = only(asyncio.run(verify(sent)))
    assert (compared.anomalies, compared.foreign, compared.messages) == ([], 4, 19)


def test_what_the_server_rewrites_is_not_judged(database: str, broker: Broker, settings: Settings) -> None:
    """A stream may keep messages under another subject than the one that they were sent to."""
    transform = {"src": "mapped.*", "dest": "mapped.elsewhere.{{wildcard(1)}}"}
    broker.create_stream("MAPPED", "mapped.>", subject_transform=transform)
    try:
        rows(database, "SELECT outbox.add('mapped.' || n, 'x') FROM generate_series(1, 70) AS n")
        assert ThreadRelay(settings, drain=True).ended() is None
        assert broker.read("MAPPED")[0].subject == "mapped.elsewhere.1"
        compared = only(asyncio.run(verify(settings)))
        assert (compared.anomalies, compared.messages, compared.transactions) == ([], 70, 1)
    finally:
        broker.api("STREAM.DELETE.MAPPED")


def test_markers_of_the_server_are_no_writer(database: str, broker: Broker, settings: Settings) -> None:
    """Where messages end by their time to live, nats-server writes what became of their subject."""
    marked = {"allow_rollup_hdrs": True, "subject_delete_marker_ttl": 60_000_000_000}
    broker.create_stream("LIVES", "lives.>", allow_msg_ttl=True, max_msgs_per_subject=1, **marked)
    try:
        rows(database, "SELECT outbox.add('lives.x', 'x', headers => '{\"Nats-TTL\": \"1s\"}')")
        rows(database, "SELECT outbox.add('lives.y', 'y')")
        assert ThreadRelay(settings, drain=True).ended() is None
        until(lambda: broker.last_sequence("LIVES") > 2, what="a delete marker")
        compared = only(asyncio.run(verify(settings)))
        assert (compared.anomalies, compared.foreign, compared.removed) == ([], 1, 1)
    finally:
        broker.api("STREAM.DELETE.LIVES")


@pytest.mark.parametrize("config", [{}, {"allow_direct": True}, {"retention": "workqueue", "allow_direct": True}])
def test_every_way_of_reading_comes_to_the_same(
    config: dict[str, Any], database: str, broker: Broker, stream: Stream, settings: Settings
) -> None:
    broker.api(f"STREAM.DELETE.{stream.name}")
    broker.create_stream(stream.name, f"{stream.prefix}.>", **config)
    for _ in range(3):
        rows(database, "SELECT outbox.add(%s, n::text) FROM generate_series(1, 50) AS n", f"{stream.prefix}.x")
    assert ThreadRelay(settings, drain=True).ended() is None
    compared = only(asyncio.run(verify(settings)))
    assert (compared.anomalies, compared.messages, compared.transactions) == ([], 150, 3)
    rows(database, "UPDATE outbox.events SET payload = 'other' WHERE id IN (60, 61, 62, 100)")
    broker.api(f"STREAM.MSG.DELETE.{stream.name}", {"seq": 70})
    compared = only(asyncio.run(verify(settings)))
    wrong = [(each.kind, each.sequence, each.last_sequence) for each in compared.anomalies]
    assert wrong == [("phantom", 60, 62), ("phantom", 100, 100), ("split", 51, 100)]
    assert (compared.messages, compared.removed) == (149, 1)


def test_stream_that_is_deleted_meanwhile_is_gone(
    sent: Settings, broker: Broker, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    took = Comparison.take

    def taken(self: Comparison, *given: Any) -> None:
        took(self, *given)
        deleting = threading.Thread(target=broker.api, args=(f"STREAM.DELETE.{stream.name}",))
        deleting.start()
        deleting.join()

    monkeypatch.setattr(Comparison, "take", taken)
    compared = only(asyncio.run(verify(sent)))
    assert [each.kind for each in compared.anomalies] == ["missing"]
    assert compared.removed == 15


def test_many_of_one_kind_are_one_line(sent: Settings, environment: dict[str, str]) -> None:
    shifted = "first_sequence = first_sequence + 100, last_sequence = last_sequence + 100"
    rows(sent.database_url, f"UPDATE outbox.transactions SET {shifted}")
    done = outbox(environment, "verify", "--json")
    missing = [each for each in json.loads(done.stdout)[0]["anomalies"] if each["kind"] == "missing"]
    assert [(each["position"], each["last_position"]) for each in missing] == [(1, 5)]
    assert [(each["sequence"], each["last_sequence"]) for each in missing] == [(101, 115)]
    assert "101 to 115" in outbox(environment, "verify").stdout


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
