"""A transaction: the unit of atomicity, order, failure and receipt; and the reasons why one can never be sent.

Pure values. A transaction is here only when it is whole: the store checks the number of its events.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import repeat
from typing import NamedTuple

from outbox.event import NO_HEADERS, Event, event_problem


class DeadReason(StrEnum):
    """Why a transaction is set aside. A closed list: nothing that time can cure is on it."""

    SPANS_STREAMS = "spans-streams"
    UNROUTED = "unrouted"
    TOO_MANY_EVENTS = "too-many-events"
    TOO_LARGE_FOR_STREAM = "too-large-for-stream"
    MESSAGE_TOO_LARGE = "message-too-large"
    HEADERS_TOO_LARGE = "headers-too-large"
    DUPLICATE_MESSAGE_ID = "duplicate-message-id"
    ROLLUP_NOT_PERMITTED = "rollup-not-permitted"
    TTL_NOT_PERMITTED = "ttl-not-permitted"
    INVALID_TTL = "invalid-ttl"
    INVALID_EVENT = "invalid-event"
    WRONG_COUNT = "wrong-count"
    ENDS_CONNECTIONS = "ends-connections"
    KILLS_RELAY = "kills-relay"
    STREAM_RETIRED = "stream-retired"


HEADER_WEIGHT = 4  # bytes in memory, about, for each byte of headers as text: they are objects there
EVENT_OVERHEAD = 200  # bytes in memory and on the wire, about, besides subject, headers and payload
OWN_HEADER_BYTES = 190  # of the relay's headers on each message, at least
NO_LIMIT = 1 << 62
NO_ROLLUPS: frozenset[str] = frozenset()


@dataclass(slots=True)  # not frozen: making a frozen one takes twice as long
class Transaction:
    """A committed transaction with all its events, in the order in which they were added.

    Events are kept in columns, as they are read and sent: thousands of small objects would take longer than the rest.
    `headers` is empty if no event has any; what is in there may still be anything: see `invalid`. `size` is bytes in
    memory and on the wire, about; `rollups` are the subjects that it rolls up; `replay_of` is the position of the
    transaction that it sends again, or 0.
    """

    position: int
    message_ids: Sequence[str]
    subjects: Sequence[str]
    payloads: Sequence[bytes]
    headers: Sequence[Mapping[str, str]]
    count: int
    size: int
    replay_of: int
    rollups: frozenset[str]

    @classmethod
    def of(cls, position: int, events: Sequence[Event], replay_of: int = 0) -> Transaction:
        """The transaction at this position with these events."""
        ids, subjects, payloads, headers = zip(*events, strict=True)
        size = EVENT_OVERHEAD * len(events) + sum(map(len, payloads))
        if all(each is NO_HEADERS for each in headers):
            return cls(position, ids, subjects, payloads, (), len(events), size, replay_of, NO_ROLLUPS)
        size += HEADER_WEIGHT * sum(len(str(each)) for each in headers)
        rollups = frozenset(event.subject for event in events if isinstance(event.headers, dict) and event.is_rollup)
        return cls(position, ids, subjects, payloads, headers, len(events), size, replay_of, rollups)

    @property
    def events(self) -> Iterator[Event]:
        """Its events one by one."""
        return map(Event, self.message_ids, self.subjects, self.payloads, self.headers or repeat(NO_HEADERS))


class Receipt(NamedTuple):
    """Where a transaction is: its messages are `first_sequence` to `last_sequence` of `stream`, without a gap."""

    position: int
    stream: str
    first_sequence: int
    last_sequence: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A transaction can never be sent: `reason` is from the closed list, `detail` says what was found.

    `part` is the one of its parts that is meant, or 0 for all of it.
    """

    position: int
    reason: DeadReason
    detail: str
    part: int = 0

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def reason_of(written: str) -> str:
    """The reason that a verdict begins with which was written down as its `str`."""
    return written.partition(":")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """How much a stream holds that refuses what is new when it is full: messages, bytes, and messages of a subject.

    `overhead` is how many bytes it keeps beside each message and its subject.
    """

    messages: int = NO_LIMIT
    bytes: int = NO_LIMIT
    of_subject: int = NO_LIMIT
    overhead: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one stream and its server take: events in a batch, bytes of a message (payload and headers), all in all."""

    max_batch_messages: int
    max_message_bytes: int
    room: Room = field(default_factory=Room)


def invalid(transaction: Transaction) -> Verdict | None:
    """Why this transaction can never be sent, whatever the streams: its rows were written around the triggers; or None.

    Look before anybody is asked where its subjects go: a hostile header could end a batch, a hostile subject is a
    question that has no answer.
    """
    for number, event in enumerate(transaction.events, start=1):
        if problem := event_problem(event):
            detail = f"event {number}: {problem}"
            return Verdict(position=transaction.position, reason=DeadReason.INVALID_EVENT, detail=detail)
    return None


def verdict(transaction: Transaction, streams: Mapping[str, str | None], limits: Limits) -> Verdict | None:
    """Why this transaction can never be sent, as far as that can be seen before the first byte; or None.

    `streams` maps each of its subjects to the stream that takes it.
    """
    if len(streams) > 1 and len(taken_by := set(streams.values())) > 1:
        detail = "its subjects belong to " + ", ".join(sorted(map(str, taken_by)))
        return Verdict(position=transaction.position, reason=DeadReason.SPANS_STREAMS, detail=detail)
    if fits(transaction, limits) and not transaction.rollups:
        return None  # as nearly all are; the others are looked at event by event
    return _problem(transaction, limits)


def fits(transaction: Transaction, limits: Limits) -> bool:
    """True if nothing can be said against its message ids and sizes, at a glance."""
    count = transaction.count
    return (
        transaction.size <= min(limits.max_message_bytes, limits.room.bytes // 2)
        and count <= min(limits.max_batch_messages, limits.room.messages, limits.room.of_subject)
        and (count == 1 or len(set(transaction.message_ids)) == count)
    )


def _problem(transaction: Transaction, limits: Limits) -> Verdict | None:
    def dead(reason: DeadReason, detail: str) -> Verdict:
        return Verdict(position=transaction.position, reason=reason, detail=detail)

    if transaction.count > limits.max_batch_messages:
        return dead(DeadReason.TOO_MANY_EVENTS, f"{transaction.count} events, {limits.max_batch_messages} fit a batch")
    ids: set[str] = set()
    subjects: set[str] = set()
    for number, event in enumerate(transaction.events, start=1):
        if event.message_id in ids:
            return dead(DeadReason.DUPLICATE_MESSAGE_ID, f"event {number} repeats message id {event.message_id}")
        if event.is_rollup and event.subject in subjects:
            return dead(DeadReason.ROLLUP_NOT_PERMITTED, f"event {number} rolls up a subject of its own transaction")
        if (size := message_bytes(event)) > limits.max_message_bytes:
            return dead(
                DeadReason.MESSAGE_TOO_LARGE, f"event {number} has {size} bytes, {limits.max_message_bytes} are taken"
            )
        ids.add(event.message_id)
        subjects.add(event.subject)
    return never_fits(transaction, limits.room)


def never_fits(transaction: Transaction, room: Room, size: int | None = None) -> Verdict | None:
    """The verdict on a transaction for which not even the empty stream has room, or None.

    `size` is how many bytes it takes there, to the byte, where that is known.
    """
    if (why := _over(transaction, room, size)) is None:
        return None
    detail = f"{why}, and it refuses what is new when it is full"
    return Verdict(position=transaction.position, reason=DeadReason.TOO_LARGE_FOR_STREAM, detail=detail)


def _over(transaction: Transaction, room: Room, size: int | None) -> str | None:
    if transaction.count > room.messages:
        return f"{transaction.count} events, and the stream holds {room.messages} messages"
    most, subject = max((count, subject) for subject, count in Counter(transaction.subjects).items())
    if most > room.of_subject:
        return f"{most} events on {subject[:80]}, and the stream holds {room.of_subject} messages of a subject"
    if size is None:
        beside = OWN_HEADER_BYTES + room.overhead
        size = sum(beside + len(event.subject) + message_bytes(event) for event in transaction.events)
    if size > room.bytes:
        return f"at least {size} bytes, and the stream holds {room.bytes} bytes"
    return None


def message_bytes(event: Event) -> int:
    """Bytes of payload and headers as they are sent, a lower bound of the message on the wire."""
    return len(event.payload) + sum(len(name) + len(value.strip()) + 4 for name, value in event.headers.items())
