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


OWN = "own.{0..4}"
COMPANY = {
    "foreign": ["drain", "--foreign", "50", "--foreign-subject", OWN, "--subject", "hot", "--subject", OWN],
    "drains": ["drain", "--outboxes", "2", "--subject", OWN],
    "latency": ["latency", "--outboxes", "2"],
}


@pytest.mark.parametrize("what", ["foreign", *(pytest.param(each, marks=pytest.mark.long) for each in [*COMPANY][1:])])
def test_bench_in_a_stream_with_other_writers(database: str, nats: Nats, tmp_path: Path, what: str) -> None:
    report = tmp_path / "bench.json"
    servers = ["--database-url", database, "--nats-url", nats.url]
    sizes = ["--events", "3", "--total", "600", "--rounds", "1", "--seconds", "5", "--json", str(report)]
    done = bench(*COMPANY[what], *servers, *sizes, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    ((case),) = json.loads(report.read_text())["cases"]
    found = {name: figure["median"] for name, figure in case["figures"].items()}
    if what == "foreign":
        assert case["parameters"]["onto"] == OWN
        assert found["foreign_messages_per_second"] > 0
        assert found["beside_foreign_sent_of_backlog"] > 0
    elif what == "drains":
        assert 0 < found["together_sent_of_backlogs"] <= 1
    else:
        assert found["commit_to_stored_p99_ms"] <= found["commit_to_stored_p99_of_the_slowest_outbox_ms"]
    assert rows(database, "SELECT nspname FROM pg_namespace WHERE nspname LIKE 'outbox_bench%%'") == []


def test_bench_without_a_server_says_what_to_do(tmp_path: Path) -> None:
    done = bench(
        "idle", "--database-url", "postgresql://127.0.0.1:1/none", "--nats-url", "nats://127.0.0.1:1", cwd=tmp_path
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "outbox: connection" in done.stderr
