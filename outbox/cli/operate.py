"""The commands of whoever is on call, from `outbox status` to `outbox rebase`.

Parse, call one function, print, exit. Each loads what it needs when it is called.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType
from rich.live import Live
from rich.text import Text

from outbox.cli import screen
from outbox.cli.options import AsJson, DatabaseURL, NatsURL, Schema, Yes, confirm, err, loaded, settings
from outbox.cli.screen import out, say
from outbox.config import LONGEST_HOURS, Settings
from outbox.core.positions import HIGHEST
from outbox.doctor.check import Colour
from outbox.errors import Weather
from outbox.sources import current
from outbox.text import counted, printable, to_json

if TYPE_CHECKING:
    from outbox.operate.replay import Replayed, Wanted

OBJECTS_BETWEEN_COLLECTIONS = 200_000
SECONDS = 1.0  # between two looks of a watch


def register(app: typer.Typer) -> None:
    """Add these commands."""
    for command in (status, doctor, config, show, replay, pause, resume, verify, purge, rebase):
        app.command()(command)


def status(
    database_url: DatabaseURL = None,
    schema_name: Schema = None,
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", help="Look again every second, with rates; Ctrl-C ends.")] = False,
) -> None:
    """Show what is pending, sent and dead, who leads, and each stream.

    With --watch and --json it prints one line of JSON a second.

    Example: outbox status --watch
    """
    from outbox.operate import status

    given = settings(database_url=database_url, schema=schema_name)
    if watch:
        _watch(given, as_json=as_json)
    elif as_json:
        print(to_json(status.status(given.database_url, given.schema)))
    else:
        screen.show_status(status.status(given.database_url, given.schema))


def _watch(given: Settings, *, as_json: bool) -> None:
    from outbox.operate import status
    from outbox.operate.status import History

    history, terminal = History(), out.is_terminal and not as_json
    try:
        with Live(console=out, auto_refresh=False, screen=terminal) as live:

            def show(view: RenderableType) -> None:
                if terminal:
                    live.update(view, refresh=True)
                else:
                    out.print(view)

            while True:
                try:
                    found = status.status(current(given, "database_").database_url, given.schema)
                except Weather as weather:
                    words = f"Postgres cannot be used: {weather.line}"
                    if as_json:
                        err.print(words)
                    else:
                        show(Text(printable(words)))
                else:
                    rates = history.take(found)
                    if as_json:
                        print(to_json(found, indent=None), flush=True)
                    else:
                        show(screen.status_view(found, rates, history.line()))
                time.sleep(SECONDS)
    except KeyboardInterrupt:
        return


def doctor(
    database_url: DatabaseURL = None, nats_url: NatsURL = None, schema_name: Schema = None, as_json: AsJson = False
) -> None:
    """Look at Postgres, at NATS and at the outbox: what is wrong, and what settles it. Exits with 1 on red.

    Changes nothing. Run it with the settings and the role of the relay, before the first start and whenever in doubt.

    Example: outbox doctor --database-url postgresql://relay@db/shop
    """
    from outbox.doctor.examine import examine

    given = settings(database_url=database_url, nats_url=nats_url, schema=schema_name)
    checks = asyncio.run(examine(given))
    if as_json:
        print(to_json(checks))
    else:
        screen.show_checks(checks)
    if any(each.colour is Colour.RED for each in checks):
        raise typer.Exit(1)


def config(as_json: AsJson = False) -> None:
    """Show every setting, its value and where it comes from. Passwords, tokens and seeds are masked.

    Example: outbox config --json
    """
    found = loaded().listed()
    if as_json:
        print(to_json(found))
    else:
        screen.show_settings(found)


def show(
    position: Annotated[int, typer.Argument(help="Position of the transaction.")],
    database_url: DatabaseURL = None,
    nats_url: NatsURL = None,
    schema_name: Schema = None,
    as_json: AsJson = False,
) -> None:
    """Show one transaction: its state, its events, its receipt, and what the stream holds at that place now.

    Example: outbox show 42
    """
    from outbox.operate import show

    given = settings(database_url=database_url, nats_url=nats_url, schema=schema_name)
    found = asyncio.run(show.show(given, position))
    if as_json:
        print(to_json(found))
    else:
        screen.show_transaction(found)


def replay(
    first: Annotated[int, typer.Option("--from", min=1, help="Lowest position.")],
    last: Annotated[int, typer.Option("--to", min=1, help="Highest position.")],
    database_url: DatabaseURL = None,
    schema_name: Schema = None,
    subject: Annotated[
        str | None, typer.Option(help="Only transactions with an event on this subject; * and > as in NATS.")
    ] = None,
    stream: Annotated[
        str | None, typer.Option(help="Only what went to this stream; of a transaction over several, its part.")
    ] = None,
    all_streams: Annotated[
        bool, typer.Option("--all-streams", help="All of it; needed where it went to several streams.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count.")] = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Send sent transactions again on purpose: whole, as new messages with new ids, marked with Outbox-Replay.

    Consumers take them for new messages: make sure that they know what to do with them.

    Example: outbox replay --from 1000 --to 2000 --subject 'orders.>' --dry-run
    """
    from outbox.operate import replay

    given = settings(database_url=database_url, schema=schema_name)
    wanted = replay.Wanted(first=first, last=last, subject=subject, stream=stream)
    if stream is not None and all_streams:
        raise typer.BadParameter("--stream and --all-streams exclude each other")
    if last < first:
        raise typer.BadParameter("--to is below --from")
    found = replay.replay(given.database_url, given.schema, wanted, dry_run=True)
    if not dry_run and len(found.streams) > 1 and not all_streams:
        raise typer.BadParameter(
            f"this went to several streams: {', '.join(found.streams)}; name one with --stream, or say --all-streams"
        )
    if not dry_run and found.transactions:
        what = f"{counted(found.transactions, 'transaction')}, {counted(found.events, 'event')}"
        rolled = f" {found.rollups} of them remove newer messages (Nats-Rollup)." if found.rollups else ""
        confirm(f"Send {what}, again as new messages?{rolled}", yes=yes)
        found = _replay(given, wanted, found.transactions)
    if as_json:
        print(to_json(found))
        return
    done = "to be sent again" if dry_run else "pending again, as new transactions"
    say(f"{counted(found.transactions, 'transaction')}, {counted(found.events, 'event')}: {done}")
    if stream or len(found.streams) > 1:
        out.print(f"it was sent before to {', '.join(found.streams)}")
    if found.pending or found.dead:
        out.print(f"passed over: {found.pending} that are pending, {found.dead} dead letters")
    if found.purged >= first:
        out.print(f"up to position {found.purged} what was sent may be purged, and so is not replayed")


