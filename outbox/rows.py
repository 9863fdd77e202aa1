"""What the store reads and writes, as values: who leads and where, pages, and what one commit decides.

Pure: rows of psycopg become domain values here, and a transaction is a value only when it is whole.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from outbox.errors import Halt
from outbox.event import Event
from outbox.positions import Range
from outbox.transaction import Receipt, Transaction, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Home:
    """Where the database is: system identifier of its cluster, its oid in there, and the timeline of its history."""

    cluster: int
    database: int
    timeline: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lead:
    """What a new leader finds: its epoch, the outbox's id, the cursor and the open positions."""

    epoch: int
    outbox_id: UUID
    cursor: int
    open_positions: list[Range]
    home: Home
    moved: bool  # the database was promoted or restored since a leader last settled its streams
    careful: bool  # leaders have died here: one transaction at a time, until it is known which one they die of


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamRow:
    """What the outbox remembers of a stream. `last_sequence` is the last settled one; `plan` are positions."""

    name: str
    created: str
    mode: str
    last_sequence: int
    plan: list[int]
    blocked: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Transactions in commit order, and all positions that the page covers, settled ones included."""

    transactions: list[Transaction]
    positions: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decisions:
    """What one commit writes: how far was read, the receipts and verdicts, and the plan of each changed stream."""

    cursor: int
    open_positions: Sequence[Range]
    receipts: Sequence[Receipt]
    verdicts: Sequence[Verdict]
    streams: Sequence[StreamRow]
    blocked: str | None
    taken: Sequence[Range] = ()  # retried dead letters that are among the open positions now
    sound: bool = False  # the leader has shown that it lives


def read_page(rows: Sequence[tuple[Any, ...]], name: str) -> Page:
    """A page from the rows of PAGE or PLANNED; raises `Halt` if a pending transaction is not whole."""
    transactions: list[Transaction] = []
    positions: list[int] = []
    events: list[Event] = []
    for index, (position, count, pending, message_id, subject, headers, payload) in enumerate(rows):
        if subject is not None:
            loaded = json.loads(headers) if headers else {}
            events.append(Event(message_id=message_id, subject=subject, payload=payload, headers=loaded))
        if index + 1 < len(rows) and rows[index + 1][0] == position:
            continue
        positions.append(position)
        if pending:
            if len(events) != count:
                raise Halt(
                    f"transaction {position} has {count} events, but {'only ' if len(events) < count else ''}"
                    f"{len(events)} are in {name}.events: it is never published in part",
                    remedy=f"find out who changed the table; to set the transaction aside, set dead_at and "
                    f"dead_reason of position {position} in {name}.transactions",
                )
            size = sum(len(event.payload) + 200 for event in events)
            transactions.append(Transaction(position=position, events=tuple(events), size=size))
        events = []
    return Page(transactions=transactions, positions=positions)


def multirange(ranges: Sequence[Range]) -> str:
    """Ranges as PostgreSQL reads an int8multirange."""
    return "{" + ",".join(f"[{low},{high}]" for low, high in ranges) + "}"
