"""The command line as a subprocess: exit codes, remedies, JSON, signals; never a traceback, never a password."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bed import Broker, ProcessRelay, rows, until, value
from tests.conftest import Stream


def outbox(environment: dict[str, str], *words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "outbox", *words],
        env={**os.environ, "COLUMNS": "80", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=cwd,
    )
    assert "Traceback" not in done.stderr
    return done


def test_help_and_usage(environment: dict[str, str]) -> None:
    for command in ("migrate", "relay", "status", "rebase", "demo"):
        done = outbox(environment, command, "--help")
        assert done.returncode == 0
        assert "Example:" in done.stdout, command
    assert outbox(environment, "relay", "--no-such-flag").returncode == 2
    assert outbox(environment, "relay", "--create-stream", "X").returncode == 2


def test_all_mistakes_in_settings_are_named_at_once(environment: dict[str, str]) -> None:
    done = outbox({**environment, "OUTBOX_WINDOW": "x", "OUTBOX_ON_DEAD": "y", "OUTBOX_SCHEMA": "A"}, "relay")
    assert done.returncode == 2
    assert all(name in done.stderr for name in ("OUTBOX_WINDOW", "OUTBOX_ON_DEAD", "OUTBOX_SCHEMA"))


def test_settings_by_flag_environment_and_file(environment: dict[str, str], workplace: Path) -> None:
    url = environment.pop("OUTBOX_DATABASE_URL")
    (workplace / "outbox.toml").write_text(f'database_url = "{url}"\nschema = "other"\n')
    done = outbox(environment, "status", cwd=workplace)
    assert done.returncode == 1
    assert "outbox migrate" in done.stderr
    assert outbox({**environment, "OUTBOX_SCHEMA": "outbox"}, "status", cwd=workplace).returncode == 0
    done = outbox({**environment, "OUTBOX_SCHEMA": "outbox"}, "status", "--schema", "third", cwd=workplace)
    assert done.returncode == 1
    (workplace / "outbox.toml").write_text('databse_url = "x"\n')
    done = outbox(environment, "status", cwd=workplace)
    assert done.returncode == 2
    assert "databse_url" in done.stderr


def test_password_is_never_shown(environment: dict[str, str]) -> None:
    secret = "postgresql://someone:hunter2@127.0.0.1:1/nowhere"
    for words in (["status"], ["migrate"], ["migrate", "--check"]):
        done = outbox({**environment, "OUTBOX_DATABASE_URL": secret}, *words)
        assert done.returncode == 1
        assert "hunter2" not in done.stdout + done.stderr


def test_migrate(environment: dict[str, str], database: str) -> None:
    assert outbox(environment, "migrate", "--check").returncode == 0
    assert outbox(environment, "migrate", "--to", "0").returncode == 0
    done = outbox(environment, "migrate", "--check")
    assert done.returncode == 1
    assert "outbox migrate" in done.stderr
    role = f"cli_{database.rpartition('/')[2]}"
    rows(database, f"CREATE ROLE {role}")
    done = outbox(environment, "migrate", "--application-role", role, "--relay-role", role, "--operator-role", role)
    assert done.returncode == 0
    assert "version 0 -> 1" in done.stdout
    assert value(database, "SELECT has_function_privilege(%s, 'outbox.add(text, text, jsonb, uuid)', 'EXECUTE')", role)
    printed = outbox({}, "migrate", "--sql", "--schema", "printed")
    assert 'CREATE TABLE "printed".events' in printed.stdout


def test_relay_drains_and_status_tells(
    environment: dict[str, str], database: str, broker: Broker, stream: Stream, workplace: Path
) -> None:
    rows(database, "SELECT outbox.add(%s, n::text) FROM generate_series(1, 3) AS n", f"{stream.prefix}.x")
    before = json.loads(outbox(environment, "status", "--json").stdout)
    assert (before["pending_transactions"], before["pending_events"], before["leader"]) == (1, 3, None)
    assert before["oldest_pending_seconds"] > 0
    assert outbox(environment, "relay", "--drain").returncode == 0
    after = json.loads(outbox(environment, "status", "--json").stdout)
    assert (after["pending_transactions"], after["sent_transactions"], after["sent_events"]) == (0, 1, 3)
    assert after["schema_version"] == 1
    (told,) = after["streams"]
    assert (told["name"], told["mode"], told["last_sequence"]) == (stream.name, "chained", 3)
    table = outbox(environment, "status").stdout
    assert stream.name in table
    assert max(map(len, table.splitlines())) <= 80
    with ProcessRelay(workplace, environment) as relay:
        relay.wait_for("TookLead")
        leader = until(lambda: json.loads(outbox(environment, "status", "--json").stdout)["leader"])
        assert leader.endswith(f":{relay.pid}")
        assert relay.stop() == 0
    assert len(broker.read(stream.name)) == 3


def test_create_stream_is_made_once_and_then_left_alone(environment: dict[str, str], broker: Broker) -> None:
    words = ["relay", "--drain", "--create-stream", "CREATED", "--subjects", "created.>"]
    rows(environment["OUTBOX_DATABASE_URL"], "SELECT outbox.add('created.x', 'y')")
    assert outbox(environment, *words).returncode == 0
    config = broker.info("CREATED")["config"]
    assert config["allow_atomic"]
    assert config["storage"] == "file"
    broker.api("STREAM.UPDATE.CREATED", {**config, "max_age": 3_600_000_000_000})
    rows(environment["OUTBOX_DATABASE_URL"], "SELECT outbox.add('created.x', 'z')")
    assert outbox(environment, *words).returncode == 0
    assert [each.payload for each in broker.read("CREATED")] == [b"y", b"z"]
    broker.api("STREAM.DELETE.CREATED")


def test_halt_is_exit_code_1_with_its_remedy(environment: dict[str, str], database: str) -> None:
    rows(database, "UPDATE outbox.relay SET system_identifier = 42")
    done = outbox(environment, "relay", "--drain")
    assert done.returncode == 1
    assert "remedy: " in done.stderr
    assert "outbox rebase" in done.stderr
    assert outbox(environment, "rebase").returncode == 1  # asks, and nobody answers
    assert outbox(environment, "rebase", "--yes").returncode == 0
    assert outbox(environment, "relay", "--drain").returncode == 0
    done = outbox(environment, "rebase", "--stream", "NONE", "--yes")
    assert done.returncode == 1
    assert "does not know" in done.stderr


def test_relay_waits_for_both_servers(environment: dict[str, str], workplace: Path) -> None:
    away = {**environment, "OUTBOX_NATS_URL": "nats://127.0.0.1:1"}
    with ProcessRelay(workplace, away) as relay:
        relay.wait_for("Unreachable", server="nats")
        assert relay.stop() == 0
    away = {**environment, "OUTBOX_DATABASE_URL": "postgresql://postgres@127.0.0.1:1/x"}
    with ProcessRelay(workplace, away) as relay:
        relay.wait_for("Unreachable", server="postgres")
        assert relay.stop() == 0


@pytest.mark.parametrize("number", [15, 2])
def test_stop_signals_end_with_0(environment: dict[str, str], workplace: Path, number: int) -> None:
    with ProcessRelay(workplace, environment) as relay:
        relay.wait_for("Slept")
        relay.send_signal(number)
        assert relay.stop() == 0
        assert relay.happenings()[-1]["event"] == "Stopped"
