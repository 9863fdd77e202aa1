"""The command line: parse, call one function, print, exit. Exit codes: 0 done, 1 failed, 2 usage."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from outbox import admin, demo, migrating, schema, telemetry
from outbox.config import PREFIX, BatchMode, Durability, OnDead, OnUnrouted, Settings
from outbox.errors import OutboxError
from outbox.relay import Relay

app = typer.Typer(
    name="outbox",
    help="Transactional outbox for Postgres and NATS JetStream. Settings: flag, else OUTBOX_… in the environment, "
    "else outbox.toml. Exit codes: 0 done, 1 failed, 2 usage.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
out = Console()
err = Console(stderr=True, soft_wrap=True)


class LogFormat(StrEnum):
    """How the relay says what happens, on standard error."""

    HUMAN = "human"
    JSON = "json"


DatabaseURL = Annotated[str | None, typer.Option("--database-url", help="Postgres URL (OUTBOX_DATABASE_URL).")]
NatsURL = Annotated[str | None, typer.Option("--nats-url", help="NATS URL or URLs (OUTBOX_NATS_URL).")]
Schema = Annotated[str | None, typer.Option("--schema", help="Postgres schema of the outbox (OUTBOX_SCHEMA).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def main() -> None:
    """Entry point: errors are shown with their remedy, never as a traceback."""
    try:
        app()
    except OutboxError as error:
        err.print(f"outbox: {error}", markup=False, highlight=False)
        sys.exit(1)


def settings(**flags: Any) -> Settings:
    """Settings from the given flags and their sources; prints every mistake at once and exits with 2."""
    try:
        return Settings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        for each in error.errors():
            name = ".".join(map(str, each["loc"]))
            err.print(f"outbox: setting {name} ({PREFIX}{name.upper()}): {each['msg']}", markup=False)
        raise typer.Exit(2) from None


@app.command()
def migrate(
    database_url: DatabaseURL = None,
    schema_name: Schema = None,
    sql: Annotated[bool, typer.Option("--sql", help="Print the SQL instead; needs no database.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Change nothing; fail if behind or drifted.")] = False,
    to: Annotated[int, typer.Option(help="Schema version to go to; 0 removes the outbox.")] = schema.VERSION,
    application_role: Annotated[str | None, typer.Option(help="Existing role that may add events.")] = None,
    relay_role: Annotated[str | None, typer.Option(help="Existing role that the relay runs as.")] = None,
    operator_role: Annotated[str | None, typer.Option(help="Existing role of operators.")] = None,
) -> None:
    """Bring the database to the current schema version, and grant to roles.

    Example: outbox migrate --database-url postgresql://owner@db/shop --application-role shop
    """
    given = settings(database_url=database_url, schema=schema_name)
    if sql:
        print(migrating.migration_sql(given.schema, to=to), end="")
        for line in schema.grants(given.schema, application=application_role, relay=relay_role, operator=operator_role):
            print(f"{line};")
        return
    if check:
        problems = migrating.problems(given.database_url, given.schema)
        for problem in problems:
            err.print(problem, markup=False)
        if problems:
            raise typer.Exit(1)
        out.print(f"schema {given.schema} is at version {schema.VERSION}, without drift", markup=False)
        return
    before, after = migrating.migrate(given.database_url, given.schema, to=to)
    migrating.grant(
        given.database_url, given.schema, application=application_role, relay=relay_role, operator=operator_role
    )
    out.print(f"schema {given.schema}: version {before} -> {after}", markup=False)


@app.command()
def relay(
    database_url: DatabaseURL = None,
    nats_url: NatsURL = None,
    schema_name: Schema = None,
    drain: Annotated[bool, typer.Option("--drain", help="Exit with 0 when nothing is pending.")] = False,
    batch: Annotated[BatchMode | None, typer.Option(help="Pack transactions, or one batch each.")] = None,
    max_batch_messages: Annotated[int | None, typer.Option(help="Messages in one batch, at most.")] = None,
    window: Annotated[int | None, typer.Option(help="Batches in flight, at most.")] = None,
    on_dead: Annotated[OnDead | None, typer.Option(help="After a dead letter.")] = None,
    on_unrouted: Annotated[OnUnrouted | None, typer.Option(help="A subject that is in no stream.")] = None,
    durability: Annotated[Durability | None, typer.Option(help="Wait for asynchronous standbys too.")] = None,
    create_stream: Annotated[str | None, typer.Option(metavar="NAME", help="First create this stream.")] = None,
    subjects: Annotated[list[str] | None, typer.Option(help="Subjects of the stream to create.")] = None,
    log: Annotated[LogFormat, typer.Option(help="How to say what happens, on standard error.")] = LogFormat.HUMAN,
    verbose: Annotated[bool, typer.Option("--verbose", help="Say every page, batch and mark too.")] = False,
) -> None:
    """Publish pending transactions until SIGTERM or SIGINT; start a second one as a standby.

    Example: outbox relay --nats-url nats://nats:4222 --create-stream SHOP --subjects 'shop.>'
    """
    if bool(create_stream) != bool(subjects):
        raise typer.BadParameter("--create-stream and --subjects go together")
    given = settings(
        database_url=database_url,
        nats_url=nats_url,
        schema=schema_name,
        batch=batch,
        max_batch_messages=max_batch_messages,
        window=window,
        on_dead=on_dead,
        on_unrouted=on_unrouted,
        durability=durability,
    )
    _run(
        _relay(
            given,
            drain=drain,
            create=(create_stream, subjects) if create_stream and subjects else None,
            tell=_teller(log, verbose=verbose),
        )
    )


async def _relay(
    given: Settings, *, drain: bool, create: tuple[str, list[str]] | None, tell: telemetry.Listener
) -> None:
    process = Relay(given, tell=tell, create_stream=create)
    loop = asyncio.get_running_loop()
    # Not the loop's own handlers: its end brings the default back, and a second signal would kill us on the way out.
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(process.stop))
    try:
        await process.run(drain=drain)
    finally:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)


@app.command()
def status(database_url: DatabaseURL = None, schema_name: Schema = None, as_json: AsJson = False) -> None:
    """Show what is pending, sent and dead, who leads, and each stream.

    Example: outbox status --json
    """
    given = settings(database_url=database_url, schema=schema_name)
    found = admin.status(given.database_url, given.schema)
    if as_json:
        print(json.dumps(dataclasses.asdict(found), default=str, indent=2))
    else:
        _print_status(found)


@app.command()
def rebase(
    database_url: DatabaseURL = None,
    schema_name: Schema = None,
    stream: Annotated[str | None, typer.Option(help="Only accept this stream as it is now.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Accept a re-created stream (--stream), or a restored or moved database, after the relay has halted on it.

    Example: outbox rebase --stream SHOP --yes
    """
    given = settings(database_url=database_url, schema=schema_name)
    what = f"stream {stream}" if stream else f"the database of schema {given.schema}"
    if not yes and not typer.confirm(f"Accept {what} as it is? What is not known to be stored is sent again."):
        raise typer.Exit(1)
    if stream:
        admin.accept_stream(given.database_url, given.schema, stream)
        out.print(f"stream {stream} is accepted as it is; start the relay", markup=False)
    else:
        out.print(f"the outbox has the new id {admin.rebase(given.database_url, given.schema)}", markup=False)


