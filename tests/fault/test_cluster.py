"""A stream of three replicas: its leader changes, its servers die, its quorum is lost. Promises 1 to 3 and 5."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from outbox.config import Settings
from outbox.core.telemetry import Marked
from tests.support.bed import ThreadRelay, until, wait_until_sent
from tests.support.cluster import Cluster, three_nodes
from tests.support.faults import assert_ended_well, more_sent
from tests.support.foreign import Company
from tests.support.workload import Writers

SLOW = 60  # an election can take ten seconds, and on a loaded machine more


@pytest.fixture(scope="module")
def cluster(home: Path) -> Iterator[Cluster]:
    """One cluster for all tests of this module; each leaves it with three servers that run."""
    with three_nodes(home / "cluster") as made:
        yield made


def under_load(database: str, cluster: Cluster, name: str, company: Company) -> tuple[Writers, ThreadRelay]:
    cluster.create_stream(name, f"{name}.>")
    company.joins(cluster.url, name, name)
    writers = Writers(database, name, threads=4, endless=True, seed=113).start()
    relay = ThreadRelay(Settings(database_url=database, nats_url=cluster.url))
    relay.wait_for(Marked)
    return writers, relay


def ended_well(database: str, cluster: Cluster, name: str, writers: Writers, relay: ThreadRelay) -> None:
    more_sent(database, 100, patience=SLOW)
    writers.stop()
    wait_until_sent(database, patience=SLOW)
    assert relay.stop() is None
    cluster.leader(name)
    assert_ended_well(writers, cluster.broker, name)


@pytest.mark.parametrize("times", [2, pytest.param(8, marks=pytest.mark.long)])
def test_leader_steps_down(database: str, cluster: Cluster, company: Company, times: int) -> None:
    """Fault: the stream's leader steps down several times with batches in flight. Promise: whole, once, in order."""
    name = company.named(f"STEPS{times}")
    writers, relay = under_load(database, cluster, name, company)
    for _ in range(times):
        old = cluster.leader(name)
        cluster.step_down(name)
        until(lambda o=old: cluster.leader(name) != o, patience=SLOW)  # type: ignore[misc]
        more_sent(database, patience=SLOW)
    ended_well(database, cluster, name, writers, relay)


@pytest.mark.long
def test_leader_is_killed(database: str, cluster: Cluster, company: Company) -> None:
    """Fault: SIGKILL of the stream's leader, three times, and restart. Promise: whole, once, in order."""
    name = company.named("KILLS")
    writers, relay = under_load(database, cluster, name, company)
    for _ in range(3):
        server = cluster.servers[cluster.leader(name)]
        server.kill()
        more_sent(database, patience=SLOW)
        server.start()
        more_sent(database, patience=SLOW)
    ended_well(database, cluster, name, writers, relay)


@pytest.mark.parametrize("seconds", [5, pytest.param(20, marks=pytest.mark.long)])
def test_quorum_is_lost_by_freezing(database: str, cluster: Cluster, company: Company, seconds: int) -> None:
    """Fault: two of three servers are frozen for a while. Promise: waited out; what is acked late counts once."""
    name = company.named(f"FROZEN{seconds}")
    writers, relay = under_load(database, cluster, name, company)
    leader = cluster.leader(name)
    frozen = [server for each, server in cluster.servers.items() if each != leader]
    for server in frozen:
        server.send_signal(signal.SIGSTOP)
    threading.Event().wait(seconds)
    for server in frozen:
        server.send_signal(signal.SIGCONT)
    ended_well(database, cluster, name, writers, relay)


@pytest.mark.long
def test_quorum_is_lost_by_killing(database: str, cluster: Cluster, company: Company) -> None:
    """Fault: SIGKILL of two of three servers, the leader among them, for 20 s. Promise: waited out, nothing is lost."""
    name = company.named("KILLED")
    writers, relay = under_load(database, cluster, name, company)
    leader = cluster.leader(name)
    killed = [cluster.servers[leader], next(server for each, server in cluster.servers.items() if each != leader)]
    for server in killed:
        server.kill()
    threading.Event().wait(20)
    for server in killed:
        server.start()
    ended_well(database, cluster, name, writers, relay)
