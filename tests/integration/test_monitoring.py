"""Health, readiness and metrics over HTTP, and what systemd is told: from a relay as its own process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from outbox.core.telemetry import TookLead
from outbox.core.transaction import DeadReason
from outbox.embedded import Nats, free_port
from outbox.monitor import http as server
from outbox.monitor.http import Health
from outbox.monitor.metrics import Metrics
from outbox.operate import pause
from tests.support import promql
from tests.support.bed import Broker, ProcessRelay, rows, until, wait_until_sent
from tests.support.proxy import RESET
from tests.support.servers import Stream, own_nats, own_postgres, prepared

ALERTS = yaml.safe_load((Path(__file__).parents[2] / "docs/deploy/monitoring/alerts.yml").read_text())["groups"][0][
    "rules"
]
Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


class Scraped(ProcessRelay):
    """A relay that serves health and metrics."""

    def __init__(self, directory: Path, environment: dict[str, str], *flags: str) -> None:
        self.port = free_port()
        super().__init__(directory, environment, "--listen", f"127.0.0.1:{self.port}", *flags)

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except urllib.error.URLError:
            return 0, ""

    def ready(self) -> tuple[int, Any]:
        status, body = self.get("/readyz")
        return status, json.loads(body) if body else {}

    def series(self) -> Series:
        _, body = self.get("/metrics")
        found: Series = {}
        for family in text_string_to_metric_families(body):
            for sample in family.samples:
                labels = {name: each for name, each in sample.labels.items() if name != "schema"}
                found[sample.name, tuple(sorted(labels.items()))] = sample.value
        return found

    def alerts(self) -> set[str]:
        """The alerts whose expressions are true of what this relay exports now."""
        _, body = self.get("/metrics")
        scraped: dict[promql.Labels, list[float | None]] = {}
        for family in text_string_to_metric_families(body):
            for sample in family.samples:
                labels = {"__name__": sample.name, "job": "outbox", "instance": "relay", **sample.labels}
                scraped[frozenset(labels.items())] = [sample.value]
        samples = promql.Samples(interval=1.0, series=scraped)
        expressions = {rule["alert"]: promql_parser.parse(rule["expr"]) for rule in ALERTS}
        return {name for name, each in expressions.items() if promql.value_of(each, samples, 0.0)}

    def value(self, name: str, **labels: str) -> float | None:
        return self.series().get((f"outbox_{name}", tuple(sorted(labels.items()))))

    def until(self, name: str, wanted: float, **labels: str) -> None:
        until(lambda: self.value(name, **labels) == wanted, what=f"{name} {labels} to be {wanted}")


def add(url: str, subject: str, events: int = 1) -> None:
    rows(url, "SELECT outbox.add(%s, n::text) FROM generate_series(1, %s) AS n", subject, events)


def test_leader_and_standby_are_ready_and_count(
    database: str, environment: dict[str, str], stream: Stream, workplace: Path
) -> None:
    add(database, f"{stream.prefix}.x", 3)
    with Scraped(workplace, environment) as leader:
        until(lambda: leader.ready() == (200, {"ready": True, "state": "leader", "problem": None, "held": {}}))
        wait_until_sent(database)
        with Scraped(workplace, environment) as standby:
            until(lambda: standby.ready()[1].get("state") == "standby")
            assert standby.ready()[0] == 200
            standby.until("leader_present", 1)
            assert (leader.value("leader"), standby.value("leader")) == (1, 0)
            pause.pause(database, "outbox", "a test")
            leader.wait_for("Paused")
            add(database, f"{stream.prefix}.x", 2)
            for relay in (leader, standby):
                relay.until("pending_events", 2)
                relay.until("paused", 1)
                assert (relay.value("oldest_pending_age_seconds") or 0) > 0
            pause.resume(database, "outbox")
            leader.until("published_events_total", 5, stream=stream.name)
            assert leader.value("published_transactions_total", stream=stream.name) == 2
            assert leader.value("batches_total", outcome="stored") == 2
            assert leader.value("batch_messages_sum") == 5
            assert leader.value("batch_commit_duration_seconds_count") == 2
            assert leader.value("batches_in_flight") == 0
            leader.until("stream_last_sequence", 5, stream=stream.name)
            leader.until("pending_events", 0)
            assert leader.value("oldest_pending_age_seconds") == 0
            assert (leader.value("delivery_lag_seconds_count") or 0) >= 1
            assert standby.value("published_events_total", stream=stream.name) == 0
        assert leader.get("/healthz") == (200, '{"alive": true}\n')
        assert leader.get("/nothing")[0] == 404
        assert leader.stop() == 0


def test_dead_letters_and_blocks_are_counted(
    database: str, environment: dict[str, str], stream: Stream, workplace: Path
) -> None:
    same = "6ba7b810-9dad-11d1-80b4-00c04fd430c8"
    twice = "INSERT INTO outbox.events (subject, payload, message_id) VALUES (%s, 'a', %s), (%s, 'b', %s)"
    rows(database, twice, f"{stream.prefix}.x", same, f"{stream.prefix}.x", same)
    with Scraped(workplace, environment) as relay:
        relay.wait_for("Died")
        assert relay.value("dead_transactions_total", reason="duplicate-message-id") == 1
        relay.until("dead_letters", 1)
        add(database, "nowhere.x")
        relay.until("blocked", 1)
        rows(database, "UPDATE outbox.transactions SET dead_at = now(), dead_reason = 'by hand' WHERE position = 2")
        relay.until("blocked", 0)


def test_dead_broker_shows_and_does_not_end_the_relay(workplace: Path, database: str) -> None:
    """The lag grows by the database's clock, readiness says why, and liveness stays: a restart would not help."""
    broker = own_nats(workplace / "nats")
    environment = {"OUTBOX_DATABASE_URL": database, "OUTBOX_NATS_URL": broker.url}
    with broker:
        Broker(broker.url).create_stream("DIES", "dies.>")
        relay = Scraped(workplace, environment)
        with relay:
            relay.until("connected", 1, server="nats")
            broker.kill()
            add(database, "dies.x")
            rows(database, "UPDATE outbox.transactions SET sealed_at = sealed_at - interval '10 minutes'")
            until(lambda: relay.ready()[0] == 503)
            assert relay.ready()[1]["problem"].startswith("nats: ")
            relay.until("connected", 0, server="nats")
            until(lambda: (relay.value("oldest_pending_age_seconds") or 0) > 600)
            assert {"OutboxLagging", "OutboxNATSDisconnected"} <= relay.alerts()
            assert (relay.value("connection_failures_total", server="nats") or 0) > 0
            assert relay.get("/healthz")[0] == 200
            broker.start()
            until(lambda: relay.ready()[0] == 200)
            relay.until("published_events_total", 1, stream="DIES")
            relay.until("oldest_pending_age_seconds", 0)
            assert not {"OutboxLagging", "OutboxNATSDisconnected"} & relay.alerts()


