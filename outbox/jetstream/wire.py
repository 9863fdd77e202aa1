"""nats-py's client on a connection of ours, with what it leaves out: a wary eye on TLS, later INFOs, and patience.

By itself nats-py talks in the clear to a server that only offers TLS; takes in only what the server says of itself
first; and takes a server for dead whose answer to a ping waits behind what is being sent. Whether a batch or a question
has arrived is told by the server's answer to a ping behind it. Must not know JetStream.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from collections.abc import Callable
from typing import Any

import nats.errors
from nats.aio.client import Client
from nats.aio.transport import TcpTransport
from nats.protocol.parser import PERMISSIONS_ERR

from outbox.errors import Denied

TICK_SECONDS = 0.5
PING_TICKS, DEAD_TICKS = 4, 16  # without a byte in either direction: ask, and give up
LITTLE_BYTES = 8192
UNSENT_BYTES = 131_072  # more are not given to the kernel before they go out
MOST_LAST_WORDS = 65_536
LINE_BYTES = 1_048_576  # an INFO of a large cluster
NO_TLS = (
    "turn TLS on in the server; or, on a network that you trust, ask for none: nats:// in OUTBOX_NATS_URL, and no "
    "OUTBOX_NATS_TLS_…"
)
NO_CERTIFICATE = "give one: OUTBOX_NATS_TLS_CERT and OUTBOX_NATS_TLS_KEY"
LAME_DUCK = "the server is about to stop (lame duck mode)"


class _ToTheEnd(asyncio.StreamReaderProtocol):
    """Reads what a server said before it hung up, also when a failed write finds that out first."""

    def __init__(self, reader: asyncio.StreamReader, made: socket.socket) -> None:
        super().__init__(reader)
        self._reader, self._made = reader, made

    def connection_lost(self, exc: Exception | None) -> None:
        with contextlib.suppress(OSError):
            if exc is not None and (rest := self._made.recv(MOST_LAST_WORDS)):
                self._reader.feed_data(rest)
        super().connection_lost(exc)


class Wire(TcpTransport):
    """A TCP connection to one address, which counts the bytes that go over it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._received = self._given = 0

    async def open(self, family: int, address: Any) -> None:
        """Connect; raises `OSError`."""
        made = socket.socket(family, socket.SOCK_STREAM)
        with contextlib.ExitStack() as undo:
            undo.callback(made.close)
            made.setblocking(False)
            with contextlib.suppress(OSError, AttributeError):  # not on every system
                # The kernel takes megabytes at once: who looks at what it has not taken would see nothing move.
                made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(made, address)
            reader = asyncio.StreamReader(limit=LINE_BYTES)
            transport, protocol = await loop.create_connection(lambda: _ToTheEnd(reader, made), sock=made)
            undo.pop_all()
        self._bare_io_reader = self._io_reader = reader
        self._bare_io_writer = self._io_writer = asyncio.StreamWriter(transport, protocol, reader, loop)

    async def connect(self, *_: Any, **__: Any) -> None:
        """It is connected already."""

    @property
    def moved(self) -> tuple[int, int]:
        """Bytes that came, and bytes that went: while these grow, there is somebody on the other side."""
        return self._received, self._given - self.waiting

    @property
    def waiting(self) -> int:
        """Bytes that are to go out."""
        return self._io_writer.transport.get_write_buffer_size() if self._io_writer else 0

    @property
    def unread(self) -> bytes:
        """What has come and nobody has read yet."""
        return bytes(getattr(self._io_reader, "_buffer", b""))

    def abort(self) -> None:
        """Close the socket at once; idempotent. nats-py waits until the server has read all, which may be never."""
        if self._io_writer is not None:
            self._io_writer.transport.abort()

    def write(self, payload: bytes) -> None:
        """As nats-py does, and count."""
        self._given += len(payload)
        super().write(payload)  # type: ignore[no-untyped-call]

    def writelines(self, payload: list[bytes]) -> None:
        """As nats-py does, and count."""
        self._given += sum(map(len, payload))
        super().writelines(payload)  # type: ignore[no-untyped-call]

    async def read(self, buffer_size: int) -> bytes:
        """As nats-py does, and count."""
        data: bytes = await super().read(buffer_size)
        self._received += len(data)
        return data


