"""Is this relay ready: does it lead with both servers, or stand by with Postgres? A listener to what happens; no IO."""

from __future__ import annotations

from outbox.core import telemetry


class Health:
    """`happened` is a listener. Reading is safe from any thread."""

    def __init__(self) -> None:
        self._state = "starting"
        self._lost: dict[str, str] = {"postgres": "not connected yet", "nats": "not connected yet"}

    def happened(self, happening: telemetry.Happening) -> None:
        """Take in what happened; ignores what does not count."""
        match happening:
            case telemetry.Connected(server=server):
                self._lost.pop(server, None)
            case telemetry.Unreachable(server=server, why=why):
                self._lost[server] = why
            case telemetry.StandingBy():
                self._state = "standby"
            case telemetry.TookLead():
                self._state = "leader"
            case telemetry.LeadEnded():
                self._state = "starting"
                self._lost["nats"] = "not connected yet"
            case telemetry.Stopped():
                self._state = "stopped"
            case _:
                pass

    @property
    def state(self) -> str:
        """What the relay is: starting, standby, leader or stopped."""
        return self._state

    @property
    def problem(self) -> str | None:
        """Why it is not ready, or None."""
        if self._state not in ("standby", "leader"):
            return self._lost.get("postgres") or f"the relay is {self._state}"
        needed = ("postgres", "nats") if self._state == "leader" else ("postgres",)
        lost = ((server, self._lost.get(server)) for server in needed)
        return next((f"{server}: {why}" for server, why in lost if why is not None), None)
