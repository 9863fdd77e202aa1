"""What dies is the relay, at each of its delicate places. Promises 1 to 3: whole, once, in commit order."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import psycopg
import pytest

from outbox.embedded import Nats
from tests.support.armed import ONCE_A_TERM, POINTS, came_to
from tests.support.bed import Broker, ProcessRelay, rows, until, value, wait_until_sent
from tests.support.foreign import Company, ours
from tests.support.servers import Stream
from tests.support.workload import Writers, check

# Here a relay that ends cannot know what is stored: the ack was thrown away, or the stream not yet read back.
UNKNOWING = {"before-ack", *ONCE_A_TERM}
MARKED = "SELECT coalesce(sum(event_count), 0) FROM outbox.transactions WHERE sent_at IS NOT NULL"
CORE = {("mid-batch", 1), ("before-ack", 3)}
KILLS = [
    pytest.param(point, nth, marks=[pytest.mark.core] if (point, nth) in CORE else [])
    for point in POINTS
    for nth in (1, 3)
]


@pytest.mark.parametrize(("point", "nth"), KILLS)
def test_killed_at(
    database: str,
    environment: dict[str, str],
    nats: Nats,
    stream: Stream,
    workplace: Path,
    company: Company,
    point: str,
    nth: int,
) -> None:
    """Fault: SIGKILL at a stop point. Promise: whole transactions only, and the next relay finishes the work."""
    broker = Broker(nats.url)
    company.joins(nats.url, stream.name, stream.prefix)
    rows(database, "SELECT outbox.add(%s, n::text) FROM generate_series(1, 3) AS n", f"{stream.prefix}.first")
    rows(
        database, "INSERT INTO ledger SELECT message_id, '00000000-0000-0000-0000-000000000000', id FROM outbox.events"
    )
    writers = Writers(database, stream.prefix, threads=3, endless=True, seed=71).start()
    with ProcessRelay(workplace, environment, armed=(point, "SIGKILL", nth)) as relay:
        came_to(relay, point, "SIGKILL", database)
        assert relay._process.wait(10) == -signal.SIGKILL
    # nats-server may still be applying the batch, message by message.
    until(lambda: check(database, broker.read(stream.name)).anomalies.keys() <= {"missing"})
    with ProcessRelay(workplace, environment) as second:
        second.wait_for("Marked")
        writers.stop()
        wait_until_sent(database)
        assert second.stop() == 0
    report = check(database, broker.read(stream.name))
    assert report.anomalies == {}
    assert report.transactions == writers.committed + 1


@pytest.mark.parametrize("point", POINTS)
def test_terminated_at(
    database: str,
    environment: dict[str, str],
    nats: Nats,
    stream: Stream,
    workplace: Path,
    company: Company,
    point: str,
) -> None:
    """Fault: SIGTERM at a stop point. Promise: exit code 0, and the next one finishes."""
    broker = Broker(nats.url)
    company.joins(nats.url, stream.name, stream.prefix)
    writers = Writers(database, stream.prefix, threads=3, endless=True, seed=73).start()
    with ProcessRelay(workplace, environment, armed=(point, "SIGTERM", 2)) as relay:
        came_to(relay, point, "SIGTERM", database)
        assert relay._process.wait(25) == 0, relay.log.read_text()[-2000:]
        assert relay.happenings()[-1]["event"] == "Stopped"
    stored = ours(broker.read(stream.name))
    assert check(database, stored).anomalies.keys() <= {"missing"}
    if point not in UNKNOWING:
        assert value(database, MARKED) == len(stored)
    with ProcessRelay(workplace, environment) as second:
        second.wait_for("Marked")
        writers.stop()
        wait_until_sent(database)
        assert second.stop() == 0
    stored = ours(broker.read(stream.name))
    report = check(database, stored)
    assert report.anomalies == {}
    assert report.transactions == writers.committed
    assert value(database, MARKED) == len(stored)


@pytest.mark.parametrize("point", ["before-ack", "before-first-message", "in-the-mark"])
def test_frozen_at(
    database: str,
    environment: dict[str, str],
    nats: Nats,
    stream: Stream,
    workplace: Path,
    company: Company,
    point: str,
) -> None:
    """Fault: SIGSTOP at a stop point, until another relay leads, then SIGCONT. Promise: the thawed one does no harm.

    The stream forgets message ids meanwhile: what keeps the thawed batch out is the fence on it.
    """
    broker = Broker(nats.url)
    config = broker.info(stream.name)["config"]
    broker.api(f"STREAM.UPDATE.{stream.name}", {**config, "duplicate_window": 100_000_000})
    assert broker.info(stream.name)["config"]["duplicate_window"] == 100_000_000
    company.joins(nats.url, stream.name, stream.prefix)
    writers = Writers(database, stream.prefix, threads=3, endless=True, seed=79).start()
    frozen = ProcessRelay(workplace, environment, armed=(point, "SIGSTOP", 3))
    with frozen:
        came_to(frozen, point, "SIGSTOP", database)
        with ProcessRelay(workplace, environment) as second:
            second.wait_for("TookLead")
            second.wait_for("Marked")
            threading.Event().wait(1)  # what the frozen batch holds was stored by now, and its ids are forgotten
            seen = len(frozen.happenings())
            frozen.send_signal(signal.SIGCONT)
            frozen.wait_for("StandingBy", after=seen)
            second.wait_for("Marked", after=len(second.happenings()))
            writers.stop()
            wait_until_sent(database)
            with psycopg.connect(database) as connection:
                leaders = connection.execute("SELECT leader FROM outbox.relay").fetchall()
            assert leaders[0][0].endswith(f":{second.pid}")
            assert second.stop() == 0
        frozen.wait_for("TookLead", after=seen)
        assert frozen.stop() == 0
    report = check(database, broker.read(stream.name))
    assert report.anomalies == {}
    assert report.transactions == writers.committed
