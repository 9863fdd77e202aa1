"""The published schemas of what commands print with --json: `docs/schemas`, made from the types that are printed.

`python -m tests.support.schemas` writes them; a test sees that they are up to date and that real output fits them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from outbox.core.comparison import Summary
from outbox.doctor.check import Check
from outbox.operate.dead import DeadLetter
from outbox.operate.replay import Replayed
from outbox.operate.show import Shown
from outbox.operate.status import Status
from outbox.sources import Setting

FOLDER = Path(__file__).parents[2] / "docs" / "schemas"
TYPES: dict[str, tuple[str, Any]] = {
    "status": ("outbox status --json", Status),
    "config": ("outbox config --json", list[Setting]),
    "doctor": ("outbox doctor --json", list[Check]),
    "show": ("outbox show POSITION --json, and outbox dead show", Shown),
    "dead-list": ("outbox dead list --json", list[DeadLetter]),
    "replay": ("outbox replay --json", Replayed),
    "verify": ("outbox verify --json", list[Summary]),
}
BYTES = {"type": "string", "format": "binary"}
PRINTED_BYTES = {
    "description": "Text, or where it is not UTF-8 an object with the one key base64.",
    "anyOf": [
        {"type": "string"},
        {"type": "object", "properties": {"base64": {"type": "string"}}, "required": ["base64"]},
    ],
}


def schema(name: str) -> dict[str, Any]:
    """The JSON schema of one command's output."""
    command, kind = TYPES[name]
    made = TypeAdapter(kind).json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_printed(made), "title": command}


def _printed(value: Any) -> Any:
    if isinstance(value, dict):
        if {key: value.get(key) for key in BYTES} == BYTES:
            return PRINTED_BYTES
        closed = {"additionalProperties": False} if value.get("type") == "object" and "properties" in value else {}
        return {key: _printed(each) for key, each in value.items()} | closed
    return [_printed(each) for each in value] if isinstance(value, list) else value


def text(name: str) -> str:
    """The file's text."""
    return json.dumps(schema(name), indent=2) + "\n"


if __name__ == "__main__":
    for each in TYPES:
        (FOLDER / f"{each}.json").write_text(text(each))
