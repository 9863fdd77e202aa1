"""The command line as a subprocess: exit codes, remedies, JSON, signals; never a traceback, never a password."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from outbox.cli.app import app
from outbox.errors import Weather
from outbox.operate import replay
from outbox.operate.replay import Replayed
from tests.support.bed import Broker, ProcessRelay, rows, until, value
from tests.support.commands import outbox, process
from tests.support.documents import check_command, invocations
from tests.support.servers import Stream


def commands() -> Iterator[tuple[str, ...]]:
    """Every command, those of groups with their group."""
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        below = getattr(command, "commands", None)
        yield from [(name, each) for each in below] if below else [(name,)]


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_help_has_an_example_that_parses_and_fits_the_width(words: tuple[str, ...]) -> None:
    done = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert done.exit_code == 0
    example = re.search(r"Example: (outbox [^\n]+(?:\n +[^\n]+)*)", done.output)
    assert example, done.output
    (said,) = invocations(" ".join(example.group(1).split()))
    check_command(said)
    assert tuple(said[: len(words)]) == words
    assert max(map(len, done.output.splitlines())) <= 80
    assert CliRunner().invoke(app, [*words, "--no-such-flag"]).exit_code == 2


@pytest.mark.parametrize(
    "words",
    [
        "relay --create-stream bad*name --subjects x",
        "relay --no-such-flag",
        "relay --create-stream X",
        "replay --from 5 --to 4",
        "replay --from 0 --to 4",
        "show first",
        "no-such-command",
    ],
)
def test_wrong_usage_is_exit_code_2(words: str) -> None:
    assert CliRunner().invoke(app, words.split()).exit_code == 2


def test_usage(environment: dict[str, str]) -> None:
    unknown = process(environment, "migrate", "--application-role", "nobody_of_that_name")
    assert unknown.returncode == 1
    assert "CREATE ROLE" in unknown.stderr
    assert process(environment, "migrate", "--relay-role", "").returncode == 1
    assert process(environment, "no-such-command").returncode == 2
    assert metadata.version("outbox-relay") in process(environment, "--version").stdout


def test_pause_resume_show_replay_and_purge(environment: dict[str, str], database: str, stream: Stream) -> None:
    rows(database, "SELECT outbox.add(%s, 'x')", f"{stream.prefix}.x")
    assert "no reason" in outbox(environment, "pause", "--why", "no reason").stdout
    assert "already" in outbox(environment, "pause").stdout
    table = outbox(environment, "status").stdout
    assert "no reason" in table
    assert "outbox resume" in table
    assert outbox(environment, "resume").stdout == "resumed\n"
    assert "not paused" in outbox(environment, "resume").stdout
    assert outbox(environment, "relay", "--drain").returncode == 0
    shown = outbox(environment, "show", "1")
    assert shown.returncode == 0
    assert f"receipt: stream {stream.name}, sequences 1 to 1" in shown.stdout
    assert "sequence 1: there" in shown.stdout
    missing = outbox(environment, "show", "99")
    assert missing.returncode == 1
    assert "remedy" in missing.stderr
    away = outbox({**environment, "OUTBOX_NATS_URL": "nats://127.0.0.1:1"}, "show", "1")
    assert away.returncode == 0
    assert "the stream could not be asked" in away.stdout
    assert outbox(environment, "replay", "--from", "1", "--to", "9", "--dry-run").stdout.startswith(
        "1 transaction, 1 event: "
    )
    assert outbox(environment, "replay", "--from", "1", "--to", "9").returncode == 1  # asks, and nobody answers
    assert value(database, "SELECT count(*) FROM outbox.transactions") == 1
    assert outbox(environment, "replay", "--from", "1", "--to", "9", "--yes").returncode == 0
    assert outbox(environment, "relay", "--drain").returncode == 0
    assert "replay of transaction 1" in outbox(environment, "show", "2").stdout
    assert outbox(environment, "purge", "--older-than", "0").stdout == "2 transactions are deleted\n"
    assert "purged" in outbox(environment, "show", "1").stderr
    assert outbox(environment, "purge", "--older-than", "-1").returncode == 2


def test_interrupted_replay_says_where_to_go_on(
    environment: dict[str, str], database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, progress: Callable[[Replayed], None], **__: object) -> Replayed:
        progress(Replayed(transactions=3, last=7))
        raise Weather("the connection was lost")

    for name, each in environment.items():
        monkeypatch.setenv(name, each)
    rows(database, "SELECT outbox.add('a.b', 'x')")
    receipt = "sent_at = now(), stream = 'S', first_sequence = 1, last_sequence = 1"
    rows(database, f"UPDATE outbox.transactions SET {receipt}")
    real = replay.replay
    monkeypatch.setattr(replay, "replay", lambda *a, **k: real(*a, **k) if "dry_run" in k else broken(*a, **k))
    done = CliRunner().invoke(app, ["replay", "--from", "1", "--to", "9", "--yes"])
    assert isinstance(done.exception, Weather)
    assert "replayed up to position 7. Look (outbox show 8), then go on with --from 8" in " ".join(done.stderr.split())


def test_watch_prints_a_line_a_look_and_ends_with_0(environment: dict[str, str], workplace: Path) -> None:
    watching = subprocess.Popen(
        [sys.executable, "-m", "outbox", "status", "--watch", "--json"],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that starts the tests in the background has them ignore it, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - no threads of ours run yet
    )
    with watching:
        assert watching.stdout
        looks = [json.loads(watching.stdout.readline()) for _ in range(2)]
        watching.send_signal(signal.SIGINT)
        assert watching.wait(20) == 0
        assert watching.stderr
        assert watching.stderr.read() == ""
    assert looks[0]["observed_at"] < looks[1]["observed_at"]


def test_tables_fit_80_columns_whatever_is_in_the_rows(
    environment: dict[str, str], database: str, broker: Broker, stream: Stream
) -> None:
    """Long names, long subjects, headers and payloads, and what a terminal would take for a command."""
    long = f"{stream.prefix}.{'long.' * 40}end"
    rows(database, "SELECT outbox.add(%s, %s, %s)", long, "\x1b[31mred" * 99, json.dumps({"a-long-header": "v" * 300}))
    same = "6ba7b810-9dad-11d1-80b4-00c04fd430c8"
    twice = "INSERT INTO outbox.events (subject, payload, message_id) VALUES (%s, 'a', %s), (%s, 'b', %s)"
    rows(database, twice, long, same, long, same)
    assert outbox(environment, "relay", "--drain").returncode == 0
    rows(database, "SELECT outbox.add('nowhere.at.all', 'x')")
    rows(database, "UPDATE outbox.streams SET blocked = repeat('why ', 60), blocked_since = now()")
    rows(database, "UPDATE outbox.relay SET paused_at = now(), paused_why = repeat('because', 30)")
    printing = ("status", "doctor", "config", "show 1", "dead list", "dead show 2", "verify")
    seen = "".join(outbox(environment, *words.split()).stdout for words in printing)
    assert [line for line in seen.splitlines() if len(line) > 80] == []
    assert "\x1b" not in seen
    assert "\\x1b[31mred" in seen


def test_all_mistakes_in_settings_are_named_at_once(environment: dict[str, str]) -> None:
    done = process({**environment, "OUTBOX_WINDOW": "x", "OUTBOX_ON_DEAD": "y", "OUTBOX_SCHEMA": "A"}, "relay")
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
    for words in (["status"], ["migrate"]):
        done = process({**environment, "OUTBOX_DATABASE_URL": secret}, *words)
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
    assert "version 0 -> 2" in done.stdout
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
    assert after["schema_version"] == 2
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
