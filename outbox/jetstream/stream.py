"""What JetStream's answers say of a stream and of a stored message, as values. Pure; what comes in may be hostile."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, NamedTuple, Self

from outbox.core.plan import Seen
from outbox.core.requirements import Problem, of_sharing, of_stream
from outbox.core.transaction import NO_LIMIT, Room
from outbox.errors import Unusable

# Bytes beside a message, its headers and its subject: nats-server's fileStoreMsgSize and memStoreMsgSize.
OVERHEAD = {"file": 34, "memory": 16}
MAX_DIGITS = 18  # a number of more is nobody's position
# What the relay writes, in its order (`outbox.core.batch.frames`).
OURS = re.compile(
    rb"NATS/1\.0\r\n(?:Nats-Expected-Stream: [^\r\n]*\r\n)?(?:Nats-Expected-Last-Sequence: (\d{1,18})\r\n)?"
    rb"(?:Nats-Expected-Last-Subject-Sequence: (\d{1,18})\r\n)?"
    rb"(?:Nats-Batch-Id: (\S+)\r\nNats-Batch-Sequence: \d+\r\n(?:Nats-Batch-Commit: 1\r\n)?)?"
    rb"Nats-Msg-Id: (\S+)\r\nOutbox-Id: (\S+)\r\n"
    rb"(?:Outbox-Transaction: (\d{1,18})|Outbox-Replay: \d+\r\nOutbox-Replay-Position: (\d{1,18}))\r\n"
    rb"Outbox-Transaction-Count: (\d{1,18})\r\nOutbox-Transaction-Sequence: (\d{1,18})\r\n"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamInfo:
    """What the relay needs to know of a stream. `created` is its identity: a re-created stream has another one.

    A `consumable` one is not changed by a consumer; a `direct` one gives messages to whoever asks any of its replicas.
    """

    name: str
    created: str
    first_sequence: int
    last_sequence: int
    subjects: tuple[str, ...]
    problem: Problem | None
    max_message_bytes: int | None
    consumable: bool = False
    direct: bool = False
    room: Room = field(default_factory=Room)
    unfencible: str | None = None  # why it cannot be fenced by a subject
    removes: bool = False  # what is old
    deleted: tuple[int, ...] = ()  # what is gone between its first and last message, where it was asked for

    def check(self) -> Self:
        """The stream itself; raises `Unusable`, with the remedy, if the relay cannot keep its promises with it."""
        if self.problem is not None:
            raise Unusable(f"stream {self.name} cannot be used: {self.problem.what}", remedy=self.problem.remedy)
        return self


def stream_info(answer: dict[str, Any]) -> StreamInfo:
    """The answer to STREAM.INFO, as far as the relay needs it."""
    config = answer["config"]
    size = int(config.get("max_msg_size", -1))
    return StreamInfo(
        name=config["name"],
        created=answer["created"],
        first_sequence=max(1, int(answer["state"]["first_seq"])),
        last_sequence=int(answer["state"]["last_seq"]),
        subjects=tuple(config.get("subjects") or ()),
        problem=next(of_stream(config), None),
        max_message_bytes=size if size >= 0 else None,
        consumable=config.get("retention", "limits") == "limits",
        direct=bool(config.get("allow_direct")),
        room=_room(config),
        unfencible=next(of_sharing(config), None),
        removes=bool(config.get("max_age")) or (config.get("discard") != "new" and _limited(config)),
        deleted=tuple(answer["state"].get("deleted") or ()),
    )


def _limited(config: dict[str, Any]) -> bool:
    return any(int(config.get(name, -1)) > 0 for name in ("max_msgs", "max_bytes"))


def _room(config: dict[str, Any]) -> Room:
    """A stream that removes what is old has room for anything."""

    def limit(name: str) -> int:
        given = int(config.get(name, -1))
        return given if given > 0 else NO_LIMIT

    if config.get("discard") != "new":
        return Room()
    of_subject = limit("max_msgs_per_subject") if config.get("discard_new_per_subject") else NO_LIMIT
    overhead = OVERHEAD.get(config.get("storage", ""), 0)
    return Room(messages=limit("max_msgs"), bytes=limit("max_bytes"), of_subject=of_subject, overhead=overhead)


_seen = partial(tuple.__new__, Seen)  # of a tuple, without a call in Python


class Message(NamedTuple):
    """A stored message as it was read. `headers` are as they are on the wire, empty if it has none; `stamp` is when it
    was stored, as whoever answered told it.
    """

    sequence: int
    subject: bytes
    headers: bytes
    payload: bytes
    stamp: bytes

    @property
    def stored_at(self) -> datetime:
        """When the server stored it, to the microsecond."""
        if self.stamp.isdigit():
            return datetime.fromtimestamp(0, UTC) + timedelta(microseconds=int(self.stamp) // 1000)
        return datetime.fromisoformat(self.stamp.decode())


def message_of(answer: dict[str, Any]) -> Message:
    """The message in the answer to STREAM.MSG.GET."""
    message = answer["message"]
    headers, payload = (base64.b64decode(message.get(part) or "") for part in ("hdrs", "data"))
    return Message(int(message["seq"]), message["subject"].encode(), headers, payload, message["time"].encode())


def seen(message: Message) -> Seen:
    """What tells whose a stored message is. A hostile header is only a header that does not fit."""
    headers = message.headers
    found = OURS.match(headers)
    if found is None or _has_more(headers, found.end()):
        return _looked_up(headers)
    follows, fence, batch_id, message_id, outbox_id, position, replayed, count, number = found.groups()
    return _seen(
        (
            outbox_id.decode("utf-8", "replace"),
            message_id.decode("utf-8", "replace"),
            int(position or replayed),
            int(number),
            int(count),
            position is None,
            batch_id.decode("utf-8", "replace") if batch_id else None,
            int(fence) if fence else None,
            int(follows) if follows else None,
            False,
            False,
            None,
        )
    )


def _has_more(headers: bytes, end: int) -> bool:
    """True if there are headers of nats-server or of an outbox behind those that a relay writes."""
    return end + 2 != len(headers) and (headers.find(b"Nats-", end) >= 0 or headers.find(b"Outbox-", end) >= 0)


def _looked_up(raw: bytes) -> Seen:
    """The same of headers in any order: of two with one name the first counts, as it does for nats-server."""
    headers: dict[str, str] = {}
    for line in raw.decode(errors="replace").split("\r\n")[1:]:
        name, _, value = line.partition(":")
        headers.setdefault(name, value.strip())

    def number(name: str) -> int | None:
        value = headers.get(name, "")
        return int(value) if value.isascii() and value.isdigit() and len(value) <= MAX_DIGITS else None

    # What a stream has from another one was not fenced here, whatever it brings along.
    fenced = "Nats-Stream-Source" not in headers
    own = "Nats-Expected-Last-Subject-Sequence-Subject" not in headers
    return Seen(
        outbox_id=headers.get("Outbox-Id"),
        message_id=headers.get("Nats-Msg-Id"),
        position=number("Outbox-Replay-Position" if "Outbox-Replay" in headers else "Outbox-Transaction"),
        number=number("Outbox-Transaction-Sequence"),
        count=number("Outbox-Transaction-Count"),
        replayed="Outbox-Replay" in headers,
        batch_id=headers.get("Nats-Batch-Id") if fenced else None,
        fence=number("Nats-Expected-Last-Subject-Sequence") if fenced and own else None,
        follows=number("Nats-Expected-Last-Sequence") if fenced else None,
        marker="Nats-Marker-Reason" in headers,
        sourced="Nats-Stream-Source" in headers,
        part=number("Outbox-Transaction-Part"),
    )
