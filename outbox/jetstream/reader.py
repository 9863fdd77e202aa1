"""A stream read from end to end, fast: frames on a connection of its own, and the leader's word for what is missing.

By a consumer where one changes nothing, else by direct gets, else message by message from the stream's leader. The
first two may be answered by a replica that lags, so every gap is asked of the leader. Requests are bounded by bytes.
At the first doubt, such as a gap in the consumer's own count or silence, consumer and connection are thrown away, and
it goes on behind the last page that was given out.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import re
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from functools import partial
from typing import NamedTuple

import nats.errors

from outbox.errors import Weather
from outbox.jetstream.client import JetStream
from outbox.jetstream.connect import close
from outbox.jetstream.frames import Doubtful, Frame, Frames
from outbox.jetstream.stream import Message, StreamInfo
from outbox.jetstream.wire import Wary

PAGE_MESSAGES, PAGE_BYTES = 4096, 8 << 20
BESIDE_BYTES = 65_536  # what counts beside payload and headers
MOST_BYTES = 64 << 20  # of one message and of a request for it
FEW = 64  # are read from the leader sooner than a connection is made
TRIES = 3  # that come to nothing, before another way is taken
SILENT_SECONDS = 5.0
IDLE_NANOSECONDS = 60_000_000_000  # until the server forgets a consumer
GAPS_AT_ONCE = 32
ACK_WORDS = 9  # later servers may put domain and account before the stream's name
STATUS = re.compile(rb"NATS/1\.0 (\d{3})")
USED_UP = b" Message Size Exceeds MaxBytes\r\n", b" Batch Completed\r\n"
NO_HEADERS = b"NATS/1.0\r\n\r\n"
TOLD = re.compile(
    rb"\r\nNats-Stream: (\S+)\r\nNats-Subject: (\S+)\r\nNats-Sequence: (\d+)\r\nNats-Time-Stamp: (\S+)\r\n"
)


_message = partial(tuple.__new__, Message)  # of a tuple, without a call in Python
Parts = AsyncGenerator[list[Message], None]


class Page(NamedTuple):
    """All messages up to `end` that came in no page before; what is not there is gone, by the leader's word."""

    messages: list[Message]
    end: int


class Unfit(Doubtful):
    """This way does not lead to the messages, and will not if it is tried again."""


async def pages(jetstream: JetStream, info: StreamInfo, first: int, last: int) -> AsyncGenerator[Page, None]:
    """The messages of a stream from `first` to `last`, in order; close it when done.

    Raises `Weather`; of it `Refused` says by its code that the stream is gone.
    """
    at = first
    for way in _ways(info, last + 1 - first):
        tries = TRIES
        while at <= last and tries:
            tries -= 1
            try:
                async with _line(jetstream) as line, contextlib.aclosing(way(line, info.name, at, last)) as parts:
                    async for found in parts:
                        end = min(found[-1].sequence, last)
                        messages = await _with_missing(jetstream, info.name, found, at, end)
                        at, tries = end + 1, TRIES
                        yield Page(messages, end)
            except Unfit:
                break
            except (Doubtful, nats.errors.Error, OSError):
                continue
            if at <= last:
                # A replica that lags has no more: its leader may have.
                following = await jetstream.next_message(info.name, at)
                if following is not None and following.sequence <= last:
                    break
                at = last + 1
                yield Page([], last)
    async for page in _by_leader(jetstream, info.name, at, last):
        yield page


def _ways(info: StreamInfo, count: int) -> Iterator[Callable[[_Line, str, int, int], Parts]]:
    if count <= FEW:
        return
    if info.consumable:
        yield _by_consumer
    if info.direct:
        yield _by_direct_gets


async def _by_leader(jetstream: JetStream, stream: str, first: int, last: int) -> AsyncIterator[Page]:
    messages: list[Message] = []
    size = 0
    async for place, message in jetstream.messages(stream, range(first, last + 1)):
        if message is not None:
            messages.append(message)
            size += len(message.payload)
        if place == last or size > PAGE_BYTES or not place % PAGE_MESSAGES:
            yield Page(messages, place)
            messages, size = [], 0


