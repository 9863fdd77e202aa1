"""Where the benchmark runs: servers, a schema and a stream of its own, a backlog, and a relay as its own process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import nats
import psycopg
from nats.aio.client import Client
from nats.errors import Error as NatsError

from outbox.bench.figures import Storage
from outbox.bench.subjects import turns
from outbox.embedded import Nats, Postgres, free_port
from outbox.errors import Misconfigured, OutboxError
from outbox.operate import migrate
from outbox.postgres.session import stepping_session

SCHEMA, STREAM, BARE = "outbox_bench", "OUTBOX_BENCH", "OUTBOX_BENCH_BARE"
FAR_TXID = 1 << 63  # transaction ids that no server ever comes to
WAIT_SECONDS = 60.0
NOT_DRAINED = 3  # exit code of a drain that is stopped
# What anybody would set on a server of its own: the backlog stays in memory, and no checkpoint falls into a round.
POSTGRES = {"shared_buffers": "1GB", "max_wal_size": "8GB"}


# A backlog at once: as the triggers would write it, but not one commit after the other.
LOAD = """
WITH t AS (
  INSERT INTO {schema}.transactions (txid, event_count)
  SELECT (%(first)s + n)::text::xid8, %(events)s FROM generate_series(1, %(transactions)s) AS n
)
INSERT INTO {schema}.events (txid, subject, payload)
SELECT (%(first)s + n)::text::xid8, (%(subjects)s::text[])[e][1 + n %% %(turns)s],
       decode(repeat('78', %(payload)s), 'hex')
  FROM generate_series(1, %(transactions)s) AS n, generate_series(1, %(events)s) AS e
