"""`outbox demo`: the command as a user runs it, and the check that its verdict rests on."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import psycopg
import pytest

from outbox.demo import Entry, Message, check, latencies
from outbox.embedded import accepts_connections
from tests.support.bed import until

KINDS = ("split", "missing", "duplicated", "out of order", "phantom")
START = datetime(2026, 1, 1, tzinfo=UTC)


def run_demo(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "outbox", "demo", *flags]
    environment = {**os.environ, "COLUMNS": "200", "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, timeout=120, check=False)


def row(output: str, name: str) -> str:
    found = re.search(rf"^\W+{name}\W+(\d.*?) *\W*$", output, re.MULTILINE)
    assert found, output
    return found.group(1)


def test_every_promise_holds_while_leading_relays_are_killed() -> None:
    done = run_demo("--transactions", "300", "--kill-relay")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {kind: row(done.stdout, kind) for kind in KINDS} == dict.fromkeys(KINDS, "0")
    assert row(done.stdout, "relays killed") == "3"
    committed = re.fullmatch(r"(\d+) transactions, ([\d,]+) events", row(done.stdout, "committed"))
    assert committed
    assert row(done.stdout, "stored").startswith(f"{committed.group(2)} events")
    directory = re.search(r" in (/\S+)", done.stdout)
    assert directory
    assert not Path(directory.group(1)).exists()


def test_servers_that_are_kept_outlive_the_demo_and_end_by_the_printed_command() -> None:
    done = run_demo("--transactions", "50", "--keep")
    assert done.returncode == 0, done.stdout + done.stderr
    stop = re.search(r"kill -INT ([\d ]+); then rm -r (/\S+)", done.stdout)
    url = re.search(r"PostgreSQL (postgresql://\S+),", done.stdout)
    port = re.search(r"nats://127\.0\.0\.1:(\d+)", done.stdout)
    assert stop
    try:
        assert url
        assert port
        assert accepts_connections(int(port.group(1)))
        with psycopg.connect(url.group(1), autocommit=True) as connection:
            connection.execute("SELECT outbox.add('shop.orders.1', '{}'::jsonb)")
            until(lambda: connection.execute("TABLE outbox.pending").fetchone() is None)
    finally:
        for pid in stop.group(1).split():
            os.kill(int(pid), signal.SIGINT)
        folder = Path(stop.group(2))
        until(lambda: not (folder / "postgres" / "data" / "postmaster.pid").exists())
        until(lambda: port is None or not accepts_connections(int(port.group(1))))
        until(lambda: (folder / "relay.log").read_text().rstrip().endswith("stopped"))
        shutil.rmtree(folder)


# Three transactions: order 1 is changed and its payment with it, then order 1 again, then order 2 twice.
CHANGES = ((7, "orders.1", 1), (7, "payments.1", 1), (8, "orders.1", 2), (9, "orders.2", 1), (9, "orders.2", 2))
COMMITTED = [
    Entry(txid, UUID(int=place), {"aggregate": aggregate, "version": version})
    for place, (txid, aggregate, version) in enumerate(CHANGES, start=1)
]


def message(place: int, *, position: int, number: int, count: int) -> Message:
    """The message of the entry at this place, at the sequence of the same number."""
    entry = COMMITTED[place - 1]
    return Message(place, START + timedelta(seconds=place), entry.message_id, position, number, count, entry.data)


ORDER, PAYMENT, AGAIN, OTHER, TWICE = GOOD = (
    message(1, position=1, number=1, count=2),
    message(2, position=1, number=2, count=2),
    message(3, position=2, number=1, count=1),
    message(4, position=4, number=1, count=2),
    message(5, position=4, number=2, count=2),
)
STRANGER = replace(AGAIN, message_id=UUID(int=99), position=3)


def found(messages: Sequence[Message]) -> dict[str, int]:
    """What the check finds in a stream that holds these messages in this order."""
    stored = [replace(each, sequence=sequence) for sequence, each in enumerate(messages, start=1)]
    report = check(COMMITTED, stored)
    assert tuple(report.anomalies) == KINDS
    assert report.ok is not any(report.anomalies.values())
    return {kind: len(cases) for kind, cases in report.anomalies.items() if cases}


def test_a_stream_that_holds_exactly_what_was_committed_is_in_order() -> None:
    assert found(GOOD) == {}


def test_transactions_that_did_not_conflict_may_be_in_any_order() -> None:
    assert found([OTHER, TWICE, ORDER, PAYMENT, AGAIN]) == {}


def test_nothing_committed_proves_nothing() -> None:
    assert not check([], []).ok


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        pytest.param([ORDER, AGAIN, PAYMENT, OTHER, TWICE], {"split": 1}, id="another transaction in between"),
        pytest.param([PAYMENT, ORDER, AGAIN, OTHER, TWICE], {"split": 1}, id="events of a transaction swapped"),
        pytest.param([ORDER, replace(PAYMENT, position=5), AGAIN, OTHER, TWICE], {"split": 1}, id="two positions"),
        pytest.param([ORDER, PAYMENT, replace(AGAIN, position=1), OTHER, TWICE], {"split": 2}, id="one position twice"),
        pytest.param([ORDER, PAYMENT, replace(AGAIN, count=2), OTHER, TWICE], {"split": 1}, id="wrong count"),
        pytest.param([ORDER, PAYMENT, AGAIN, OTHER], {"split": 1, "missing": 1}, id="a part is missing"),
        pytest.param([ORDER, PAYMENT, AGAIN], {"missing": 2}, id="a transaction is missing"),
        pytest.param([*GOOD, OTHER, TWICE], {"duplicated": 2}, id="a transaction stored twice"),
        pytest.param([ORDER, ORDER, PAYMENT, AGAIN, OTHER, TWICE], {"split": 1, "duplicated": 1}, id="a part twice"),
        pytest.param([AGAIN, ORDER, PAYMENT, OTHER, TWICE], {"out of order": 1}, id="a conflicting one overtook"),
        pytest.param([*GOOD, STRANGER], {"phantom": 1}, id="a rolled-back transaction"),
        pytest.param([*GOOD, *[replace(TWICE, message_id=None, position=0)] * 2], {"phantom": 2}, id="no headers"),
        pytest.param(
            [ORDER, PAYMENT, replace(STRANGER, position=1), AGAIN, OTHER, TWICE],
            {"split": 1, "phantom": 1},
            id="a rolled-back savepoint",
        ),
        pytest.param([ORDER, PAYMENT, AGAIN, OTHER, replace(TWICE, data={})], {"phantom": 1}, id="other data"),
    ],
)
def test_the_check_finds(messages: Sequence[Message], expected: dict[str, int]) -> None:
    assert found(messages) == expected


def test_latency_is_from_the_commit_to_the_last_message_of_a_transaction() -> None:
    sealed = {1: START + timedelta(seconds=1.5), 2: START + timedelta(seconds=2.75)}
    assert latencies(GOOD, sealed) == [250.0, 500.0]
