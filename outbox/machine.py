"""What is printed: values as JSON for machines (see `docs/schemas`), and text that is safe for terminals. Pure."""

from __future__ import annotations

import base64
import dataclasses
import json
from typing import Any


def machine(value: Any, *, indent: int | None = 2) -> str:
    """A value of the commands, or a list of them, as JSON: times as ISO 8601, UUIDs as text.

    Bytes are text where they are UTF-8; else an object with the one key `base64`.
    """
    return json.dumps(_plain(value), default=_text, indent=indent)


def printable(text: str) -> str:
    """The text without anything that a terminal would take for a command: what comes from rows is hostile."""
    return "".join(each if each.isprintable() or each == "\n" else _escaped(each) for each in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def counted(number: float, word: str) -> str:
    """Such as "1 event" or "1,000 events"."""
    return f"{number:,.0f} {word}{'' if number == 1 else 's'}"


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def _text(value: Any) -> Any:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return {"base64": base64.b64encode(value).decode()}
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