"""
OUTBOXES = f"SELECT nspname FROM pg_namespace WHERE nspname ~ '^{SCHEMA}(_[0-9]+)?$'"  # noqa: S608 - constants


@dataclass(kw_only=True)
class Site:
    """The servers of a run. Everything that is made on them is called after the benchmark."""

    database_url: str
    nats_url: str
    storage: Storage
    folder: Path
    pgbench: str | None
    loaded: int = field(default=0)

    def sql(self, statement: str, **parameters: Any) -> list[tuple[Any, ...]]:
        """Run one statement by itself."""
        with stepping_session(self.database_url) as connection:  # VACUUM runs in no transaction
            cursor = connection.execute(statement.encode(), parameters or None)
            return cursor.fetchall() if cursor.description else []

    def value(self, statement: str, **parameters: Any) -> Any:
        """The only value of a statement's answer."""
        return self.sql(statement, **parameters)[0][0]

    @property
    def environment(self) -> dict[str, str]:
        """That of a command which works here."""
        ours = {"DATABASE_URL": self.database_url, "NATS_URL": self.nats_url, "SCHEMA": SCHEMA}
        return {**os.environ, **{f"OUTBOX_{name}": value for name, value in ours.items()}}

    def prepare(self, outboxes: int = 1, *, retention: str = "limits") -> None:
        """New schemas, as many as outboxes, and new streams."""
        self.clear()
        for schema in schemas(outboxes):
            migrate.migrate(self.database_url, schema)
        for name in (STREAM, BARE):
            self.create_stream(name, retention=retention)

    def create_stream(self, name: str, *, retention: str = "limits") -> None:
        """A stream of this storage that suits the relay, and takes the subjects of its name."""
        config = {
            "name": name,
            "subjects": [f"{name.lower()}.>"],
            "storage": "memory" if self.storage is Storage.MEMORY else "file",
            "retention": retention,
            "num_replicas": 3 if self.storage is Storage.R3 else 1,
            "allow_atomic": True,
            "allow_direct": True,
        }
        deadline = time.monotonic() + WAIT_SECONDS
        while (answer := self.api(f"STREAM.CREATE.{name}", config)) is None or "error" in answer:
            if time.monotonic() > deadline:
                raise OutboxError(f"stream {name} cannot be made: {answer}", remedy="look at the nats-server's log")
            time.sleep(0.2)

    def wait_until_sent(self, schema: str = SCHEMA) -> None:
        """Wait until nothing is pending, and so no plan speaks of what the next round throws away."""
        deadline = time.monotonic() + WAIT_SECONDS
        while self.value(f"SELECT EXISTS (SELECT FROM {schema}.pending)"):  # noqa: S608
            if time.monotonic() > deadline:
                raise OutboxError(f"the backlog is not sent after {WAIT_SECONDS:.0f} s", remedy="use fewer events")
            time.sleep(0.05)

    def clear(self) -> None:
        """Leave nothing behind."""
        for (schema,) in self.sql(OUTBOXES):
            self.sql(f'DROP SCHEMA "{schema}" CASCADE')
        for name in (STREAM, BARE):
            self.api(f"STREAM.DELETE.{name}")
        self.loaded = 0

    def api(self, call: str, body: object = None) -> dict[str, Any] | None:
        """Ask JetStream; None if it does not answer."""

        async def ask() -> dict[str, Any] | None:
            client = Client()
            try:
                await client.connect(self.nats_url.split(","), connect_timeout=5, max_reconnect_attempts=1)
                payload = json.dumps(body).encode() if body is not None else b""
                answer: dict[str, Any] = json.loads((await client.request(f"$JS.API.{call}", payload, timeout=5)).data)
            except (NatsError, OSError, TimeoutError):
                return None
            finally:
                await client.close()
            return answer

        return asyncio.run(ask())

    def nats_version(self) -> str:
        """Of the server that is connected to first."""

        async def ask() -> str:
            client = await nats.connect(self.nats_url.split(","))
            version = client.connected_server_version
            await client.close()
            return f"{version.major}.{version.minor}.{version.patch}"

        return asyncio.run(ask())

    def last_sequence(self, name: str = STREAM) -> int:
        """Where a stream ends."""
        answer = self.api(f"STREAM.INFO.{name}") or {}
        return int(answer["state"]["last_seq"])

    def load(
        self, transactions: int, events: int, payload: int, *, subjects: Sequence[str] = (), schema: str = SCHEMA
    ) -> None:
        """Add a backlog, all at once."""
        spread = subjects_of(schema, subjects, events)
        sizes = {"events": events, "payload": payload, "subjects": spread, "turns": len(spread[0])}
        with psycopg.connect(self.database_url) as connection:
            for table in ("events", "transactions"):
                connection.execute(f"ALTER TABLE {schema}.{table} DISABLE TRIGGER USER")
            for start in range(0, transactions, 100_000):
                part = min(100_000, transactions - start)
                first = FAR_TXID + self.loaded + start
                given = {"first": first, "transactions": part, **sizes}
                connection.execute(LOAD.format(schema=schema).encode(), given)
            for table in ("events", "transactions"):
                connection.execute(f"ALTER TABLE {schema}.{table} ENABLE TRIGGER USER")
        self.loaded += transactions

    def writers(self, script: str, *, clients: int, seconds: float, rate: float | None = None) -> subprocess.Popen[str]:
        """pgbench with this script; its output says how many transactions a second it made."""
        if self.pgbench is None:
            raise Misconfigured("pgbench is not installed", remedy="install the client tools of PostgreSQL")
        path = self.folder / "script.sql"
        path.write_text(script)
        rated = ["-R", f"{rate:.0f}"] if rate else []
        command = [self.pgbench, "-n", "-M", "prepared", "-c", str(clients), "-j", "2", "-T", f"{seconds:.0f}", *rated]
        return subprocess.Popen(
            [*command, "-f", str(path), self.database_url],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def made(writers: subprocess.Popen[str]) -> float:
    """Wait for pgbench to end; transactions a second."""
    output, errors = writers.communicate()
    for line in output.splitlines():
        if line.startswith("tps = "):
            return float(line.split()[2])
    raise OutboxError(f"pgbench failed: {errors.strip()[-500:]}", remedy="run it by hand against the same database")


def schemas(outboxes: int) -> list[str]:
    """The schemas of so many outboxes."""
    return [SCHEMA, *(f"{SCHEMA}_{number}" for number in range(2, outboxes + 1))]


def subjects_of(schema: str, patterns: Sequence[str], events: int) -> list[list[str]]:
    """The subjects of each event of an outbox, in turn: of these patterns, which are below the stream's prefix.

    Without patterns, each outbox has subjects of its own.
    """
    return turns(patterns, events, SCHEMA if patterns or schema == SCHEMA else f"{SCHEMA}.{schema}")


class RelayProcess:
    """`outbox relay` as users run it: its log, its use of the machine, and its end."""

    def __init__(
        self, site: Site, *flags: str, schema: str = SCHEMA, environment: Mapping[str, str] | None = None
    ) -> None:
        self._log = site.folder / f"relay-{schema}.log"
        self._drains = "--drain" in flags
        environment = {**site.environment, "OUTBOX_SCHEMA": schema, **(environment or {})}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "outbox", "relay", "--log", "json", *flags],
                env=environment,
                cwd=site.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def happened(self, event: str) -> float | None:
        """When this happened first, in seconds since 1970; None if it has not."""
        for line in self._log.read_text(errors="replace").splitlines():
            if line.startswith("{") and json.loads(line)["event"] == event:
                return datetime.fromisoformat(json.loads(line)["time"]).timestamp()
        return None

    def wait_until_ready(self) -> float:
        """Wait until it leads and has found nothing to do, or is at it; when it took the lead."""
        began = self.wait_until_it_leads()
        time.sleep(1)
        return began

    def wait_until_it_leads(self) -> float:
        """Wait until it leads; when it took the lead."""
        deadline = time.monotonic() + WAIT_SECONDS
        while (at := self.happened("TookLead")) is None:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise OutboxError(f"no TookLead in the relay's log: {self._log.read_text()[-500:]}")
            time.sleep(0.02)
        return at

    @property
    def cpu_seconds(self) -> float:
        """What it has used of a core so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def peak_megabytes(self) -> float:
        """The most memory that it had resident so far."""
        for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1000
        return 0.0

    def ends_within(self, seconds: float) -> bool:
        """Wait until it has ended by itself, but not for longer."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        if self._process.returncode:
            raise OutboxError(f"the relay failed: {self._log.read_text()[-1000:]}")
        return self._process.returncode == 0

    def ended(self, seconds: float) -> tuple[float, float]:
        """Wait until it has ended by itself; seconds of CPU and megabytes at the peak."""
        deadline, peak = time.monotonic() + seconds, 0.0
        while True:
            peak = max(peak, self.peak_megabytes)  # the kernel's word at the end may be of the process that forked it
            pid, status, usage = os.wait4(self._process.pid, os.WNOHANG)
            if pid:
                self._process.returncode = os.waitstatus_to_exitcode(status)
                break
            if time.monotonic() > deadline:
                raise OutboxError(f"the relay is not done after {seconds:.0f} s", remedy=f"look at {self._log}")
            time.sleep(0.02)
        if self._process.returncode:
            raise OutboxError(f"the relay failed: {self._log.read_text()[-1000:]}")
        return usage.ru_utime + usage.ru_stime, peak

    def __enter__(self) -> RelayProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        ended = self._process.poll() is not None and not self._drains
        self._process.terminate()
        good = (0, NOT_DRAINED) if self._drains else (0,)
        if (self._process.wait(30) not in good or ended) and kind is None:
            raise OutboxError(f"the relay ended by itself: {self._log.read_text()[-1000:]}")


