"""The servers that the tests share: one migrated template database per server and session, a clone per test; one
nats-server per session, a stream per test. Tests that kill a server start their own.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from outbox.config import Settings
from outbox.embedded import Nats, Postgres
from tests.support.bed import Broker
from tests.support.servers import Stream, clone, numbers, own_nats, templated

ROOM = 8 << 30  # bytes that a run may take for a while


def pytest_configure() -> None:
    """Data in memory where the system has room for it: the tests kill processes, not machines, and a disk is slow."""
    memory = Path("/dev/shm")
    if "TMPDIR" not in os.environ and os.access(memory, os.W_OK):
        there = os.statvfs(memory)
        if there.f_bavail * there.f_frsize > ROOM and not there.f_flag & os.ST_NOEXEC:
            os.environ["TMPDIR"] = str(memory)  # for the commands that the tests run, too
            tempfile.tempdir = None


@pytest.fixture(scope="session")
def home() -> Iterator[Path]:
    """A short-lived directory that the servers' unprivileged user can reach."""
    directory = Path(tempfile.mkdtemp(prefix="outbox-tests-"))
    yield directory
    if not os.environ.get("OUTBOX_TESTS_KEEP"):
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres(home: Path) -> Iterator[Postgres]:
    """PostgreSQL with the default settings: the relay is woken by notifications."""
    server = templated(home / f"postgres-{next(numbers)}")
    yield server
    server.stop()


@pytest.fixture(scope="session")
def two_phase_postgres(home: Path) -> Iterator[Postgres]:
    """PostgreSQL that allows prepared transactions: the relay polls."""
    server = templated(home / f"postgres-{next(numbers)}", max_prepared_transactions="50")
    yield server
    server.stop()


@pytest.fixture
def database(postgres: Postgres) -> str:
    """URL of a fresh migrated database."""
    return clone(postgres)


@pytest.fixture
def two_phase_database(two_phase_postgres: Postgres) -> str:
    """URL of a fresh migrated database where transactions may be prepared."""
    return clone(two_phase_postgres)


@pytest.fixture(scope="session")
def nats(home: Path) -> Iterator[Nats]:
    """nats-server with file storage."""
    server = own_nats(home / "nats")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def broker(nats: Nats) -> Broker:
    return Broker(nats.url)


@pytest.fixture
def stream(broker: Broker) -> Iterator[Stream]:
    """A fresh R1 file stream."""
    number = next(numbers)
    made = Stream(f"S{number}", f"t{number}")
    broker.create_stream(made.name, f"{made.prefix}.>")
    yield made
    broker.api(f"STREAM.DELETE.{made.name}")


@pytest.fixture
def settings(database: str, nats: Nats) -> Settings:
    return Settings(database_url=database, nats_url=nats.url)


@pytest.fixture
def environment(database: str, nats: Nats) -> dict[str, str]:
    """The environment of a relay or command as a subprocess."""
    return {"OUTBOX_DATABASE_URL": database, "OUTBOX_NATS_URL": nats.url}


@pytest.fixture
def workplace(home: Path) -> Path:
    """A directory of one test that the servers' unprivileged user can reach."""
    directory = home / f"test-{next(numbers)}"
    directory.mkdir()
    return directory
