"""What can never be sent is set aside whole, with its reason, while everything else flows: promise 5."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from outbox.config import OnDead, OnUnrouted, Settings
from outbox.core.telemetry import Blocked, Died, Marked
from outbox.embedded import Nats
from outbox.errors import Halt
from outbox.operate import status
from outbox.postgres.store import Store
from tests.support.bed import Broker, ThreadRelay, rows, until, value, wait_until_sent
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
    with ThreadRelay(Settings(database_url=database, nats_url=nats.url)):
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
    settings = Settings(database_url=database, nats_url=nats.url, on_dead=OnDead.HALT)
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