@contextlib.contextmanager
def site(database_url: str | None, nats_url: str | None, storage: Storage) -> Iterator[Site]:
    """The given servers, or embedded ones with a stream of this storage; ready, and cleared at the end."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="outbox-bench-")))
        pgbench = shutil.which("pgbench")
        if database_url is None:
            postgres = stack.enter_context(Postgres(folder / "postgres", settings=POSTGRES))
            database_url, pgbench = postgres.url(), str(postgres.installation / "bin" / "pgbench")
        if nats_url is None:
            servers = _servers(folder, 3 if storage is Storage.R3 else 1)
            nats_url = ",".join(stack.enter_context(server).url for server in servers)
        there = Site(database_url=database_url, nats_url=nats_url, storage=storage, folder=folder, pgbench=pgbench)
        there.prepare()
        stack.callback(there.clear)
        yield there


def _servers(folder: Path, count: int) -> list[Nats]:
    ports = [free_port() for _ in range(count)]
    routes = ", ".join(f"nats://127.0.0.1:{port}" for port in ports)
    return [
        Nats(
            folder / f"nats{number}",
            config=f"server_name: n{number}\ncluster {{ name: bench, listen: 127.0.0.1:{port}, routes: [{routes}] }}"
            if count > 1
            else "",
        )
        for number, port in enumerate(ports, start=1)
    ]
