"""Packing whole transactions into batches, and putting a batch on the wire.

Pure. A batch always holds whole transactions; a lone event is a plain publish in the same chain, which costs the
server a tenth of a batch of one (no staging store). Header names are ADR-50's, in the exact case: others are ignored
by the server, and the messages stored one by one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, chain, islice, repeat
from operator import attrgetter
from typing import NamedTuple

from outbox.core.fence import Fence, numbered
from outbox.core.parts import Part
from outbox.core.plan import Planned
from outbox.core.transaction import Receipt, Transaction

END = b"\r\n"
_BREAK = re.compile("[\r\n]")
COUNT, SIZE, POSITION = attrgetter("count"), attrgetter("size"), attrgetter("position")
MESSAGE_IDS, ROLLUPS = attrgetter("message_ids"), attrgetter("rollups")
_receipt = partial(tuple.__new__, Receipt)  # of a tuple, without a call in Python


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
    """Whole transactions, expected to follow the sequence `base` of `stream`, or fenced by a subject of the first one.

    `id` is fresh for every attempt, and ends in the number of messages where there is a fence. A careful batch asks
    for a reply to every message, so that a refusal in its middle tells its cause.
    """

    id: str
    stream: str
    base: int
    transactions: tuple[Transaction, ...]
    careful: bool = False
    fence: Fence | None = None
    count: int = field(init=False)
    size: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "count", sum(map(COUNT, self.transactions)))
        object.__setattr__(self, "size", sum(map(SIZE, self.transactions)))

    @property
    def last_sequence(self) -> int:
        """The sequence of its last message, if it is stored where it is expected."""
        return self.base + self.count

    def receipts(self) -> Iterator[Receipt]:
        """The receipts of its transactions, if it is stored where it is expected."""
        return receipts(self.stream, self.base, self.transactions)


def receipts(stream: str, base: int, transactions: Sequence[Planned | Transaction]) -> Iterator[Receipt]:
    """The receipts of transactions that are stored one behind the other, the first one behind the sequence `base`."""
    ends = list(accumulate(map(COUNT, transactions), initial=base))
    firsts = (end + 1 for end in ends)
    return map(_receipt, zip(map(POSITION, transactions), repeat(stream), firsts, islice(ends, 1, None), strict=False))


def take(queue: Iterable[Transaction], packing: Packing) -> list[Transaction]:
    """The transactions from the head of `queue` that go into the next batch: at least one, if there is one.

    A batch ends before a repeated message id, which the server would refuse (10201), and before a rollup of a subject
    that the batch already holds (10111).
    """
    taken: list[Transaction] = []
    messages = size = 0
    for transaction in queue:
        messages += transaction.count
        size += transaction.size
        if taken and (messages > packing.max_messages or size > packing.max_bytes or packing.one_transaction):
            break
        taken.append(transaction)
    ids = set(chain.from_iterable(map(MESSAGE_IDS, taken)))
    if len(ids) == sum(map(COUNT, taken)) and not any(map(ROLLUPS, taken)):
        return taken  # as nearly all are; the others are looked at one by one
    return taken[: _compatible(taken)]


def _compatible(transactions: Sequence[Transaction]) -> int:
    """How many of these, from the first on, the server takes in one batch."""
    ids: set[str] = set()
    subjects: set[str] = set()
    for number, transaction in enumerate(transactions):
        if number and not (ids.isdisjoint(transaction.message_ids) and subjects.isdisjoint(transaction.rollups)):
            return number
        ids.update(transaction.message_ids)
        subjects.update(transaction.subjects)
    return len(transactions)


def trace_contexts(batch: Batch) -> list[str]:
    """The W3C trace contexts that the batch's events carry, each once."""
    found = (event.headers.get("traceparent") for each in batch.transactions if each.headers for event in each.events)
    return list(dict.fromkeys(context for context in found if context))


class Frames(NamedTuple):
    """A batch as nats-server reads it, three pieces a message; and bytes of headers and payload of each message."""

    pieces: list[bytes]
    sizes: list[int]


