"""Health and metrics over HTTP: `/healthz`, `/readyz`, `/metrics`. In threads, so it answers though the loop hangs.

`/healthz` asks whether the relay's loop still turns, and probes nothing else: an outage is no reason to kill a relay.
`/readyz` tells whether this relay leads with both servers, or stands by with PostgreSQL.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import TimeoutError as NotInTime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from outbox.core import telemetry
from outbox.errors import Misconfigured

LOOP_SECONDS = 5.0  # a loop that does not turn for so long is stuck


class Health:
    """`happened` is a listener. Reading is safe from any thread."""

    def __init__(self) -> None:
        self._state = "starting"
        self._waits: str | None = None
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
                self._waits = None
            case telemetry.Waiting(why=why):
                self._state, self._waits = "standby", why
            case telemetry.TookLead():
                self._state, self._waits = "leader", None
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
        if self._waits is not None and "postgres" not in self._lost:
            return self._waits
        needed = ("postgres", "nats") if self._state == "leader" else ("postgres",)
        lost = ((server, self._lost.get(server)) for server in needed)
        return next((f"{server}: {why}" for server, why in lost if why is not None), None)


class Answer(NamedTuple):
    """Status, content type and body."""

    status: int
    kind: str
    body: bytes


Respond = Callable[[str], Answer]  # of the request's header Accept


@contextlib.contextmanager
def serving(listen: str, registry: CollectorRegistry, health: Health) -> Iterator[int]:
    """Serve on `listen`, HOST:PORT, while the block runs in the relay's loop; gives the port. Port 0: any free one.

    Raises `Misconfigured` if the address cannot be had.
    """
    loop = asyncio.get_running_loop()

    def healthz(_: str) -> Answer:
        turned = asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop)
        try:
            turned.result(LOOP_SECONDS)
        except NotInTime:
            return _json(503, {"alive": False})
        return _json(200, {"alive": True})

    def readyz(_: str) -> Answer:
        state, problem = health.state, health.problem
        return _json(503 if problem else 200, {"ready": problem is None, "state": state, "problem": problem})

    def metrics(accept: str) -> Answer:
        encode, kind = choose_encoder(accept)
        return Answer(200, kind, encode(registry))

    server = _listening(listen, {"/healthz": healthz, "/readyz": readyz, "/metrics": metrics})
    thread = threading.Thread(target=server.serve_forever, name="outbox http", daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _json(status: int, value: object) -> Answer:
    return Answer(status, "application/json", json.dumps(value).encode() + b"\n")


def _listening(listen: str, pages: Mapping[str, Respond]) -> ThreadingHTTPServer:
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")

    class Handler(BaseHTTPRequestHandler):
        server_version, timeout = "outbox", 10

        def do_GET(self) -> None:
            page = pages.get(self.path.partition("?")[0])
            accept = self.headers.get("Accept", "")
            answer = page(accept) if page is not None else _json(404, {"paths": list(pages)})
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.kind)
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            self.wfile.write(answer.body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is the base class's
            """Requests are not worth a line."""

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        daemon_threads, block_on_close = True, False

    try:
        return Server((host, int(port)), Handler)
    except (OSError, OverflowError) as error:
        raise Misconfigured(
            f"cannot listen on {listen}: {error}", remedy="choose another HOST:PORT with --listen (OUTBOX_LISTEN)"
        ) from error
