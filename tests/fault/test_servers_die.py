"""What dies is a server. Promises 1 to 3 and 5: whole, once, in order; an outage is waited out, by the same relay."""

from __future__ import annotations

from pathlib import Path

import pytest

from outbox.config import Settings
from outbox.core.telemetry import Marked
from outbox.embedded import Nats
from tests.support.bed import Broker, ThreadRelay, until, value, wait_until_sent
from tests.support.foreign import Company
from tests.support.servers import own_nats, own_postgres, prepared
from tests.support.workload import Writers, check


def sent(url: str) -> int:
    return int(value(url, "SELECT count(*) FROM outbox.transactions WHERE sent_at IS NOT NULL"))


def test_nats_server_is_killed_five_times_under_load(database: str, workplace: Path, company: Company) -> None:
    """Fault: SIGKILL and restart of nats-server, file storage."""
    with own_nats(workplace / "nats") as server:
        broker = Broker(server.url)
        broker.create_stream("S", "s.>")
        company.joins(server.url, "S", "s")
        writers = Writers(database, "s", threads=4, endless=True, seed=21).start()
        relay = ThreadRelay(Settings(database_url=database, nats_url=server.url))
        relay.wait_for(Marked)
        for _ in range(5):
            before = sent(database)
            server.restart(kill=True)
            until(lambda b=before: sent(database) > b + 50)  # type: ignore[misc]
        writers.stop()
        wait_until_sent(database)
        assert relay.stop() is None
        report = check(database, broker.read("S"))
    assert report.anomalies == {}
    assert report.transactions == writers.committed


@pytest.mark.parametrize("how", ["restart", "crash"])
def test_postgres_is_restarted_five_times_under_load(nats: Nats, workplace: Path, how: str) -> None:
    """Fault: restart, or immediate shutdown and crash recovery, with synchronous_commit = off in every writer.

    Promise 6 besides: nothing is in the stream whose transaction vanished in the crash.
    """
    settings = {"wal_writer_delay": "2s", "synchronous_commit": "off", "max_connections": "50"}
    with own_postgres(workplace / "postgres", **settings) as server:
        prepared(server)
        broker = Broker(nats.url)
        name, prefix = f"PG{how}", f"pg-{how}"
        broker.create_stream(name, f"{prefix}.>")
        writers = Writers(server.url(), prefix, threads=4, endless=True, seed=31).start()
        relay = ThreadRelay(Settings(database_url=server.url(), nats_url=nats.url))
        relay.wait_for(Marked)
        for _ in range(5):
            before = sent(server.url())
            if how == "crash":
                server.crash()
                server.start()
            else:
                server.restart()
            until(lambda b=before: sent(server.url()) > b + 50)  # type: ignore[misc]
        writers.stop()
        wait_until_sent(server.url())
        assert relay.stop() is None
        report = check(server.url(), broker.read(name))
        broker.api(f"STREAM.DELETE.{name}")
    assert report.anomalies == {}
    assert report.transactions > 250
