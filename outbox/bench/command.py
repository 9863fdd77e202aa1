"""The command: which cases, on which servers, how often; a table for people and JSON for plots."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from outbox.bench.figures import Case, Figures, Kind, Storage, table

console = Console(stderr=True)


def command(
    kinds: Annotated[list[Kind] | None, typer.Argument(help="What to measure; all but flat if none is named.")] = None,
    database_url: Annotated[str | None, typer.Option(help="Postgres to measure on; embedded if none is given.")] = None,
    nats_url: Annotated[str | None, typer.Option(help="NATS to measure on; embedded if none is given.")] = None,
    storage: Annotated[Storage, typer.Option(help="Of the stream.")] = Storage.FILE,
    events: Annotated[list[int] | None, typer.Option(help="Events in a transaction; can be repeated.")] = None,
    payload: Annotated[int, typer.Option(help="Bytes of payload in an event.")] = 256,
    total: Annotated[int, typer.Option(help="Events in a backlog.")] = 100_000,
    rounds: Annotated[int, typer.Option(min=1, help="How often; the medians are shown.")] = 3,
    seconds: Annotated[float, typer.Option(help="Of each measurement that has a duration.")] = 20.0,
    subjects: Annotated[
        list[str] | None,
        typer.Option(
            "--subject",
            help="Of a transaction's first event, second, and so on; the last for the rest. a.{0..99}: 100 in turn.",
        ),
    ] = None,
    outboxes: Annotated[int, typer.Option(min=1, help="That drain, or write, into one stream at the same time.")] = 1,
    foreign: Annotated[
        float, typer.Option(min=0, help="Messages a second that another process writes to the stream beside a drain.")
    ] = 0.0,
    foreign_subjects: Annotated[
        list[str] | None,
        typer.Option("--foreign-subject", help="Of these messages, in turn; by default foreign.{0..9}, no event's."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
) -> None:
    """Measure the relay next to what the two servers allow, and show medians.

    Works in schemas and streams of its own (outbox_bench...), which it removes. Embedded servers need
    outbox-relay[demo]. Nothing else should run on the machine.

    Example: outbox bench drain --events 1 --events 3 --json bench.json
    """
    from outbox.bench.cases import CASES, Sizes
    from outbox.bench.site import site

    if foreign and outboxes > 1:
        raise typer.BadParameter("give one of --foreign and --outboxes")
    chosen = kinds or [kind for kind in Kind if kind is not Kind.FLAT]
    cases: list[Case] = []
    with site(database_url, nats_url, storage) as there, console.status("starting") as status:
        versions = {"postgres": there.value("SHOW server_version"), "nats": there.nats_version()}
        wanted = Sizes(
            events=events or [1, 3],
            payload=payload,
            total=total,
            seconds=seconds,
            subjects=subjects or [],
            outboxes=outboxes,
            foreign=foreign,
            foreign_subjects=foreign_subjects or ["foreign.{0..9}"],
            say=status.update,
        )
        for kind in chosen:
            measured = list(CASES[kind](there, wanted))
            found: list[list[Figures]] = [[] for _ in measured]
            for number in range(rounds):
                for (parameters, measure), figures in zip(measured, found, strict=True):
                    status.update(f"{kind} {parameters}, round {number + 1} of {rounds}")
                    figures.append(measure())
            done = [
                Case(name=kind, parameters=parameters, rounds=figures)
                for (parameters, _), figures in zip(measured, found, strict=True)
            ]
            for group in {tuple(case.rounds[0]): None for case in done}:
                Console().print(table([case for case in done if tuple(case.rounds[0]) == group]))
            cases += done
    if output is not None:
        output.write_text(json.dumps(_report(versions, storage, rounds, cases), indent=1) + "\n")


def _report(versions: dict[str, Any], storage: Storage, rounds: int, cases: list[Case]) -> dict[str, Any]:
    return {
        "command": shlex.join(["outbox", *sys.argv[1:]]),
        "outbox": metadata.version("outbox-relay"),
        **versions,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "storage": storage,
        "rounds": rounds,
        "cases": [case.as_json() for case in cases],
    }