def test_dead_database_shows_and_is_observed_again(workplace: Path, nats: Nats) -> None:
    with own_postgres(workplace / "postgres") as postgres:
        prepared(postgres)
        relay = Scraped(workplace, {"OUTBOX_DATABASE_URL": postgres.url(), "OUTBOX_NATS_URL": nats.url})
        with relay:
            until(lambda: relay.ready()[0] == 200)
            until(lambda: relay.value("observed_timestamp_seconds"))
            postgres.kill()
            until(lambda: relay.ready()[0] == 503)
            seen = relay.value("observed_timestamp_seconds")
            assert relay.value("leader") == 0
            until(lambda: math.isnan(relay.value("pending_transactions") or 0))
            assert relay.get("/healthz")[0] == 200
            postgres.start()
            until(lambda: relay.ready()[0] == 200)
            until(lambda: relay.value("observed_timestamp_seconds") != seen)


def test_all_series_are_there_from_the_start() -> None:
    """But those by stream, which nobody knows yet; and no label holds what an application chooses."""
    registry = CollectorRegistry()
    Metrics("shop", "1.2.3", registry)
    by_stream = {
        "outbox_published_transactions",
        "outbox_published_events",
        "outbox_stream_blocked",
        "outbox_stream_contended",
        "outbox_stream_shared",
        "outbox_stream_last_sequence",
    }
    families = {family.name: family for family in registry.collect()}
    assert {name for name, family in families.items() if not family.samples} == by_stream
    labels = {name for family in families.values() for sample in family.samples for name in sample.labels}
    assert labels == {"schema", "outcome", "reason", "server", "version", "le"}
    assert {sample.labels["schema"] for family in families.values() for sample in family.samples} == {"shop"}
    reasons = {sample.labels["reason"] for sample in families["outbox_dead_transactions"].samples}
    assert reasons == set(DeadReason)