def frames(batch: Batch, outbox_id: str, reply: str) -> Frames:
    """The batch on the wire, in order; only its last message asks for a reply, but in a careful batch every one.

    The fence is on the first message: the stream must stand at `base` (ADR-50); or on the first one with its subject.
    Ours come before the application's headers: of two headers with one name the server reads the first. Protocol: HPUB,
    docs.nats.io.
    """
    total, number = batch.count, 0
    pieces: list[bytes] = []
    sizes: list[int] = []
    fence = f"Nats-Expected-Stream: {batch.stream}\r\n"
    fenced, expected = _fence(batch)
    part, parted = (f"Nats-Batch-Id: {batch.id}\r\nNats-Batch-Sequence: ", "\r\n") if total > 1 else ("", "")
    asked = ""
    for each in batch.transactions:
        whole = (
            f"\r\nOutbox-Id: {outbox_id}\r\n{_place(each)}\r\nOutbox-Transaction-Count: {each.count}\r\n"
            "Outbox-Transaction-Sequence: "
        )
        first = number
        for message_id, subject, payload in zip(each.message_ids, each.subjects, each.payloads):  # noqa: B905 - slow
            number += 1
            place = number - first
            if number == total and total > 1:
                parted = "\r\nNats-Batch-Commit: 1\r\n"
            if number == total or batch.careful:
                asked = f" {reply}"
            if number == fenced:
                fence += expected
            head = (
                f"NATS/1.0\r\n{fence}{part}{number if total > 1 else ''}{parted}Nats-Msg-Id: {message_id}"
                f"{whole}{place}\r\n{_lines(each.headers[place - 1]) if each.headers else ''}\r\n"
            )
            head_size = len(head) if head.isascii() else len(head.encode())
            size = head_size + len(payload)
            sizes.append(size)
            pieces += (f"HPUB {subject}{asked} {head_size} {size}\r\n{head}".encode(), payload, END)
            fence = ""
    return Frames(pieces, sizes)


def refenced(made: Frames, before: Batch, batch: Batch) -> Frames:
    """The frames of `batch`, of those that were made `before` for one that has another sequence in its fence."""
    number, old = _fence(before)
    _, new = _fence(batch)
    pieces, sizes = made
    longer, place = len(new) - len(old), 3 * (number - 1)
    command, _, headers = pieces[place].partition(END)
    *words, head_size, size = command.split(b" ")
    words += [b"%d" % (int(head_size) + longer), b"%d" % (int(size) + longer)]
    pieces[place] = b" ".join(words) + END + headers.replace(old.encode(), new.encode(), 1)
    sizes[number - 1] += longer
    return made


def _fence(batch: Batch) -> tuple[int, str]:
    """The number of the message that carries the fence, and the header."""
    if batch.fence is None:
        return 1, f"Nats-Expected-Last-Sequence: {batch.base}\r\n"
    number = numbered(batch.transactions[0], batch.fence.subject)
    return number, f"Nats-Expected-Last-Subject-Sequence: {batch.fence.sequence}\r\n"


def stored_bytes(batch: Batch, outbox_id: str, overhead: int) -> int:
    """Bytes that the batch takes of its stream, which keeps `overhead` bytes beside each message and its subject."""
    subjects = chain.from_iterable(each.subjects for each in batch.transactions)
    return sum(frames(batch, outbox_id, "").sizes) + sum(len(each.encode()) + overhead for each in subjects)


def _place(transaction: Transaction) -> str:
    """Which transaction this is. A replay must not look like one to who follows the positions."""
    place = f"Outbox-Transaction: {transaction.position}"
    if transaction.replay_of:
        place = f"Outbox-Replay: {transaction.replay_of}\r\nOutbox-Replay-Position: {transaction.position}"
    if not isinstance(transaction, Part):
        return place
    row = transaction.row
    return f"{place}\r\nOutbox-Transaction-Part: {row.part}\r\nOutbox-Transaction-Parts: {row.parts}"


def _lines(headers: Mapping[str, str]) -> str:
    # A line break would end the header: the database refuses it, and so does the relay when it reads the row.
    return "".join(f"{name}: {_BREAK.sub(' ', value.strip())}\r\n" for name, value in headers.items())
