"""What hides rows from us, keeps us from writing, or lets no more sessions in, is named with what settles it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import psycopg
import pytest

from outbox.config import Settings
from outbox.core.telemetry import Connected, Unreachable
from outbox.doctor.check import Check, Colour
from outbox.doctor.examine import examine
from outbox.embedded import Nats
from outbox.errors import Misconfigured
from outbox.operate import migrate
from tests.support.bed import ThreadRelay, rows, until, value, wait_until_sent
from tests.support.commands import outbox
from tests.support.servers import Stream


@pytest.fixture
def role(database: str) -> str:
    """A role of its own that may all that a relay and an operator may."""
    name = f"role_{database.rpartition('/')[2]}"
    rows(database, f"CREATE ROLE {name} LOGIN")
    migrate.grant(database, "outbox", relay=name, operator=name)
    return name


@pytest.fixture
def as_role(database: str, role: str, nats: Nats) -> Settings:
    url = psycopg.conninfo.make_conninfo(database, user=role)
    return Settings(database_url=url, nats_url=nats.url)


def reds(settings: Settings) -> list[Check]:
    return [each for each in asyncio.run(examine(settings)) if each.colour is Colour.RED]


@pytest.mark.parametrize("table", ["relay", "events", "transactions", "streams", "limits"])
def test_row_security_is_told_at_the_start(
    database: str, role: str, as_role: Settings, stream: Stream, workplace: Path, table: str
) -> None:
    """Fault: rows are hidden. Promise: the relay ends with the doctor's words, and no command takes them for none."""
    rows(database, "SELECT outbox.add(%s, 'x')", f"{stream.prefix}.x")
    rows(database, f"ALTER TABLE outbox.{table} ENABLE ROW LEVEL SECURITY")
    (check,) = reds(as_role)
    assert f"it may hide rows of {table} from role {role}" in check.found
    error = ThreadRelay(as_role, drain=True).ended()
    assert isinstance(error, Misconfigured)
    assert (error.message, error.remedy) == (check.found, check.remedy)
    environment = {"OUTBOX_DATABASE_URL": as_role.database_url, "OUTBOX_NATS_URL": as_role.nats_url}
    for words in ("status --json", "show 1 --json", "dead list", "pause", "resume", "verify", "purge"):
        done = outbox(environment, *words.split(), cwd=workplace)
        if done.returncode:
            assert "row security would hide rows from this role" in done.stderr, words
            assert "DISABLE ROW LEVEL SECURITY" in done.stderr, words
        elif words.startswith(("status", "show")):
            found = json.loads(done.stdout)
            assert found.get("pending_transactions", found.get("event_count")) == 1
    rows(database, check.remedy.partition(";")[0])
    assert ThreadRelay(as_role, drain=True).ended() is None


def test_row_security_that_the_owner_is_subject_to(database: str, as_role: Settings, stream: Stream) -> None:
    """Fault: the views read for their owner. Promise: what is pending is not taken for nothing."""
    rows(database, "SELECT outbox.add(%s, 'x')", f"{stream.prefix}.x")
    owner = f"owner_{stream.prefix}"
    rows(database, f"CREATE ROLE {owner} LOGIN")
    rows(database, f"GRANT USAGE ON SCHEMA outbox TO {owner}")
    for table in ("transactions", "relay", "streams"):
        rows(database, f"ALTER TABLE outbox.{table} OWNER TO {owner}")
    for view in ("pending", "dead"):
        rows(database, f"ALTER VIEW outbox.{view} OWNER TO {owner}")
    rows(database, "ALTER TABLE outbox.transactions ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY")
    done = outbox({"OUTBOX_DATABASE_URL": database}, "status")
    assert done.returncode == 1
    assert "row security would hide rows" in done.stderr


def test_one_session_is_enough_for_the_doctor(database: str, role: str, as_role: Settings, stream: Stream) -> None:
    rows(database, "SELECT outbox.add(%s, 'x')", f"{stream.prefix}.x")
    rows(database, f"ALTER ROLE {role} CONNECTION LIMIT 1")
    for _ in range(3):
        until(lambda: value(database, "SELECT count(*) = 0 FROM pg_stat_activity WHERE usename = %s", role))
        assert reds(as_role) == []


def test_too_many_connections_are_named(
    database: str, role: str, as_role: Settings, stream: Stream, workplace: Path
) -> None:
    """Fault: somebody has the last connection that a role or a database may have. Promise: waited out, and said."""
    rows(database, "SELECT outbox.add(%s, 'x')", f"{stream.prefix}.x")
    environment = {"OUTBOX_DATABASE_URL": as_role.database_url, "OUTBOX_NATS_URL": as_role.nats_url}
    name = database.rpartition("/")[2]
    for limited in (f"ROLE {role}", f"DATABASE {name}"):
        rows(database, f"ALTER {limited} CONNECTION LIMIT 1")
        with psycopg.connect(as_role.database_url), ThreadRelay(as_role) as relay:
            for told in (relay.wait_for(Unreachable).why, reds(as_role)[0].found + reds(as_role)[0].remedy):
                assert "too many connections for" in told
                assert "CONNECTION LIMIT" in told
                assert "start Postgres" not in told
            for words in ("status", "pause", "migrate --check"):
                done = outbox(environment, *words.split(), cwd=workplace)
                assert done.returncode == 1
                assert "CONNECTION LIMIT" in done.stderr, words
            relay.stop()
        rows(database, f"ALTER {limited} CONNECTION LIMIT -1")
    with ThreadRelay(as_role) as relay:
        relay.wait_for(Connected)
        wait_until_sent(database)


def test_triggers_that_would_not_fire_are_named(
    database: str, role: str, as_role: Settings, stream: Stream, workplace: Path
) -> None:
    """Fault: a role inherits session_replication_role = replica, and may not change it."""
    rows(database, "SELECT outbox.add(%s, 'x')", f"{stream.prefix}.x")
    rows(database, f"ALTER ROLE {role} SET session_replication_role = replica")
    environment = {"OUTBOX_DATABASE_URL": as_role.database_url, "OUTBOX_NATS_URL": as_role.nats_url}
    error = ThreadRelay(as_role, drain=True).ended()
    assert isinstance(error, Misconfigured)
    (check,) = reds(as_role)
    replayed = outbox(environment, "replay", "--from", "1", "--to", "1", "--yes", cwd=workplace).stderr
    for told in (f"{error}", check.found + check.remedy, replayed):
        assert "session_replication_role" in told
        assert "ALTER ROLE … RESET" in told
    rows(database, f"ALTER ROLE {role} RESET session_replication_role")
    assert ThreadRelay(as_role, drain=True).ended() is None


@pytest.mark.parametrize("table", ["transactions", "relay"])
def test_no_command_waits_long_for_a_lock(environment: dict[str, str], database: str, table: str) -> None:
    """Fault: a table is locked, as VACUUM FULL and ALTER TABLE do. A command says so, and ends."""
    with psycopg.connect(database) as stranger:
        stranger.execute(f"LOCK TABLE outbox.{table} IN ACCESS EXCLUSIVE MODE".encode())
        for words in (("status",), ("pause",), ("dead", "list")):
            done = outbox(environment, *words)
            assert done.returncode in (0, 1), words
            if done.returncode == 1:
                assert done.stderr.count("\n") <= 3
