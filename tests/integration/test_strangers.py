"""What strangers do to the relay, and the relay to strangers: promise 4, and no new failures for applications."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from psycopg import errors

from outbox.config import Settings
from outbox.core.telemetry import Marked, Slept
from outbox.embedded import Nats, Postgres
from outbox.relay.leader import OPEN_RANGES
from tests.support.bed import Broker, ThreadRelay, rows, transactions, until, value, wait_until_sent
from tests.support.servers import Stream

pytestmark = pytest.mark.core


def test_open_transactions_of_strangers_delay_nothing(
    two_phase_postgres: Postgres, two_phase_database: str, nats: Nats, stream: Stream
) -> None:
    url = two_phase_database
    rows(two_phase_postgres.url(), "CREATE TABLE IF NOT EXISTS elsewhere (n int)")
    rows(url, "CREATE TABLE unrelated (n int)")
    with (
        psycopg.connect(two_phase_postgres.url()) as other_database,
        psycopg.connect(url) as same_database,
        psycopg.connect(url) as prepared,
    ):
        other_database.execute("INSERT INTO elsewhere VALUES (1)")
        same_database.execute("INSERT INTO unrelated VALUES (1)")
        prepared.execute("INSERT INTO unrelated VALUES (2)")
        prepared.execute("SELECT outbox.add(%s, 'forgotten')", [f"{stream.prefix}.forgotten"])
        prepared.execute("PREPARE TRANSACTION 'forgotten'")
        prepared.rollback()
        with ThreadRelay(Settings(database_url=url, nats_url=nats.url)) as relay:
            for number in range(20):
                after = len(relay.happenings)
                rows(url, "SELECT outbox.add(%s, %s::text)", f"{stream.prefix}.flows", str(number))
                relay.wait_for(Marked, after=after)
            assert value(url, "SELECT count(*) FROM outbox.pending") == 0
            assert value(url, "SELECT open_positions::text FROM outbox.relay") == "{[1,2)}"
            after = len(relay.happenings)
            rows(url, "COMMIT PREPARED 'forgotten'")
            relay.wait_for(Marked, lambda each: each.last_position == 1, after=after)


def test_a_forgotten_prepared_transaction_keeps_no_other_position_open(
    two_phase_database: str, nats: Nats, stream: Stream
) -> None:
    """Fault: it added an event, and commits fail after they drew a position: each would stay open, for ever."""
    url = two_phase_database
    rows(url, "CREATE TABLE fails (n int PRIMARY KEY DEFERRABLE INITIALLY DEFERRED)")
    rows(url, "INSERT INTO fails VALUES (1)")
    with psycopg.connect(url) as prepared:
        prepared.execute("SELECT outbox.add(%s, 'forgotten')", [f"{stream.prefix}.x"])
        prepared.execute(f"PREPARE TRANSACTION '{stream.name}'".encode())
        prepared.rollback()
    only = "SELECT open_positions::text = '{[1,2)}' FROM outbox.relay"
    with ThreadRelay(Settings(database_url=url, nats_url=nats.url)):

        def alone() -> bool:
            transactions(url, f"{stream.prefix}.x", 1)  # open positions are written with the next plan
            wait_until_sent(url)
            return bool(value(url, only))

        until(alone, what="its own position is open")
        with psycopg.connect(url) as connection:
            for _ in range(100):
                connection.execute("SELECT outbox.add(%s, 'fails')", [f"{stream.prefix}.x"])
                connection.execute("INSERT INTO fails VALUES (1)")
                with pytest.raises(errors.UniqueViolation):
                    connection.commit()
                connection.execute("SELECT outbox.add(%s, 'flows')", [f"{stream.prefix}.x"])
                connection.commit()
        until(alone, what="only its own position is open")
        rows(url, f"COMMIT PREPARED '{stream.name}'")
        until(lambda: value(url, "SELECT sent_at FROM outbox.transactions WHERE position = 1"), what="it is sent")


def test_what_a_full_stream_holds_costs_others_no_long_row(
    database: str, nats: Nats, broker: Broker, stream: Stream
) -> None:
    """Fault: a stream is full, and its transactions lie scattered among others'. A new leader sends them once."""
    broker.create_stream("FULL", "full.>", discard="new", max_msgs=1)
    rows(database, "UPDATE outbox.limits SET max_transaction_events = 10")
    settings = Settings(database_url=database, nats_url=nats.url, max_batch_messages=10, window=1)
    with psycopg.connect(database, autocommit=True) as connection:
        for number in range(300):
            connection.execute("SELECT outbox.add(%s, 'x')", [f"{stream.prefix}.x" if number % 3 else "full.x"])
    with ThreadRelay(settings) as relay:
        until(lambda: broker.last_sequence(stream.name) == 200)
        until(lambda: value(database, "SELECT blocked FROM outbox.streams WHERE name = 'FULL'"))
        transactions(database, f"{stream.prefix}.x", 1)
        until(lambda: broker.last_sequence(stream.name) == 201)
        relay.kill()
    ranges = "SELECT count(*) FROM outbox.relay, unnest(open_positions)"
    assert 0 < value(database, ranges) <= OPEN_RANGES + 2
    broker.api("STREAM.UPDATE.FULL", {**broker.info("FULL")["config"], "max_msgs": -1})
    assert ThreadRelay(settings, drain=True).ended() is None
    assert [each.position for each in broker.read("FULL")] == list(range(1, 301, 3))
    assert broker.last_sequence(stream.name) == 201
    broker.api("STREAM.DELETE.FULL")


