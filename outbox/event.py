"""An event, and the rules that make it publishable: the same rules, in the same words, as the database's triggers.

Pure values. The writer checks before it asks the server; the triggers check what comes by plain SQL.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

from outbox.errors import InvalidEvent

MAX_SUBJECT_BYTES = 255
MAX_HEADER_BYTES = 61_440
MAX_EVENT_BYTES = 1_000_000

_BLANK = re.compile("[\x00-\x20\x7f-\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]")
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_RESERVED = re.compile(r"(nats|outbox)-", re.IGNORECASE)
_ORDINARY = re.compile(rf"(?!(?i:nats|outbox)-){_TOKEN.pattern}")  # a name that no rule but the value's is about
_REMEMBERED_SUBJECTS = 10_000
ROLLUP = "Nats-Rollup"
NO_HEADERS: Mapping[str, str] = {}  # of the events that have none in the database; shared, and told by its identity


class Event(NamedTuple):
    """What an application adds: `message_id`, the text of a UUID, becomes `Nats-Msg-Id`; `headers` map str to str."""

    message_id: str
    subject: str
    payload: bytes
    headers: Mapping[str, str]

    @property
    def is_rollup(self) -> bool:
        """True if storing this message removes the earlier ones of its subject."""
        return ROLLUP in self.headers


def subject_problem(subject: str) -> str | None:  # noqa: PLR0911 - one return for each rule
    """What makes `subject` unpublishable, or None. The words are those of the database."""
    if not subject:
        return "is empty"
    if len(subject.encode(errors="surrogatepass")) > MAX_SUBJECT_BYTES:
        return f"is longer than {MAX_SUBJECT_BYTES} bytes"
    if _BLANK.search(subject):
        return "contains white space or a control character"
    if "*" in subject or ">" in subject:
        return "contains a wildcard (* or >)"
    if subject.startswith("$"):
        return "begins with $, which is reserved"
    if subject.startswith(".") or subject.endswith(".") or ".." in subject:
        return "has an empty token"
    return None


def matches(subject: str, pattern: str) -> bool:
    """True if a subject fits a filter such as `orders.*.placed` or `orders.>`."""
    tokens, parts = subject.split("."), pattern.split(".")
    for index, part in enumerate(parts):
        if part == ">":
            return len(tokens) > index
        if index >= len(tokens) or part not in ("*", tokens[index]):
            return False
    return len(tokens) == len(parts)


def header_problem(headers: Mapping[str, str]) -> str | None:  # noqa: PLR0911 - one return for each rule
    """What makes `headers` unpublishable, or None. The words are those of the database."""
    if not isinstance(headers, Mapping):
        return "must be an object of strings"
    for name, value in headers.items():
        if not isinstance(value, str):
            return f"value of '{name}' is not a string"
        if not isinstance(name, str) or not _TOKEN.fullmatch(name):
            return f"name '{name}' is not a token"
        if "\r" in value or "\n" in value:
            return f"value of '{name}' has a line break"
        if name == "Nats-TTL" or (name == ROLLUP and value == "sub"):
            continue
        if name == ROLLUP:
            return "Nats-Rollup may only have the value sub"
        if _RESERVED.match(name):
            return f"name '{name}' is reserved"
    return None


_subject_problem = lru_cache(_REMEMBERED_SUBJECTS)(subject_problem)


def event_problem(event: Event) -> str | None:
    """What makes an event from the database unpublishable, or None: a row that was written around its triggers.

    For every event on its way out: what is in order is told apart cheaply.
    """
    if problem := _subject_problem(event.subject):
        return f"subject {event.subject[:80]!r} {problem}"
    if event.headers is NO_HEADERS:
        return None
    if type(event.headers) is dict and all(
        type(value) is str and _ORDINARY.fullmatch(name) and "\n" not in value and "\r" not in value
        for name, value in event.headers.items()
    ):
        return None
    problem = header_problem(event.headers)
    # Its words quote a hostile name: kept short and on one line.
    return f"headers: {problem}"[:200].encode("unicode_escape").decode() if problem else None


def header_bytes(headers: Mapping[str, str]) -> int:
    """Size of the headers on the wire, in bytes: name, value, separator and line end of each, and the first line."""
    return 12 + sum(len(name.encode()) + len(value.encode()) + 4 for name, value in headers.items())


def encode_payload(payload: object) -> bytes:
    """`bytes` as they are, `str` as UTF-8, anything else as JSON; raises `InvalidEvent` for what JSON cannot hold."""
    if isinstance(payload, bytes | bytearray | memoryview):
        return bytes(payload)
    try:
        text = payload if isinstance(payload, str) else json.dumps(payload, separators=(",", ":"))
        return text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidEvent(
            f"outbox: payload of type {type(payload).__name__} cannot be encoded: {error}",
            remedy="give bytes, a str, or a value that json.dumps accepts",
        ) from error


def check_size(event: Event, most: int) -> None:
    """Raise `InvalidEvent` if payload and headers together have more than `most` bytes."""
    size = len(event.payload) + (header_bytes(event.headers) if event.headers else 0)
    if size > most:
        raise InvalidEvent(
            f"outbox: payload and headers of {size} bytes are over the limit of {most}",
            remedy="send a reference instead; or raise max_event_bytes in the table limits and in Outbox(...)",
        )


def check_event(event: Event) -> Event:
    """The event itself, or `InvalidEvent` with what to change: every rule but the size, which can be configured."""
    if problem := subject_problem(event.subject):
        raise InvalidEvent(
            f"outbox: subject {event.subject[:80]!r} {problem}",
            remedy="a subject is one or more tokens separated by dots, such as orders.created",
        )
    if problem := header_problem(event.headers):
        raise InvalidEvent(
            f"outbox: headers: {problem}",
            remedy="headers map strings to strings; of the names in Nats- only Nats-TTL and Nats-Rollup (sub) are free",
        )
    if (size := header_bytes(event.headers)) > MAX_HEADER_BYTES:
        raise InvalidEvent(f"outbox: headers of {size} bytes are over the limit of {MAX_HEADER_BYTES}")
    return event