async def _with_missing(
    jetstream: JetStream, stream: str, found: list[Message], first: int, last: int
) -> list[Message]:
    """What was found, and what the leader has between, from `first` to `last`."""
    kept = found if found[-1].sequence <= last else [each for each in found if each.sequence <= last]
    if len(kept) == last + 1 - first:
        return kept
    places = [first - 1, *(each.sequence for each in kept), last + 1]
    gaps = [(low + 1, high - 1) for low, high in itertools.pairwise(places) if high - low > 1]
    missing: list[Message] = []
    for part in range(0, len(gaps), GAPS_AT_ONCE):
        for each in await asyncio.gather(*(_left(jetstream, stream, *gap) for gap in gaps[part : part + GAPS_AT_ONCE])):
            missing += each
    return sorted(kept + missing) if missing else kept


async def _left(jetstream: JetStream, stream: str, first: int, last: int) -> list[Message]:
    """What the stream's leader has there, where a replica had nothing."""
    at = first
    if first < last:
        message = await jetstream.next_message(stream, first)
        at = last + 1 if message is None else message.sequence
    return [each async for _, each in jetstream.messages(stream, range(at, last + 1)) if each is not None]


async def _by_consumer(line: _Line, stream: str, first: int, last: int) -> Parts:
    """By a consumer that acks nothing, which the stream does not keep."""
    name = f"outbox-{secrets.token_hex(6)}"
    config = {
        "name": name,
        "ack_policy": "none",
        "deliver_policy": "by_start_sequence",
        "opt_start_seq": first,
        "replay_policy": "instant",
        "mem_storage": True,
        "inactive_threshold": IDLE_NANOSECONDS,
    }
    await line.call(f"CONSUMER.CREATE.{stream}.{name}", {"stream_name": stream, "config": config})
    try:
        wanted = {"batch": PAGE_MESSAGES, "max_bytes": line.request_bytes, "no_wait": True}
        place, count, more = first - 1, 0, True
        await line.ask(f"CONSUMER.MSG.NEXT.{stream}.{name}", wanted)
        while more and place < last:
            found: list[Message] = []
            done = False
            while not done:
                for frame in await line.frames():
                    if not frame.reply:
                        more, done = _goes_on(frame), True
                        continue
                    message, number = _delivered(frame)
                    count += 1
                    if number != count or message.sequence <= place:
                        raise Doubtful("the consumer left something out")
                    place = message.sequence
                    found.append(message)
                done = done or len(found) == PAGE_MESSAGES
            if more and not found and wanted["max_bytes"] >= MOST_BYTES:
                raise Unfit("a message is larger than any request")
            if not found:
                wanted["max_bytes"] *= 2
            if more and place < last:
                await line.ask(f"CONSUMER.MSG.NEXT.{stream}.{name}", wanted)
            if found:
                yield found
    finally:
        await line.forget(f"CONSUMER.DELETE.{stream}.{name}")


def _goes_on(frame: Frame) -> bool:
    """True if the request is used up, False if the replica has no more; raises `Doubtful` on anything else."""
    status = STATUS.match(frame.headers)
    if status is not None and status[1] in (b"404", b"408"):
        return False
    if status is not None and status[1] == b"409" and any(word in frame.headers for word in USED_UP):
        return True
    raise Doubtful(frame.headers.decode(errors="replace"))


def _delivered(frame: Frame) -> tuple[Message, int]:
    """A consumer's message, and its number by the consumer's count."""
    subject, reply, headers, payload = frame
    words = reply.split(b".")
    try:
        place, number, stamp = words[5:8] if len(words) == ACK_WORDS else words[7:10]
        return _message((int(place), subject, headers, payload, stamp)), int(number)
    except ValueError as error:
        raise Doubtful("a message does not tell its place") from error


async def _by_direct_gets(line: _Line, stream: str, first: int, last: int) -> Parts:
    """By direct gets of many at once, which any replica answers, and which leave no trace."""
    place, more = first - 1, True

    async def ask() -> None:
        wanted = {"seq": place + 1, "batch": PAGE_MESSAGES, "max_bytes": line.request_bytes}
        await line.ask(f"DIRECT.GET.{stream}", wanted)

    await ask()
    while more:
        found: list[Message] = []
        done = False
        while not done:
            for frame in await line.frames():
                message = _told(frame, stream)
                if message is None:
                    more, done = _has_more(frame) and place < last, True
                    continue
                if message.sequence <= place:
                    raise Doubtful("a message came twice, or too late")
                place = message.sequence
                found.append(message)
        if more and not found:
            raise Doubtful("an answer without a message")
        if more:
            await ask()
        if found:
            yield found