def test_loop_that_hangs_is_not_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one thing that a restart cures; the server answers from a thread of its own."""
    monkeypatch.setattr(server, "LOOP_SECONDS", 0.05)
    go_on = threading.Event()

    def get(port: int) -> int:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=10) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            error.close()
            return error.code
        finally:
            go_on.set()

    async def hang() -> None:
        with server.serving("127.0.0.1:0", CollectorRegistry(), Health()) as port:
            assert await asyncio.to_thread(get, port) == 200
            go_on.clear()
            asked = asyncio.get_running_loop().run_in_executor(None, get, port)
            go_on.wait(10)  # the loop hangs here
            assert await asked == 503

    asyncio.run(hang())


def test_odd_requests_are_answered_and_harm_nothing() -> None:
    """HEAD as GET, but for the body; what else a client thinks of is refused; who is slow or rude gives way."""

    def asked(port: int, request: bytes) -> tuple[int, dict[str, str], bytes]:
        with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
            client.sendall(request)
            head, _, body = b"".join(iter(lambda: client.recv(65536), b"")).partition(b"\r\n\r\n")
        first, *rest = head.decode().split("\r\n")
        return int(first.split()[1]), dict(line.split(": ", 1) for line in rest), body

    def work(port: int) -> None:
        for path in ("/healthz", "/readyz", "/metrics", "/nothing"):
            got = asked(port, f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            head = asked(port, f"HEAD {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            old = asked(port, f"GET {path} HTTP/1.0\r\n\r\n".encode())
            assert got[0] == head[0] == old[0] == {"/nothing": 404, "/readyz": 503}.get(path, 200)
            assert head[1]["Content-Length"] == got[1]["Content-Length"] or path == "/metrics"
            assert head[2] == b""
            assert got[2]
        for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "BREW"):
            body = b"x" * 50_000
            status, headers, _ = asked(
                port, f"{method} /healthz HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
            )
            assert (status, headers["Allow"]) == (405, "GET, HEAD")
        for request in (b"GET /healthz HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00 \x01 \x00\r\n\r\n"):
            with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
                client.sendall(request)
                assert b"Error code" in b"".join(iter(lambda: client.recv(65536), b""))
        for request in (b"GET /healthz HTTP/1.1\r\nX: " + b"y" * 100_000, b"GET /" + b"z" * 70_000):
            with contextlib.suppress(ConnectionError):  # more than the server reads: the answer may be lost
                assert asked(port, request + b"\r\n\r\n")[0] >= 400
        strange = b"application/openmetrics-text; version=odd; q=x,, ;;text/plain;version=1.x; escaping=no"
        assert asked(port, b"GET /metrics HTTP/1.1\r\nAccept: " + strange + b"\r\n\r\n")[0] in (200, 406)
        with contextlib.ExitStack() as stack:
            for _ in range(3 * server.MOST_CLIENTS):
                slow = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))
                slow.sendall(b"GET /hea")
            assert asked(port, b"GET /healthz HTTP/1.1\r\n\r\n")[0] == 200
            until(lambda: sum(each.name.startswith("Thread-") for each in threading.enumerate()) <= 40)
        rude = socket.create_connection(("127.0.0.1", port))
        rude.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        rude.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        rude.close()
        assert asked(port, b"GET /healthz HTTP/1.1\r\n\r\n")[0] == 200

    async def serve() -> None:
        registry = CollectorRegistry()
        Metrics("shop", "1.2.3", registry)
        with server.serving("127.0.0.1:0", registry, Health()) as port:
            await asyncio.to_thread(work, port)

    asyncio.run(serve())


def test_address_that_is_taken_is_told(environment: dict[str, str], workplace: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        relay = ProcessRelay(workplace, environment, "--listen", f"127.0.0.1:{taken.getsockname()[1]}")
        with relay:
            until(lambda: not relay.running)
            assert relay.stop() == 1
        said = relay.log.read_text()
        assert "cannot listen on" in said
        assert "OUTBOX_LISTEN" in said


@pytest.fixture
def notified(workplace: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(workplace / "notify"))
        listening.settimeout(20)
        yield listening


def test_systemd_is_told(environment: dict[str, str], workplace: Path, notified: socket.socket) -> None:
    """Ready when it leads, alive in between, and stopping at the end."""
    given = {"NOTIFY_SOCKET": str(workplace / "notify"), "WATCHDOG_USEC": "200000"}
    heard: list[str] = []
    with ProcessRelay(workplace, environment | given) as relay:
        while sum(words == "WATCHDOG=1" for words in heard) < 3 or not any("READY=1" in words for words in heard):
            heard.append(notified.recv(4096).decode())
        assert relay.stop() == 0
        while "STOPPING=1" not in heard:
            heard.append(notified.recv(4096).decode())
    assert [words for words in heard if "READY=1" in words] == ["READY=1\nSTATUS=leading, epoch 1"]


def test_systemd_that_does_not_listen_stops_nothing(
    environment: dict[str, str], database: str, stream: Stream, workplace: Path, notified: socket.socket
) -> None:
    """Fault: the queue of the supervisor's socket is full. Promise: all goes on, and what matters is said later."""
    given = {"NOTIFY_SOCKET": str(workplace / "notify"), "WATCHDOG_USEC": "2000"}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as strange:
        strange.setblocking(False)
        strange.connect(given["NOTIFY_SOCKET"])
        with contextlib.suppress(BlockingIOError):
            while True:
                strange.send(b"full")
    with ProcessRelay(workplace, environment | given) as relay:
        relay.wait_for("Slept")
        add(database, f"{stream.prefix}.x")
        wait_until_sent(database)
        while b"READY=1" not in notified.recv(4096):
            pass
        assert relay.stop() == 0


def test_health_follows_what_happens() -> None:
    health = Health()
    assert health.problem
    health.happened(TookLead(epoch=1))
    assert health.problem == "postgres: not connected yet"
