"""Packing whole transactions into batches, and putting a batch on the wire.

Pure. A batch always holds whole transactions; a lone event is a plain publish in the same chain, which costs the
server a tenth of a batch of one (no staging store). Header names are ADR-50's, in the exact case: others are ignored
by the server, and the messages stored one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from uuid import UUID

from outbox.plan import Planned
from outbox.transaction import Receipt, Transaction


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

    @property
    def count(self) -> int:
        """How many messages it has."""
        return sum(transaction.count for transaction in self.transactions)

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
        yield Receipt(position=transaction.position, stream=stream, first_sequence=first, last_sequence=base)


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """An event on the wire."""

    subject: str
    headers: dict[str, str]
    payload: bytes
    is_last: bool


def wire_bytes(message: Message) -> int:
    """Bytes of headers and payload as the server counts them against `max_payload`."""
    headers = message.headers.items()
    return len(message.payload) + 14 + sum(len(name) + len(value.encode()) + 4 for name, value in headers)


def take(queue: Iterable[Transaction], packing: Packing) -> list[Transaction]:
    """The transactions from the head of `queue` that go into the next batch: at least one, if there is one.

    A batch ends before a repeated message id, which the server would refuse (10201), and before a rollup of a subject
    that the batch already holds (10111).
    """
    taken: list[Transaction] = []
    messages = size = 0
    ids: set[UUID] = set()
    subjects: set[str] = set()
    for transaction in queue:
        fits = messages + transaction.count <= packing.max_messages and size + transaction.size <= packing.max_bytes
        if taken and (not fits or packing.one_transaction):
            break
        if any(e.message_id in ids or (e.is_rollup and e.subject in subjects) for e in transaction.events):
            break
        taken.append(transaction)
        messages, size = messages + transaction.count, size + transaction.size
        for event in transaction.events:
            ids.add(event.message_id)
            subjects.add(event.subject)
    return taken


def messages(batch: Batch, outbox_id: str) -> Iterator[Message]:
    """The batch as messages, in order. The fence is on the first one: the stream must stand at `base` (ADR-50)."""
    total, number = batch.count, 0
    for transaction in batch.transactions:
        for place, event in enumerate(transaction.events, start=1):
            number += 1
            headers = {
                **event.headers,
                "Nats-Msg-Id": str(event.message_id),
                "Outbox-Id": outbox_id,
                "Outbox-Transaction": str(transaction.position),
                "Outbox-Transaction-Sequence": str(place),
                "Outbox-Transaction-Count": str(transaction.count),
            }
            if number == 1:
                headers["Nats-Expected-Stream"] = batch.stream
                headers["Nats-Expected-Last-Sequence"] = str(batch.base)
            if total > 1:
                headers["Nats-Batch-Id"] = batch.id
                headers["Nats-Batch-Sequence"] = str(number)
                if number == total:
                    headers["Nats-Batch-Commit"] = "1"
            yield Message(subject=event.subject, headers=headers, payload=event.payload, is_last=number == total)
