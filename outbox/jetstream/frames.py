"""Messages as they stand on the wire, for readers of many: nothing is made of a frame but its four parts.

`Splitter` is pure: bytes in, as they come, frames and other lines out. `Frames` puts it in the place of nats-py's
parser, which goes on with everything that is no message; nats-py's own work on one takes several times as long.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from nats.aio.client import Client
from nats.errors import ProtocolError
from nats.protocol.parser import Parser

from outbox.jetstream.wire import LINE_BYTES

END = b"\r\n"
MOST_BYTES = 1 << 27  # of a message: nats-server's own limit is half of it
MOST_DIGITS = 12  # of both sizes
HEADED, BARE = 2, 1  # sizes that a frame's line ends with: of headers and all, or of all


class Frame(NamedTuple):
    """A message as the server sent it; `reply` and `headers` are empty where there are none."""

    subject: bytes
    reply: bytes
    headers: bytes
    payload: bytes


class Doubtful(ValueError):
    """What came is not the protocol, or may not be whole."""


class Splitter:
    """The server's bytes, in pieces of any size, cut into messages and lines."""

    def __init__(self, rest: bytes = b"") -> None:
        self._pieces, self._size, self._needed = [rest], len(rest), 1

    def feed(self, data: bytes) -> tuple[list[Frame], list[bytes]]:
        """The messages that are whole now, and the other lines, without their ends; raises `Doubtful`."""
        self._pieces.append(data)
        self._size += len(data)
        if self._size < self._needed:
            return [], []  # a large message is put together once, and not with every piece
        return self._split(b"".join(self._pieces))

    def _split(self, data: bytes) -> tuple[list[Frame], list[bytes]]:
        frames: list[Frame] = []
        lines: list[bytes] = []
        at, needed, size = 0, 1, len(data)
        while (end := data.find(END, at)) >= 0:
            if data.startswith(b"HMSG ", at):
                sizes = HEADED
            elif data.startswith(b"MSG ", at):
                sizes = BARE
            else:
                lines.append(data[at:end])
                at = end + 2
                continue
            subject, reply, head, total = _line(data[at:end], sizes)
            begin, stop = end + 2, end + 2 + total
            if size < stop + 2:
                needed = stop + 2 - at
                break
            if data[stop : stop + 2] != END:
                raise Doubtful("a message does not end where it should")
            frames.append(Frame(subject, reply, data[begin : begin + head], data[begin + head : stop]))
            at = stop + 2
        else:
            if size - at > LINE_BYTES:
                raise Doubtful("a line does not end")
        self._pieces, self._size, self._needed = [data[at:]], size - at, needed
        return frames, lines


def _line(line: bytes, sizes: int) -> tuple[bytes, bytes, int, int]:
    """Subject, reply, and bytes of headers and of all: `[H]MSG subject sid [reply] [headers] all`."""
    words = line.split()
    digits = b"".join(words[-sizes:])
    if not (sizes + 3 <= len(words) <= sizes + 4 and digits.isdigit() and len(digits) <= MOST_DIGITS):
        raise Doubtful("a message begins with something else than its sizes")
    head, total = int(words[-2]) if sizes == HEADED else 0, int(words[-1])
    if not head <= total <= MOST_BYTES:
        raise Doubtful("the sizes of a message cannot be")
    return words[1], words[3] if len(words) == sizes + 4 else b"", head, total


class Frames(Parser):
    """In the place of a connected client's parser: messages go to `take`, all else is nats-py's.

    `moved` grows while messages come, also while a large one is under way.
    """

    def __init__(self, client: Client, take: Callable[[list[Frame]], None]) -> None:
        super().__init__(client)
        self._splitter = Splitter(bytes(client._ps.buf))  # noqa: SLF001 - what has come already
        self._take = take
        self.moved = 0
        client._ps = self  # noqa: SLF001 - nats-py has no other door

    async def parse(self, data: bytes = b"") -> None:
        """As nats-py's does; of what is not the protocol it closes the connection."""
        try:
            frames, lines = self._splitter.feed(data)
        except Doubtful as doubt:
            raise ProtocolError from doubt
        self.moved += bool(frames or not lines)
        if frames:
            self._take(frames)
        for line in lines:
            try:
                await super().parse(line + END)
            except (AttributeError, ValueError) as error:  # nats-py would only stop reading
                raise ProtocolError from error
            if self.buf:
                raise ProtocolError  # nats-py would wait for more
