"""A soak of liveness: obstacles that strangers make, one after the other, and how soon publishing goes on after each.

`python -m tests.liveness --minutes 10 --seed 1` ends in a table of the obstacles with the longest wait after each, and
the anomalies by kind. Exit code 1 if a transaction waited longer than five seconds after its obstacle was gone, or if
there is any anomaly. Nobody reads what the relay logs.
"""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import psycopg
import typer
from rich.console import Console
from rich.table import Table

from outbox.config import Settings
from outbox.embedded import Nats, Postgres
from outbox.operate import rebase
from tests.support.bed import Broker, rows, until, value
from tests.support.proxy import NatsProxy, Proxy
from tests.support.servers import own_nats, own_postgres, prepared
from tests.support.workload import Report, Writers, check

STREAM, PREFIX = "ALIVE", "alive"
PROMISED = 5.0  # seconds after the obstacle is gone
OLD = "SELECT FROM outbox.transactions WHERE sent_at IS NOT NULL ORDER BY position"
LOCKS = {
    "an old transaction": f"{OLD} LIMIT 1 FOR UPDATE",
    "some events": "SELECT FROM outbox.events ORDER BY txid, id LIMIT 20 FOR UPDATE",
    "what is pending": "SELECT FROM outbox.transactions WHERE sent_at IS NULL LIMIT 3 FOR UPDATE",
    "the row of the relay": "SELECT FROM outbox.relay FOR UPDATE",
    "the streams": "SELECT FROM outbox.streams FOR UPDATE",
    "the row of housekeeping": "SELECT FROM outbox.housekeeping FOR UPDATE",
}
SPOILT = (
    "datestyle = 'SQL, DMY'",
    "search_path = public",
    "statement_timeout = '50ms'",
    "lock_timeout = '1ms'",
    "enable_indexscan = off",
    "default_transaction_isolation = 'serializable'",
    "default_transaction_read_only = on",
    "extra_float_digits = -5",
    "bytea_output = 'escape'",
)
console = Console()


@dataclass
class Alive:
    """Two servers behind proxies, one relay whose log nobody reads, and what strangers do to them."""

    directory: Path
    postgres: Postgres
    nats: Nats
    to_postgres: Proxy
    to_nats: NatsProxy
    chance: random.Random
    streams: int = 0
    waits: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    _relay: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return self.postgres.url()

    @property
    def broker(self) -> Broker:
        return Broker(self.nats.url)

    def start(self) -> None:
        through = self.url.replace(f":{self.postgres.port}/", f":{self.to_postgres.port}/")
        environment = {"OUTBOX_DATABASE_URL": through, "OUTBOX_NATS_URL": self.to_nats.url, "OUTBOX_RETENTION": "0.001"}
        command = [sys.executable, "-m", "outbox", "relay", "--verbose", "--max-batch-messages", "1000"]
        root = str(Path(__file__).parents[1])
        self._relay = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": root, **environment},
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,  # never read
            cwd=self.directory,
        )

    def stop(self) -> None:
        """In an orderly way, full pipe or not."""
        assert self._relay is not None
        assert self._relay.poll() is None, f"the relay has ended: {self._relay.returncode}"
        self._relay.terminate()
        try:
            assert self._relay.wait(20) == 0
        finally:
            self._relay.kill()
            self._relay.wait()
            if self._relay.stderr is not None:
                self._relay.stderr.close()

    def rest(self, low: float, high: float) -> None:
        time.sleep(self.chance.uniform(low, high))

    # --- obstacles: each lasts for as long as its block

    @contextmanager
    def lock(self) -> Iterator[None]:
        with psycopg.connect(self.url) as stranger:
            stranger.execute(LOCKS[self.chance.choice(list(LOCKS))].encode())
            yield

    @contextmanager
    def tiny_queue(self) -> Iterator[None]:
        """The stream has room for a few more, again and again, as if consumers took some."""
        end = time.monotonic() + self.chance.uniform(1, 5)
        while time.monotonic() < end:
            self._configure(max_msgs=self.broker.last_sequence(STREAM) + self.chance.randint(1, 40))
            self.rest(0.1, 0.4)
        yield
        self._configure(max_msgs=-1)

    @contextmanager
    def hang_ups(self) -> Iterator[None]:
        for _ in range(self.chance.randint(3, 20)):
            self.to_nats.cut()
            self.rest(0.05, 0.4)
        yield

    @contextmanager
    def slow_links(self) -> Iterator[None]:
        proxy: Proxy = self.chance.choice([self.to_nats, self.to_postgres])
        flow = self.chance.choice([proxy.up, proxy.down])
        proxy.change(flow, rate=self.chance.choice([20_000, 100_000, 500_000]))
        yield
        proxy.heal()

    @contextmanager
    def role_settings(self) -> Iterator[None]:
        rows(self.url, f"ALTER DATABASE postgres SET {self.chance.choice(SPOILT)}")
        self.to_postgres.cut()
        yield
        with psycopg.connect(self.url, autocommit=True, options="-cdefault_transaction_read_only=off") as connection:
            connection.execute("ALTER DATABASE postgres RESET ALL")

    @contextmanager
    def full_servers(self) -> Iterator[None]:
        """Neither server lets anybody in for a while."""
        proxy = self.chance.choice([self.to_nats, self.to_postgres])
        proxy.refusing = True
        proxy.cut()
        yield
        proxy.heal()

    @contextmanager
    def retired_stream(self) -> Iterator[None]:
        """A stream is deleted, what is for it waits, another one takes its subjects, and the operator retires it."""
        self.streams += 1
        name = f"R{self.streams}"
        self.broker.create_stream(name, f"{name.lower()}.>")
        rows(self.url, "SELECT outbox.add(%s, 'x')", f"{name.lower()}.x")
        until(lambda: self.broker.last_sequence(name) == 1, what="the stream in use")
        self.broker.api(f"STREAM.DELETE.{name}")
        rows(self.url, "SELECT outbox.add(%s, 'y')", f"{name.lower()}.x")
        yield
        self.broker.create_stream(f"{name}B", f"{name.lower()}.>")
        self.stop()
        asyncio.run(rebase.retire_stream(Settings(database_url=self.url, nats_url=self.nats.url), name))
        self.start()

    def _configure(self, **changes: Any) -> None:
        self.broker.api(f"STREAM.UPDATE.{STREAM}", {**self.broker.info(STREAM)["config"], **changes})

    def obstacles(self) -> list[Callable[[], Any]]:
        return [self.lock] * 3 + [
            self.tiny_queue,
            self.hang_ups,
            self.slow_links,
            self.role_settings,
            self.full_servers,
            self.retired_stream,
        ]

    def hurt(self) -> float:
        """One obstacle, and how long those that were committed before its end waited after that."""
        obstacle = self.chance.choice(self.obstacles())
        with obstacle():
            self.rest(0.5, 6)
        gone = time.monotonic()
        now = value(self.url, "SELECT clock_timestamp()")
        late = "SELECT count(*) FROM outbox.pending WHERE sealed_at < %s"
        until(lambda: value(self.url, late, now) == 0, patience=60, what=f"all sent after {obstacle.__name__}")
        waited = time.monotonic() - gone
        self.waits[obstacle.__name__].append(waited)
        return waited


