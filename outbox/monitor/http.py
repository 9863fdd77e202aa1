"""Health and metrics over HTTP: `/healthz`, `/readyz`, `/metrics`. In threads, so it answers though the loop hangs.

`/healthz` asks whether the relay's loop still turns, and probes nothing else: an outage is no reason to kill a relay.
`/readyz` tells whether this relay leads with both servers, or stands by with PostgreSQL.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from outbox.core import telemetry
from outbox.errors import Misconfigured

LOOP_SECONDS = 5.0  # a loop that does not turn for so long is stuck
METHODS = ("GET", "HEAD")
MOST_CLIENTS = 32  # at a time: more are slow, or hostile
MOST_BODY = 1 << 16  # bytes that are read of what nobody should send


class Health:
    """`happened` is a listener. Reading is safe from any thread."""

    def __init__(self) -> None:
        self._state = "starting"
        self._waits: str | None = None
        self._held: dict[str, str] = {}
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
                self._held = {}
            case telemetry.Stopped():
                self._state = "stopped"
            case _:
                self._hold(happening)

    def _hold(self, happening: telemetry.Happening) -> None:
        match happening:
            case telemetry.Blocked(stream=stream, why=why):
                self._held[stream or "outbox"] = why
            case telemetry.Unblocked(stream=stream):
                self._held.pop(stream or "outbox", None)
            case telemetry.Paused(why=why):
                self._held["paused"] = why
            case telemetry.Resumed():
                self._held.pop("paused", None)
            case telemetry.Drifted(what=what):
                self._held |= {"drift": what}
                if not what:
                    del self._held["drift"]
            case _:
                pass

    @property
    def state(self) -> str:
        """What the relay is: starting, standby, leader or stopped."""
        return self._state

    @property
    def held(self) -> dict[str, str]:
        """What holds transactions back though the relay is ready: by stream, or all as "outbox", "paused", "drift"."""
        return dict(self._held)

    @property
    def problem(self) -> str | None:
        """Why it is not ready, or None."""
        if self._state not in ("standby", "leader"):
            why = self._lost.get("postgres")
            return f"postgres: {why}" if why else f"the relay is {self._state}"
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
        turned = threading.Event()
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(turned.set)
        alive = turned.wait(LOOP_SECONDS)
        return _json(200 if alive else 503, {"alive": alive})

    def readyz(_: str) -> Answer:
        state, problem = health.state, health.problem
        found = {"ready": problem is None, "state": state, "problem": problem, "held": health.held}
        return _json(503 if problem else 200, found)

    def metrics(accept: str) -> Answer:
        try:
            encode, kind = choose_encoder(accept)
        except (TypeError, ValueError):  # a version that is none
            encode, kind = choose_encoder("")
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


class _Server(ThreadingHTTPServer):
    """Serves each client in a thread of its own; too many of them do not take the relay's descriptors."""

    daemon_threads, block_on_close = True, False

    def __init__(self, host: str, port: int, pages: Mapping[str, Respond]) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.pages = pages
        self._clients: deque[socket.socket] = deque()
        super().__init__((host, port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Whoever has been there for longest gives way."""
        self._clients.append(request)
        if len(self._clients) > MOST_CLIENTS:
            with contextlib.suppress(OSError):
                self._clients.popleft().shutdown(socket.SHUT_RDWR)
        super().process_request(request, client_address)

    def close_request(self, request: Any) -> None:
        with contextlib.suppress(ValueError):
            self._clients.remove(request)
        super().close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - the base class's
        """Who hangs up is not worth a line; a page that fails is."""
        if not isinstance(sys.exception(), OSError):
            logging.getLogger("outbox").exception("a page could not be made")


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version, timeout = "outbox", 10

    def do_GET(self) -> None:
        page = self.server.pages.get(self.path.partition("?")[0])
        accept = self.headers.get("Accept", "")
        self._answer(page(accept) if page is not None else _json(404, {"paths": list(self.server.pages)}))

    def __getattr__(self, name: str) -> Callable[[], None]:
        # The base class looks for do_HEAD, do_POST and whatever a client thinks of.
        if not name.startswith("do_"):
            raise AttributeError(name)
        return self.do_GET if name == "do_HEAD" else self._refuse

    def _refuse(self) -> None:
        # The system resets a connection of which something is not read, and the answer may be lost with that.
        with contextlib.suppress(ValueError):
            self.rfile.read(min(max(int(self.headers.get("Content-Length", 0)), 0), MOST_BODY))
        self._answer(_json(405, {"methods": METHODS}), Allow=", ".join(METHODS))

    def _answer(self, answer: Answer, **headers: str) -> None:
        self.send_response(answer.status)
        headers |= {"Content-Type": answer.kind, "Content-Length": str(len(answer.body))}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is the base class's
        """Requests are not worth a line."""


def _listening(listen: str, pages: Mapping[str, Respond]) -> _Server:
    host, _, port = listen.rpartition(":")
    try:
        return _Server(host.strip("[]"), int(port), pages)
    except (OSError, OverflowError, TypeError, UnicodeError) as error:
        raise Misconfigured(
            f"cannot listen on {listen}: {error}", remedy="choose another HOST:PORT with --listen (OUTBOX_LISTEN)"
        ) from error
