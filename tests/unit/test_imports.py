"""`import outbox` is light: an application must not load what only the relay needs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import outbox

OURS = {"outbox", "outbox.errors", "outbox.event", "outbox.schema", "outbox.writer"}
MOST = 290  # modules of the interpreter, of psycopg and of ours; 270 with Python 3.11 and psycopg 3.3


def test_import_loads_nothing_that_only_the_relay_needs() -> None:
    code = "import sys; before = set(sys.modules); import outbox; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = done.stdout.split()
    assert {each for each in modules if each.partition(".")[0] == "outbox"} == OURS
    assert len(modules) <= MOST
    assert not {each.partition(".")[0] for each in modules} & {
        "nats",
        "opentelemetry",
        "typer",
        "alembic",
        "prometheus_client",
        "rich",
        "pydantic",
        "pydantic_settings",
        "uvloop",
    }


@pytest.mark.parametrize(
    ("words", "loads_nats"),
    [
        (["--version"], False),
        (["dead", "list"], False),
        (["replay", "--from", "1", "--to", "2", "--dry-run"], False),
        (["show", "1"], True),
    ],
    ids=lambda each: each[0] if isinstance(each, list) else "",
)
def test_a_command_loads_what_it_needs(words: list[str], loads_nats: bool) -> None:
    """The server is not there: all that a command loads is loaded before it finds out."""
    code = f"""import sys, outbox.cli.app
sys.argv = ["outbox", *{words}]
try:
    outbox.cli.app.main()
except SystemExit:
    pass
print(*sorted({{m.split('.')[0] for m in sys.modules}}))"""
    environment = {**os.environ, "OUTBOX_DATABASE_URL": "postgresql://127.0.0.1:1/none"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    loaded = done.stdout.splitlines()[-1].split()
    assert ("nats" in loaded) is loads_nats
    assert not {"opentelemetry", "alembic", "prometheus_client", "uvloop"} & set(loaded)


def test_all_names_are_there() -> None:
    assert sorted(outbox.__all__) == outbox.__all__
    assert all(hasattr(outbox, name) for name in outbox.__all__)
