"""The same backlog through this relay and through its peers, in turn within each round, to fresh streams.

Embedded servers only, since the peers' tables go where their packages put them. A peer runs in the interpreter of its
own virtual environment; see peer_worker.py.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from outbox.bench.drain import drain, wal_bytes
from outbox.bench.figures import Case, Figures
from outbox.bench.site import STREAM, Site, Storage, site
from outbox.errors import Misconfigured, OutboxError

WORKER = Path(__file__).with_name("peer_worker.py")
PACKAGES = ("nats-outbox", "faststream-outbox", "faststream", "nats-py", "SQLAlchemy", "asyncpg", "uvloop")
RATE, RATIO = "drain_events_per_second", "outbox_of_this"
CPU, WAL = "relay_cpu_us_per_event", "wal_bytes_per_event"
SHOWN = {RATE: "events/s", RATIO: "outbox is", CPU: "CPU µs/event", WAL: "WAL bytes/event"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A tool, the most events that it is given (a slow one gets a smaller backlog), and how it drains them."""

    name: str
    most: int
    drain: Callable[..., Figures]

    def total(self, wanted: int, events: int) -> int:
        """Events in its backlog, in whole transactions."""
        return min(wanted, self.most) // events * events


def outbox(there: Site, transactions: int, events: int, payload: int, *flags: str) -> Figures:
    """This relay, as `outbox bench drain` measures it: from the lead to the last mark."""
    there.prepare()
    found = drain(there, transactions=transactions, events=events, payload=payload, flags=flags)
    return {name: found[name] for name in (RATE, CPU, WAL)}


def peer(there: Site, transactions: int, events: int, payload: int, *, name: str, python: Path, relays: int) -> Figures:
    """A peer in so many processes: from the go until everything is in the stream and no row is left to send."""
    there.prepare()
    sizes = {"--transactions": transactions, "--events": events, "--payload": payload}
    at = {"--database-url": there.database_url, "--nats-url": there.nats_url, "--stream": STREAM}
    given = [name, "--subject", STREAM.lower(), *(str(each) for pair in {**sizes, **at}.items() for each in pair)]
    subprocess.run([python, WORKER, "load", *given], check=True, cwd=there.folder)
    before = wal_bytes(there)
    found = _run_together([[str(python), str(WORKER), "drain", *given]] * relays, there.folder)
    total = transactions * events
    if (stored := there.last_sequence()) != total:
        raise OutboxError(f"{stored} messages were stored by {name}, not {total}: the run does not count")
    return {
        RATE: total / (max(each["ended"] for each in found) - min(each["began"] for each in found)),
        CPU: sum(each["cpu_seconds"] for each in found) / total * 1e6,
        WAL: (wal_bytes(there) - before) / total,
    }


def _run_together(commands: list[list[str]], folder: Path) -> list[dict[str, float]]:
    """Start workers, tell them to go when all are ready, and read what each has found."""
    with ExitStack() as stack:
        workers = []
        for command in commands:
            worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder)
            stack.callback(_end, worker)
            workers.append(worker)
        for worker in workers:
            if _line(worker) != "ready":
                raise OutboxError(f"a peer did not become ready: {worker.args!r}")
        for worker in workers:
            print("go", file=worker.stdin, flush=True)
        return [json.loads(_line(worker)) for worker in workers]


def _line(worker: subprocess.Popen[str]) -> str:
    line = worker.stdout.readline().strip() if worker.stdout else ""
    if not line:
        raise OutboxError(f"a peer ended with {worker.wait()}; see its error above")
    return line


def _end(worker: subprocess.Popen[str]) -> None:
    """Let it end by itself, which a closed input makes it do, or make it."""
    try:
        worker.communicate(timeout=10)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.communicate()


def tools(python: Path, peer_events: int, relays: int) -> list[Tool]:
    """What is compared; the first is what the others are set against."""
    peers = [
        Tool(name=name, most=peer_events, drain=partial(peer, name=name, python=python, relays=relays))
        for name in ("nats-outbox", "faststream-outbox")
    ]
    return [
        Tool(name="outbox", most=sys.maxsize, drain=outbox),
        Tool(name="outbox --batch transaction", most=3_000, drain=_by_transaction),
        *peers,
    ]


