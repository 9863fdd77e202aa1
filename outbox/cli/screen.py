"""What the commands show: tables for people on standard output, one row for each thing. Decides nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.progress import Progress, TaskID
from rich.table import Table
from rich.text import Text

from outbox.core.chain import SHARED
from outbox.core.comparison import Comparison
from outbox.doctor.check import Check, Colour
from outbox.sources import Setting
from outbox.text import counted, printable

if TYPE_CHECKING:  # a screen is the same for every command; each loads its own
    from outbox.operate.dead import DeadLetter
    from outbox.operate.show import Shown, ShownPart
    from outbox.operate.status import Rates, Status

SHOWN_BYTES = 2000
OLD_SECONDS = 60.0  # a transaction that waits longer is worth a look
GOOD, WARN, BAD = "green", "yellow", "bold red"
SHOWN_ANOMALIES = 50
NUMBERS = {"transactions", "events", "messages", "last sequence", "planned", "position", "sequence"}
out = Console(markup=False, emoji=False, highlight=False)  # what is shown comes from rows: hostile until checked


def say(text: str) -> None:
    """One line of text."""
    out.print(printable(text))


def _text(text: str, style: str = "") -> Text:
    return Text(printable(text), style=style)


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each stream on standard error, which shows nothing where that is no terminal."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def tell(stream: str, done: int, total: int) -> None:
            if stream not in tasks:
                tasks[stream] = bars.add_task(stream, total=total)
            bars.update(tasks[stream], completed=done)

        yield tell


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(title=title)
    for column in columns:
        table.add_column(column, overflow="fold", justify="right" if column in NUMBERS else "left")
    return table


def show_settings(settings: Iterable[Setting]) -> None:
    """Settings, one row each."""
    table = _table("setting", "value", "from")
    for each in settings:
        table.add_row(each.name, _text(each.value or ""), _text(each.source))
    out.print(table)


def show_status(found: Status) -> None:
    """The state of an outbox."""
    out.print(status_view(found))


def status_view(found: Status, rates: Rates | None = None, backlog: str = "") -> Group:
    """The state of an outbox as one picture; with `rates` and the line of the backlog, a moment of a watch."""
    title = f"outbox {found.outbox_id}, schema {found.schema} version {found.schema_version}"
    table = _table("what", "value")
    for name, value, style in _status_rows(found, rates, backlog):
        table.add_row(name, _text(value, style))
    parts: list[RenderableType] = [_text(title), table]
    if found.streams:
        streams = _table(
            "stream", "mode", "last sequence", "transactions", "events", "planned", title="sent, by stream"
        )
        for each in found.streams:
            numbers = (each.last_sequence, each.sent_transactions, each.sent_events, each.planned)
            mode = "retired" if each.retired_at else each.mode
            if mode == SHARED:
                mode = f"{SHARED}, by {each.fence}"
            streams.add_row(_text(each.name), mode, *(f"{number:,}" for number in numbers))
        parts.append(streams)
        parts += [_text(f"{each.name}: {each.sharing}", WARN) for each in found.streams if each.sharing]
    return Group(*parts)


def _status_rows(found: Status, rates: Rates | None, backlog: str) -> Iterator[tuple[str, str, str]]:
    """What it is, what it is now, and the style that says how good that is."""
    leader = f"{found.leader}, since {found.leader_since:%F %T}" if found.leader else "none: nothing is sent"
    yield "leader", leader, GOOD if found.leader else BAD
    if found.paused_at:
        yield "paused", f"{found.paused_why}, since {found.paused_at:%F %T}; outbox resume", WARN
    yield "pending", _both(found.pending_transactions, found.pending_events), ""
    if found.oldest_pending_seconds is not None:
        waited = f"position {found.oldest_pending_position}, {found.oldest_pending_seconds:.1f} s old"
        yield "oldest pending", waited, WARN if found.oldest_pending_seconds > OLD_SECONDS else ""
    if backlog:
        yield "backlog", backlog, ""
    if found.blocked:
        yield "blocked", f"{found.blocked}\nsince {found.blocked_since:%F %T}", BAD
    if found.unreconciled:
        yield "unreconciled", found.unreconciled, BAD
    for each in found.streams:
        if each.blocked:
            yield f"blocked {each.name}", f"{each.blocked}\nsince {each.blocked_since:%F %T}", BAD
    yield from _troubles(found)
    yield "sent", _both(found.sent_transactions, found.sent_events), ""
    if rates is not None:
        yield "sent per second", _both(rates.sent_transactions, rates.sent_events), ""
        yield "added per second", counted(rates.added_transactions, "transaction"), ""
    yield "dead", counted(found.dead_transactions, "transaction"), BAD if found.dead_transactions else ""
    for letter in found.dead:
        yield (
            f"dead {letter.position}",
            f"{letter.reason} ({counted(letter.event_count, 'event')}, {letter.dead_at:%F %T})",
            BAD,
        )


def _troubles(found: Status) -> Iterator[tuple[str, str, str]]:
    """What does not stop the others: what the schema lacks, events that nobody counts, and housekeeping."""
    if found.drift:
        yield "drift", f"missing or disabled: {found.drift}: events may never be sent; outbox doctor", BAD
    if found.stray_events:
        yield "stray events", f"{counted(found.stray_events, 'event')} of no transaction; outbox doctor", BAD
    if found.housekeeping_failing:
        yield "housekeeping", f"{found.housekeeping_failing}\nsince {found.housekeeping_failing_since:%F %T}", WARN


def _both(transactions: float, events: float) -> str:
    return f"{counted(transactions, 'transaction')}, {counted(events, 'event')}"


def show_transaction(found: Shown) -> None:
    """One transaction with its events and its receipt; long payloads are cut."""
    say(f"transaction {found.position}: {found.state}, {counted(found.event_count, 'event')}, {found.sealed_at:%F %T}")
    if found.replay_of:
        say(f"a replay of transaction {found.replay_of}")
    if found.replays:
        say(f"replayed as {', '.join(map(str, found.replays))}")
    for part in found.parts:
        say(f"part {part.part}: stream {part.stream}, {counted(len(part.numbers), 'event')}: {_end(part)}")
    if found.sent_at and not found.parts:
        places = f"sequences {found.first_sequence} to {found.last_sequence}"
        say(f"receipt: stream {found.stream}, {places}, {found.sent_at:%F %T}")
    if found.dead_at:
        say(f"dead since {found.dead_at:%F %T}: {found.dead_reason}")
    if found.discarded_at:
        say(f"discarded {found.discarded_at:%F %T}")
    if found.problem:
        say(f"the stream could not be asked: {found.problem}")
    for number, each in enumerate(found.events, start=1):
        stream = f"stream {each.stream}, " if found.parts else ""
        place = f", {stream}sequence {each.sequence}: {each.in_stream or 'unknown'}" if each.sequence else ""
        table = Table(show_header=False, title=f"event {number}{place}", title_justify="left")
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        table.add_row("message id", str(each.message_id))
        table.add_row("subject", _text(each.subject))
        for name, value in (each.headers or {}).items():
            table.add_row(_text(name), _text(str(value)))
        table.add_row("payload", _text(_shortened(each.payload)))
        out.print(table)


def _end(part: ShownPart) -> str:
    """What became of a part."""
    if part.sent_at:
        return f"sequences {part.first_sequence} to {part.last_sequence}, {part.sent_at:%F %T}"
    return f"dead since {part.dead_at:%F %T}: {part.dead_reason}" if part.dead_at else "pending"


def _shortened(payload: bytes) -> str:
    shown, rest = payload[:SHOWN_BYTES].decode(errors="replace"), len(payload) - SHOWN_BYTES
    return f"{shown} … and {rest} bytes" if rest > 0 else shown


def show_letters(letters: Sequence[DeadLetter]) -> None:
    """Dead letters, one row each; why in full is told by `outbox show`."""
    if not letters:
        say("no dead letters")
        return
    table = _table("position", "events", "subjects", "reason", "dead since", "discarded")
    table.columns[3].no_wrap = True  # the word is for --reason
    for each in letters:
        times = (f"{at:%F %T}" if at else "" for at in (each.dead_at, each.discarded_at))
        words = (_text(", ".join(each.subjects)), _text(each.reason.partition(":")[0]))
        table.add_row(str(each.position), str(each.event_count), *words, *times)
    out.print(table)


def show_checks(checks: Sequence[Check]) -> None:
    """What the doctor found: a line each, and beneath it the remedy of what is not green."""
    styles = {Colour.GREEN: GOOD, Colour.YELLOW: WARN, Colour.RED: BAD}
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for width in (6, 8):
        table.add_column(width=width, no_wrap=True)
    table.add_column(overflow="fold", max_width=21)
    table.add_column(overflow="fold", ratio=1)
    for each in checks:
        words = _text(each.found)
        if each.remedy:
            words.append(printable(f"\n-> {each.remedy}"), style="bold")
        table.add_row(_text(each.colour, styles[each.colour]), each.area, _text(each.name), words)
    out.print(table)
    counts = {colour: sum(each.colour is colour for each in checks) for colour in Colour}
    out.print(", ".join(f"{count} {colour}" for colour, count in counts.items()))


def show_comparisons(comparisons: Sequence[Comparison]) -> None:
    """What a verification found, a column for each stream and a row for each anomaly."""
    anomalies = [(each.stream, anomaly) for each in comparisons for anomaly in each.anomalies]
    table = _table("what")
    for each in comparisons:
        table.add_column(_text(each.stream or "in none"), overflow="fold", justify="right")
    for what in ("transactions", "messages", "foreign", "replayed", "removed", "unknown"):
        table.add_row(what, *(f"{getattr(each, what):,}" for each in comparisons))
    table.add_row("anomalies", *(f"{len(each.anomalies):,}" for each in comparisons))
    out.print(table)
    if anomalies:
        wrong = _table("stream", "kind", "position", "sequence", "what", title="anomalies")
        for stream, found in anomalies[:SHOWN_ANOMALIES]:
            positions = _places(found.position, found.last_position)
            sequences = _places(found.sequence, found.last_sequence)
            wrong.add_row(_text(stream), found.kind, positions, sequences, _text(found.what))
        out.print(wrong)
        if len(anomalies) > SHOWN_ANOMALIES:
            say(f"… and {len(anomalies) - SHOWN_ANOMALIES} more; --json shows all")


def _places(first: int | None, last: int | None) -> str:
    if first is None:
        return ""
    return str(first) if last in (None, first) else f"{first} to {last}"
