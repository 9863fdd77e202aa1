"""What systemd is told of a service with `Type=notify`: that it is ready, what it does, that its loop turns, its end.

The protocol of sd_notify(3): datagrams to the socket in NOTIFY_SOCKET. Without that variable everything here is silent.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Mapping

from outbox.core import telemetry


class Supervisor:
    """`happened` is a listener; `watch` says that the loop turns, as often as the supervisor wants to hear it."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._path = environment.get("NOTIFY_SOCKET", "")
        microseconds = environment.get("WATCHDOG_USEC", "")
        self._seconds = int(microseconds) / 2e6 if microseconds.isdecimal() else None
        self._ready = False
        self._owed = ""  # what must be heard, and was not yet

    def happened(self, happening: telemetry.Happening) -> None:
        """Ready is a relay that leads, stands by, or waits out an outage: its settings can be worked with."""
        match happening:
            case telemetry.TookLead() | telemetry.StandingBy() | telemetry.Waiting() | telemetry.Unreachable():
                if not self._ready:
                    self._ready, self._owed = True, "READY=1\n"
                self._say(f"STATUS={_line(happening)}")
            case telemetry.Blocked() | telemetry.Unblocked() | telemetry.Paused() | telemetry.Resumed():
                self._say(f"STATUS={_line(happening)}")
            case telemetry.Stopped():
                self._say("STOPPING=1")
            case _:
                pass

    async def watch(self) -> None:
        """Say that the loop turns, until cancelled; at once done if nobody wants to hear it."""
        while self._seconds is not None:
            self._say("WATCHDOG=1")
            await asyncio.sleep(self._seconds)

    def _say(self, words: str) -> None:
        if not self._path:
            return
        address = f"\0{self._path[1:]}" if self._path.startswith("@") else self._path
        # A supervisor that does not listen is no reason to end, nor to wait: sending blocks while its queue is full.
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as speaking:
            speaking.setblocking(False)
            speaking.connect(address)
            speaking.send(f"{self._owed}{words}".encode())
            self._owed = ""


def _line(happening: telemetry.Happening) -> str:
    return " ".join(str(happening).split())
