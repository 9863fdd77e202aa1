"""Packing whole transactions into batches, and putting a batch on the wire.

Pure. A batch always holds whole transactions; a lone event is a plain publish in the same chain, which costs the
server a tenth of a batch of one (no staging store). Header names are ADR-50's, in the exact case: others are ignored
by the server, and the messages stored one by one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from outbox.plan import Planned
from outbox.transaction import Receipt, Transaction

_BREAK = re.compile("[\r\n]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How much goes into one batch: messages, bytes of payload and headers, and whether transactions share one.

    `pipeline_behind` is how many messages a batch must have for another one to be sent behind it, without waiting for
    its ack. The fence is only a number: if a foreign writer slipped in exactly as many messages as a batch has, the
    batch would be refused and the next one fit. Behind a small batch that is likely, behind a large one it is not.
    """

    max_messages: int = 1000
    max_bytes: int = 8_000_000
    one_transaction: bool = False
    pipeline_behind: int = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Whole transactions, expected to follow the sequence `base` of `stream`. `id` is fresh for every attempt.

    A careful batch asks for a reply to every message, so that a refusal in its middle tells its cause.
    """

    id: str
    stream: str
    base: int
    transactions: tuple[Transaction, ...]
    careful: bool = False
    count: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "count", sum(transaction.count for transaction in self.transactions))

    @property
    def last_sequence(self) -> int:
        """The sequence of its last message, if it is stored where it is expected."""
        return self.base + self.count

    def receipts(self) -> Iterator[Receipt]:
        """The receipts of its transactions, if it is stored where it is expected."""
        return receipts(self.stream, self.base, self.transactions)


def receipts(stream: str, base: int, transactions: Iterable[Planned | Transaction]) -> Iterator[Receipt]:
    """The receipts of transactions that are stored one behind the other, the first one behind the sequence `base`."""
    for transaction in transactions:
        first, base = base + 1, base + transaction.count
        yield Receipt(transaction.position, stream, first, base)


def take(queue: Iterable[Transaction], packing: Packing) -> list[Transaction]:
    """The transactions from the head of `queue` that go into the next batch: at least one, if there is one.

    A batch ends before a repeated message id, which the server would refuse (10201), and before a rollup of a subject
    that the batch already holds (10111).
    """
    taken: list[Transaction] = []
    messages = size = 0
    ids: set[str] = set()
    for transaction in queue:
        messages += transaction.count
        size += transaction.size
        if taken and (messages > packing.max_messages or size > packing.max_bytes or packing.one_transaction):
            break
        if not ids.isdisjoint(transaction.message_ids):
            break
        if transaction.rollups and any(e.subject in transaction.rollups for each in taken for e in each.events):
            break
        taken.append(transaction)
        ids.update(transaction.message_ids)
    return taken


def trace_contexts(batch: Batch) -> list[str]:
    """The W3C trace contexts that the batch's events carry, each once."""
    found = (event.headers.get("traceparent") for each in batch.transactions for event in each.events)
    return list(dict.fromkeys(context for context in found if context))


class Frames(NamedTuple):
    """A batch as nats-server reads it, one frame a message; `largest` is as the server counts against max_payload."""

    frames: list[bytes]
    largest: int


def frames(batch: Batch, outbox_id: str, reply: str) -> Frames:
    """The batch on the wire, in order; only its last message asks for a reply, but in a careful batch every one.

    The fence is on the first message: the stream must stand at `base` (ADR-50). Ours come before the application's
    headers: of two headers with one name the server reads the first. Protocol: HPUB, docs.nats.io.
    """
    total, number, largest = batch.count, 0, 0
    made: list[bytes] = []
    fence = f"Nats-Expected-Stream: {batch.stream}\r\nNats-Expected-Last-Sequence: {batch.base}\r\n"
    for transaction in batch.transactions:
        whole = f"{_place(transaction)}\r\nOutbox-Transaction-Count: {transaction.count}\r\n"
        for place, event in enumerate(transaction.events, start=1):
            number += 1
            last = number == total
            if total > 1:
                part = f"Nats-Batch-Id: {batch.id}\r\nNats-Batch-Sequence: {number}\r\n"
                commit = "Nats-Batch-Commit: 1\r\n" if last else ""
            else:
                part = commit = ""
            head = (
                f"NATS/1.0\r\n{fence}{part}{commit}Nats-Msg-Id: {event.message_id}\r\nOutbox-Id: {outbox_id}\r\n"
                f"{whole}Outbox-Transaction-Sequence: {place}\r\n{_lines(event.headers) if event.headers else ''}\r\n"
            ).encode()
            fence = ""
            size = len(head) + len(event.payload)
            asked = f" {reply}" if last or batch.careful else ""
            command = f"HPUB {event.subject}{asked} {len(head)} {size}\r\n".encode()
            made.append(b"".join((command, head, event.payload, b"\r\n")))
            largest = max(largest, size)
    return Frames(made, largest)


def _place(transaction: Transaction) -> str:
    """Which transaction this is. A replay must not look like one to who follows the positions."""
    if transaction.replay_of:
        return f"Outbox-Replay: {transaction.replay_of}\r\nOutbox-Replay-Position: {transaction.position}"
    return f"Outbox-Transaction: {transaction.position}"


def _lines(headers: Mapping[str, str]) -> str:
    # A line break would end the header: the database refuses it, and so does the relay when it reads the row.
    return "".join(f"{name}: {_BREAK.sub(' ', value.strip())}\r\n" for name, value in headers.items())
