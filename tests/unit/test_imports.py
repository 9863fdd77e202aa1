"""`import outbox` is light: an application must not load what only the relay needs."""

from __future__ import annotations

import subprocess
import sys

import outbox


def test_import_loads_nothing_that_only_the_relay_needs() -> None:
    code = "import outbox, sys; print(*sorted(m.split('.')[0] for m in sys.modules))"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert not loaded & {
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


def test_command_line_loads_nothing_of_opentelemetry() -> None:
    code = "import outbox.cli, sys; print(*sorted(m.split('.')[0] for m in sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "nats" in loaded
    assert "opentelemetry" not in loaded


def test_all_names_are_there() -> None:
    assert sorted(outbox.__all__) == outbox.__all__
    assert all(hasattr(outbox, name) for name in outbox.__all__)
