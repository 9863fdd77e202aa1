"""Health and metrics over HTTP: `/healthz`, `/readyz`, `/metrics`. In threads, so it answers though the loop hangs.

`/healthz` asks whether the relay's loop still turns, and probes nothing else: an outage is no reason to kill a relay.
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

from outbox.errors import Misconfigured
from outbox.health import Health

LOOP_SECONDS = 5.0  # a loop that does not turn for so long is stuck


class Answer(NamedTuple):
    """Status, content type and body."""

    status: int
    kind: str
    body: bytes


Page = Callable[[str], Answer]  # of the request's header Accept


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


def _listening(listen: str, pages: Mapping[str, Page]) -> ThreadingHTTPServer:
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
