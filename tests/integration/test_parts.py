"""A transaction over several streams: each gets its part, whole and in its order; see decision 13."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import psycopg
import pytest

from outbox.config import AcrossStreams, OnDead, Settings
from outbox.errors import Halt, Misconfigured
from outbox.operate import dead, migrate, purge, show, status
from outbox.operate.verify import verify
from tests.support.bed import Broker, Stored, ThreadRelay, rows, until, value, wait_until_sent
from tests.support.commands import outbox
from tests.support.servers import Stream

PARTS = """
SELECT part, stream, numbers,
       CASE WHEN sent_at IS NOT NULL THEN 'sent' WHEN dead_at IS NOT NULL THEN 'dead' ELSE 'open' END
  FROM outbox.parts WHERE position = %s ORDER BY part
"""


@pytest.fixture
def queue(broker: Broker, stream: Stream) -> Iterator[Stream]:
    """A second stream, whose messages may have 2,000 bytes."""
    made = Stream(f"{stream.name}Q", f"{stream.prefix}q")
    broker.create_stream(made.name, f"{made.prefix}.>", max_msg_size=2000)
    yield made
    broker.api(f"STREAM.DELETE.{made.name}")


def add(url: str, *events: tuple[str, str], headers: str = "null") -> None:
    """One transaction with these events, as subject and payload."""
    subjects, payloads = zip(*events, strict=True)
    statement = "SELECT outbox.add(s, p, nullif(%s, 'null')::jsonb) FROM unnest(%s::text[], %s::text[]) AS e (s, p)"
    rows(url, statement, headers, list(subjects), list(payloads))


def made(url: str, role: str) -> str:
    """The role, which is made."""
    rows(url, f"CREATE ROLE {role} LOGIN")
    return role


def told(messages: list[Stored]) -> list[tuple[int, int, int, str | None, str | None, bytes]]:
    """Position, number, count, part and parts of each message, and its payload."""
    part, parts = "Outbox-Transaction-Part", "Outbox-Transaction-Parts"
    return [(m.position, m.number, m.count, m.headers.get(part), m.headers.get(parts), m.payload) for m in messages]


def test_each_stream_gets_its_part(
    database: str, broker: Broker, stream: Stream, queue: Stream, settings: Settings
) -> None:
    one, two = f"{stream.prefix}.x", f"{queue.prefix}.x"
    add(database, (one, "a"), (one, "b"))
    add(database, (two, "c"), (one, "d"), (two, "e"))
    add(database, (two, "f"))
    with ThreadRelay(settings):
        wait_until_sent(database)
        add(database, (one, "g"), (two, "h"))
        wait_until_sent(database)
    assert told(broker.read(stream.name)) == [
        (1, 1, 2, None, None, b"a"),
        (1, 2, 2, None, None, b"b"),
        (2, 1, 1, "2", "2", b"d"),
        (4, 1, 1, "1", "2", b"g"),
    ]
    assert told(broker.read(queue.name)) == [
        (2, 1, 2, "1", "2", b"c"),
        (2, 2, 2, "1", "2", b"e"),
        (3, 1, 1, None, None, b"f"),
        (4, 1, 1, "2", "2", b"h"),
    ]
    assert rows(database, PARTS, 2) == [(1, queue.name, [1, 3], "sent"), (2, stream.name, [2], "sent")]
    receipt = "SELECT stream, first_sequence, last_sequence FROM outbox.transactions WHERE position = 2"
    assert rows(database, receipt) == [("*", 1, 3)]
    assert rows(database, "SELECT sent_transactions, sent_events FROM outbox.streams ORDER BY name") == [(3, 4), (3, 4)]


def test_dead_where_operators_want_that(
    database: str, broker: Broker, stream: Stream, queue: Stream, settings: Settings
) -> None:
    add(database, (f"{stream.prefix}.x", "a"), (f"{queue.prefix}.x", "b"))
    with ThreadRelay(settings.model_copy(update={"across_streams": AcrossStreams.DEAD})):
        wait_until_sent(database)
    assert str(value(database, "SELECT dead_reason FROM outbox.dead")).startswith("spans-streams")
    dead.retry(database, "outbox", [1])
    with ThreadRelay(settings):
        wait_until_sent(database)
    assert [len(broker.read(each.name)) for each in (stream, queue)] == [1, 1]


def test_what_can_be_told_before_sets_the_whole_transaction_aside(
    database: str, broker: Broker, stream: Stream, queue: Stream, settings: Settings
) -> None:
    add(database, (f"{stream.prefix}.x", "a"), (f"{queue.prefix}.x", "b" * 3000))
    add(database, (f"{stream.prefix}.x", "c"))
    with ThreadRelay(settings):
        wait_until_sent(database)
    reason = str(value(database, "SELECT dead_reason FROM outbox.dead"))
    assert reason.startswith(f"message-too-large: part 2 of 2, for stream {queue.name}: event 1")
    assert value(database, "SELECT count(*) FROM outbox.parts") == 0
    assert [each.payload for each in broker.read(stream.name)] == [b"c"]


@pytest.mark.parametrize("same_relay", [True, False])
def test_dead_part_is_retried_alone(
    database: str, broker: Broker, stream: Stream, queue: Stream, settings: Settings, *, same_relay: bool
) -> None:
    """The queue refuses its part, when the other one is stored already: only what is missing is sent.

    Relay and operator have the roles that are theirs.
    """
    relays, operators = f"relay_{stream.prefix}", f"operator_{stream.prefix}"
    migrate.grant(database, "outbox", relay=made(database, relays), operator=made(database, operators))
    settings = settings.model_copy(update={"database_url": database.replace("postgres@", f"{relays}@")})
    add(database, (f"{stream.prefix}.x", "a"), (f"{queue.prefix}.x", "b"), headers='{"Nats-TTL": "1h"}')
    ttl = {**broker.info(stream.name)["config"], "allow_msg_ttl": True}
    broker.api(f"STREAM.UPDATE.{stream.name}", ttl)
    relay = ThreadRelay(settings)
    until(lambda: rows(database, "SELECT dead_reason FROM outbox.transactions WHERE dead_at IS NOT NULL"))
    assert rows(database, PARTS, 1) == [(1, stream.name, [1], "sent"), (2, queue.name, [2], "dead")]
    assert str(value(database, "SELECT dead_reason FROM outbox.dead")).startswith("ttl-not-permitted: part 2 of 2")
    if not same_relay:
        assert relay.stop() is None
    broker.api(f"STREAM.UPDATE.{queue.name}", {**broker.info(queue.name)["config"], "allow_msg_ttl": True})
    assert dead.retry(database.replace("postgres@", f"{operators}@"), "outbox", [1]) == [1]
    if not same_relay:
        relay = ThreadRelay(settings)
    wait_until_sent(database)
    assert relay.stop() is None
    assert [part[3] for part in rows(database, PARTS, 1)] == ["sent", "sent"]
    assert [[each.payload for each in broker.read(each.name)] for each in (stream, queue)] == [[b"a"], [b"b"]]


def test_commands_know_parts(
    database: str, broker: Broker, stream: Stream, queue: Stream, settings: Settings, environment: dict[str, str]
) -> None:
    """What is shown, replayed to one stream alone, counted once, and purged."""
    one, two = f"{stream.prefix}.x", f"{queue.prefix}.x"
    add(database, (two, "a"), (one, "b"), (two, "c"))
    add(database, (one, "d"))
    with ThreadRelay(settings):
        wait_until_sent(database)
        found = asyncio.run(show.show(settings, 1))
        assert [(part.part, part.stream, part.state, part.numbers) for part in found.parts] == [
            (1, queue.name, "sent", [1, 3]),
            (2, stream.name, "sent", [2]),
        ]
        assert (found.state, found.stream, found.first_sequence) == ("sent", None, None)
        assert [(each.stream, each.sequence, each.in_stream) for each in found.events] == [
            (queue.name, 1, "there"),
            (stream.name, 1, "there"),
            (queue.name, 2, "there"),
        ]
        assert f"part 1: stream {queue.name}, 2 events: sequences 1 to 2" in outbox(environment, "show", "1").stdout
        refused = outbox(environment, "replay", "--from", "1", "--to", "2", "--yes")
        assert refused.returncode == 2
        assert "--all-streams" in refused.stderr
        done = outbox(environment, "replay", "--from", "1", "--to", "2", "--stream", stream.name, "--yes")
        assert f"2 transactions, 2 events: pending again, as new transactions\nit was sent before to {stream.name}" in (
            done.stdout
        )
        wait_until_sent(database)
        assert outbox(environment, "replay", "--from", "1", "--to", "1", "--all-streams", "--yes").returncode == 0
        wait_until_sent(database)
    assert [each.payload for each in broker.read(stream.name)] == [b"b", b"d", b"b", b"d", b"b"]
    assert [(each.payload, each.part, each.replay_of) for each in broker.read(queue.name)] == [
        (b"a", 1, None),
        (b"c", 1, None),
        (b"a", 1, 1),
        (b"c", 1, 1),
    ]
    assert [each.anomalies for each in asyncio.run(verify(settings))] == [[], []]
    assert purge.purge(database, "outbox", 0) == 5
    assert value(database, "SELECT (SELECT count(*) FROM outbox.parts) + (SELECT count(*) FROM outbox.events)") == 0
    assert [each.anomalies for each in asyncio.run(verify(settings))] == [[], []]


def test_dead_letters_know_parts(
    database: str, broker: Broker, stream: Stream, queue: Stream, settings: Settings, environment: dict[str, str]
) -> None:
    """A dead part is a dead letter at once, while the other one still waits; it can be discarded when that is over."""
    full = {**broker.info(stream.name)["config"], "allow_msg_ttl": True, "max_msgs": 1, "discard": "new"}
    broker.api(f"STREAM.UPDATE.{stream.name}", full)
    add(database, (f"{stream.prefix}.x", "a"))
    add(database, (f"{stream.prefix}.x", "b"), (f"{queue.prefix}.x", "c"), headers='{"Nats-TTL": "1h"}')
    with ThreadRelay(settings):
        until(lambda: value(database, "SELECT count(*) FROM outbox.dead") == 1)
        (letter,) = dead.dead_letters(database, "outbox", dead.Selection())
        assert (letter.position, letter.sent_to) == (2, [])
        assert "part 2: stream" in outbox(environment, "dead", "show", "2").stdout
        broker.api(f"STREAM.UPDATE.{stream.name}", {**full, "max_msgs": -1})
        wait_until_sent(database)
        with pytest.raises(psycopg.errors.RaiseException, match="transaction 2 has parts in several streams"):
            rows(database, "UPDATE outbox.relay SET epoch = epoch + 1, leader = 'a relay of version 1'")
        (letter,) = dead.dead_letters(database, "outbox", dead.Selection(reason="ttl-not-permitted"))
        assert (letter.position, letter.sent_to) == (2, [stream.name])
        with pytest.raises(Misconfigured, match="transaction 2 has parts"):
            migrate.migrate(database, to=1)
        assert "discarded: 1 dead letter" in outbox(environment, "dead", "discard", "2", "--yes").stdout
        assert dead.retry(database, "outbox", [2]) == []
        assert status.status(database).dead_transactions == 0
    assert migrate.migrate(database, to=1) == (2, 1)
    assert rows(database, "SELECT position FROM outbox.transactions") == [(1,)]
    assert migrate.migrate(database) == (1, 2)


def test_dead_part_is_discarded_while_the_other_one_waits(
    database: str, broker: Broker, stream: Stream, queue: Stream, settings: Settings, environment: dict[str, str]
) -> None:
    """With --on-dead halt nothing goes on before that."""
    full = {**broker.info(stream.name)["config"], "allow_msg_ttl": True, "max_msgs": 1, "discard": "new"}
    broker.api(f"STREAM.UPDATE.{stream.name}", full)
    add(database, (f"{stream.prefix}.x", "a"))
    add(database, (f"{stream.prefix}.x", "b"), (f"{queue.prefix}.x", "c"), headers='{"Nats-TTL": "1h"}')
    halting = settings.model_copy(update={"on_dead": OnDead.HALT})
    for _ in range(2):
        error = ThreadRelay(halting).ended()
        assert isinstance(error, Halt)
        assert "transaction 2" in error.message
    assert dead.discard(database, "outbox", [2]) == [2]
    assert status.status(database).dead_transactions == 0
    broker.api(f"STREAM.UPDATE.{stream.name}", {**full, "max_msgs": -1})
    assert ThreadRelay(halting, drain=True).ended() is None
    discarded = "SELECT discarded_at IS NOT NULL FROM outbox.transactions ORDER BY position"
    assert rows(database, discarded) == [(False,), (True,)]
    assert [each.payload for each in broker.read(stream.name)] == [b"a", b"b"]
    assert asyncio.run(verify(settings))[0].anomalies == []
