"""A soak: writers, two relays and random faults for minutes, then the whole stream against the whole database.

`python -m tests.soak --minutes 10 --seed 1` ends in a table of the faults, the transactions, and the anomalies by kind;
exit code 1 if there is any. Everything is reachable through proxies, so that each connection can be hurt. With
`--shared` there are two outboxes with the same subjects and two relays each, and a foreign writer besides.
"""

from __future__ import annotations

import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated

import psycopg
import typer
from rich.console import Console
from rich.table import Table

from outbox.embedded import Nats, Postgres
from outbox.errors import OutboxError
from outbox.operate import pause, replay
from outbox.operate.migrate import migrate
from tests.support.armed import POINTS
from tests.support.bed import Broker, ProcessRelay, rows, value, wait_until_sent
from tests.support.foreign import Foreign, of_outbox
from tests.support.proxy import NatsProxy, Proxy
from tests.support.servers import own_nats, own_postgres
from tests.support.workload import LEDGER, Report, Writers, check

STREAM, PREFIX = "SOAK", "soak"
SCHEMAS = ("outbox", "other")
EXPECTED_ENDS = (0, -signal.SIGKILL)
REFUSED = "lacks allow_atomic"  # a relay that starts just then ends with the remedy, for its supervisor to start again
console = Console()


