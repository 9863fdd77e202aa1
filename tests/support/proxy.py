"""A TCP proxy that fails on purpose: cuts, stalls, delays, swallows, is slow, each way; and one that knows acks.

Directions are the client's: `up` is what it sends to the server, `down` what the server answers.
"""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading
from dataclasses import dataclass, field
from typing import Self

from outbox.embedded import free_port

RESET = struct.pack("ii", 1, 0)  # SO_LINGER of zero seconds: close sends a reset
MESSAGE = re.compile(rb"(?:MSG|HMSG) .* (\d+)\r\n")
STREAM_ACK = re.compile(rb'\{"stream":"[^"]+", ?"seq":\d+')


@dataclass
class Flow:
    """One direction of all connections. `bytes` counts what was let through; `rate`, if any, is how many a second are.

    What comes while it is `holding` is taken in (`held` bytes of it) and delivered later, though its sender be gone.
    """

    stalled: bool = False
    swallowed: bool = False
    holding: bool = False
    delay: float = 0.0
    rate: float = 0.0  # bytes a second; 0: as fast as it goes
    bytes: int = 0
    held: int = 0


@dataclass(eq=False)
class _Pair:
    client: socket.socket
    server: socket.socket
    rest: bytes = b""
    lock: threading.Lock = field(default_factory=threading.Lock)
    owes: bool = False  # something held is not delivered yet

    def reset(self) -> None:
        for each in (self.client, self.server):
            with contextlib.suppress(OSError):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                each.shutdown(socket.SHUT_RDWR)
            each.close()


class Proxy:
    """Forwards a port of its own to `target` on the loopback interface; as a context manager it ends with a cut."""

    def __init__(self, target: int) -> None:
        self.target, self.port = target, free_port()
        self.up, self.down = Flow(), Flow()
        self.refusing = False
        self.poison = b""  # what a client may not send: its connection is reset
        self.connections = 0
        self._changed = threading.Condition()
        self._pairs: list[_Pair] = []
        self._closed = False
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, daemon=True).start()

    def change(self, flow: Flow, **values: bool | float) -> None:
        """Change how a direction fails: `stalled`, `swallowed`, `holding`, `delay` in seconds, `rate` in bytes/s."""
        with self._changed:
            for name, value in values.items():
                setattr(flow, name, value)
            self._changed.notify_all()

    def heal(self) -> None:
        """Let everything through again; what was stalled goes on."""
        self.refusing = False
        for flow in (self.up, self.down):
            self.change(flow, stalled=False, swallowed=False, holding=False, delay=0.0, rate=0.0)

    def cut(self) -> None:
        """Reset every connection."""
        with self._changed:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            pair.reset()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self._listener.close()
        self.heal()
        self.cut()

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.refusing or self._closed:
                client.close()
                continue
            try:
                server = socket.create_connection(("127.0.0.1", self.target), timeout=5)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            pair = _Pair(client, server)
            with self._changed:
                self._pairs.append(pair)
                self.connections += 1
            threading.Thread(target=self._pump, args=(pair, self.up), daemon=True).start()
            threading.Thread(target=self._pump, args=(pair, self.down), daemon=True).start()

    def _pump(self, pair: _Pair, flow: Flow) -> None:
        source, target = (pair.client, pair.server) if flow is self.up else (pair.server, pair.client)
        try:
            while data := source.recv(65536):
                if flow.holding:
                    data = self._hold(pair, source, flow, data)
                with self._changed:
                    if flow.rate:
                        self._changed.wait_for(lambda: not flow.rate or self._closed, len(data) / flow.rate)
                    if flow.delay:
                        self._changed.wait_for(lambda: not flow.delay or self._closed, flow.delay)
                    self._changed.wait_for(lambda: not flow.stalled or self._closed)
                if flow.swallowed:
                    continue
                if flow is self.up and self.poison and self.poison in data:
                    pair.reset()
                    break
                flow.bytes += len(data)
                with pair.lock:
                    target.sendall(self.passed(pair, data) if flow is self.down else data)
        except OSError:
            pass
        with self._changed:  # who swallows packets swallows the end of a connection too
            self._changed.wait_for(lambda: not (self.up.swallowed or self.down.swallowed) or self._closed)
            self._changed.wait_for(lambda: not pair.owes or self._closed)
        pair.reset()

    def _hold(self, pair: _Pair, source: socket.socket, flow: Flow, data: bytes) -> bytes:
        """Take in what comes until the flow heals, and return it; if its sender is gone by then, deliver it here."""
        pair.owes, flow.held = True, flow.held + len(data)
        source.settimeout(0.02)
        gone = False
        while flow.holding and not self._closed and not gone:
            try:
                more = source.recv(65536)
                gone = not more
                data, flow.held = data + more, flow.held + len(more)
            except TimeoutError:
                continue
            except OSError:
                gone = True
        with self._changed:
            self._changed.wait_for(lambda: not flow.holding or self._closed)
        if gone:
            pair.server.sendall(data)
            flow.bytes += len(data)
            pair.server.shutdown(socket.SHUT_WR)
            with contextlib.suppress(OSError):
                while pair.server.recv(65536):  # until the server has read all, and hangs up
                    pass
        else:
            source.settimeout(None)
        with self._changed:
            pair.owes = False
            self._changed.notify_all()
        return b"" if gone else data

    def passed(self, _: _Pair, data: bytes) -> bytes:
        """What of the server's answer goes on."""
        return data


class NatsProxy(Proxy):
    """Also drops or holds back JetStream's acks of publishes, and lets everything else pass."""

    def __init__(self, target: int) -> None:
        super().__init__(target)
        self.acks = "pass"  # or "drop", or "hold"
        self.held: list[tuple[_Pair, bytes]] = []
        self.dropped = 0

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def release(self, *, reverse: bool = False) -> None:
        """Deliver the acks that were held back, in their order or in the opposite one; hold no more."""
        self.acks = "pass"
        held, self.held = self.held, []
        for pair, frame in reversed(held) if reverse else held:
            with pair.lock, contextlib.suppress(OSError):
                pair.client.sendall(frame)

    def passed(self, pair: _Pair, data: bytes) -> bytes:
        pair.rest += data
        kept = b""
        while (end := pair.rest.find(b"\r\n")) >= 0:
            size = end + 2
            if message := MESSAGE.match(pair.rest):
                size += int(message.group(1)) + 2
                if len(pair.rest) < size:
                    break
            frame, pair.rest = pair.rest[:size], pair.rest[size:]
            if self.acks != "pass" and STREAM_ACK.search(frame):
                if self.acks == "hold":
                    self.held.append((pair, frame))
                else:
                    self.dropped += 1
                continue
            kept += frame
        return kept
