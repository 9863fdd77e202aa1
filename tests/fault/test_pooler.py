"""A pooler in front of Postgres: in session mode it works, in transaction mode it is refused with the remedy."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from outbox.config import Settings
from outbox.doctor import examine as doctor
from outbox.doctor.check import Colour
from outbox.embedded import Nats, Postgres, accepts_connections, free_port
from outbox.errors import Misconfigured
from tests.support.bed import Broker, ProcessRelay, ThreadRelay, rows, until, value
from tests.support.servers import Stream

CONFIG = """
[databases]
{database} = host=127.0.0.1 port={server} dbname={database} user=postgres
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = {mode}
"""


@contextmanager
def pooler(postgres: Postgres, database: str, directory: Path, mode: str) -> Iterator[str]:
    """PgBouncer in this mode; yields the URL of the database through it. Skips where it is not installed."""
    binary = shutil.which("pgbouncer", path="/usr/sbin:/usr/bin:/usr/local/bin:/usr/local/sbin")
    if binary is None:
        pytest.skip("PgBouncer is not installed on this machine")
    port, name = free_port(), database.rpartition("/")[2]
    config = directory / "pgbouncer.ini"
    config.write_text(CONFIG.format(database=name, server=postgres.port, port=port, mode=mode))
    for folder in (directory.parent, directory):
        folder.chmod(0o755)
    process = subprocess.Popen([binary, "-q", str(config)], stderr=subprocess.DEVNULL, **postgres._identity())
    try:
        until(lambda: accepts_connections(port), what="PgBouncer")
        yield f"postgresql://postgres@127.0.0.1:{port}/{name}"
    finally:
        process.terminate()
        process.wait()


def test_transaction_mode_is_refused(
    postgres: Postgres, database: str, nats: Nats, stream: Stream, workplace: Path
) -> None:
    """Fault: session locks that hold nothing. Promise: refused at the start, before anything is published."""
    rows(database, "SELECT outbox.add(%s, 'x')", f"{stream.prefix}.x")
    with pooler(postgres, database, workplace, "transaction") as url:
        error = ThreadRelay(Settings(database_url=url, nats_url=nats.url), drain=True).ended()
    assert isinstance(error, Misconfigured)
    assert "pooler in transaction mode" in error.message
    assert "direct connection" in error.remedy
    assert Broker(nats.url).read(stream.name) == []


def test_session_mode_works(postgres: Postgres, database: str, nats: Nats, stream: Stream, workplace: Path) -> None:
    rows(database, "SELECT outbox.add(%s, 'x')", f"{stream.prefix}.x")
    with pooler(postgres, database, workplace, "session") as url:
        assert ThreadRelay(Settings(database_url=url, nats_url=nats.url), drain=True).ended() is None
    assert len(Broker(nats.url).read(stream.name)) == 1


def test_the_doctor_and_the_metrics_leave_nothing_behind(
    postgres: Postgres, database: str, environment: dict[str, str], workplace: Path
) -> None:
    """Fault: the connections of the pool are the application's too. Promise: refused whatever runs beside, and the
    application goes on as before.
    """
    with pooler(postgres, database, workplace, "transaction") as url:
        through = environment | {"OUTBOX_DATABASE_URL": url}
        checks = asyncio.run(doctor.examine(Settings(database_url=url, nats_url=environment["OUTBOX_NATS_URL"])))
        assert [each.name for each in checks if each.colour is Colour.RED] == ["pooler"]
        for _ in range(3):
            with ProcessRelay(workplace, through, "--drain", "--listen", "127.0.0.1:0") as relay:
                until(lambda: not relay.running)
                assert relay.stop() == 1
                assert "pooler in transaction mode" in relay.log.read_text()
        for _ in range(5):
            rows(url, "SELECT outbox.add('a.b', 'x')")
        assert value(url, "SHOW enable_seqscan") == "on"
