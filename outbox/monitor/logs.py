"""The relay's log: what happens, as lines on standard error, for people or as JSON. No payloads, no secrets."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from datetime import UTC, datetime

from outbox.config import LogFormat
from outbox.core import telemetry
from outbox.text import printable

USUAL = (
    telemetry.PageRead,
    telemetry.BatchSent,
    telemetry.BatchEnded,
    telemetry.Marked,
    telemetry.Purged,
    telemetry.Slept,
)
ERRORS = (telemetry.Died, telemetry.Blocked, telemetry.Strayed)
WARNINGS = (
    telemetry.Careful,
    telemetry.LostLead,
    telemetry.Unreachable,
    telemetry.InDoubt,
    telemetry.Shared,
    telemetry.Paused,
)


def logger(form: LogFormat, *, verbose: bool) -> telemetry.Listener:
    """A listener that writes a line for each thing that happens; every page, batch and mark only if `verbose`."""

    def write(happening: telemetry.Happening) -> None:
        if verbose or not isinstance(happening, USUAL):
            # A log that nobody takes is no reason to stop publishing.
            with contextlib.suppress(OSError):
                print(_json(happening) if form is LogFormat.JSON else _human(happening), file=sys.stderr, flush=True)

    return write


def level(happening: telemetry.Happening) -> str:
    """How much it matters: error, warning, info, or debug for what happens all the time."""
    if isinstance(happening, ERRORS):
        return "error"
    if isinstance(happening, WARNINGS):
        return "warning"
    return "debug" if isinstance(happening, USUAL) else "info"


def _human(happening: telemetry.Happening) -> str:
    return f"{datetime.now().astimezone():%H:%M:%S.%f} [{os.getpid()}] {printable(telemetry.sentence(happening))}"


def _json(happening: telemetry.Happening) -> str:
    fields = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "level": level(happening),
        "pid": os.getpid(),
        "event": type(happening).__name__,
        "message": telemetry.sentence(happening),
        **dataclasses.asdict(happening),
    }
    return json.dumps(fields, default=str)
