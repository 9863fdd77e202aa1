"""What is wrong is the data: no stream for it yet, refused by the stream, or written around the triggers. Promise 5."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest

from outbox.config import AcrossStreams, Settings
from outbox.core.telemetry import Blocked, Died, Marked
from outbox.embedded import Nats
from tests.support.bed import Broker, ThreadRelay, rows, until, value, wait_until_sent
from tests.support.proxy import NatsProxy
from tests.support.servers import Stream, numbers
from tests.support.workload import Writers, check

PENDING = "SELECT count(*) FROM outbox.pending"
LINE_BREAK, RESERVED, NO_STRING = "has a line break", "is reserved", "is not a string"
NO_TOKEN, NO_OBJECT = "is not a token", "must be an object of strings"
HEADERS = [
    ('{"X": "a\\r\\nNats-Batch-Commit: 1"}', LINE_BREAK),
    ('{"good": "x", "X": "a\\nb"}', LINE_BREAK),
    ('{"X": "a\\r"}', LINE_BREAK),
    ('{"Nats-Expected-Last-Sequence": "1"}', RESERVED),
    ('{"Nats-Batch-Id": "x"}', RESERVED),
    ('{"nats-batch-commit": "1"}', RESERVED),
    ('{"Nats-Msg-Id": "x"}', RESERVED),
    ('{"Outbox-Transaction": "7"}', RESERVED),
    ('{"OUTBOX-ID": "7"}', RESERVED),
    ('{"Nats-Rollup": "all"}', "may only have the value sub"),
    ('{"X": 7}', NO_STRING),
    ('{"X": null}', NO_STRING),
    ('{"Nats-TTL": {"a": "b"}}', NO_STRING),
    ('{"a b": "x"}', NO_TOKEN),
    ('{"a:b": "x"}', NO_TOKEN),
    ('{"a\\nb": "x"}', NO_TOKEN),
    ('{"\u017f": "x"}', NO_TOKEN),
    ('{"": "x"}', NO_TOKEN),
    ('{"X": 1e5000}', NO_OBJECT),
    ('{"X": ' + 3000 * "[" + 3000 * "]" + "}", NO_OBJECT),
    ("[]", NO_OBJECT),
    ('["Nats-Rollup"]', NO_OBJECT),
    ('"x"', NO_OBJECT),
    ("7", NO_OBJECT),
    ("null", NO_OBJECT),
]
SUBJECTS = [
    ("{prefix}.a b", "white space"),
    ("{prefix}.a\nb", "control character"),
    ("{prefix}.*", "wildcard"),
    ("{prefix}.>", "wildcard"),
    (">", "wildcard"),
    ("$JS.API.STREAM.PURGE.{name}", "reserved"),
    ("{prefix}..x", "empty token"),
    (".{prefix}", "empty token"),
    ("{prefix}.", "empty token"),
    ("", "is empty"),
    ("{prefix}." + "x" * 300, "longer than 255 bytes"),
]


def write_around(url: str, *events: tuple[str, str | None]) -> int:
    """Commit a transaction of these subjects and headers without any trigger; returns its position."""
    with psycopg.connect(url) as connection:
        connection.execute("SET session_replication_role = replica")
        for subject, headers in events:
            connection.execute(
                "INSERT INTO outbox.events (subject, headers, payload) VALUES (%s, %s, 'hostile')", [subject, headers]
            )
        sealed = "INSERT INTO outbox.transactions (txid, event_count) VALUES (pg_current_xact_id(), %s)"
        row = connection.execute(f"{sealed} RETURNING position".encode(), [len(events)]).fetchone()
        assert row is not None
        return int(row[0])


@pytest.mark.core
def test_rows_written_around_the_triggers_are_set_aside(
    database: str, settings: Settings, broker: Broker, stream: Stream
) -> None:
    """Fault: events that no trigger checked. Promise: set aside whole with the reason; the rest flows, in order."""
    good = f"{stream.prefix}.good"
    written: dict[int, str] = {}
    writers = Writers(database, stream.prefix, threads=3, endless=True, seed=83).start()
    with ThreadRelay(settings) as relay:
        relay.wait_for(Marked)
        for headers, words in HEADERS:
            written[write_around(database, (good, None), (good, headers), (good, '{"X": "y"}'))] = words
        for subject, words in SUBJECTS:
            named = subject.format(prefix=stream.prefix, name=stream.name)
            written[write_around(database, (good, None), (named, None))] = words
        after = len(relay.happenings)
        relay.wait_for(Died, lambda each: each.verdict.position == max(written))
        relay.wait_for(Marked, after=after)
        writers.stop()
        wait_until_sent(database)
    dead = dict(rows(database, "SELECT position, dead_reason FROM outbox.dead"))
    assert dead.keys() == written.keys()
    for position, words in written.items():
        assert dead[position].startswith("invalid-event: event 2: "), dead[position]
        assert words in dead[position]
        assert dead[position].isprintable()
    report = check(database, broker.read(stream.name))
    assert report.anomalies == {}
    assert report.transactions == writers.committed


def test_hostile_row_alone_before_any_stream_is_known(database: str, settings: Settings) -> None:
    """Fault: the first subject of an outbox is a question that JetStream cannot answer. Promise: it blocks nobody."""
    position = write_around(database, ("no stream.>", None))
    assert ThreadRelay(settings, drain=True).ended() is None
    assert rows(database, "SELECT position FROM outbox.dead") == [(position,)]


def test_stream_that_is_made_under_load(database: str, settings: Settings, broker: Broker) -> None:
    """Fault: there is no stream for the subjects yet. Promise: it is waited for, visibly, and all goes out in order."""
    name = f"LATE{next(numbers)}"
    writers = Writers(database, name.lower(), threads=4, endless=True, seed=89).start()
    with ThreadRelay(settings) as relay:
        relay.wait_for(Blocked, lambda each: "is in no stream" in each.why)
        until(lambda: value(database, PENDING) > 100)
        assert "is in no stream" in value(database, "SELECT blocked FROM outbox.relay")
        broker.create_stream(name, f"{name.lower()}.>")
        relay.wait_for(Marked)
        writers.stop()
        wait_until_sent(database)
        assert value(database, "SELECT blocked FROM outbox.relay") is None
    report = check(database, broker.read(name))
    assert report.anomalies == {}
    assert report.transactions == writers.committed
    assert rows(database, "SELECT * FROM outbox.dead") == []
    broker.api(f"STREAM.DELETE.{name}")


def test_what_the_streams_cannot_take_is_set_aside_under_load(
    database: str, settings: Settings, broker: Broker
) -> None:
    """Fault: transactions that span streams, are too large, or ask what the stream forbids. Promise: only they stay."""
    number = next(numbers)
    here, there = f"HERE{number}", f"THERE{number}"
    prefix, other = here.lower(), there.lower()
    broker.create_stream(here, f"{prefix}.>", max_msg_size=5000)
    broker.create_stream(there, f"{other}.>")
    good, repeated = f"outbox.add('{prefix}.y', 'y')", "'11111111-1111-1111-1111-111111111111'"
    offences = {
        "spans-streams": f"SELECT outbox.add(s, 'x') FROM unnest(ARRAY['{prefix}.x', '{other}.x']) AS s",
        "message-too-large": f"SELECT outbox.add('{prefix}.x', repeat('x', n)) FROM unnest(ARRAY[1, 6000]) AS n",
        "duplicate-message-id": f"SELECT outbox.add('{prefix}.x', 'x', NULL, {repeated}) FROM generate_series(1, 2)",
        "ttl-not-permitted": f"SELECT {good}, outbox.add('{prefix}.x', 'x', '{{\"Nats-TTL\": \"1h\"}}')",
        "rollup-not-permitted": f"SELECT {good}, outbox.add('{prefix}.x', 'x', '{{\"Nats-Rollup\": \"sub\"}}')",
    }
    writers = Writers(database, prefix, threads=3, endless=True, seed=97).start()
    with ThreadRelay(settings.model_copy(update={"across_streams": AcrossStreams.DEAD})) as relay:
        relay.wait_for(Marked)
        for _ in range(3):
            for statement in offences.values():
                rows(database, statement)
        until(lambda: value(database, "SELECT count(*) FROM outbox.dead") == 3 * len(offences))
        relay.wait_for(Marked, after=len(relay.happenings))
        writers.stop()
        wait_until_sent(database)
    reasons = [reason.partition(":")[0] for (reason,) in rows(database, "SELECT dead_reason FROM outbox.dead")]
    assert sorted(reasons) == sorted(3 * list(offences))
    report = check(database, broker.read(here))
    assert report.anomalies == {}
    assert report.transactions == writers.committed
    assert broker.read(there) == []
    for name in (here, there):
        broker.api(f"STREAM.DELETE.{name}")


BACKLOG = """
DO $body$ BEGIN
  SET synchronous_commit = off;
  FOR n IN 1..10000 LOOP
    INSERT INTO outbox.events (subject, payload) VALUES ('{subject}', n::text::bytea), ('{subject}', n::text::bytea);
    COMMIT;
  END LOOP;