@dataclass
class Soak:
    """Two servers, two relays of each outbox, and what can be done to them."""

    directory: Path
    postgres: Postgres
    nats: Nats
    to_postgres: Proxy
    to_nats: NatsProxy
    chance: random.Random
    schemas: Sequence[str]
    faults: Counter[str] = field(default_factory=Counter)
    halted: list[str] = field(default_factory=list)
    refused: int = 0
    relays: list[ProcessRelay] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def url(self, schema: str) -> str:
        """Where the writers of this outbox are at home: each has a ledger of its own."""
        return self.postgres.url() + f"?options=-csearch_path%3Dledger_of_{schema}"

    def relay(self, index: int, *, armed: bool = False) -> ProcessRelay:
        environment = {
            "OUTBOX_DATABASE_URL": self.postgres.url().replace(f":{self.postgres.port}/", f":{self.to_postgres.port}/"),
            "OUTBOX_NATS_URL": self.to_nats.url,
            "OUTBOX_ACK_TIMEOUT": "2",
            "OUTBOX_SCHEMA": self.schemas[index % len(self.schemas)],
        }
        armed_at = (self.chance.choice([*POINTS]), "SIGKILL", self.chance.randint(1, 20)) if armed else None
        return ProcessRelay(self.directory, environment, armed=armed_at)

    def replace(self, index: int, *, armed: bool = False) -> None:
        """A new relay where one has ended, was killed or stopped; a halt is kept and told at the end."""
        old = self.relays[index]
        old.send_signal(signal.SIGCONT)
        code = old.stop()
        text = old.log.read_text()  # it is empty if the relay was stopped before it had begun
        if code == 1 and REFUSED in text:
            self.refused += 1
        elif code not in EXPECTED_ENDS and text:
            self.halted.append(f"exit code {code}: {text[-1500:]}")
        old.log.unlink(missing_ok=True)
        self.relays[index] = self.relay(index, armed=armed)

    def one_of_the_relays(self) -> int:
        return self.chance.randrange(len(self.relays))

    # --- faults of relays

    def kill_relay(self) -> None:
        index = self.one_of_the_relays()
        self.relays[index].kill()
        self.replace(index)

    def kill_relay_at_a_stop_point(self) -> None:
        self.replace(index := self.one_of_the_relays(), armed=True)
        self.pause(4)
        if not self.relays[index].running:
            self.replace(index)

    def stop_relay(self) -> None:
        self.replace(self.one_of_the_relays())

    def freeze_relay(self) -> None:
        relay = self.relays[self.one_of_the_relays()]
        relay.send_signal(signal.SIGSTOP)
        self.pause(self.chance.uniform(0.5, 8))
        relay.send_signal(signal.SIGCONT)

    # --- faults of nats-server and the way to it

    def kill_nats(self) -> None:
        self.nats.kill()
        self.pause(self.chance.uniform(0, 1))
        self.nats.start()

    def freeze_nats(self) -> None:
        self.nats.send_signal(signal.SIGSTOP)
        self.pause(self.chance.uniform(0.2, 3))
        self.nats.send_signal(signal.SIGCONT)

    def cut_nats(self) -> None:
        self.to_nats.cut()

    def stall_nats(self) -> None:
        flow = self.chance.choice([self.to_nats.up, self.to_nats.down])
        self.to_nats.change(flow, stalled=True)
        self.pause(self.chance.uniform(0.2, 4))
        self.to_nats.heal()

    def lose_acks(self) -> None:
        self.to_nats.acks = "drop"
        self.pause(self.chance.uniform(0.1, 1))
        self.to_nats.acks = "pass"

    def reorder_acks(self) -> None:
        self.to_nats.acks = "hold"
        self.pause(self.chance.uniform(0.1, 4))
        self.to_nats.release(reverse=True)

    def disable_atomic(self) -> None:
        self.reconfigure(allow_atomic=False)
        self.pause(self.chance.uniform(0.1, 1))
        self.reconfigure(allow_atomic=True)

    def fill_stream(self) -> None:
        self.reconfigure(max_msgs=Broker(self.nats.url).last_sequence(STREAM) + self.chance.randint(0, 500))
        self.pause(self.chance.uniform(0.1, 2))
        self.reconfigure(max_msgs=-1)

    def reconfigure(self, **changes: bool | int) -> None:
        broker = Broker(self.nats.url)
        broker.api(f"STREAM.UPDATE.{STREAM}", {**broker.info(STREAM)["config"], **changes})

    # --- faults of Postgres and the way to it

    def restart_postgres(self) -> None:
        self.postgres.restart()

    def kill_postgres(self) -> None:
        self.postgres.restart(kill=True)

    def crash_postgres(self) -> None:
        self.postgres.crash()
        self.postgres.start()

    def terminate_backends(self) -> None:
        rows(
            self.postgres.url(),
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'outbox relay'",
        )

    def cut_postgres(self) -> None:
        self.to_postgres.cut()

    def stall_postgres(self) -> None:
        flow = self.chance.choice([self.to_postgres.up, self.to_postgres.down])
        self.to_postgres.change(flow, stalled=True)
        self.pause(self.chance.uniform(0.2, 6))
        self.to_postgres.heal()

    def read_only(self) -> None:
        for setting in ("on", "off"):
            with_superuser = "ALTER SYSTEM SET default_transaction_read_only = " + setting
            rows(self.postgres.url() + "?options=-cdefault_transaction_read_only%3Doff", with_superuser)
            rows(self.postgres.url(), "SELECT pg_reload_conf()")
            self.pause(0.5)

    # --- operators at work

    def pause_outbox(self) -> None:
        schema = self.chance.choice(self.schemas)
        with suppress(OutboxError):
            pause.pause(self.postgres.url(), schema, "the soak")
        self.pause(self.chance.uniform(0.2, 2))
        with suppress(OutboxError):  # a server that is down: the next time, or the end, resumes
            pause.resume(self.postgres.url(), schema)

    def replay(self) -> None:
        with suppress(OutboxError, psycopg.OperationalError):
            schema = self.chance.choice(self.schemas)
            highest = f'SELECT coalesce(max(position), 0) FROM "{schema}".transactions'
            last = int(value(self.postgres.url(), highest))
            first = self.chance.randint(1, max(1, last))
            wanted = replay.Wanted(first=first, last=first + self.chance.randint(0, 20))
            replay.replay(self.postgres.url(), schema, wanted)

    def pause(self, seconds: float) -> None:
        self.done.wait(seconds)

    def hurt(self, kinds: list[Callable[[], None]]) -> None:
        """One fault after the other, with pauses, until it is done. Every one is healed before the next of its kind."""
        while not self.done.is_set():
            fault = self.chance.choice(kinds)
            fault()
            with self.lock:
                self.faults[fault.__name__] += 1
            self.pause(self.chance.uniform(0.3, 3.5))

    def parties(self) -> list[list[Callable[[], None]]]:
        relays = [self.kill_relay, self.kill_relay_at_a_stop_point, self.stop_relay, self.freeze_relay]
        nats = [self.kill_nats, self.freeze_nats, self.cut_nats, self.stall_nats, self.lose_acks, self.reorder_acks]
        nats += [self.disable_atomic, self.fill_stream]
        postgres = [self.restart_postgres, self.kill_postgres, self.crash_postgres, self.terminate_backends]
        postgres += [self.cut_postgres, self.stall_postgres, self.read_only]
        return [relays, nats, postgres, [self.pause_outbox, self.replay]]


@contextmanager
def begun(seed: int, schemas: Sequence[str]) -> Iterator[Soak]:
    directory = Path(tempfile.mkdtemp(prefix="outbox-soak-"))
    with ExitStack() as stack:
        postgres = own_postgres(directory / "postgres", synchronous_commit="off", wal_writer_delay="500ms")
        nats = own_nats(directory / "nats")
        for server in (postgres, nats):
            stack.enter_context(server)
        for schema in schemas:
            migrate(postgres.url(), schema)
            rows(postgres.url(), f"CREATE SCHEMA ledger_of_{schema}")
        rows(postgres.url(), "CHECKPOINT")  # with synchronous_commit = off a crash could take the tables away
        Broker(nats.url).create_stream(STREAM, f"{PREFIX}.>", discard="new")  # a full stream must lose nothing
        to_postgres = stack.enter_context(Proxy(postgres.port))
        to_nats = stack.enter_context(NatsProxy(nats.port))
        soak = Soak(directory, postgres, nats, to_postgres, to_nats, random.Random(seed), schemas)
        for schema in schemas:
            rows(soak.url(schema), LEDGER)
        soak.relays = [soak.relay(index) for index in range(2 * len(schemas))]
        try:
            yield soak
        finally:
            for relay in soak.relays:
                relay.kill()


