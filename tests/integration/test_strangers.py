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
from tests.support.bed import ThreadRelay, rows, value, wait_until_sent
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
