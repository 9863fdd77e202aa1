"""`outbox dead`: list, show, retry and discard dead letters. Parse, call one function, print, exit."""

from __future__ import annotations

import asyncio
import dataclasses
from datetime import datetime
from typing import Annotated

import typer

from outbox.cli import screen
from outbox.cli.options import AsJson, DatabaseURL, Schema, Yes, confirm, settings
from outbox.config import Settings
from outbox.core.transaction import DeadReason
from outbox.errors import Misconfigured
from outbox.operate import dead
from outbox.operate.dead import DeadLetter, Selection
from outbox.text import counted, to_json

app = typer.Typer(help="List, show, retry and discard dead letters.", no_args_is_help=True)

Positions = Annotated[list[int] | None, typer.Argument(help="Positions of dead letters.")]
Reason = Annotated[
    DeadReason | None, typer.Option(metavar="REASON", help="Only those with this reason, as the list names it.")
]
Subject = Annotated[str | None, typer.Option(help="Only those with an event on this subject; * and > as in NATS.")]
Since = Annotated[datetime | None, typer.Option(help="Only those that died at this time or later.")]
Until = Annotated[datetime | None, typer.Option(help="Only those that died before this time.")]
All = Annotated[bool, typer.Option("--all", help="All that fit; needed where no position is given.")]


def _selected(given: Settings, selection: Selection) -> list[DeadLetter]:
    return dead.dead_letters(given.database_url, given.schema, selection)


def _selection(
    positions: list[int] | None,
    reason: DeadReason | None,
    subject: str | None,
    since: datetime | None,
    until: datetime | None,
) -> Selection:
    return Selection(
        positions=positions or (),
        reason=reason,
        subject=subject,
        since=since and since.astimezone(),
        until=until and until.astimezone(),
    )


@app.command(name="list")
def list_(
    database_url: DatabaseURL = None,
    schema_name: Schema = None,
    reason: Reason = None,
    subject: Subject = None,
    since: Since = None,
    until: Until = None,
    discarded: Annotated[bool, typer.Option("--discarded", help="Discarded ones too.")] = False,
    as_json: AsJson = False,
) -> None:
    """List dead letters that nobody has discarded, by position.

    Example: outbox dead list --reason message-too-large
    """
    given = settings(database_url=database_url, schema=schema_name)
    selection = dataclasses.replace(_selection(None, reason, subject, since, until), discarded=discarded)
    found = _selected(given, selection)
    if as_json:
        print(to_json(found))
    else:
        screen.show_letters(found)


@app.command()
def show(
    position: Annotated[int, typer.Argument(help="Position of the dead letter.")],
    database_url: DatabaseURL = None,
    schema_name: Schema = None,
    as_json: AsJson = False,
) -> None:
    """Show one dead letter with its events.

    Example: outbox dead show 42
    """
    from outbox.operate import show

    given = settings(database_url=database_url, schema=schema_name)
    found = asyncio.run(show.show(given, position))
    if found.dead_at is None and not any(part.dead_at for part in found.parts):
        raise Misconfigured(f"transaction {position} is not a dead letter", remedy="outbox dead list")
    if as_json:
        print(to_json(found))
    else:
        screen.show_transaction(found)


@app.command()
def retry(
    positions: Positions = None,
    database_url: DatabaseURL = None,
    schema_name: Schema = None,
    reason: Reason = None,
    subject: Subject = None,
    since: Since = None,
    until: Until = None,
    every: All = False,
    yes: Yes = False,
) -> None:
    """Make dead letters pending again: they are sent as they are, late, out of their place in the order.

    Example: outbox dead retry 42 43
    """
    given = settings(database_url=database_url, schema=schema_name)
    chosen = _chosen(given, _selection(positions, reason, subject, since, until), every=every)
    confirm(f"Send {counted(len(chosen), 'dead letter')} after all, out of place in the order?", yes=yes)
    done = dead.retry(given.database_url, given.schema, chosen)
    screen.say(f"pending again: {counted(len(done), 'transaction')}")


@app.command()
def discard(
    positions: Positions = None,
    database_url: DatabaseURL = None,
    schema_name: Schema = None,
    reason: Reason = None,
    subject: Subject = None,
    since: Since = None,
    until: Until = None,
    every: All = False,
    yes: Yes = False,
) -> None:
    """Declare that dead letters are never to be sent. They stay in the table, with the time of this.

    Example: outbox dead discard --reason message-too-large --all
    """
    given = settings(database_url=database_url, schema=schema_name)
    chosen = _chosen(given, _selection(positions, reason, subject, since, until), every=every)
    confirm(f"Discard {counted(len(chosen), 'dead letter')} for good?", yes=yes)
    done = dead.discard(given.database_url, given.schema, chosen)
    screen.say(f"discarded: {counted(len(done), 'dead letter')}")


def _chosen(given: Settings, selection: Selection, *, every: bool) -> list[int]:
    """The positions that are meant; a usage error if that is not clear, or if one is not a dead letter."""
    if bool(selection.positions) == every:
        raise typer.BadParameter("name positions, or say --all")
    chosen = [letter.position for letter in _selected(given, selection)]
    if missing := sorted(set(selection.positions) - set(chosen)):
        raise typer.BadParameter(f"not a dead letter that fits: {', '.join(map(str, missing))}; see outbox dead list")
    return chosen
