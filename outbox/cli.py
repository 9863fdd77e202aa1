"""The command line: parse, call one function, print, exit. Exit codes: 0 done, 1 failed, 2 usage."""

from __future__ import annotations

import asyncio
import logging
import re
import sys
from importlib import metadata
from typing import Annotated

import typer

from outbox import deadcli, demo, migrating, opscli, rebasing, retention, schema, screen, verifying
from outbox.bench import command as bench
from outbox.config import LONGEST_HOURS, BatchMode, Durability, LogFormat, OnDead, OnUnrouted
from outbox.errors import OutboxError
from outbox.options import AsJson, DatabaseURL, NatsURL, Schema, Yes, confirm, err, settings
from outbox.relay import process
from outbox.screen import out
from outbox.text import printable, to_json

app = typer.Typer(
    name="outbox",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Entry point: errors are shown with their remedy, never as a traceback."""
    # nats-py's TLS makes the loop say so whenever a server hangs up; it means nothing.
    logging.getLogger("asyncio").addFilter(lambda record: "eof_received" not in str(record.msg))
    try:
        app()
    except OutboxError as error:
        err.print(printable(f"outbox: {error}"))
        sys.exit(1)


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

    Settings: flag, else OUTBOX_… in the environment, else outbox.toml. Exit codes: 0 done, 1 failed, 2 usage.
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
    given = settings(database_url=database_url, schema=schema_name)
    if sql:
        print(migrating.migration_sql(given.schema, to=to), end="")
        for line in schema.grants(given.schema, application=application_role, relay=relay_role, operator=operator_role):
            print(f"{line};")
        return
    if check:
        problems = migrating.problems(given.database_url, given.schema)
        for problem in problems:
            err.print(problem)
        if problems:
            raise typer.Exit(1)
        out.print(f"schema {given.schema} is at version {schema.VERSION}, without drift")
        return
    before, after = migrating.migrate(given.database_url, given.schema, to=to)
    migrating.grant(
        given.database_url, given.schema, application=application_role, relay=relay_role, operator=operator_role
    )
    out.print(f"schema {given.schema}: version {before} -> {after}")


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
    retention: Annotated[float | None, typer.Option(help="Hours that sent transactions are kept.")] = None,
    durability: Annotated[Durability | None, typer.Option(help="Wait for asynchronous standbys too.")] = None,
    create_stream: Annotated[str | None, typer.Option(metavar="NAME", help="First create this stream.")] = None,
    subjects: Annotated[list[str] | None, typer.Option(help="Subjects of the stream to create.")] = None,
    listen: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Health and metrics over HTTP.")] = None,
    traces: Annotated[bool | None, typer.Option("--traces", help="A span for each batch (OpenTelemetry).")] = None,
    log: Annotated[LogFormat | None, typer.Option(help="How to say what happens, on standard error.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Say every page, batch and mark too.")] = False,
) -> None:
    """Publish pending transactions until SIGTERM or SIGINT; start a second one as a standby.

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
        retention=retention,
        durability=durability,
        listen=listen,
        traces=traces,
        log=log,
    )
    process.run(
        given,
        drain=drain,
        create=(create_stream, subjects) if create_stream and subjects else None,
        verbose=verbose,
    )


@app.command()
def rebase(
    database_url: DatabaseURL = None,
    nats_url: NatsURL = None,
    schema_name: Schema = None,
    stream: Annotated[str | None, typer.Option(help="Only accept this stream as it is now.")] = None,
    blind: Annotated[bool, typer.Option("--blind", help="Do not read the streams: send all that is pending.")] = False,
    yes: Yes = False,
) -> None:
    """Accept a stream (--stream), or a restored, copied or moved database, after the relay has halted on it.

    What the database does not know as sent, and a stream holds whole, is marked; the rest is sent again.

    Example: outbox rebase --stream SHOP --yes
    """
    if stream and blind:
        raise typer.BadParameter("--blind is for the whole database, not for one stream")
    given = settings(database_url=database_url, nats_url=nats_url, schema=schema_name)
    what = f"stream {stream}" if stream else f"the database of schema {given.schema}"
    confirm(f"Accept {what} as it is? What is not known to be stored is sent again.", yes=yes)
    if stream:
        done = asyncio.run(rebasing.accept_stream(given, stream))
        out.print(f"stream {stream} is accepted as it is; start the relay")
    else:
        done = asyncio.run(rebasing.rebase(given, read_back=not blind))
        out.print(f"the outbox has the new id {done.outbox_id}; start the relay")
    if done.adopted or done.unknown:
        out.print(f"{done.adopted} pending transactions were found in the streams and are marked sent")
        out.print(f"{done.unknown} messages are of transactions that the database does not have")


@app.command()
def verify(
    database_url: DatabaseURL = None,
    nats_url: NatsURL = None,
    schema_name: Schema = None,
    first: Annotated[int, typer.Option("--from", help="Lowest position.")] = 1,
    last: Annotated[int, typer.Option("--to", help="Highest position.")] = verifying.HIGHEST,
    stream: Annotated[str | None, typer.Option(help="Only this stream.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare the outbox with its streams, message by message; exit with 1 on anything that is promised not to be.

    Reads only; relays and writers may be at work. Without --from and --to the whole of each stream is read.

    Example: outbox verify --from 1000 --to 2000
    """
    given = settings(database_url=database_url, nats_url=nats_url, schema=schema_name)
    with screen.progress() as progress:
        found = asyncio.run(verifying.verify(given, first=first, last=last, stream=stream, progress=progress))
    if as_json:
        print(to_json([each.summary() for each in found]))
    else:
        screen.show_comparisons(found)
    if any(each.anomalies for each in found):
        raise typer.Exit(1)


@app.command()
def purge(
    database_url: DatabaseURL = None,
    schema_name: Schema = None,
    older_than: Annotated[float, typer.Option(min=0, max=LONGEST_HOURS, help="Hours since it was sent.")] = 24,
) -> None:
    """Delete what was sent, in pages: transactions with their events and receipts, never one that is pending or dead.

    Example: outbox purge --older-than 48
    """
    given = settings(database_url=database_url, schema=schema_name)
    gone = retention.purge(given.database_url, given.schema, older_than * 3600)
    out.print(f"{gone} transactions are deleted")


opscli.register(app)
app.command(name="demo")(demo.command)
app.command(name="bench")(bench.command)
app.add_typer(deadcli.app, name="dead")
