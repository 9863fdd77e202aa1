"""A model of everything at once: random writes, commits, roll-backs and faults on real servers, then every promise.

Hypothesis draws the sequences and shrinks one that fails; those it has found are named tests at the end of this file.
Three nats-servers with a replicated stream, a PostgreSQL, each behind a proxy; relays that are killed in mid-air.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, settings, strategies
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from outbox import Outbox
from outbox.config import BatchMode, Settings
from outbox.embedded import Postgres
from outbox.operate import pause, purge, replay
from tests.support.bed import ThreadRelay, until, value, wait_until_sent
from tests.support.cluster import Cluster, three_nodes
from tests.support.proxy import NatsProxy, Proxy
from tests.support.servers import clone
from tests.support.workload import check

SESSIONS = strategies.integers(0, 2)
numbers = itertools.count(1)
EXAMPLES = int(os.environ.get("OUTBOX_TESTS_EXAMPLES", "8"))


class World(RuleBasedStateMachine):
    """What can happen, one thing at a time."""

    postgres: Postgres
    cluster: Cluster

    @initialize()
    def begin(self) -> None:
        self.name = f"M{next(numbers)}"
        self.cluster.create_stream(self.name, f"{self.name}.>")
        self.url = clone(self.postgres)
        self.database = Proxy(self.postgres.port)
        self.brokers = [NatsProxy(server.port) for server in self.cluster.servers.values()]
        self.sessions: list[psycopg.Connection[tuple[object, ...]] | None] = [None] * 3
        self.added = [0] * 3
        self.markers = [uuid4()] * 3
        self.locks: list[set[int]] = [set(), set(), set()]
        self.relays: list[ThreadRelay] = []
        self.start(single=False, rival=False)

    # --- the application

    @rule(session=SESSIONS, events=strategies.integers(1, 5), aggregate=strategies.integers(1, 3))
    def write(self, session: int, events: int, aggregate: int) -> None:
        if any(other != session and aggregate in self._locks(other) for other in range(3)):
            return  # it would wait for another session of this very thread
        if self.sessions[session] is None:
            self.sessions[session] = psycopg.connect(self.url)
            self.added[session], self.markers[session] = 0, uuid4()
            self.locks[session] = set()
        connection, marker = self.sessions[session], self.markers[session]
        assert connection is not None
        for _ in range(events):
            message_id, number = uuid4(), self.added[session]
            payload = json.dumps({"marker": str(marker), "n": number})
            Outbox().add(connection, f"{self.name}.x", payload, message_id=message_id)
            connection.execute("INSERT INTO ledger VALUES (%s, %s, %s)", [message_id, marker, number])
            self.added[session] += 1
        if aggregate not in self.locks[session]:
            self.locks[session].add(aggregate)
            bump = "UPDATE aggregates SET version = version + 1 WHERE id = %s RETURNING version"
            row = connection.execute(bump, [aggregate]).fetchone()
            assert row is not None
            connection.execute("INSERT INTO bumps VALUES (%s, %s, %s)", [marker, aggregate, row[0]])

    def _locks(self, session: int) -> set[int]:
        return self.locks[session] if self.sessions[session] is not None else set()

    @rule(session=SESSIONS)
    def commit(self, session: int) -> None:
        self._end(session, commit=True)

    @rule(session=SESSIONS)
    def roll_back(self, session: int) -> None:
        self._end(session, commit=False)

    def _end(self, session: int, *, commit: bool) -> None:
        connection, self.sessions[session] = self.sessions[session], None
        if connection is not None:
            with connection:
                if not commit:
                    connection.rollback()

    # --- relays

    @precondition(lambda self: len(self.relays) < 2)
    @rule(single=strategies.booleans(), rival=strategies.booleans())
    def start(self, single: bool, rival: bool) -> None:
        """A relay, or a second one: a standby, or a rival that does not ask for the lock."""
        given = Settings(
            database_url=self.url.replace(f":{self.postgres.port}/", f":{self.database.port}/"),
            nats_url=",".join(proxy.url for proxy in self.brokers),
            batch=BatchMode.TRANSACTION if single else BatchMode.PACKED,
            ack_timeout=1.0,
        )
        self.relays.append(ThreadRelay(given, locked=not rival))

    @precondition(lambda self: self.relays)
    @rule(which=strategies.integers(0, 1))
    def kill(self, which: int) -> None:
        self.relays.pop(which % len(self.relays)).kill()

    @precondition(lambda self: self.relays)
    @rule()
    def restart(self) -> None:
        error = self.relays.pop(0).stop()
        assert error is None, error
        self.start(single=False, rival=False)

    # --- faults

    @rule()
    def cut_nats(self) -> None:
        for proxy in self.brokers:
            proxy.cut()

    @rule()
    def cut_postgres(self) -> None:
        self.database.cut()

    @rule(lost=strategies.sampled_from(["drop", "hold", "pass"]))
    def lose_acks(self, lost: str) -> None:
        for proxy in self.brokers:
            if lost == "pass":
                proxy.release(reverse=True)
            proxy.acks = lost

    @rule()
    def step_down(self) -> None:
        self.cluster.step_down(self.name)

    @rule()
    def purge_old(self) -> None:
        purge.purge(self.url, "outbox", 0)

    # --- operators

    @rule(low=strategies.integers(1, 20), count=strategies.integers(1, 5))
    def replay(self, low: int, count: int) -> None:
        replay.replay(self.url, "outbox", replay.Wanted(first=low, last=low + count))

    @rule()
    def pause(self) -> None:
        pause.pause(self.url, "outbox", "by the model")

    @rule()
    def resume(self) -> None:
        pause.resume(self.url, "outbox")

    @rule(seconds=strategies.sampled_from([0.02, 0.1, 0.4]))
    def wait(self, seconds: float) -> None:
        threading.Event().wait(seconds)

    # --- the promises

    def teardown(self) -> None:
        if not hasattr(self, "relays"):
            return
        for session in range(3):
            self._end(session, commit=True)
        for proxy in self.brokers:
            proxy.release()
        try:
            dead = [relay for relay in self.relays if relay.error is not None]
            assert not dead, dead[0].error
            for relay in self.relays[:-1]:
                relay.stop()
            self.relays = self.relays[-1:]
            if not self.relays:
                self.start(single=False, rival=False)
            pause.resume(self.url, "outbox")
            wait_until_sent(self.url, patience=40)
            stored = self.cluster.read(self.name)
            report = check(self.url, stored)
            assert report.anomalies == {}
            originals = [each for each in stored if not each.replay_of]
            assert len(originals) == value(self.url, "SELECT count(*) FROM ledger")
        finally:
            for relay in self.relays:
                relay.kill()
            for each in (self.database, *self.brokers):
                each.__exit__()
            self.cluster.delete_stream(self.name)


@pytest.fixture(scope="module")
def world(postgres: Postgres, home: Path) -> Iterator[type[World]]:
    with three_nodes(home / "model") as cluster:
        World.postgres, World.cluster = postgres, cluster
        until(lambda: cluster.broker)
        yield World


def run(world: type[World], examples: int) -> None:
    run_state_machine_as_test(
        world,
        settings=settings(
            max_examples=examples,
            stateful_step_count=25,
            deadline=None,
            phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.target, Phase.shrink],
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )


def test_every_promise_under_random_sequences(world: type[World]) -> None:
    """Fault: any of them, in any order. Promise: whole, once, in order, nothing missing, nothing made up."""
    run(world, EXAMPLES)


@pytest.mark.long
def test_every_promise_under_many_random_sequences(world: type[World]) -> None:
    """The same for longer; OUTBOX_TESTS_EXAMPLES says how many sequences."""
    run(world, 10 * EXAMPLES)
