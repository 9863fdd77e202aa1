"""`outbox config`: every setting as it is in force here, and where it comes from; secrets are masked."""

from __future__ import annotations

import json

from outbox.config import Loaded, Settings
from outbox.options import AsJson, loaded
from outbox.screen import show_settings
from outbox.sources import variable


def command(as_json: AsJson = False) -> None:
    """Show every setting, its value and where it comes from. Passwords, tokens and seeds are masked.

    Example: outbox config --json
    """
    found = rows(loaded())
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        show_settings(found)


def rows(found: Loaded) -> list[dict[str, str | None]]:
    """One row for each setting; the value is null where none is given."""
    return [
        {
            "name": name,
            "variable": variable(name),
            "value": found.settings.shown(name),
            "source": found.origins.get(name, "default"),
        }
        for name in Settings.model_fields
    ]
