"""First figures: `python -m tests.drain` drains a backlog of 3-event transactions, packed and one batch each.

Starts its own servers (R1 file stream), writes the backlog, then times `--drain` runs in turn; prints medians of
three. A measurement of speed, not a test.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import psycopg
import typer
from rich.console import Console
from rich.table import Table

from outbox import embedded, migrating
from outbox.config import BatchMode, Settings
from tests.bed import Broker, ThreadRelay, rows

INSERT = """
INSERT INTO outbox.events (subject, headers, payload)
SELECT 'drain.' || n, '{"tenant": "acme"}', convert_to(repeat('x', 256), 'UTF8') FROM generate_series(1, 3) AS n
"""


def fill(url: str, transactions: int) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SET synchronous_commit = off")
        for _ in range(transactions):
            connection.execute(INSERT.encode())


def drain(url: str, nats_url: str, mode: BatchMode) -> float:
    """Seconds from the start of the relay, connecting included, until nothing is pending."""
    started = time.perf_counter()
    relay = ThreadRelay(Settings(database_url=url, nats_url=nats_url, batch=mode), drain=True)
    error = relay.ended(patience=600)
    if error is not None:
        raise error
    return time.perf_counter() - started


def main(events: int = 30_000, rounds: int = 3) -> None:
    """Print events per second of draining, medians of `rounds`."""
    rates: dict[BatchMode, list[float]] = {mode: [] for mode in BatchMode}
    with (
        tempfile.TemporaryDirectory(prefix="outbox-drain-") as directory,
        embedded.both(Path(directory)) as (postgres, nats),
    ):
        migrating.migrate(postgres.url())
        broker = Broker(nats.url)
        broker.create_stream("DRAIN", "drain.>")
        for _ in range(rounds):
            for mode, part in ((BatchMode.PACKED, events), (BatchMode.TRANSACTION, events // 10)):
                fill(postgres.url(), part // 3)
                before = broker.last_sequence("DRAIN")
                seconds = drain(postgres.url(), nats.url, mode)
                assert broker.last_sequence("DRAIN") - before == part // 3 * 3
                rates[mode].append(part / seconds)
        version = rows(postgres.url(), "SHOW server_version")[0][0]
    table = Table("batches", "events/s (median)", "lowest", "highest")
    for mode, each in rates.items():
        table.add_row(mode, *(f"{value:,.0f}" for value in (statistics.median(each), min(each), max(each))))
    Console().print(f"{events:,} events in 3-event transactions (a tenth of that with one batch each), 256 B")
    Console().print(f"PostgreSQL {version}, nats-server with an R1 file stream, {rounds} rounds in turn")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
