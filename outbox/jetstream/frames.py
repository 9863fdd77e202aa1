"""Messages as they stand on the wire, for readers of many: nothing is made of a frame but its four parts.

`Splitter` is pure: bytes in, as they come, frames and other lines out. `Frames` puts it in the place of nats-py's
parser, which goes on with everything that is no message; nats-py's own work on one takes several times as long.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from nats.aio.client import Client
from nats.errors import ProtocolError
from nats.protocol.parser import Parser

from outbox.jetstream.wire import LINE_BYTES

END = b"\r\n"
# Protocol: docs.nats.io. Subject, sid, a reply or none, bytes of headers, bytes of all.
HEADED = re.compile(rb"HMSG (\S+) \d+ (?:(\S+) )?(\d{1,9}) (\d{1,9})\r\n")
BARE = re.compile(rb"MSG (\S+) \d+ (?:(\S+) )?(\d{1,9})\r\n")


class Frame(NamedTuple):
    """A message as the server sent it; `reply` and `headers` are empty where there are none."""

    subject: bytes
    reply: bytes
    headers: bytes
    payload: bytes


_frame = partial(tuple.__new__, Frame)  # of a tuple, without a call in Python


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
        while at < size:
            if (found := HEADED.match(data, at)) is not None:
                subject, reply, head, total = found.groups(b"")
            elif (found := BARE.match(data, at)) is not None:
                subject, reply, total = found.groups(b"")
                head = b"0"
            elif (end := data.find(END, at)) >= 0:
                lines.append(_line(data[at:end]))
                at = end + 2
                continue
            elif size - at > LINE_BYTES:
                raise Doubtful("a line does not end")
            else:
                break
            begin = found.end()
            middle, stop = begin + int(head), begin + int(total)
            if middle > stop:
                raise Doubtful("the sizes of a message cannot be")
            if size < stop + 2:
                needed = stop + 2 - at
                break
            if not data.startswith(END, stop):
                raise Doubtful("a message does not end where it should")
            frames.append(_frame((subject, reply, data[begin:middle], data[middle:stop])))
            at = stop + 2
        self._pieces, self._size, self._needed = [data[at:]], size - at, needed
        return frames, lines


def _line(line: bytes) -> bytes:
    if line.startswith((b"MSG", b"HMSG")):
        raise Doubtful("a message begins with something else than its sizes")
    return line


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
