"""What JetStream's answers say of a stream and of a stored message, as values. Pure; what comes in may be hostile."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Self

from outbox.core.plan import Seen
from outbox.core.requirements import Problem, of_stream
from outbox.core.transaction import NO_LIMIT, Room
from outbox.errors import Unusable

# Bytes beside a message, its headers and its subject: nats-server's fileStoreMsgSize and memStoreMsgSize.
OVERHEAD = {"file": 34, "memory": 16}
MAX_DIGITS = 18  # a number of more is nobody's position


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamInfo:
    """What the relay needs to know of a stream. `created` is its identity: a re-created stream has another one."""

    name: str
    created: str
    first_sequence: int
    last_sequence: int
    subjects: tuple[str, ...]
    problem: Problem | None
    max_message_bytes: int | None
    room: Room = field(default_factory=Room)

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
        room=_room(config),
    )


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


def seen(message: dict[str, Any]) -> Seen:
    """What tells whose a stored message is. A hostile header is only a header that does not fit."""
    headers: dict[str, str] = {}
    raw, payload = (base64.b64decode(message.get(part) or "") for part in ("hdrs", "data"))
    for line in raw.decode(errors="replace").split("\r\n")[1:]:
        name, _, value = line.partition(":")
        headers.setdefault(name, value.strip())

    def number(name: str) -> int | None:
        value = headers.get(name, "")
        return int(value) if value.isascii() and value.isdigit() and len(value) <= MAX_DIGITS else None

    return Seen(
        outbox_id=headers.get("Outbox-Id"),
        message_id=headers.get("Nats-Msg-Id"),
        position=number("Outbox-Replay-Position" if "Outbox-Replay" in headers else "Outbox-Transaction"),
        number=number("Outbox-Transaction-Sequence"),
        count=number("Outbox-Transaction-Count"),
        replayed="Outbox-Replay" in headers,
        part=number("Outbox-Transaction-Part"),
        digest=sha256(message["subject"].encode() + b"\n" + payload).digest(),
    )
