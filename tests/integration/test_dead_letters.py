"""What can never be sent is set aside whole, with its reason, while everything else flows: promise 5."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from outbox.config import AcrossStreams, OnDead, OnUnrouted, Settings
from outbox.core.telemetry import BatchSent, Blocked, Died, Marked
from outbox.embedded import Nats
from outbox.errors import Halt
from outbox.operate import status
from outbox.operate.dead import retry
from outbox.postgres.store import Store
from tests.support.bed import Broker, ThreadRelay, rows, transactions, until, value, wait_until_sent
from tests.support.servers import Stream


def transaction(url: str, *events: tuple[str, str], headers: str | None = None) -> None:
    """One transaction with these events: subject and payload."""
    values = ", ".join(["(%s, %s::bytea, %s::jsonb)"] * len(events))
    parameters = [part for subject, payload in events for part in (subject, payload, headers)]
    rows(url, f"INSERT INTO outbox.events (subject, payload, headers) VALUES {values}", *parameters)


def dead(url: str) -> list[tuple[int, str]]:
    return [
        (p, str(reason).split(":")[0])
        for p, reason in rows(url, "SELECT position, dead_reason FROM outbox.dead ORDER BY 1")
    ]


def test_over_two_streams_and_too_large_die_and_the_rest_flows(
    database: str, broker: Broker, nats: Nats, stream: Stream
) -> None:
    broker.create_stream(f"{stream.name}B", f"{stream.prefix}b.>", max_msg_size=2000)
    one, two = f"{stream.prefix}.x", f"{stream.prefix}b.x"
    for _ in range(5):
        transaction(database, (one, "a"), (one, "b"))
        transaction(database, (two, "a"))
    transaction(database, (one, "a"), (two, "b"))
    transaction(database, (two, "ok"), (two, "x" * 3000))
    transaction(database, (two, "y" * 1900))  # fits by itself, not with the relay's headers: the server refuses it
    for _ in range(5):
        transaction(database, (one, "c"))
        transaction(database, (two, "c"), (two, "d"))
    with ThreadRelay(Settings(database_url=database, nats_url=nats.url, across_streams=AcrossStreams.DEAD)):
        until(lambda: len(dead(database)) == 3)
        wait_until_sent(database)
    assert dead(database) == [(11, "spans-streams"), (12, "message-too-large"), (13, "message-too-large")]
    assert len(broker.read(stream.name)) == 15
    assert len(broker.read(f"{stream.name}B")) == 15
    found = status.status(database)
    assert found.dead_transactions == 3
    assert (found.sent_transactions, found.sent_events) == (20, 30)
    assert stream.name in next(letter.reason for letter in found.dead if letter.position == 11)
    broker.api(f"STREAM.DELETE.{stream.name}B")


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ('{"Nats-Rollup": "sub"}', "rollup-not-permitted"),
        ('{"Nats-TTL": "1h"}', "ttl-not-permitted"),
        ('{"Nats-TTL": "soon"}', "invalid-ttl"),
    ],
)
def test_what_the_server_refuses_alone_is_convicted_alone(
    database: str, broker: Broker, nats: Nats, stream: Stream, headers: str, reason: str
) -> None:
    if reason == "invalid-ttl":
        broker.api(f"STREAM.UPDATE.{stream.name}", {**broker.info(stream.name)["config"], "allow_msg_ttl": True})
    subject = f"{stream.prefix}.x"
    for _ in range(10):
        transaction(database, (subject, "a"), (subject, "b"))
    transaction(database, (subject, "bad"), headers=headers)
    transaction(database, (f"{subject}.1", "bad"), (f"{subject}.2", "bad"), headers=headers)
    for _ in range(10):
        transaction(database, (subject, "c"), (subject, "d"))
    with ThreadRelay(Settings(database_url=database, nats_url=nats.url)):
        wait_until_sent(database)
    assert dead(database) == [(11, reason), (12, reason)]
    assert [each.position for each in broker.read(stream.name)] == [
        p for p in range(1, 23) for _ in "ab" if p not in (11, 12)
    ]


def test_repeated_message_ids(database: str, broker: Broker, nats: Nats, stream: Stream) -> None:
    subject, same = f"{stream.prefix}.x", "6ba7b810-9dad-11d1-80b4-00c04fd430c8"
    insert = "INSERT INTO outbox.events (subject, payload, message_id) VALUES (%s, %s::bytea, %s)"
    rows(database, insert, subject, "first", same)
    rows(database, "SELECT outbox.add(%s, 'between')", subject)
    rows(database, insert, subject, "again", same)
    rows(
        database,
        insert.replace("(%s, %s::bytea, %s)", "(%s, %s::bytea, %s), (%s, 'twin', %s)"),
        subject,
        "a",
        same,
        subject,
        same,
    )
    rows(database, "SELECT outbox.add(%s, 'last')", subject)
    with ThreadRelay(Settings(database_url=database, nats_url=nats.url)):
        wait_until_sent(database)
    assert dead(database) == [(3, "duplicate-message-id"), (4, "duplicate-message-id")]
    assert [each.payload for each in broker.read(stream.name)] == [b"first", b"between", b"last"]


def test_rollups_end_a_batch_and_flow(database: str, broker: Broker, nats: Nats) -> None:
    broker.create_stream("ROLLUP", "rollup.>", allow_rollup_hdrs=True)
    for number in range(20):
        transaction(database, ("rollup.x", f"{number}"), headers='{"Nats-Rollup": "sub"}')
        transaction(database, ("rollup.y", f"{number}"))
    with ThreadRelay(Settings(database_url=database, nats_url=nats.url)):
        wait_until_sent(database)
    assert dead(database) == []
    left = broker.read("ROLLUP")
    assert [each.payload for each in left if each.subject == "rollup.x"] == [b"19"]
    assert len(left) == 21
    broker.api("STREAM.DELETE.ROLLUP")


def test_halt_on_dead_stops_behind_it_and_says_why(database: str, broker: Broker, nats: Nats, stream: Stream) -> None:
    broker.create_stream(f"{stream.name}B", f"{stream.prefix}b.>")
    one, two = f"{stream.prefix}.x", f"{stream.prefix}b.x"
    transaction(database, (one, "before"), (one, "before"))
    transaction(database, (one, "a"), (two, "b"))
    transaction(database, (one, "behind"))
    settings = Settings(
        database_url=database, nats_url=nats.url, on_dead=OnDead.HALT, across_streams=AcrossStreams.DEAD
    )
    error = ThreadRelay(settings).ended()
    assert isinstance(error, Halt)
    assert "transaction 2" in error.message
    assert "spans-streams" in error.message
    assert [each.payload for each in broker.read(stream.name)] == [b"before", b"before"]
    again = ThreadRelay(settings).ended()
    assert isinstance(again, Halt)
    rows(database, "UPDATE outbox.transactions SET discarded_at = now() WHERE position = 2")
    assert ThreadRelay(settings, drain=True).ended() is None
    assert [each.payload for each in broker.read(stream.name)] == [b"before", b"before", b"behind"]
    broker.api(f"STREAM.DELETE.{stream.name}B")


def test_subject_in_no_stream_waits_and_holds_what_is_behind_it(
    database: str, broker: Broker, nats: Nats, stream: Stream
) -> None:
    transaction(database, (f"{stream.prefix}.x", "before"))
    transaction(database, ("nowhere.x", "lost?"))
    transaction(database, (f"{stream.prefix}.x", "behind"))
    with ThreadRelay(Settings(database_url=database, nats_url=nats.url)) as relay:
        relay.wait_for(Blocked, lambda each: "nowhere.x" in each.why)
        until(lambda: "transaction 2: subject nowhere.x" in str(status.status(database).blocked))
        broker.create_stream("NOWHERE", "nowhere.>")
        wait_until_sent(database)
        until(lambda: status.status(database).blocked is None)
    assert [each.payload for each in broker.read(stream.name)] == [b"before", b"behind"]
    assert [each.payload for each in broker.read("NOWHERE")] == [b"lost?"]
    broker.api("STREAM.DELETE.NOWHERE")


def test_blocked_head_can_be_set_aside_by_hand(database: str, broker: Broker, nats: Nats, stream: Stream) -> None:
    transaction(database, ("nowhere.y", "never"))
    transaction(database, (f"{stream.prefix}.x", "behind"))
    with ThreadRelay(Settings(database_url=database, nats_url=nats.url)) as relay:
        relay.wait_for(Blocked)
        rows(database, "UPDATE outbox.transactions SET dead_at = now(), dead_reason = 'by hand' WHERE position = 1")
        relay.wait_for(Marked)
    assert [each.payload for each in broker.read(stream.name)] == [b"behind"]


def test_unrouted_dead_lets_the_rest_flow(database: str, broker: Broker, nats: Nats, stream: Stream) -> None:
    transaction(database, ("nowhere.z", "never"))
    transaction(database, (f"{stream.prefix}.x", "behind"))
    settings = Settings(database_url=database, nats_url=nats.url, on_unrouted=OnUnrouted.DEAD)
    with ThreadRelay(settings) as relay:
        relay.wait_for(Died)
        wait_until_sent(database)
    assert dead(database) == [(1, "unrouted")]
    assert [each.payload for each in broker.read(stream.name)] == [b"behind"]


def test_full_stream_is_weather(database: str, broker: Broker, nats: Nats, stream: Stream) -> None:
    broker.create_stream("FULL", "full.>", max_msgs=3, discard="new")
    for number in range(3):
        transaction(database, ("full.x", f"{number}"), ("full.x", f"{number}"))
    transaction(database, (f"{stream.prefix}.x", "flows"))
    with ThreadRelay(Settings(database_url=database, nats_url=nats.url)) as relay:
        relay.wait_for(Blocked, lambda each: each.stream == "FULL")
        until(lambda: len(broker.read(stream.name)) == 1)
        blocked = until(lambda: [s.blocked for s in status.status(database).streams if s.blocked])
        assert "maximum messages exceeded" in str(blocked)
        config = {**broker.info("FULL")["config"], "max_msgs": 100}
        broker.api("STREAM.UPDATE.FULL", config)
        wait_until_sent(database)
    assert [each.position for each in broker.read("FULL")] == [1, 1, 2, 2, 3, 3]
    assert dead(database) == []
    assert value(database, "SELECT max(attempts) FROM outbox.transactions") == 0
    broker.api("STREAM.DELETE.FULL")


def test_raised_limit_goes_through_as_one_batch_of_its_size(database: str, workplace: Path) -> None:
    config = 'jetstream {{ store_dir: "{}", limits {{ batch {{ max_msgs: 2000 }} }} }}'.format(workplace / "js")
    with Nats(workplace / "nats", config=config) as server:
        assert isinstance(server, Nats)
        broker = Broker(server.url)
        broker.create_stream("BIG", "big.>")
        rows(database, "UPDATE outbox.limits SET max_transaction_events = 2000")
        rows(database, "SELECT outbox.add('big.x', n::text) FROM generate_series(1, 1500) AS n")
        settings = Settings(database_url=database, nats_url=server.url, max_batch_messages=2000)
        with ThreadRelay(settings, drain=True) as relay:
            assert relay.ended() is None
        stored = broker.read("BIG")
    assert len({each.headers["Nats-Batch-Id"] for each in stored}) == 1
    assert [each.number for each in stored] == list(range(1, 1501))


def test_batch_over_the_servers_limit_is_made_smaller(database: str, workplace: Path) -> None:
    config = 'jetstream {{ store_dir: "{}", limits {{ batch {{ max_msgs: 100 }} }} }}'.format(workplace / "js")
    with Nats(workplace / "nats", config=config) as server:
        assert isinstance(server, Nats)
        broker = Broker(server.url)
        broker.create_stream("SMALL", "small.>")
        for _ in range(200):
            rows(database, "SELECT outbox.add('small.x', n::text) FROM generate_series(1, 3) AS n")
        rows(database, "SELECT outbox.add('small.x', n::text) FROM generate_series(1, 150) AS n")
        rows(database, "SELECT outbox.add('small.x', 'last')")
        with ThreadRelay(Settings(database_url=database, nats_url=server.url), drain=True) as relay:
            assert relay.ended() is None
        assert len(broker.read("SMALL")) == 601
    assert dead(database) == [(201, "too-many-events")]


@pytest.mark.parametrize("next_leaders", [["other"], ["other", "other"], ["other", ""]])
def test_leader_that_was_taken_for_dead_takes_it_back(database: str, next_leaders: list[str]) -> None:
    """Also after its successor has lost the session and leads again, or has laid the lead down in an orderly way."""
    transaction(database, ("any.x", "a"))
    counted = "SELECT deaths, attempts FROM outbox.relay, outbox.transactions"

    async def lose_the_lead() -> None:
        store = await Store.connect(database, "outbox", replicas=False)
        async with store:
            home = await store.preflight(1000)
            await store.suspect((await store.lead("one", home)).epoch, 1)
            for name in next_leaders:
                lead = await store.lead(name or "other", home)
                if not name:
                    await store.resign(lead.epoch, None)
            assert rows(database, counted) == [(0 if "" in next_leaders else 1, 1)]
            await store.alive("one")
            assert rows(database, counted) == [(0, 0)]

    asyncio.run(lose_the_lead())


@pytest.mark.parametrize(
    "limits",
    [
        {"max_msgs": 100},
        {"max_bytes": 100 * 400},
        {"max_msgs_per_subject": 100, "discard_new_per_subject": True},
    ],
    ids=lambda each: next(iter(each)),
)
def test_small_queue_that_is_emptied_is_filled_again(
    database: str, broker: Broker, nats: Nats, limits: dict[str, Any]
) -> None:
    """Fault: a backlog that is packed has no room in the stream, though each transaction has."""
    broker.create_stream("SMALL", "small.>", discard="new", **limits)
    transactions(database, "small.x", 300)
    with ThreadRelay(Settings(database_url=database, nats_url=nats.url)):
        purged = 0
        while purged < 300:
            until(lambda: broker.info("SMALL")["state"]["messages"])
            purged += broker.api("STREAM.PURGE.SMALL")["purged"]
        wait_until_sent(database)
    assert purged == broker.last_sequence("SMALL") == 300
    assert dead(database) == []
    broker.api("STREAM.DELETE.SMALL")


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"max_msgs": 20}, "30 events, and the stream holds 20 messages"),
        ({"max_bytes": 4000}, "and the stream holds 4000 bytes"),
        ({"max_msgs_per_subject": 20, "discard_new_per_subject": True}, "30 events on tiny.x"),
    ],
    ids=["max_msgs", "max_bytes", "max_msgs_per_subject"],
)
def test_what_can_never_fit_its_stream_is_set_aside(
    database: str, broker: Broker, nats: Nats, limits: dict[str, Any], words: str
) -> None:
    """Fault: a transaction has more messages or bytes than the stream holds. The others flow; a retry sends it."""
    broker.create_stream("TINY", "tiny.>", discard="new", **limits)
    rows(database, "SELECT outbox.add('tiny.a', 'x')")
    rows(database, "SELECT outbox.add('tiny.x', n::text) FROM generate_series(1, 30) AS n")
    rows(database, "SELECT outbox.add('tiny.b', 'x')")
    with ThreadRelay(Settings(database_url=database, nats_url=nats.url)):
        wait_until_sent(database)
        assert dead(database) == [(2, "too-large-for-stream")]
        assert words in value(database, "SELECT dead_reason FROM outbox.dead")
        assert [each.position for each in broker.read("TINY")] == [1, 3]
        none = {"max_msgs": -1, "max_bytes": -1, "max_msgs_per_subject": -1, "discard_new_per_subject": False}
        broker.api("STREAM.UPDATE.TINY", {**broker.info("TINY")["config"], **none})
        assert retry(database, "outbox", [2]) == [2]
        wait_until_sent(database)
    assert [each.position for each in broker.read("TINY")] == [1, 3, *[2] * 30]
    broker.api("STREAM.DELETE.TINY")


def test_one_that_waits_for_room_is_set_aside_when_its_stream_is_made_too_small(
    database: str, broker: Broker, nats: Nats
) -> None:
    """Fault: it was planned for a stream that would have held it, and then an operator lowered the limit."""
    broker.create_stream("SHRINKS", "shrinks.>", discard="new", max_msgs=40)
    rows(database, "SELECT outbox.add('shrinks.x', n::text) FROM generate_series(1, 35) AS n")
    with ThreadRelay(Settings(database_url=database, nats_url=nats.url)) as relay:
        relay.wait_for(Marked)
        rows(database, "SELECT outbox.add('shrinks.x', n::text) FROM generate_series(1, 30) AS n")
        rows(database, "SELECT outbox.add('shrinks.y', 'small')")
        relay.wait_for(Blocked)
        broker.api("STREAM.UPDATE.SHRINKS", {**broker.info("SHRINKS")["config"], "max_msgs": 20})
        assert relay.wait_for(Died).verdict.position == 2
        broker.api("STREAM.PURGE.SHRINKS")
        wait_until_sent(database)
    assert dead(database) == [(2, "too-large-for-stream")]
    assert [each.position for each in broker.read("SHRINKS")] == [3]
    broker.api("STREAM.DELETE.SHRINKS")


def test_one_offender_in_a_pack_costs_few_batches(database: str, broker: Broker, nats: Nats) -> None:
    """Fault: one of 400 transactions is refused by the stream for what only the stream can see."""
    broker.create_stream("PACK", "pack.>")
    for number in range(400):
        ttl = '{"Nats-TTL": "5s"}' if number == 250 else None  # per-message TTL is off in this stream
        transaction(database, ("pack.x", str(number)), headers=ttl)
    with ThreadRelay(Settings(database_url=database, nats_url=nats.url)) as relay:
        wait_until_sent(database)
    assert dead(database) == [(251, "ttl-not-permitted")]
    assert [each.position for each in broker.read("PACK")] == [n for n in range(1, 401) if n != 251]
    assert sum(isinstance(each, BatchSent) for each in relay.happenings) < 60
    broker.api("STREAM.DELETE.PACK")


@pytest.mark.parametrize("storage", ["file", "memory"])
@pytest.mark.parametrize("count", [1, 30])
def test_what_a_transaction_takes_of_its_stream_is_known_to_the_byte(
    database: str, broker: Broker, nats: Nats, storage: str, count: int
) -> None:
    """What fits exactly is sent, and what is one byte over waits for nothing."""
    broker.create_stream("BYTES", "bytes.>", storage=storage)
    add = "SELECT outbox.add('bytes.ü', n || 'x', '{\"a\": \"  padded ü \"}') FROM generate_series(101, 100 + %s) AS n"
    settings = Settings(database_url=database, nats_url=nats.url)
    with ThreadRelay(settings):
        rows(database, add, 30)  # from here on a sequence has two digits
        wait_until_sent(database)
        broker.api("STREAM.PURGE.BYTES")
        rows(database, add, count)
        wait_until_sent(database)
        exactly = broker.info("BYTES")["state"]["bytes"]
    config = broker.info("BYTES")["config"]
    for most, reasons in ((exactly, []), (exactly - 1, [(4, "too-large-for-stream")])):
        broker.api("STREAM.PURGE.BYTES")
        broker.api("STREAM.UPDATE.BYTES", {**config, "discard": "new", "max_bytes": most})
        with ThreadRelay(settings):
            rows(database, add, count)
            wait_until_sent(database)
        assert dead(database) == reasons
    broker.api("STREAM.DELETE.BYTES")


def test_white_space_that_is_not_sent_convicts_nobody(database: str, broker: Broker, nats: Nats) -> None:
    """Fault: a value of a header is padded, the stream takes small messages, and the padding is stripped when sent."""
    broker.create_stream("PADDED", "padded.>", max_msg_size=1000)
    transaction(database, ("padded.x", "x" * 500), headers=json.dumps({"a": "b" + " " * 1000}))
    with ThreadRelay(Settings(database_url=database, nats_url=nats.url)):
        wait_until_sent(database)
    assert (dead(database), broker.last_sequence("PADDED")) == ([], 1)
    broker.api("STREAM.DELETE.PADDED")