def main(
    minutes: Annotated[float, typer.Option(help="How long faults are injected.")] = 10,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 1,
    shared: Annotated[bool, typer.Option("--shared", help="Two outboxes in one stream, and a foreign writer.")] = False,
    copies: Annotated[bool, typer.Option(help="The foreign writer copies messages of the outboxes, too.")] = True,
) -> None:
    """Random faults under load, then every message against what was committed."""
    schemas = SCHEMAS if shared else SCHEMAS[:1]
    with begun(seed, schemas) as soak, ExitStack() as stack:
        foreign = Foreign(soak.directory, soak.nats.url, STREAM, PREFIX, copies=copies) if shared else None
        if foreign:
            stack.enter_context(foreign)
        threads = 4 // len(schemas)
        writers = [
            Writers(soak.url(each), PREFIX, threads, endless=True, seed=seed, events=4, slow=0.0, schema=each).start()
            for each in schemas
        ]
        _hurt_for(soak, 60 * minutes, writers)
        for each in writers:
            each.stop()
        soak.to_nats.acks = "pass"
        for schema in schemas:
            pause.resume(soak.postgres.url(), schema)
        for index in range(len(soak.relays)):
            soak.replace(index)
        for schema in schemas:
            wait_until_sent(soak.postgres.url(), schema, patience=300)
        if not _passed(soak, foreign, f"seed {seed}, {minutes:g} minutes{', shared' * shared}"):
            raise typer.Exit(1)


def _hurt_for(soak: Soak, seconds: float, writers: Sequence[Writers]) -> None:
    failures: list[BaseException] = []
    threads = [threading.Thread(target=_guarded, args=(soak, kinds, failures)) for kinds in soak.parties()]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    while time.monotonic() - began < seconds and not failures:
        soak.pause(min(10, seconds))
        took, committed = time.monotonic() - began, sum(each.committed for each in writers)
        print(f"{took:4.0f} s: {sum(soak.faults.values())} faults, {committed} transactions", file=sys.stderr)
    soak.done.set()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def _passed(soak: Soak, foreign: Foreign | None, title: str) -> bool:
    """Print what was found; True if it is as promised. What is foreign must be where it was stored, too."""
    written = foreign.written().keys() if foreign else set[int]()
    stored = Broker(soak.nats.url).read(STREAM)
    report = Report()
    for schema in soak.schemas:
        found = check(soak.url(schema), of_outbox(soak.url(schema), stored, schema), schema)
        names = [each.name for each in fields(Report)]
        report = Report(**{name: getattr(report, name) + getattr(found, name) for name in names})
    places = {each.sequence for each in stored if each.foreign}
    displaced = len(written - places)
    dead = sum(int(value(soak.postgres.url(), f'SELECT count(*) FROM "{schema}".dead')) for schema in soak.schemas)
    console.print(title)
    _print(soak, report, {"foreign messages": len(places), "of which displaced": displaced, "dead letters": dead})
    for halt in soak.halted:
        console.print(halt, markup=False)
    return not (report.anomalies or displaced or dead or soak.halted)


def _guarded(soak: Soak, kinds: list[Callable[[], None]], failures: list[BaseException]) -> None:
    try:
        soak.hurt(kinds)
    except BaseException as error:  # noqa: BLE001 - raised again by main
        failures.append(error)


def _print(soak: Soak, report: Report, others: Mapping[str, int]) -> None:
    faults = Table("fault", "times")
    for name, times in sorted(soak.faults.items()):
        faults.add_row(name.replace("_", " "), str(times))
    faults.add_row("all", str(sum(soak.faults.values())), style="bold")
    console.print(faults)
    found = Table("what", "number")
    for kind in ("transactions", "replays", "messages"):
        found.add_row(kind, str(getattr(report, kind)))
    for kind in ("missing", "doubled", "split", "phantom", "disordered", "receipts"):
        found.add_row(kind, str(len(report.anomalies.get(kind, ()))))
    for name, number in others.items():
        found.add_row(name, str(number))
    found.add_row("relays refused at their start", str(soak.refused))
    found.add_row("relays that halted", str(len(soak.halted)))
    console.print(found)


if __name__ == "__main__":
    typer.run(main)