def _by_transaction(there: Site, transactions: int, events: int, payload: int) -> Figures:
    return outbox(there, transactions, events, payload, "--batch", "transaction")


def versions(python: Path) -> dict[str, str]:
    """The peers' packages, and Python as they have it."""
    if not python.exists():
        raise Misconfigured(f"there is no {python}", remedy="make the peers' environment; see benchmarks/README.md")
    script = (
        "import json, platform, sys; from importlib.metadata import version; "
        "print(json.dumps({'python': platform.python_version()} | {name: version(name) for name in sys.argv[1:]}))"
    )
    made = subprocess.run([python, "-c", script, *PACKAGES], check=True, capture_output=True, text=True)
    found: dict[str, str] = json.loads(made.stdout)
    return found


def main(
    python: Annotated[Path, typer.Option(help="Interpreter of the peers' virtual environment.")] = Path(
        ".venv-peers/bin/python"
    ),
    events: Annotated[int, typer.Option(help="Events in the backlog of the relay.")] = 99_999,
    peer_events: Annotated[int, typer.Option(help="Events in the backlog of a peer, at most.")] = 30_000,
    per: Annotated[list[int] | None, typer.Option(help="Events in a transaction; can be repeated.")] = None,
    payload: Annotated[int, typer.Option(help="Bytes of payload in an event.")] = 256,
    rounds: Annotated[int, typer.Option(min=1, help="How often; the medians are shown.")] = 3,
    relays: Annotated[int, typer.Option(min=1, help="Processes of a peer at once.")] = 1,
    output: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
) -> None:
    """Drain a backlog through this relay and its peers, and show events a second and ratios.

    Nothing else should run on the machine.
    """
    python = Path(os.path.abspath(python))  # noqa: PTH100 - a resolved link would leave the virtual environment
    compared = tools(python, peer_events, relays)
    report: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.peers", *sys.argv[1:]]),
        "outbox": metadata.version("outbox-relay"),
        "peers": versions(python),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "rounds": rounds,
        "relays_of_a_peer": relays,
    }
    cases: list[Case] = []
    with site(None, None, Storage.FILE) as there, Console(stderr=True).status("starting") as status:
        report |= {"postgres": there.value("SHOW server_version"), "nats": there.nats_version()}
        for each in per or [3, 1]:
            sizes = [tool.total(events, each) for tool in compared]
            found: list[list[Figures]] = [[] for _ in compared]
            for number in range(rounds):
                for tool, total, figures in zip(compared, sizes, found, strict=True):
                    status.update(f"{tool.name}, {each} events in a transaction, round {number + 1} of {rounds}")
                    figures.append(tool.drain(there, total // each, each, payload))
            made = _cases(compared, sizes, each, payload, found)
            Console().print(_table(made))
            cases += made
    report["cases"] = [case.as_json() for case in cases]
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=1) + "\n")


def _cases(compared: list[Tool], sizes: list[int], events: int, payload: int, found: list[list[Figures]]) -> list[Case]:
    """Each tool's rounds, with how many times its rate the first tool reached in the same round."""
    return [
        Case(
            name="peers",
            parameters={"tool": tool.name, "events": events, "payload": payload, "total": total},
            rounds=[
                {RATE: own[RATE], RATIO: first[RATE] / own[RATE], **own}
                for own, first in zip(figures, found[0], strict=True)
            ],
        )
        for tool, total, figures in zip(compared, sizes, found, strict=True)
    ]


def _table(cases: list[Case]) -> Table:
    """A tool a line: the medians, and below them the lowest and the highest round."""
    shown = Table(title=f"{cases[0].parameters['events']} events in a transaction", title_justify="left")
    for name in ("", "backlog", *SHOWN.values()):
        shown.add_column(name, justify="right" if name else "left")
    for case in cases:
        figures = (_cell(case, name) for name in SHOWN)
        shown.add_row(case.parameters["tool"], f"{case.parameters['total']:,}", *figures)
    return shown


def _cell(case: Case, name: str) -> str:
    values = [each[name] for each in case.rounds]
    form, unit = (",.1f", "x") if name == RATIO else (",.0f", "")
    spread = f"\n{min(values):{form}}-{max(values):{form}}" if len(values) > 1 else ""
    return f"{case.median(name):{form}}{unit}{spread}"


if __name__ == "__main__":
    typer.run(main)
