"""PgBouncer in front of a test's database."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from outbox.embedded import Postgres, accepts_connections, free_port
from tests.support.bed import until

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
