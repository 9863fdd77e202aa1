"""`outbox bench` as a subprocess: it measures what it says, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from outbox.embedded import Nats
from tests.support.bed import Broker, rows


def bench(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "outbox", "bench", *words]
    environment = {**os.environ, "COLUMNS": "80"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd, env=environment, check=False)


def test_bench_on_given_servers_measures_and_clears_up(database: str, nats: Nats, tmp_path: Path) -> None:
    report = tmp_path / "bench.json"
    servers = ["--database-url", database, "--nats-url", nats.url]
    sizes = ["--events", "3", "--total", "3000", "--rounds", "1", "--seconds", "1", "--json", str(report)]
    done = bench("drain", "idle", "verify", *servers, *sizes, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "drain of publish only" in " ".join(done.stdout.split())
    found = json.loads(report.read_text())
    assert [case["case"] for case in found["cases"]] == ["drain", "idle", "verify", "verify"]
    drain = found["cases"][0]["figures"]
    ratio = drain["drain_events_per_second"]["median"] / drain["publish_only_events_per_second"]["median"]
    assert drain["drain_of_publish_only"]["median"] == pytest.approx(ratio)
    assert rows(database, "SELECT nspname FROM pg_namespace WHERE nspname LIKE 'outbox_bench%%'") == []
    assert "error" in Broker(nats.url).info("OUTBOX_BENCH")


def test_bench_without_a_server_says_what_to_do(tmp_path: Path) -> None:
    done = bench(
        "idle", "--database-url", "postgresql://127.0.0.1:1/none", "--nats-url", "nats://127.0.0.1:1", cwd=tmp_path
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "outbox: connection" in done.stderr
