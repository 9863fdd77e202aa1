"""What dies is the relay, or its leadership. Promises 1 to 3: whole, once, in commit order."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import psycopg
import pytest

from outbox.config import BatchMode, Settings
from outbox.core.telemetry import BatchSent, TookLead
from outbox.embedded import Nats
from tests.support.bed import Broker, ProcessRelay, ThreadRelay, rows, running, until, value, wait_until_sent
from tests.support.faults import more_sent
from tests.support.foreign import Company, ours
from tests.support.servers import Stream
from tests.support.workload import Writers, check


def test_sigkill_twenty_times_under_load_with_a_standby(
    database: str, environment: dict[str, str], nats: Nats, stream: Stream, workplace: Path, company: Company
) -> None:
    """Fault: SIGKILL of the leader, 20 times. Promise: nothing missing, doubled, split or out of order."""
    broker = Broker(nats.url)
    company.joins(nats.url, stream.name, stream.prefix)
    writers = Writers(database, stream.prefix, threads=4, endless=True, seed=3).start()
    leader, standby = (ProcessRelay(workplace, environment) for _ in range(2))
    gaps = []
    try:
        for _ in range(20):
            leader, standby = _leader_first(leader, standby)
            more_sent(database, 1)
            leader.kill()
            killed = time.monotonic()
            more_sent(database, 1)
            gaps.append(time.monotonic() - killed)
            leader = ProcessRelay(workplace, environment)
        writers.stop()
        wait_until_sent(database)
    finally:
        writers._stop.set()
        with running(leader, standby):
            pass
    report = check(database, broker.read(stream.name))
    assert report.anomalies == {}
    assert report.transactions == writers.committed
    print(f"publishing again after {max(gaps):.2f} s at most, {sorted(gaps)[10]:.2f} s in the median")


def _leader_first(one: ProcessRelay, other: ProcessRelay) -> tuple[ProcessRelay, ProcessRelay]:
    def leads(relay: ProcessRelay) -> bool:
        assert relay.running, relay.log.read_text()[-2000:]
        return any(each["event"] == "TookLead" for each in relay.happenings())

    def waits(relay: ProcessRelay) -> bool:
        return any(each["event"] == "StandingBy" for each in relay.happenings())

    until(lambda: (leads(one) and waits(other)) or (leads(other) and waits(one)), what="a leader and a standby")
    return (one, other) if leads(one) else (other, one)


@pytest.mark.parametrize("transactions", [1000, pytest.param(3000, marks=pytest.mark.long)])
def test_two_leaders_that_pack_differently(
    database: str, nats: Nats, stream: Stream, company: Company, transactions: int
) -> None:
    """Fault: the lock does not hold, two relays lead in turns under the other's feet, with other batch limits.

    Promise: the plan and the chain alone keep every transaction whole, once and in order, late positions included.
    """
    broker = Broker(nats.url)
    rows(database, "UPDATE outbox.limits SET max_transaction_events = 20")
    settings = Settings(database_url=database, nats_url=nats.url)
    small = settings.model_copy(update={"max_batch_messages": 20, "window": 8})
    single = settings.model_copy(update={"batch": BatchMode.TRANSACTION})
    company.joins(nats.url, stream.name, stream.prefix)
    writers = Writers(database, stream.prefix, threads=6, transactions=transactions, seed=5).start()
    with ThreadRelay(small, locked=False) as one:
        with ThreadRelay(single, locked=False) as other:
            writers.join()
        # With a rival each term is short, so one of them carries out what is left, a few transactions a batch.
        wait_until_sent(database, patience=90)
        led = [sum(isinstance(each, TookLead) for each in relay.happenings) for relay in (one, other)]
        sent = [sum(isinstance(each, BatchSent) for each in relay.happenings) for relay in (one, other)]
    assert min(led) > 3, led
    assert min(sent) > 3, sent
    assert check(database, broker.read(stream.name)).anomalies == {}


def test_frozen_leader_is_replaced_and_thawed_does_no_harm(
    database: str, environment: dict[str, str], nats: Nats, stream: Stream, workplace: Path, company: Company
) -> None:
    """Fault: SIGSTOP of the leader for 30 s, then SIGCONT. Promise: replaced within seconds, nothing doubled after."""
    broker = Broker(nats.url)
    company.joins(nats.url, stream.name, stream.prefix)
    writers = Writers(database, stream.prefix, threads=4, endless=True, seed=11).start()
    frozen = ProcessRelay(workplace, environment)
    frozen.wait_for("Marked")
    successor = ProcessRelay(workplace, environment)
    with running(frozen, successor):
        successor.wait_for("StandingBy")
        frozen.send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        successor.wait_for("TookLead")
        successor.wait_for("Marked")
        took = time.monotonic() - stopped
        until(lambda: time.monotonic() - stopped > 30, patience=40)
        seen = len(frozen.happenings())
        frozen.send_signal(signal.SIGCONT)
        frozen.wait_for("StandingBy", after=seen)
        writers.stop()
        wait_until_sent(database)
    report = check(database, broker.read(stream.name))
    assert report.anomalies == {}
    assert report.transactions == writers.committed
    print(f"replaced after {took:.1f} s")


def test_sigterm_finishes_and_marks_what_was_acked(
    database: str, environment: dict[str, str], nats: Nats, stream: Stream, workplace: Path, company: Company
) -> None:
    """Fault: SIGTERM under load. Promise: exit code 0, and nothing that is stored is left unmarked."""
    broker = Broker(nats.url)
    company.joins(nats.url, stream.name, stream.prefix)
    writers = Writers(database, stream.prefix, threads=4, endless=True, seed=2).start()
    with ProcessRelay(workplace, environment) as relay:
        relay.wait_for("Marked")
        assert relay.stop() == 0
    writers.stop()
    stored = len(ours(broker.read(stream.name)))
    marked = value(database, "SELECT coalesce(sum(event_count), 0) FROM outbox.transactions WHERE sent_at IS NOT NULL")
    assert stored == marked > 0
    with psycopg.connect(database) as connection:
        plans = connection.execute("SELECT plan FROM outbox.streams").fetchall()
    assert plans == [([],)] or stored == marked
