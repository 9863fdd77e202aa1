"""Promise: a reader's messages are those that the server sent, however the bytes come; anything else is a doubt."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nats.errors import ProtocolError
from nats.protocol.parser import Parser

from outbox.jetstream.frames import Doubtful, Frame, Frames, Splitter
from outbox.jetstream.stream import Message, _looked_up, seen
from outbox.jetstream.wire import LINE_BYTES

WORDS = st.text("abcXYZ.$_-09", min_size=1, max_size=12).map(str.encode)
HEADERS = st.one_of(
    st.just(b""),
    st.sampled_from([b"NATS/1.0 404 No Messages\r\n\r\n", b"NATS/1.0 204 EOB\r\nNats-Num-Pending: 0\r\n\r\n"]),
    st.lists(st.tuples(WORDS, WORDS), max_size=3).map(
        lambda lines: b"NATS/1.0\r\n" + b"".join(name + b": " + value + b"\r\n" for name, value in lines) + b"\r\n"
    ),
)
# What looks like the protocol and is payload.
PAYLOADS = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([b"", b"\r\n", b"PING\r\n", b"MSG a 1 3\r\nabc\r\n", b"\r", b"HMSG a 1 9 99\r\n"]),
    st.integers(1_000, 70_000).map(lambda size: b"x" * size),
)
FRAMES = st.builds(Frame, subject=WORDS, reply=st.one_of(st.just(b""), WORDS), headers=HEADERS, payload=PAYLOADS)
LINES = st.sampled_from(
    [b"PING", b"PONG", b"+OK", b"-ERR 'Slow Consumer'", b'INFO {"server_id":"A","max_payload":1048576}', b"PING "]
)


def on_the_wire(part: Frame | bytes) -> bytes:
    if isinstance(part, bytes):
        return part + b"\r\n"
    sizes = f"{len(part.headers)} " if part.headers else ""
    line = b"MSG " + part.subject + b" 1 " + part.reply + (b" " if part.reply else b"")
    head = (b"H" if part.headers else b"") + line + f"{sizes}{len(part.headers) + len(part.payload)}\r\n".encode()
    return head + part.headers + part.payload + b"\r\n"


def split(data: bytes, cuts: list[int]) -> tuple[list[Frame], list[bytes]]:
    splitter = Splitter()
    frames: list[Frame] = []
    lines: list[bytes] = []
    for begin, end in pairwise([0, *sorted(cuts), len(data)]):
        more_frames, more_lines = splitter.feed(data[begin:end])
        frames += more_frames
        lines += more_lines
    return frames, lines


PARTS = st.lists(st.one_of(FRAMES, LINES), max_size=8)


@settings(max_examples=600, deadline=None)
@given(PARTS, st.data())
def test_whatever_the_pieces_the_messages_and_lines_are_the_same(
    parts: list[Frame | bytes], data: st.DataObject
) -> None:
    wire = b"".join(map(on_the_wire, parts))
    cuts = data.draw(st.lists(st.integers(0, len(wire)), max_size=30))
    frames, lines = split(wire, cuts)
    assert frames == [each for each in parts if isinstance(each, Frame)]
    assert lines == [each for each in parts if isinstance(each, bytes)]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(FRAMES.filter(lambda each: len(each.payload) < 100), LINES), min_size=1, max_size=3))
def test_every_split_into_two_and_into_single_bytes(parts: list[Frame | bytes]) -> None:
    wire = b"".join(map(on_the_wire, parts))
    whole = split(wire, [])
    assert all(split(wire, [cut]) == whole for cut in range(len(wire) + 1))
    assert split(wire, list(range(len(wire)))) == whole


@settings(max_examples=200, deadline=None)
@given(PARTS, st.integers(0, 10**6))
def test_a_part_that_is_not_whole_is_waited_for_and_given_once(parts: list[Frame | bytes], cut: int) -> None:
    wire = b"".join(map(on_the_wire, parts))
    cut %= len(wire) + 1
    frames, lines = split(wire[:cut], [])
    found: list[Frame | bytes] = [*frames, *lines]
    assert all(each in parts for each in found)
    assert sum(len(on_the_wire(each)) for each in found) <= cut


@pytest.mark.parametrize(
    "garbage",
    [
        b"MSG a 1\r\n",
        b"MSG a 1 x\r\n",
        b"MSG a 1 -1\r\n\r\n",
        b"MSG a 1 +1\r\n1\r\n",
        b"MSG a 1 b c 1\r\n1\r\n",
        b"MSG a 1 3\r\nabcd\r\n",
        b"HMSG a 1 9 3\r\nabc\r\n",
        b"HMSG a 1 b c 1 1\r\n1\r\n",
        b"HMSG a 1 1 1_0\r\n",
        b"MSG a 1 1234567890\r\n",
        b"MSG  a 1 1\r\n1\r\n",
        b"MSG a 1 " + b"9" * 5000 + b"\r\n",
        b"x" * (LINE_BYTES + 1),
    ],
)
def test_what_cannot_be_is_a_doubt(garbage: bytes) -> None:
    with pytest.raises(Doubtful):
        split(b"PING\r\n" + garbage, [])


class Client:
    """What nats-py's parser tells of the lines that are no message."""

    def __init__(self) -> None:
        self._ps = Parser(self)
        self.told: list[Any] = []

    async def _process_ping(self) -> None:
        self.told.append("PING")

    async def _process_pong(self) -> None:
        self.told.append("PONG")

    async def _process_err(self, words: str) -> None:
        self.told.append(words)

    async def _process_info(self, info: dict[str, Any]) -> None:
        self.told.append(info)


