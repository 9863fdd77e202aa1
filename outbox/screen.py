"""What the commands show: tables for people on standard output, one row for each thing. Decides nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from outbox.admin import Status
from outbox.comparison import Comparison
from outbox.letters import DeadEvent, DeadLetter

SHOWN_BYTES = 2000
SHOWN_ANOMALIES = 50
out = Console(markup=False, emoji=False, highlight=False)  # what is shown comes from rows: hostile until checked


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
        table.add_column(column, overflow="fold")
    return table


def show_settings(settings: Iterable[Mapping[str, str | None]]) -> None:
    """Settings, one row each."""
    table = _table("setting", "value", "from")
    for each in settings:
        table.add_row(each["name"], each["value"], each["source"])
    out.print(table)


def show_status(found: Status) -> None:
    """The state of an outbox."""
    out.print(f"outbox {found.outbox_id}, schema {found.schema} version {found.schema_version}")
    table = _table("what", "value")
    for name, value in _status_rows(found):
        table.add_row(name, value)
    out.print(table)
    if found.streams:
        columns = ("stream", "mode", "last sequence", "transactions sent", "events sent", "planned", "blocked")
        streams = _table(*columns, title="streams")
        for each in found.streams:
            numbers = (each.last_sequence, each.sent_transactions, each.sent_events, each.planned)
            streams.add_row(each.name, each.mode, *map(str, numbers), each.blocked or "")
        out.print(streams)


def _status_rows(found: Status) -> Iterator[tuple[str, str]]:
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


def show_letters(letters: Iterable[DeadLetter]) -> None:
    """Dead letters, one row each."""
    table = _table("position", "events", "subjects", "reason", "dead since", "discarded")
    for each in letters:
        times = (f"{at:%F %T}" if at else "" for at in (each.dead_at, each.discarded_at))
        table.add_row(str(each.position), str(each.event_count), ", ".join(each.subjects), each.reason, *times)
    out.print(table)


def show_letter(letter: DeadLetter, events: Iterable[DeadEvent]) -> None:
    """One dead letter with its events; long payloads are cut."""
    out.print(f"transaction {letter.position}, committed {letter.sealed_at:%F %T}: {letter.reason}")
    table = _table("message id", "subject", "headers", "payload")
    for each in events:
        payload = each.payload[:SHOWN_BYTES].decode(errors="replace")
        rest = len(each.payload) - SHOWN_BYTES
        shown = f"{payload} … and {rest} bytes" if rest > 0 else payload
        headers = "" if each.headers is None else str(each.headers)
        table.add_row(str(each.message_id), each.subject, headers, shown)
    out.print(table)


def show_comparisons(comparisons: Iterable[Comparison]) -> None:
    """What a verification found, a row for each stream and one for each anomaly."""
    columns = ("stream", "transactions", "messages", "anomalies", "foreign", "replayed", "removed", "unknown")
    table, anomalies = _table(*columns), []
    for each in comparisons:
        counts = (each.transactions, each.messages, len(each.anomalies), each.foreign, each.replayed, each.removed)
        table.add_row(each.stream, *map(str, counts), str(each.unknown))
        anomalies += [(each.stream, anomaly) for anomaly in each.anomalies]
    out.print(table)
    if anomalies:
        wrong = _table("stream", "kind", "position", "sequence", "what", title="anomalies")
        for stream, found in anomalies[:SHOWN_ANOMALIES]:
            places = ("" if place is None else str(place) for place in (found.position, found.sequence))
            wrong.add_row(stream, found.kind, *places, found.what)
        out.print(wrong)
        if len(anomalies) > SHOWN_ANOMALIES:
            out.print(f"… and {len(anomalies) - SHOWN_ANOMALIES} more; --json shows all")