app.command(name="demo")(demo.command)


def _run(work: Any) -> None:
    try:
        import uvloop
    except ImportError:
        asyncio.run(work)
    else:
        uvloop.run(work)


def _teller(log: LogFormat, *, verbose: bool) -> telemetry.Listener:
    quiet = () if verbose else (telemetry.PageRead, telemetry.BatchSent, telemetry.Marked, telemetry.Slept)

    def tell(happening: telemetry.Happening) -> None:
        if isinstance(happening, quiet):
            return
        if log is LogFormat.JSON:
            at = datetime.now(UTC).isoformat(timespec="milliseconds")
            fields = {
                "time": at,
                "pid": os.getpid(),
                "event": type(happening).__name__,
                **dataclasses.asdict(happening),
            }
            print(json.dumps(fields, default=str), file=sys.stderr, flush=True)
        else:
            line = f"{datetime.now().astimezone():%H:%M:%S.%f} [{os.getpid()}] {telemetry.sentence(happening)}"
            err.print(line, markup=False, highlight=False)

    return tell


def _print_status(found: admin.Status) -> None:
    out.print(f"outbox {found.outbox_id}, schema {found.schema} version {found.schema_version}", markup=False)
    table = Table()
    table.add_column("what")
    table.add_column("value", overflow="fold")
    for name, value in _status_rows(found):
        table.add_row(name, value)
    out.print(table)
    if found.streams:
        streams = Table(title="streams")
        for column in ("stream", "mode", "last sequence", "transactions sent", "events sent", "planned", "blocked"):
            streams.add_column(column, overflow="fold")
        for each in found.streams:
            numbers = (each.last_sequence, each.sent_transactions, each.sent_events, each.planned)
            streams.add_row(each.name, each.mode, *map(str, numbers), each.blocked or "")
        out.print(streams)


def _status_rows(found: admin.Status) -> Iterator[tuple[str, str]]:
    yield "leader", f"{found.leader} since {found.leader_since:%F %T}" if found.leader else "none"
    yield "pending", f"{found.pending_transactions} transactions, {found.pending_events} events"
    if found.oldest_pending_seconds is not None:
        yield "oldest pending", f"position {found.oldest_pending_position}, {found.oldest_pending_seconds:.1f} s old"
    if found.blocked:
        yield "blocked", f"{found.blocked}, since {found.blocked_since:%F %T}"
    yield "sent", f"{found.sent_transactions} transactions, {found.sent_events} events"
    yield "dead", f"{found.dead_transactions} transactions"
    for letter in found.dead:
        yield f"dead {letter.position}", f"{letter.reason} ({letter.event_count} events, {letter.dead_at:%F %T})"