def fed(*pieces: bytes, before: bytes = b"") -> tuple[list[Frame], list[Any]]:
    client, frames = Client(), list[Frame]()
    client._ps.buf.extend(before)
    parser = Frames(client, frames.extend)  # type: ignore[arg-type]
    assert client._ps is parser

    async def feed() -> None:
        for each in pieces:
            await parser.parse(each)

    asyncio.run(feed())
    return frames, client.told


@settings(max_examples=200, deadline=None)
@given(PARTS, st.data())
def test_in_the_place_of_nats_pys_parser_all_else_is_told_to_the_client(
    parts: list[Frame | bytes], data: st.DataObject
) -> None:
    wire = b"".join(map(on_the_wire, parts))
    cut = data.draw(st.integers(0, len(wire)))
    frames, told = fed(wire[cut:], before=wire[:cut]) if wire[cut:] else fed(wire)
    words = {b"PING": "PING", b"PING ": "PING", b"PONG": "PONG", b"-ERR 'Slow Consumer'": "'slow consumer'"}
    expected = [each for each in parts if isinstance(each, bytes) and each != b"+OK"]
    assert frames == [each for each in parts if isinstance(each, Frame)]
    assert [words.get(each) or {"server_id": "A", "max_payload": 1048576} for each in expected] == told


@pytest.mark.parametrize("garbage", [b"HELLO\r\n", b"-ERR\r\n", b"INFO {\r\n", b"x" * 5000 + b"\r\n", b"MSG\r\n"])
def test_what_nats_py_would_only_wait_behind_ends_the_connection(garbage: bytes) -> None:
    with pytest.raises(ProtocolError):
        fed(b"PING\r\n", garbage)


NAMES = st.sampled_from(
    [
        b"Nats-Expected-Stream",
        b"Nats-Expected-Last-Sequence",
        b"Nats-Expected-Last-Subject-Sequence",
        b"Nats-Expected-Last-Subject-Sequence-Subject",
        b"Nats-Batch-Id",
        b"Nats-Batch-Sequence",
        b"Nats-Batch-Commit",
        b"Nats-Msg-Id",
        b"Outbox-Id",
        b"Outbox-Transaction",
        b"Outbox-Replay",
        b"Outbox-Replay-Position",
        b"Outbox-Transaction-Count",
        b"Outbox-Transaction-Sequence",
        b"Nats-Stream-Source",
        b"Nats-Marker-Reason",
        b"traceparent",
    ]
)
VALUES = st.sampled_from([b"1", b"12", b"a b", b" 7", b"", b"x", "é".encode(), b"\xff", b"9" * 18, b"9" * 19, b"-1"])
OUR_HEADERS = [
    (b"Nats-Expected-Stream", b"S"),
    (b"Nats-Expected-Last-Sequence", b"8"),
    (b"Nats-Batch-Id", b"t-1"),
    (b"Nats-Batch-Sequence", b"1"),
    (b"Nats-Batch-Commit", b"1"),
    (b"Nats-Msg-Id", b"m"),
    (b"Outbox-Id", b"me"),
    (b"Outbox-Transaction", b"5"),
    (b"Outbox-Transaction-Count", b"3"),
    (b"Outbox-Transaction-Sequence", b"1"),
]


@settings(max_examples=1500, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.tuples(NAMES, VALUES)), max_size=4), st.sets(st.integers(0, 9)))
def test_headers_in_the_relays_order_are_read_as_any_others(
    added: list[tuple[int, tuple[bytes, bytes]]], left_out: set[int]
) -> None:
    """There is a fast way for what the relay writes; it must not see what the other one does not."""
    lines = [each for number, each in enumerate(OUR_HEADERS) if number not in left_out]
    for place, line in added:
        lines.insert(min(place, len(lines)), line)
    raw = b"NATS/1.0\r\n" + b"".join(name + b": " + value + b"\r\n" for name, value in lines) + b"\r\n"
    message = Message(1, b"a", raw, b"", b"1")
    assert seen(message) == _looked_up(raw)