END $body$
"""


def _hostile(database: str, subject: str) -> None:
    write_around(database, (subject, '{"X": "a\\r\\nb"}'))


def _refused_by_the_stream(database: str, subject: str) -> None:
    rows(database, "SELECT outbox.add(%s, 'x', %s)", subject, '{"Nats-TTL": "1h"}')


@pytest.mark.parametrize("bad", [_hostile, _refused_by_the_stream])
def test_dead_letter_at_the_head_of_a_backlog(
    database: str, settings: Settings, broker: Broker, stream: Stream, bad: Callable[[str, str], None]
) -> None:
    """Fault: the first of 10,001 transactions can never be sent. Promise: all behind it flow, whole and in order."""
    subject = f"{stream.prefix}.x"
    bad(database, subject)
    rows(database, BACKLOG.format(subject=subject))
    assert ThreadRelay(settings, drain=True).ended() is None
    assert value(database, "SELECT array_agg(position) FROM outbox.dead") == [1]
    stored = broker.read(stream.name)
    assert [(each.position, each.number) for each in stored] == [(n, k) for n in range(2, 10_002) for k in (1, 2)]
    assert [int(each.payload) for each in stored] == [n for n in range(1, 10_001) for _ in (1, 2)]


def test_server_is_not_asked_by_hostile_subjects(database: str, nats: Nats, stream: Stream) -> None:
    """Fault: a row's subject is a call of JetStream's API. Promise: it is carried out by nobody."""
    rows(database, "SELECT outbox.add(%s, 'kept')", f"{stream.prefix}.x")
    settings = Settings(database_url=database, nats_url=nats.url)
    assert ThreadRelay(settings, drain=True).ended() is None
    write_around(database, (f"$JS.API.STREAM.DELETE.{stream.name}", None))
    assert ThreadRelay(settings, drain=True).ended() is None
    assert [each.payload for each in Broker(nats.url).read(stream.name)] == [b"kept"]


SPOIL = {
    "an event is gone": "DELETE FROM outbox.events WHERE id = (SELECT min(id) + 1 FROM outbox.events)",
    "all events are gone": "DELETE FROM outbox.events WHERE txid = (SELECT min(txid) FROM outbox.events)",
    "one more than is counted": "UPDATE outbox.transactions SET event_count = 2 WHERE position = 1",
    "one less than is counted": "UPDATE outbox.transactions SET event_count = 4 WHERE position = 1",
}


@pytest.mark.parametrize("spoil", SPOIL)
def test_transaction_with_a_wrong_count_is_set_aside(
    database: str, settings: Settings, broker: Broker, stream: Stream, spoil: str
) -> None:
    """Fault: somebody changes the rows by hand. Promise 1: no part of it is published; 7: the others go out."""
    for _ in range(2):
        rows(database, "SELECT outbox.add(%s, n::text) FROM generate_series(1, 3) AS n", f"{stream.prefix}.x")
    rows(database, SPOIL[spoil])
    assert ThreadRelay(settings, drain=True).ended() is None
    assert rows(database, "SELECT position, split_part(dead_reason, ':', 1) FROM outbox.dead") == [(1, "wrong-count")]
    assert [each.position for each in broker.read(stream.name)] == [2, 2, 2]


def test_wrong_count_of_what_a_former_leader_planned_is_set_aside(
    database: str, settings: Settings, nats: Nats, broker: Broker, stream: Stream
) -> None:
    """Fault: as before, after it was planned and before it was stored. Its followers move up."""
    with NatsProxy(nats.port) as proxy:
        through = settings.model_copy(update={"nats_url": proxy.url})
        rows(database, "SELECT outbox.add(%s, 'first')", f"{stream.prefix}.x")
        with ThreadRelay(through) as leader:
            wait_until_sent(database)
            proxy.change(proxy.up, swallowed=True)
            for _ in range(3):
                rows(database, "SELECT outbox.add(%s, n::text) FROM generate_series(1, 3) AS n", f"{stream.prefix}.x")
            until(lambda: value(database, "SELECT cardinality(plan) FROM outbox.streams") > 0)
            leader.kill()
    rows(database, "DELETE FROM outbox.events WHERE id = (SELECT max(id) - 6 FROM outbox.events)")
    assert ThreadRelay(settings, drain=True).ended() is None
    assert rows(database, "SELECT position, split_part(dead_reason, ':', 1) FROM outbox.dead") == [(2, "wrong-count")]
    assert [each.position for each in broker.read(stream.name)] == [1, 3, 3, 3, 4, 4, 4]


def test_counts_that_were_cleared_behind_an_early_seal(
    database: str, settings: Settings, broker: Broker, stream: Stream
) -> None:
    """Fault: a session is reset after its events were sealed early, and adds more: two counts, and neither fits."""
    with psycopg.connect(database) as connection:
        connection.execute("SELECT outbox.add(%s, 'a')", [f"{stream.prefix}.x"])
        connection.execute("SET CONSTRAINTS ALL IMMEDIATE")
        connection.execute("RESET ALL")
        connection.execute("SELECT outbox.add(%s, 'b')", [f"{stream.prefix}.x"])
    rows(database, "SELECT outbox.add(%s, 'c')", f"{stream.prefix}.x")
    assert ThreadRelay(settings, drain=True).ended() is None
    found = rows(database, "SELECT position, split_part(dead_reason, ':', 1) FROM outbox.dead ORDER BY position")
    assert found == [(1, "wrong-count"), (2, "wrong-count")]
    assert [each.payload for each in broker.read(stream.name)] == [b"c"]
