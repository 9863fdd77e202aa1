"""Text that is safe to show, and JSON for machines (see `docs/schemas`). Pure, and knows nothing of the outbox.

Safe is text without what a terminal would take for a command, and without passwords and tokens: what comes from rows is
hostile, and what a setting or a server gave may hold a secret. Where it cannot tell, it hides too much.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from typing import Any

MASK = "***"
_SECRETS = "password|sslpassword|oauth_client_secret|scram_client_key|scram_server_key"
_USER_INFO = re.compile(r"(?P<scheme>\w+)://(?P<info>[^\s/]*)@")
_IN_QUERY = re.compile(rf"([?&](?:{_SECRETS})=)[^&\s]*", re.IGNORECASE)
_IN_WORDS = re.compile(rf"(?<![?&\w])((?:{_SECRETS})\s*=\s*)(?:'(?:\\.|[^'\\])*'?|(?:\\.|[^\s\\])+)", re.IGNORECASE)


def to_json(value: Any, *, indent: int | None = 2) -> str:
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


def masked(text: str) -> str:
    """The text with every password in it replaced; a user without a password is a token, but in a PostgreSQL URL."""
    text = _USER_INFO.sub(_without_password, text)
    return _IN_WORDS.sub(rf"\1{MASK}", _IN_QUERY.sub(rf"\1{MASK}", text))


def _without_password(found: re.Match[str]) -> str:
    user, colon, _ = found["info"].partition(":")
    if colon:
        return f"{found['scheme']}://{user}:{MASK}@"
    return found[0] if found["scheme"].startswith("postgres") else f"{found['scheme']}://{MASK}@"


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
