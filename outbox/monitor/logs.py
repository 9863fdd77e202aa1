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


def logger(form: LogFormat, *, verbose: bool) -> telemetry.Listener:
    """A listener that writes a line for each thing that happens; every page, batch and mark only if `verbose`."""

    def write(happening: telemetry.Happening) -> None:
        if verbose or happening.level is not telemetry.Level.DEBUG:
            # A log that nobody takes is no reason to stop publishing.
            with contextlib.suppress(OSError):
                print(_json(happening) if form is LogFormat.JSON else _human(happening), file=sys.stderr, flush=True)

    return write


def _human(happening: telemetry.Happening) -> str:
    return f"{datetime.now().astimezone():%H:%M:%S.%f} [{os.getpid()}] {printable(str(happening))}"


def _json(happening: telemetry.Happening) -> str:
    fields = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "level": happening.level,
        "pid": os.getpid(),
        "event": type(happening).__name__,
        "message": str(happening),
        **dataclasses.asdict(happening),
    }
    return json.dumps(fields, default=str)