@contextmanager
def begun(seed: int) -> Iterator[Alive]:
    directory = Path(tempfile.mkdtemp(prefix="outbox-alive-"))
    directory.chmod(0o755)
    with ExitStack() as stack:
        postgres, nats = own_postgres(directory / "postgres"), own_nats(directory / "nats")
        for server in (postgres, nats):
            stack.enter_context(server)
        prepared(postgres)
        Broker(nats.url).create_stream(STREAM, f"{PREFIX}.>", discard="new")
        to_postgres, to_nats = stack.enter_context(Proxy(postgres.port)), stack.enter_context(NatsProxy(nats.port))
        alive = Alive(directory, postgres, nats, to_postgres, to_nats, random.Random(seed))
        alive.start()
        try:
            yield alive
        finally:
            alive.stop()


def run(seconds: float, seed: int, tell: Callable[[str], None] = lambda _: None) -> tuple[Alive, Report]:
    """Obstacles for so long under load, and every message against what was committed."""
    with begun(seed) as alive:
        writers = Writers(alive.url, PREFIX, threads=2, endless=True, seed=seed, events=4, slow=0.01).start()
        began = time.monotonic()
        while (took := time.monotonic() - began) < seconds:
            waited = alive.hurt()
            tell(f"{took:4.0f} s: {writers.committed} transactions, waited {waited:.1f} s")
        writers.stop()
        until(lambda: value(alive.url, "SELECT count(*) FROM outbox.pending") == 0, patience=60, what="all sent")
        assert value(alive.url, "SELECT count(*) FROM outbox.dead") == 0
        return alive, check(alive.url, alive.broker.read(STREAM))


def main(
    minutes: Annotated[float, typer.Option(help="How long obstacles are made.")] = 10,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 1,
) -> None:
    """Obstacles under load: how soon it goes on after each, and every message against what was committed."""
    alive, report = run(60 * minutes, seed, lambda line: print(line, file=sys.stderr))
    found = Table("obstacle", "times", "longest wait after it, s")
    for name, waits in sorted(alive.waits.items()):
        found.add_row(name.replace("_", " "), str(len(waits)), f"{max(waits):.1f}")
    console.print(f"seed {seed}, {minutes:g} minutes: {report.transactions} transactions")
    console.print(found)
    console.print({kind: len(each) for kind, each in report.anomalies.items()} or "no anomalies")
    if report.anomalies or max(max(waits) for waits in alive.waits.values()) > PROMISED:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
