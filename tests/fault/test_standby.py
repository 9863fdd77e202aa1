"""What dies is the primary, and an asynchronous standby takes over. Promise 6, on request: no phantom in a failover."""

from __future__ import annotations

import subprocess
from pathlib import Path

import psycopg

from outbox.config import Durability, Settings
from outbox.core.telemetry import Blocked, LeadEnded, Marked, Unreachable
from outbox.embedded import Nats, Postgres
from outbox.errors import Misconfigured
from outbox.operate import migrate, status
from tests.support.bed import Broker, ThreadRelay, rows, until, value
from tests.support.servers import Stream, own_postgres, standby_of


def test_nothing_is_published_that_a_standby_does_not_have(nats: Nats, stream: Stream, workplace: Path) -> None:
    """Fault: the standby lags or is away. Promise: what it would lose in a failover is not in the stream."""
    broker = Broker(nats.url)
    with own_postgres(workplace / "primary") as primary:
        migrate.migrate(primary.url())
        settings = Settings(database_url=primary.url(), nats_url=nats.url, durability=Durability.REPLICAS)
        standby = standby_of(primary, workplace / "standby")
        rows(primary.url(), "SELECT outbox.add(%s, 'one')", f"{stream.prefix}.x")
        with ThreadRelay(settings) as relay:
            relay.wait_for(Blocked, lambda each: "standby" in each.why)
            assert "no standby" in (status.status(primary.url()).blocked or "")
            assert broker.read(stream.name) == []
            with standby:
                relay.wait_for(Marked)
                assert [each.payload for each in broker.read(stream.name)] == [b"one"]
            after = len(relay.happenings)
            rows(primary.url(), "SELECT outbox.add(%s, 'two')", f"{stream.prefix}.x")
            relay.wait_for(Blocked, lambda each: "standby" in each.why, after=after)
            assert len(broker.read(stream.name)) == 1
            with standby:
                relay.wait_for(Marked, after=after)
            assert not any(isinstance(each, LeadEnded) for each in relay.happenings)
        assert [each.payload for each in broker.read(stream.name)] == [b"one", b"two"]


def test_who_only_receives_is_no_standby(nats: Nats, stream: Stream, workplace: Path) -> None:
    """Fault: pg_receivewal, or a base backup, streams beside the standby, and flushes late or never."""
    with own_postgres(workplace / "primary") as primary:
        migrate.migrate(primary.url())
        settings = Settings(database_url=primary.url(), nats_url=nats.url, durability=Durability.REPLICAS)
        standby = standby_of(primary, workplace / "standby")
        (workplace / "wal").mkdir(mode=0o777)
        (workplace / "wal").chmod(0o777)
        client = Postgres(workplace / "client").installation / "bin" / "pg_receivewal"
        words: list[str | Path] = [client, "-D", workplace / "wal", "-d", primary.url()]
        receiver = subprocess.Popen(words, stderr=subprocess.DEVNULL, **primary._identity())
        try:
            until(lambda: value(primary.url(), "SELECT count(*) FROM pg_stat_replication") == 1)
            with ThreadRelay(settings) as relay:
                rows(primary.url(), "SELECT outbox.add(%s, 'one')", f"{stream.prefix}.x")
                relay.wait_for(Blocked, lambda each: "standby" in each.why)  # the receiver is none
                with standby:
                    relay.wait_for(Marked)
                    for _ in range(3):
                        after = len(relay.happenings)
                        rows(primary.url(), "SELECT outbox.add(%s, 'two')", f"{stream.prefix}.x")
                        relay.wait_for(Marked, after=after)
        finally:
            receiver.terminate()
            receiver.wait()


def test_role_that_cannot_see_the_standbys_is_refused(database: str, nats: Nats) -> None:
    role = f"blind_{database.rpartition('/')[2]}"
    rows(database, f"CREATE ROLE {role} LOGIN")
    migrate.grant(database, "outbox", relay=role)
    url = database.replace("postgres@", f"{role}@")
    error = ThreadRelay(Settings(database_url=url, nats_url=nats.url, durability=Durability.REPLICAS)).ended()
    assert isinstance(error, Misconfigured)
    assert "pg_monitor" in error.remedy


def test_standby_itself_is_waited_out(nats: Nats, workplace: Path) -> None:
    """Fault: the URL leads to a standby, as in the middle of a failover. Promise: weather, until it is promoted."""
    with own_postgres(workplace / "primary") as primary:
        migrate.migrate(primary.url())
        standby = standby_of(primary, workplace / "standby")
    with standby, ThreadRelay(Settings(database_url=standby.url(), nats_url=nats.url)) as relay:
        relay.wait_for(Unreachable, lambda each: "recovery" in each.why)
        with psycopg.connect(standby.url(), autocommit=True) as connection:
            connection.execute("SELECT pg_promote()")
            connection.execute("SELECT outbox.add('nowhere.x', 'y')")
        relay.wait_for(Blocked)