class Wary(Client):
    """A client on an open `Wire`; raises `Denied` while it connects. `told` is called when an INFO came.

    `said` is why the connection ended, in the server's words or, where it left none, in ours; `moved` is the loop's
    time at which it was seen last that bytes had come or gone.
    """

    def __init__(
        self, wire: Wire, where: str, *, secure: bool, certified: bool, told: Callable[[dict[str, Any]], None]
    ) -> None:
        super().__init__()
        self._transport = self.wire = wire
        self._where, self._secure, self._certified, self._told = where, secure, certified, told
        self.said: str | None = None
        self._moved, self._seen = 0.0, wire.moved

    @property
    def moved(self) -> float:
        """See the class: by a look at it now, and two a second."""
        if (now := self.wire.moved) != self._seen:
            self._seen, self._moved = now, asyncio.get_running_loop().time()
        return self._moved

    @property
    def secured(self) -> bool:
        """True if the connection is in TLS."""
        return bool(self._server_info.get("tls_required"))

    @property
    def clear(self) -> bool:
        """True if nothing waits to go out, and every ping was answered."""
        return not (self._pongs or self.wire.waiting)

    @property
    def server_id(self) -> str:
        """What the server calls itself."""
        return str(self._server_info.get("server_id", ""))

    def take_in(self, info: dict[str, Any]) -> None:
        """What the server takes from now on."""
        self._max_payload = info.get("max_payload", self._max_payload)

    async def echo(self) -> asyncio.Future[bool]:
        """What it gives is done when the server has read all that was given to nats-py before; or never.

        It must not be cancelled: nats-py would stop reading.
        """
        answer = asyncio.get_running_loop().create_future()
        self._pongs.append(answer)
        await self._send_command(b"PING\r\n")
        await self._flush_pending()
        return answer

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        if initial_connection:
            if self._secure and not (info.get("tls_required") or info.get("tls_available")):
                raise Denied(f"NATS at {self._where} has no TLS, and TLS is asked for", remedy=NO_TLS)
            if info.get("tls_verify") and not self._certified:
                raise Denied(f"NATS at {self._where} asks for a client certificate", remedy=NO_CERTIFICATE)
            info["tls_required"] = info.get("tls_required") or self._secure
        else:
            self.take_in(info)  # the first INFO could not know the limit of the account
        self._told(info)
        if info.get("ldm") and not initial_connection:
            self.said = self.said or LAME_DUCK
            asyncio.create_task(self._close(Client.CLOSED, True))  # noqa: RUF006 - as nats-py does when told to go

    async def _process_err(self, err_msg: str) -> None:
        if PERMISSIONS_ERR in err_msg:
            # nats-py's parser has made it lower case, and with it the subject: as it came, it is there still.
            if found := re.search(r'"[^"]*"', bytes(self._ps.buf).partition(b"\r\n")[0].decode(errors="replace")):
                err_msg = re.sub(r'"[^"]*"', lambda _: found[0], err_msg)
        else:
            self.said = self.said or err_msg.strip("'")  # the end of the connection would be the last word
        await super()._process_err(err_msg)

    async def _process_op_err(self, e: Exception) -> None:
        # Who writes may find out first that the server has hung up: what it said is there, and was not read.
        if found := re.search(rb"-ERR '([^']*)'", self.wire.unread):
            self.said = self.said or found[1].decode(errors="replace").lower()
        await super()._process_op_err(e)

    async def _ping_interval(self) -> None:
        """Give the connection up when nothing has moved for many looks, and a ping was of no avail.

        Looks are counted, and not seconds: who was frozen looks first at what has come meanwhile.
        """
        (received, sent), quiet = self.wire.moved, 0
        while True:
            await asyncio.sleep(TICK_SECONDS)
            _ = self.moved  # takes in what has moved
            now = self.wire.moved
            # What is little goes into buffers on the way, also where nobody reads them.
            if now[0] != received or now[1] - sent >= LITTLE_BYTES:
                (received, sent), quiet = now, 0
                continue
            quiet += 1
            if quiet == PING_TICKS and not self._pongs:
                await self.echo()
            elif quiet >= DEAD_TICKS:
                self.said = self.said or f"nothing has come or gone for {DEAD_TICKS * TICK_SECONDS:.0f} s"
                self.wire.abort()
                await self._process_op_err(nats.errors.StaleConnectionError())
                return