def _told(frame: Frame, stream: str) -> Message | None:
    """The message in an answer to a direct get, without what the server has told with it; None if it is a status."""
    begin = frame.headers.rfind(b"\r\nNats-Stream: ")  # a message may bring such headers along
    told = TOLD.match(frame.headers, begin) if begin >= 0 else None
    if told is None:
        return None
    if told[1] != stream.encode():
        raise Unfit("a mirror has answered")
    headers = frame.headers[:begin] + b"\r\n\r\n"
    return _message((int(told[3]), told[2], b"" if headers == NO_HEADERS else headers, frame.payload, told[4]))


def _has_more(frame: Frame) -> bool:
    """True if the replica has more behind this answer; raises `Doubtful`, or `Unfit` if nobody gives direct gets."""
    status = STATUS.match(frame.headers)
    if status is not None and status[1] == b"204":
        return b"\r\nNats-Num-Pending: 0\r\n" not in frame.headers
    if status is not None and status[1] == b"404":
        return False
    if status is not None and status[1] == b"503":
        raise Unfit("nobody answers direct gets")
    raise Doubtful(frame.headers.decode(errors="replace"))


class _Line:
    """A connection on which one thing at a time is asked for, and many frames answer."""

    def __init__(self, jetstream: JetStream, client: Wary) -> None:
        self._jetstream, self._client = jetstream, client
        self._came = asyncio.Event()
        self._frames: list[Frame] = []
        self._parser = Frames(client, self._take)
        self._inbox, self._asked = client.new_inbox(), b""
        self._tokens = itertools.count(1)
        self.wrong: str | None = None
        # One message must fit in.
        self.request_bytes = max(PAGE_BYTES, client.max_payload + BESIDE_BYTES)

    def _take(self, frames: list[Frame]) -> None:
        # Of a question that is answered already a last status may come late; a consumer's message has a reply.
        self._frames += [each for each in frames if each.reply or each.subject == self._asked]
        self._came.set()

    def end(self, why: str) -> None:
        """Nothing that is asked here will be answered."""
        self.wrong = why
        self._came.set()

    async def listen(self) -> None:
        """Hear answers."""
        await self._client.subscribe(f"{self._inbox}.*")

    async def call(self, call: str, body: object) -> None:
        """Ask JetStream's API, on the other connection; raises `Unfit` if it does not do that."""
        try:
            await self._jetstream.ask(call, body)
        except Weather as weather:
            raise Unfit(weather.message) from weather

    async def forget(self, call: str) -> None:
        """The same of what will be forgotten anyhow."""
        with contextlib.suppress(Unfit):
            await self.call(call, None)

    async def ask(self, call: str, body: object) -> None:
        """Ask for many, when the last question is answered."""
        reply = f"{self._inbox}.{next(self._tokens)}"
        self._asked = reply.encode()
        await self._client.publish(f"{self._jetstream.api}.{call}", json.dumps(body).encode(), reply=reply)

    async def frames(self) -> list[Frame]:
        """The frames that have come; waits for one, and raises `Doubtful` at silence, or if the line is cut."""
        while not self._frames:
            await self._wait()
        frames, self._frames = self._frames, []
        return frames

    async def _wait(self) -> None:
        before = self._parser.moved
        self._came.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._came.wait(), SILENT_SECONDS)
        if self.wrong is not None:
            raise Doubtful(self.wrong)
        if not self._frames and self._parser.moved == before:
            raise Doubtful("silence")


@contextlib.asynccontextmanager
async def _line(jetstream: JetStream) -> AsyncIterator[_Line]:
    """A new connection; raises `Unfit` if there is none to be had."""
    line: _Line | None = None

    async def ended(error: Exception | None = None) -> None:
        if line is not None:
            line.end(str(error) or "the connection was lost")

    try:
        client = await jetstream.another(ended)
    except Weather as weather:
        raise Unfit(weather.message) from weather
    try:
        line = _Line(jetstream, client)
        await line.listen()
        yield line
    finally:
        await close(client)