def _replay(given: Settings, wanted: Wanted, total: int) -> Replayed:
    """Replay with a bar; whatever ends it says how far it came."""
    from outbox.operate import replay

    last: int | None = None

    def tell(done: Replayed) -> None:
        nonlocal last
        last = done.last
        bar("replay", done.transactions, total)

    def interrupted() -> None:
        go_on = wanted.first if last is None else last + 1
        words = "nothing was replayed" if last is None else f"replayed up to position {last}"
        err.print(f"outbox: interrupted; {words}. Look (outbox show {go_on}), then go on with --from {go_on}")

    with contextlib.ExitStack() as undone, screen.progress() as bar:
        undone.callback(interrupted)
        done = replay.replay(given.database_url, given.schema, wanted, progress=tell)
        undone.pop_all()
        return done


def pause(
    database_url: DatabaseURL = None,
    schema_name: Schema = None,
    why: Annotated[str, typer.Option(help="The reason, which status shows.")] = "by an operator",
) -> None:
    """Have nothing more published until `outbox resume`; what is in flight is finished. Applications go on adding.

    Example: outbox pause --why 'the stream is being moved'
    """
    from outbox.operate import pause

    given = settings(database_url=database_url, schema=schema_name)
    found = pause.pause(given.database_url, given.schema, why)
    if found.changed:
        say(f"paused: {found.paused_why}")
    else:
        say(f"it was paused already, since {found.paused_at:%F %T}: {found.paused_why}")


def resume(database_url: DatabaseURL = None, schema_name: Schema = None) -> None:
    """Have publishing go on where it was paused.

    Example: outbox resume
    """
    from outbox.operate import pause

    given = settings(database_url=database_url, schema=schema_name)
    found = pause.resume(given.database_url, given.schema)
    out.print("resumed" if found.changed else "it was not paused")


