"""`outbox`: the entry point, what all commands have in common, and the commands of a deployment: migrate, relay.

A command loads both servers' libraries, the relay and the migrations only when it needs them.
"""

from __future__ import annotations

import re
import sys
from importlib import metadata
from typing import Annotated

import typer

from outbox import demo, schema
from outbox.bench import command as bench
from outbox.cli import dead, ending, operate
from outbox.cli.options import DatabaseURL, NatsURL, Schema, err, settings
from outbox.cli.screen import out
from outbox.config import AcrossStreams, BatchMode, Durability, LogFormat, OnDead, OnUnrouted, StreamMode

app = typer.Typer(
    name="outbox",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Entry point: errors are shown with their remedy, never as a traceback."""
    sys.exit(ending.run(app))


def _version(asked: bool) -> None:
    if asked:
        print(f"outbox-relay {metadata.version('outbox-relay')}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Transactional outbox for Postgres and NATS JetStream.

    Settings: flag, else OUTBOX_… in the environment, else outbox.toml. Exit codes: 0 done, 1 failed, 2 usage,
    3 stopped before it was drained.
    """


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
    from outbox.operate import migrate as migrations

    given = settings(database_url=database_url, schema=schema_name)
    roles = {"application": application_role, "relay": relay_role, "operator": operator_role}
    if sql:
        print(migrations.migration_sql(given.schema, to=to, **roles), end="")
        return
    if check:
        problems = migrations.problems(given.database_url, given.schema)
        for problem in problems:
            err.print(problem)
        if problems:
            raise typer.Exit(1)
        out.print(f"schema {given.schema} is at version {schema.VERSION}, without drift")
        return
    before, after = migrations.migrate(given.database_url, given.schema, to=to)
    migrations.grant(given.database_url, given.schema, **roles)
    out.print(f"schema {given.schema}: version {before} -> {after}")


@app.command()
def relay(
    database_url: DatabaseURL = None,
    nats_url: NatsURL = None,
    schema_name: Schema = None,
    drain: Annotated[
        bool, typer.Option("--drain", help="Exit with 0 when nothing is pending; with 3 if stopped before.")
    ] = False,
    batch: Annotated[BatchMode | None, typer.Option(help="Pack transactions, or one batch each.")] = None,
    max_batch_messages: Annotated[int | None, typer.Option(help="Messages in one batch, at most.")] = None,
    window: Annotated[int | None, typer.Option(help="Batches in flight, at most.")] = None,
    on_dead: Annotated[OnDead | None, typer.Option(help="After a dead letter.")] = None,
    on_unrouted: Annotated[OnUnrouted | None, typer.Option(help="A subject that is in no stream.")] = None,
    across_streams: Annotated[
        AcrossStreams | None, typer.Option(help="Subjects in several streams: a part for each, or a dead letter.")
    ] = None,
    stream_mode: Annotated[StreamMode | None, typer.Option(help="Whether others write to the streams too.")] = None,
    retention: Annotated[float | None, typer.Option(help="Hours that sent transactions are kept.")] = None,
    durability: Annotated[Durability | None, typer.Option(help="Wait for asynchronous standbys too.")] = None,
    create_stream: Annotated[str | None, typer.Option(metavar="NAME", help="First create this stream.")] = None,
    subjects: Annotated[list[str] | None, typer.Option(help="Subjects of the stream to create.")] = None,
    listen: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Health and metrics over HTTP.")] = None,
    traces: Annotated[bool | None, typer.Option("--traces", help="A span for each batch (OpenTelemetry).")] = None,
    log: Annotated[LogFormat | None, typer.Option(help="How to say what happens, on standard error.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Say every page, batch and mark too.")] = False,
) -> None:
    """Publish pending transactions until SIGTERM, SIGINT or SIGQUIT; start a second one as a standby.

    SIGHUP, SIGUSR1 and SIGUSR2 are ignored: files are read at each new connection, settings at the start.

    Example: outbox relay --nats-url nats://nats:4222 --create-stream SHOP --subjects 'shop.>'
    """
    if bool(create_stream) != bool(subjects):
        raise typer.BadParameter("--create-stream and --subjects go together")
    if create_stream and not re.fullmatch(r"[^\s.*>/\\]{1,255}", create_stream):
        raise typer.BadParameter(
            "the name of a stream has no white space and none of . * > / \\", param_hint="--create-stream"
        )
    given = settings(
        database_url=database_url,
        nats_url=nats_url,
        schema=schema_name,
        batch=batch,
        max_batch_messages=max_batch_messages,
        window=window,
        on_dead=on_dead,
        on_unrouted=on_unrouted,
        across_streams=across_streams,
        stream_mode=stream_mode,
        retention=retention,
        durability=durability,
        listen=listen,
        traces=traces,
        log=log,
    )
    from outbox.relay import process

    done = process.run(
        given,
        drain=drain,
        create=(create_stream, subjects) if create_stream and subjects else None,
        verbose=verbose,
    )
    if not done:
        raise typer.Exit(ending.NOT_DRAINED)


operate.register(app)
app.command(name="demo")(demo.command)
app.command(name="bench")(bench.command)
app.add_typer(dead.app, name="dead")