def test_serializable_writers_on_disjoint_rows_fail_no_more_than_without(two_phase_database: str) -> None:
    url = two_phase_database
    # A table for each writer: in a shared one a page of its index may bring two of them together, outbox or not.
    for number in range(1, 9):
        rows(url, f"CREATE TABLE own{number} (id int PRIMARY KEY, n int)")
        rows(url, f"INSERT INTO own{number} VALUES (1, 0)")
    rows(url, "CREATE TABLE bare (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, body text)")

    def failures(statement: str) -> int:
        failed: Counter[str] = Counter()
        start = threading.Barrier(8)

        def write(number: int) -> None:
            with psycopg.connect(url) as connection:
                connection.isolation_level = psycopg.IsolationLevel.SERIALIZABLE
                start.wait()
                for _ in range(150):
                    try:
                        connection.execute(f"SELECT n FROM own{number} WHERE id = 1".encode())
                        connection.execute(f"UPDATE own{number} SET n = n + 1 WHERE id = 1".encode())
                        connection.execute(statement.encode())
                        connection.commit()
                    except errors.SerializationFailure:
                        connection.rollback()
                        failed["serialization"] += 1

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(write, range(1, 9)))
        return failed["serialization"]

    without = failures("INSERT INTO bare (body) VALUES ('1'), ('2'), ('3')")
    with_outbox = failures(
        "INSERT INTO outbox.events (subject, payload) VALUES ('a.b', '1'), ('a.b', '2'), ('a.b', '3')"
    )
    resealed = failures(
        "INSERT INTO outbox.events (subject, payload) VALUES ('a.b', '1'); SET CONSTRAINTS ALL IMMEDIATE; "
        "INSERT INTO outbox.events (subject, payload) VALUES ('a.b', '2'), ('a.b', '3')"
    )
    assert with_outbox <= without
    assert resealed <= without


def test_commits_notify_only_a_relay_that_sleeps(database: str, nats: Nats, stream: Stream) -> None:
    def add() -> None:
        rows(database, "SELECT outbox.add(%s, 'x')", f"{stream.prefix}.x")

    with psycopg.connect(database, autocommit=True) as listener:
        listener.execute("LISTEN outbox_outbox")
        add()
        with ThreadRelay(Settings(database_url=database, nats_url=nats.url)) as relay:
            relay.wait_for(Marked)
            assert list(listener.notifies(timeout=0)) == []
            after = len(relay.happenings)
            relay.wait_for(Slept)
            add()
            relay.wait_for(Marked, after=after)
            assert len(list(listener.notifies(timeout=5, stop_after=1))) == 1
        wait_until_sent(database)