def rebase(
    database_url: DatabaseURL = None,
    nats_url: NatsURL = None,
    schema_name: Schema = None,
    stream: Annotated[str | None, typer.Option(help="Only accept this stream as it is now.")] = None,
    retire: Annotated[
        bool, typer.Option("--retire", help="Forget this stream as a place to send to: it is replaced, or gone.")
    ] = False,
    blind: Annotated[bool, typer.Option("--blind", help="Do not read the streams: send all that is pending.")] = False,
    yes: Yes = False,
) -> None:
    """Accept a stream (--stream), or a restored, copied or moved database, after the relay has halted on it.

    With --retire a stream is forgotten that was replaced or is gone: what was for it goes where its subjects are now;
    what was for it of transactions over several streams is set aside, until it is retried.

    What the database does not know as sent, and a stream holds whole, is marked; the rest is sent again.

    Example: outbox rebase --stream SHOP --yes
    """
    from outbox.operate import rebase

    if stream == "":  # an empty variable in a script does not mean the whole database
        raise typer.BadParameter("is empty", param_hint="--stream")
    if stream and blind:
        raise typer.BadParameter("--blind is for the whole database, not for one stream")
    given = settings(database_url=database_url, nats_url=nats_url, schema=schema_name)
    if retire and not stream:
        raise typer.BadParameter("--retire is for one stream: --stream NAME")
    what = f"stream {stream}" if stream else f"the database of schema {given.schema}"
    _collect_rarely()
    question = f"Retire {what}?" if retire else f"Accept {what} as it is?"
    confirm(f"{question} What is not known to be stored is sent again.", yes=yes)
    if stream and retire:
        done = asyncio.run(rebase.retire_stream(given, stream))
        out.print(f"stream {stream} is retired, and nothing is sent there any more; start the relay")
    elif stream:
        done = asyncio.run(rebase.accept_stream(given, stream))
        out.print(f"stream {stream} is accepted as it is; start the relay")
    else:
        with screen.progress() as progress:
            done = asyncio.run(rebase.rebase(given, read_back=not blind, progress=progress))
        out.print(f"the outbox has the new id {done.outbox_id}; start the relay")
    if done.kept is not None:
        out.print(f"transaction {done.kept} stays planned as it was: what a relay has sent of it may still arrive")
    if done.adopted or done.unknown:
        out.print(f"{done.adopted} pending transactions were found in the streams and are marked sent")
        out.print(f"{done.unknown} messages are of transactions that the database does not have")


def verify(
    database_url: DatabaseURL = None,
    nats_url: NatsURL = None,
    schema_name: Schema = None,
    first: Annotated[int, typer.Option("--from", help="Lowest position.")] = 1,
    last: Annotated[int, typer.Option("--to", help="Highest position.")] = HIGHEST,
    stream: Annotated[str | None, typer.Option(help="Only this stream.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare the outbox with its streams, message by message; exit with 1 on anything that is promised not to be.

    Reads only; relays and writers may be at work. Without --from and --to the whole of each stream is read.

    Example: outbox verify --from 1000 --to 2000
    """
    from outbox.operate import verify

    _collect_rarely()
    given = settings(database_url=database_url, nats_url=nats_url, schema=schema_name)
    with screen.progress() as progress:
        found = asyncio.run(verify.verify(given, first=first, last=last, stream=stream, progress=progress))
    if as_json:
        print(to_json([each.summary() for each in found]))
    else:
        screen.show_comparisons(found)
    if any(each.anomalies for each in found):
        raise typer.Exit(1)


def _collect_rarely() -> None:
    """What is read of a stream is freed by reference counts; looking for cycles in it takes a sixth of the time."""
    gc.freeze()
    gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS)


def purge(
    database_url: DatabaseURL = None,
    schema_name: Schema = None,
    older_than: Annotated[float, typer.Option(min=0, max=LONGEST_HOURS, help="Hours since it was sent.")] = 24,
) -> None:
    """Delete what was sent, in pages: transactions with their events and receipts, never one that is pending or dead.

    Example: outbox purge --older-than 48
    """
    from outbox.operate import purge

    given = settings(database_url=database_url, schema=schema_name)
    gone = purge.purge(given.database_url, given.schema, older_than * 3600)
    out.print(f"{gone} transactions are deleted")
