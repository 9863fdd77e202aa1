"""Fail at the start: what cannot keep the promises is refused with its remedy, before anything is published."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from outbox.config import AcrossStreams, Settings
from outbox.core.telemetry import Blocked, Marked, StandingBy, TookLead, Unreachable
from outbox.doctor.check import Colour
from outbox.doctor.examine import examine
from outbox.embedded import Nats
from outbox.errors import Halt, Misconfigured
from outbox.operate import migrate, rebase, status
from outbox.schema import grants
from tests.support.bed import Broker, ThreadRelay, rows, until, value, wait_until_sent
from tests.support.servers import Stream, old_nats


def refusal(settings: Settings) -> Misconfigured:
    error = ThreadRelay(settings).ended()
    assert isinstance(error, Misconfigured), error
    assert error.remedy
    return error


@pytest.mark.parametrize("version", ["2.11.11", "2.12.0"])
def test_server_without_sound_atomic_batches_is_refused(database: str, workplace: Path, version: str) -> None:
    rows(database, "SELECT outbox.add('old.x', 'y')")
    with Nats(workplace / "nats", binary=old_nats(version)) as server:
        assert isinstance(server, Nats)
        broker = Broker(server.url)
        broker.create_stream("OLD", "old.>")
        error = refusal(Settings(database_url=database, nats_url=server.url))
        assert version in error.message
        assert "2.12.1" in error.remedy
        assert broker.last_sequence("OLD") == 0


def test_oldest_supported_server_works(database: str, workplace: Path) -> None:
    for n in range(30):
        rows(database, "SELECT outbox.add('old.x', k::text) FROM generate_series(0, %s) AS k", n % 3)
    with Nats(workplace / "nats", binary=old_nats("2.12.1")) as server:
        assert isinstance(server, Nats)
        broker = Broker(server.url)
        broker.create_stream("OLD", "old.>")
        with ThreadRelay(Settings(database_url=database, nats_url=server.url), drain=True) as relay:
            assert relay.ended() is None
        assert len(broker.read("OLD")) == 60


@pytest.mark.parametrize(
    ("config", "words"),
    [({"allow_atomic": False}, "allow_atomic"), ({"allow_atomic": False, "persist_mode": "async"}, "persist_mode")],
)
def test_unsuitable_stream_is_refused(
    database: str, nats: Nats, broker: Broker, config: dict[str, object], words: str
) -> None:
    broker.create_stream("UNSUITABLE", "unsuitable.>", **config)
    rows(database, "SELECT outbox.add('unsuitable.x', 'y')")
    error = refusal(Settings(database_url=database, nats_url=nats.url))
    assert words in error.message
    assert broker.last_sequence("UNSUITABLE") == 0
    broker.api("STREAM.DELETE.UNSUITABLE")


def test_stream_that_only_counts_is_refused(database: str, nats: Nats, broker: Broker) -> None:
    broker.create_stream("COUNTER", "counter.>", allow_msg_counter=True, allow_direct=True)
    rows(database, "SELECT outbox.add('counter.x', 'y')")
    settings = Settings(database_url=database, nats_url=nats.url)
    assert "counts" in refusal(settings).message
    checks = asyncio.run(examine(settings))
    assert any(each.colour is Colour.RED and "counts" in each.found for each in checks)
    broker.api("STREAM.DELETE.COUNTER")


def test_stream_that_is_sealed_later_is_named(database: str, nats: Nats, broker: Broker) -> None:
    broker.create_stream("SEALS", "seals.>")
    with ThreadRelay(Settings(database_url=database, nats_url=nats.url)) as relay:
        rows(database, "SELECT outbox.add('seals.x', 'y')")
        relay.wait_for(Marked)
        broker.api("STREAM.UPDATE.SEALS", {**broker.info("SEALS")["config"], "sealed": True})
        rows(database, "SELECT outbox.add('seals.x', 'y')")
        relay.wait_for(Blocked, lambda each: "sealed" in each.why)
    broker.api("STREAM.DELETE.SEALS")


def test_stream_that_became_a_mirror_holds_only_its_own(
    database: str, nats: Nats, broker: Broker, stream: Stream
) -> None:
    # A mirror has no subjects, so only a stream that is known can turn out to be one.
    rows(database, "INSERT INTO outbox.streams (name, created, last_sequence) VALUES ('MIRROR', 'x', 0)")
    broker.create_stream("MIRROR", allow_atomic=False, mirror={"name": stream.name})
    created = broker.info("MIRROR")["created"]
    rows(database, "UPDATE outbox.streams SET created = %s", created)
    with ThreadRelay(Settings(database_url=database, nats_url=nats.url)) as relay:
        relay.wait_for(Blocked, lambda each: each.stream == "MIRROR" and "mirror" in each.why)
        rows(database, "SELECT outbox.add(%s, 'y')", f"{stream.prefix}.x")
        wait_until_sent(database)
    broker.api("STREAM.DELETE.MIRROR")


@pytest.mark.parametrize("change", [{"sealed": True}, {"allow_atomic": False}, {"no_ack": True}])
def test_stream_that_does_not_suit_any_more_stops_no_new_relay(
    database: str, nats: Nats, broker: Broker, stream: Stream, change: dict[str, bool]
) -> None:
    """Fault: a stream that was used is made an archive, and the relay is started anew. The others flow."""
    settings = Settings(database_url=database, nats_url=nats.url)
    broker.create_stream("ARCHIVE", "archive.>")
    rows(database, "SELECT outbox.add('archive.x', 'y')")
    assert ThreadRelay(settings, drain=True).ended() is None
    broker.api("STREAM.UPDATE.ARCHIVE", {**broker.info("ARCHIVE")["config"], **change})
    with ThreadRelay(settings) as relay:
        relay.wait_for(Blocked, lambda each: each.stream == "ARCHIVE")
        rows(database, "SELECT outbox.add(%s, 'y')", f"{stream.prefix}.x")
        wait_until_sent(database)
    broker.api("STREAM.DELETE.ARCHIVE")


def test_new_stream_that_does_not_suit_holds_only_its_own(
    database: str, nats: Nats, broker: Broker, stream: Stream
) -> None:
    """Fault: a relay that works meets a subject of a stream that cannot be used. What is behind it flows."""
    settings = Settings(database_url=database, nats_url=nats.url)
    broker.create_stream("BAD", "bad.>", allow_atomic=False)
    with ThreadRelay(settings) as relay:
        rows(database, "SELECT outbox.add(%s, 'y')", f"{stream.prefix}.x")
        relay.wait_for(Marked)
        rows(database, "SELECT outbox.add('bad.x', 'y')")
        rows(database, "SELECT outbox.add(%s, 'y')", f"{stream.prefix}.x")
        relay.wait_for(Marked, lambda each: each.last_position == 3)
        relay.wait_for(Blocked, lambda each: each.stream == "BAD" and "allow_atomic" in each.why)
        relay.kill()
    with ThreadRelay(settings) as relay:
        relay.wait_for(TookLead)
        broker.api("STREAM.UPDATE.BAD", {**broker.info("BAD")["config"], "allow_atomic": True})
        wait_until_sent(database)
    assert [each.position for each in broker.read("BAD")] == [2]
    broker.api("STREAM.DELETE.BAD")


def test_stream_that_loses_allow_atomic_later_is_waited_for(database: str, nats: Nats, broker: Broker) -> None:
    broker.create_stream("LATER", "later.>")
    with ThreadRelay(Settings(database_url=database, nats_url=nats.url)) as relay:
        rows(database, "SELECT outbox.add('later.x', 'y')")
        relay.wait_for(Marked)
        config = broker.info("LATER")["config"]
        broker.api("STREAM.UPDATE.LATER", {**config, "allow_atomic": False})
        rows(database, "SELECT outbox.add('later.x', n::text) FROM generate_series(1, 3) AS n")
        relay.wait_for(Blocked, lambda each: "atomic" in each.why)
        until(lambda: any("atomic" in str(each.blocked) for each in status.status(database).streams))
        broker.api("STREAM.UPDATE.LATER", config)
        wait_until_sent(database)
    assert len(broker.read("LATER")) == 4
    broker.api("STREAM.DELETE.LATER")


def test_database_without_the_schema_is_refused(database: str, settings: Settings) -> None:
    migrate.migrate(database, to=0)
    assert refusal(settings).remedy == "outbox migrate"


def test_limit_over_the_batch_is_refused(database: str, settings: Settings) -> None:
    rows(database, "UPDATE outbox.limits SET max_transaction_events = 1001")
    assert "--max-batch-messages 1001" in refusal(settings).remedy


def test_sequence_with_a_cache_is_refused(database: str, settings: Settings) -> None:
    rows(database, "ALTER TABLE outbox.transactions ALTER COLUMN position SET CACHE 10")
    assert "CACHE 1" in refusal(settings).remedy


def test_other_cluster_is_refused_until_rebase(
    database: str, settings: Settings, broker: Broker, stream: Stream
) -> None:
    rows(database, "SELECT outbox.add(%s, 'x')", f"{stream.prefix}.x")
    with ThreadRelay(settings, drain=True) as relay:
        assert relay.ended() is None
    old = value(database, "SELECT outbox_id FROM outbox.relay")
    rows(database, "UPDATE outbox.relay SET system_identifier = 42")
    rows(database, "SELECT outbox.add(%s, 'y')", f"{stream.prefix}.x")
    error = ThreadRelay(settings).ended()
    assert isinstance(error, Halt)
    assert "outbox rebase" in error.remedy
    assert status.status(database).blocked == f"halted: {error}"
    assert len(broker.read(stream.name)) == 1
    assert asyncio.run(rebase.rebase(settings)).outbox_id != old
    with ThreadRelay(settings, drain=True) as relay:
        assert relay.ended() is None
    assert [each.payload for each in broker.read(stream.name)] == [b"x", b"y"]


def test_least_privilege_of_the_relay(database: str, nats: Nats, broker: Broker, stream: Stream) -> None:
    role = f"relay_{database.rpartition('/')[2]}"
    rows(database, f"CREATE ROLE {role} LOGIN")
    url = database.replace("postgres@", f"{role}@")
    settings = Settings(database_url=url, nats_url=nats.url)
    assert "--relay-role" in refusal(settings).remedy
    for statement in grants(relay=role):
        rows(database, statement)
    broker.create_stream(f"{stream.name}B", f"{stream.prefix}b.>")
    rows(database, "SELECT outbox.add(%s, 'x')", f"{stream.prefix}.x")
    rows(
        database,
        "INSERT INTO outbox.events (subject, payload) VALUES (%s, ''), (%s, '')",
        f"{stream.prefix}.x",
        f"{stream.prefix}b.x",
    )
    across = settings.model_copy(update={"across_streams": AcrossStreams.DEAD})
    with ThreadRelay(across, drain=True) as relay:
        assert relay.ended() is None
    assert rows(database, "SELECT sent_at IS NULL, dead_at IS NULL FROM outbox.transactions ORDER BY position") == [
        (False, True),
        (True, False),
    ]
    broker.api(f"STREAM.DELETE.{stream.name}B")


def test_standby_that_nats_denies_ends_at_its_start(settings: Settings, workplace: Path) -> None:
    """Not at the failover, when nobody else is there to lead."""
    users = "authorization { users: [ { user: relay, password: right } ] }"
    with Nats(workplace / "guarded", config=users) as server:
        right = settings.model_copy(update={"nats_url": server.url.replace("//", "//relay:right@")})
        wrong = settings.model_copy(update={"nats_url": server.url.replace("//", "//relay:wrong@")})
        away = settings.model_copy(update={"nats_url": "nats://127.0.0.1:1"})
        with ThreadRelay(right) as leader:
            leader.wait_for(TookLead)
            assert isinstance(ThreadRelay(wrong).ended(), Misconfigured)
            with ThreadRelay(away) as standby:
                standby.wait_for(StandingBy)


def test_standby_keeps_its_session_while_nats_says_nothing(settings: Settings) -> None:
    """It tries NATS once; PostgreSQL ends a session that is idle for as long as nats-py would wait."""
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        deaf = settings.model_copy(
            update={"nats_url": ",".join(f"nats://127.0.0.1:{each.getsockname()[1]}" for each in (one, other))}
        )
        with ThreadRelay(deaf) as leader:
            leader.wait_for(TookLead)
            with ThreadRelay(deaf) as standby:
                standby.wait_for(StandingBy)
        assert not [each for each in standby.happenings if isinstance(each, Unreachable)]
