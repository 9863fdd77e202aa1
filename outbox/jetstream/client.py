"""The relay's only hand on NATS: one connection, stream facts, single messages, and batches with windowed acks.

Built on nats-py's public calls, but for what `wire` changes, where batches are written. nats-py buffers what is
published while it reconnects and sends it later, even what its caller has given up: so this connection never
reconnects. When it is lost, every batch in flight has the outcome `Unknown`, and the leader opens a new one. No time is
counted while bytes are on their way: a limit is what the server may take once it has read all.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any, NamedTuple, Self

import nats.errors
from nats.aio.msg import Msg

from outbox.config import Settings
from outbox.core.batch import Batch, Frames, frames, refenced
from outbox.core.outcome import (
    MEANINGS,
    MESSAGE_NOT_FOUND,
    MESSAGE_TOO_LARGE,
    STREAM_NOT_FOUND,
    Meaning,
    Outcome,
    Rejected,
    Unknown,
    read_reply,
)
from outbox.core.plan import Seen
from outbox.core.requirements import of_nats
from outbox.errors import Denied, Misconfigured, Weather
from outbox.jetstream.connect import Servers, close, dial
from outbox.jetstream.credentials import options
from outbox.jetstream.denials import blames_what_was_sent
from outbox.jetstream.stream import Message, StreamInfo, message_of, seen, stream_info
from outbox.jetstream.wire import UNSENT_BYTES, Wary

API_SECONDS, MESSAGE_SECONDS = 3.0, 10.0
READ_AT_ONCE = 32  # each answer carries the whole message
SLOW_SECONDS = 1.0  # in which fewer are read at once; the server hangs up over an answer that takes ten
LIMITS_SECONDS = 5.0
FEW = 30  # pieces of frames
CHUNK_BYTES = 262_144  # so often the server's answer to a ping shows that it reads


class Refused(Weather):
    """JetStream's API answered with an error."""

    def __init__(self, code: int, description: str) -> None:
        super().__init__(f"{description} ({code})")
        self.code = code


class Forbidden(nats.errors.Error):
    """The server does not let us publish there. To who waits for an answer it would look like silence."""


class Sending:
    """A batch on its way, and its outcome."""

    def __init__(self, nc: Wary) -> None:
        self.outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self.begun = asyncio.get_running_loop().time()
        self._nc = nc
        self._arrived: float | None = None

    @property
    def since(self) -> float:
        """The loop's time since which only the server keeps us waiting, as far as is known."""
        return max(self.begun, self._nc.moved) if self._arrived is None else self._arrived

    def arrived(self, _: object = None) -> None:
        """The server has read all of it."""
        self._arrived = asyncio.get_running_loop().time()


class _Made(NamedTuple):
    """A batch that is to be sent later, and its frames."""

    batch: Batch
    token: str
    frames: Frames


class JetStream:
    """One connection to NATS. When it is lost, `lost` says why, and a new one must be made."""

    def __init__(self, news: Callable[[], None]) -> None:
        self._news = news
        self._nc: Wary
        self._api = "$JS.API"
        self._prefix = ""
        self._tokens = itertools.count(1)
        self._awaited: dict[str, Sending] = {}
        self._asked: dict[str, asyncio.Future[Msg]] = {}
        self._outgoing: asyncio.Queue[tuple[str, Batch, str]] = asyncio.Queue()
        self._sender: asyncio.Task[None] | None = None
        self._forbidden: dict[str, str] = {}
        self._questions: dict[str, str] = {}  # the subjects of what is asked
        self._deaf = ""
        self._settings: Settings
        self._servers: Servers
        self._made: _Made | None = None
        self._limits_due = 0.0
        self._at_once = 1

    @classmethod
    async def connect(
        cls, settings: Settings, news: Callable[[], None] = lambda: None, servers: Servers | None = None
    ) -> Self:
        """Connect, with the settings' credentials and certificates as they are on disk now; close it when done.

        Raises `Weather` if no server answers, `Misconfigured` if it cannot keep the promises. Of the weather, `Denied`
        is what credentials, TLS or permissions must settle. `news` is called, without arguments, whenever a reply came
        in, the server has other limits, or the connection was lost. `servers` remembers whom the servers have named.
        """
        self = cls(news)
        self._settings, self._servers = settings, servers or Servers(settings.nats_servers)
        self._nc = await dial(
            self._servers,
            news=news,
            error_cb=self._on_error,
            closed_cb=self._on_closed,
            **options(settings),
        )
        self._api = f"$JS.{settings.nats_domain}.API" if settings.nats_domain else "$JS.API"
        async with contextlib.AsyncExitStack() as undo:
            undo.push_async_callback(self.close)
            self._check_version()
            await self._listen()
            await self._look_for_jetstream()
            undo.pop_all()
        self._sender = asyncio.create_task(self._send_in_order())
        self._sender.add_done_callback(lambda _: self._news())
        return self

    async def _listen(self) -> None:
        """Subscribe to our inbox; what the server has against it comes before its answer to a ping."""
        self._prefix = self._nc.new_inbox()
        lost = self._asked[""] = asyncio.get_running_loop().create_future()
        try:
            # nats-py throws away what is over its limit.
            await self._nc.subscribe(f"{self._prefix}.*", cb=self._on_reply, pending_bytes_limit=0)
            await self._arrival(lost, API_SECONDS)
            if lost.done():
                lost.result()
        except (TimeoutError, nats.errors.Error) as error:
            raise Weather(f"the connection to NATS was lost at once: {self.lost or error}") from error
        finally:
            del self._asked[""]
        if self._deaf:
            raise Denied(
                f"NATS lets the relay hear no answers: {self._deaf}",
                remedy="allow its user to subscribe to _INBOX.>, or set OUTBOX_NATS_INBOX_PREFIX to the prefix that "
                "its permissions allow",
            )

    def _check_version(self) -> None:
        for problem in of_nats(self.version):
            raise Misconfigured(problem.what, remedy=problem.remedy)

    async def _look_for_jetstream(self) -> None:
        """Raise `Weather` if nobody listens where JetStream should; who is only silent may lack a leader just now."""
        with contextlib.suppress(TimeoutError, nats.errors.Error):
            try:
                await self._question(f"{self._api}.STREAM.NAMES")
            except nats.errors.NoRespondersError as error:
                remedy = "turn JetStream on in nats-server; or, behind a leaf node, see OUTBOX_NATS_DOMAIN"
                raise Weather(f"no JetStream answers at {self._api}", remedy=remedy) from error

    async def close(self) -> None:
        """Close the connection; idempotent, blocks for at most two seconds."""
        if self._sender is not None:
            self._sender.cancel()
        await close(self._nc)

    @property
    def lost(self) -> str | None:
        """Why the connection is gone, or None while it stands."""
        if self._sender is not None and self._sender.done() and not self._sender.cancelled():
            return f"sending has ended: {self._sender.exception()!r}"
        if not self._nc.is_closed:
            return self._deaf or None
        return self._nc.said or str(self._nc.last_error or "the connection was closed")

    @property
    def blames(self) -> bool | None:
        """Whether the server ended the connection over what it was sent: None if it did not say why."""
        if self._nc.said is None:
            return None if self._nc.is_closed and not self._deaf else False
        return blames_what_was_sent(self._nc.said)

    @property
    def version(self) -> tuple[int, int, int]:
        """Version of the connected server."""
        version = self._nc.connected_server_version
        return (version.major, version.minor, version.patch)

    @property
    def max_payload(self) -> int:
        """The most bytes of payload and headers that the server takes now; more closes the connection for good."""
        return self._nc.max_payload

    async def learn_limits(self) -> None:
        """Take in the limits that a new connection to the same server is told; at most every few seconds.

        A server that was reloaded with a higher limit says nothing of it to those that are connected.
        """
        if (now := asyncio.get_running_loop().time()) < self._limits_due:
            return
        self._limits_due = now + LIMITS_SECONDS
        other = await JetStream.connect(self._settings, servers=self._servers.last())
        if other._nc.server_id == self._nc.server_id:  # noqa: SLF001 - it is one of these
            self._nc.take_in({"max_payload": other.max_payload})
        await other.close()

    @property
    def api(self) -> str:
        """What the subjects of JetStream's API begin with."""
        return self._api

    async def another(self, ended: Callable[..., Awaitable[None]]) -> Wary:
        """One more connection, as this one was made, for a reader; raises as `connect` does.

        `ended` is called with every error that the server tells, and at the end.
        """
        return await dial(self._servers, news=lambda: None, error_cb=ended, closed_cb=ended, **options(self._settings))

    async def ask(self, call: str, body: object = None) -> dict[str, Any]:
        """JetStream's own answer to a call of its API; raises `Weather`, or `Refused` with the code of its refusal."""
        return await self._request(call, body)

    async def probe(self, subject: str) -> Outcome:
        """What the stream's leader says to the second message of a batch that has no first: nothing is ever stored.

        10176 says that atomic batches are on, 10174 that they are off, 10060 that the server does not know them.
        """
        headers = {"Nats-Batch-Id": "probe", "Nats-Batch-Sequence": "2", "Nats-Expected-Stream": "~probe~"}
        try:
            reply = await self._question(subject, headers=headers)
        except nats.errors.NoRespondersError:
            return Unknown(why="no responders: the subject is in no stream, or the stream has no leader")
        except (TimeoutError, nats.errors.Error) as error:
            return Unknown(why=str(error) or "no answer within the time limit")
        return read_reply(reply.data)

    async def stream_of(self, subject: str) -> str | None:
        """The stream that takes `subject` by JetStream's own answer, or None if it says that there is none."""
        names = (await self._request("STREAM.NAMES", {"subject": subject})).get("streams") or []
        return str(names[0]) if names else None

    async def is_mapped(self, subject: str) -> bool:
        """True if a stream takes what is published to `subject`, though the subject is in no stream."""
        return isinstance(await self.probe(subject), Rejected)

    async def stream(self, name: str, *, deleted: bool = False) -> StreamInfo | None:
        """What the stream's leader says of it now, with what is `deleted` if asked; None if there is no such stream."""
        try:
            return stream_info(
                await self._request(f"STREAM.INFO.{name}", {"deleted_details": True} if deleted else None)
            )
        except Refused as refused:
            if refused.code == STREAM_NOT_FOUND:
                return None
            raise

    async def ensure_stream(self, name: str, subjects: Sequence[str]) -> None:
        """Create a stream that suits the relay, unless there is one of that name; then only check that it suits.

        Made with file storage, atomic batches, and new messages refused when it is full. Raises `Misconfigured`.
        """
        if (existing := await self.stream(name)) is not None:
            existing.check()
            return
        config = {
            "name": name,
            "subjects": list(subjects),
            "storage": "file",
            "discard": "new",
            "allow_atomic": True,
            "allow_direct": True,
            "duplicate_window": 120_000_000_000,
        }
        try:
            await self._request(f"STREAM.CREATE.{name}", config)
        except Refused as refused:
            if MEANINGS.get(refused.code) is Meaning.WEATHER:
                raise
            raise Misconfigured(
                f"stream {name} cannot be created: {refused}",
                remedy="choose other --create-stream and --subjects, or create the stream by hand, with allow_atomic",
            ) from refused

    def forbidden(self) -> tuple[str, str] | None:
        """A subject to which we may not publish, and NATS' words, once: to the publisher it looks like silence."""
        return self._forbidden.popitem() if self._forbidden else None

    async def read(self, stream: str, sequences: Sequence[int]) -> dict[int, Seen | None]:
        """Whose these messages are, read from the stream's leader; None for one that is gone."""
        return {place: message and seen(message) async for place, message in self.messages(stream, sequences)}

    async def messages(self, stream: str, sequences: Sequence[int]) -> AsyncIterator[tuple[int, Message | None]]:
        """These messages in order, read from the stream's leader a few at a time; None for one that is gone."""
        done = 0
        clock = asyncio.get_running_loop().time
        while done < len(sequences):
            part, began = sequences[done : done + self._at_once], clock()
            found = await asyncio.gather(*(self._message(stream, seq=place) for place in part))
            slow = clock() - began > SLOW_SECONDS
            self._at_once = max(1, self._at_once // 2) if slow else min(READ_AT_ONCE, 2 * self._at_once)
            done += len(part)
            for each in zip(part, found, strict=True):
                yield each

    async def last_on(self, stream: str, subject: str) -> int:
        """The sequence of the last message on a subject, as the stream's leader knows it; 0 if there is none."""
        found = await self._message(stream, last_by_subj=subject)
        return found.sequence if found is not None else 0

    async def next_on(self, stream: str, subject: str, sequence: int) -> tuple[int, Seen] | None:
        """The first message on a subject from this sequence on, and where it is, from the leader; None if none."""
        found = await self._message(stream, seq=sequence, next_by_subj=subject)
        return (found.sequence, seen(found)) if found is not None else None

    async def subject_at(self, stream: str, sequence: int) -> str | None:
        """The subject of a stored message, as the stream's leader has it; None if it is gone."""
        found = await self._message(stream, seq=sequence)
        return found.subject.decode() if found is not None else None

    async def next_message(self, stream: str, sequence: int) -> Message | None:
        """The first message at this sequence or behind it, by the word of the stream's leader; None if none is."""
        return await self._message(stream, seq=sequence, next_by_subj=">")

    async def _message(self, stream: str, **which: str | int) -> Message | None:
        try:
            return message_of(await self._request(f"STREAM.MSG.GET.{stream}", which, MESSAGE_SECONDS))
        except Refused as refused:
            if refused.code == MESSAGE_NOT_FOUND:
                return None
            raise

    async def _request(self, call: str, body: object = None, seconds: float = API_SECONDS) -> dict[str, Any]:
        payload = json.dumps(body).encode() if body is not None else b""
        asked = f"{self._api}.{call}"
        try:
            reply = await self._question(asked, payload, seconds)
            answer: dict[str, Any] = json.loads(reply.data)
        except (TimeoutError, nats.errors.Error, ValueError) as error:
            why = str(error) or type(error).__name__
            remedy = f"allow this user to publish to {asked}" if isinstance(error, Forbidden) else ""
            raise Weather(f"JetStream does not answer ({asked}): {why}", remedy=remedy) from error
        if refusal := answer.get("error"):
            raise Refused(int(refusal.get("err_code", 0)), str(refusal.get("description", "")))
        return answer

    async def _question(
        self, subject: str, payload: bytes = b"", seconds: float = API_SECONDS, headers: dict[str, str] | None = None
    ) -> Msg:
        """The reply; raises `TimeoutError` if the server has sent none so many seconds after it had read the question.

        nats-py's `request` counts from the call: also while the question waits behind a batch that is being sent, or
        the reply behind others.
        """
        token = str(next(self._tokens))
        reply = self._asked[token] = asyncio.get_running_loop().create_future()
        self._questions[token] = subject
        try:
            await self._nc.publish(subject, payload, reply=f"{self._prefix}.{token}", headers=headers)
            await self._arrival(reply, seconds)
            await asyncio.wait({reply}, timeout=seconds)
            await self._arrival(reply, seconds)  # what it has sent by now comes before its answer to a ping
            if not reply.done():
                raise nats.errors.TimeoutError
            message: Msg = reply.result()
        finally:
            del self._asked[token], self._questions[token]
            reply.cancel()
        if (message.headers or {}).get("Status") == "503":
            raise nats.errors.NoRespondersError
        return message

    async def _arrival(self, reply: asyncio.Future[Msg], seconds: float) -> None:
        """Wait until the server has read all that was sent, or the reply is there, or nothing moves for so long."""
        if reply.done():
            return
        echo, moved = await self._nc.echo(), None
        while not (echo.done() or reply.done()):
            if moved == (moved := self._nc.wire.moved):
                return
            either: set[asyncio.Future[Any]] = {echo, reply}
            await asyncio.wait(either, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)

    def send(self, batch: Batch, outbox_id: str) -> Sending:
        """Queue a batch for the wire, in order. Never blocks; sets no time limit.

        Only the last message asks for a reply, but for a careful batch.
        """
        made = self._made if self._made is not None and self._made.batch.id == batch.id else None
        token = made.token if made is not None else str(next(self._tokens))
        sending = self._awaited[token] = Sending(self._nc)
        sending.outcome.add_done_callback(lambda _: self._awaited.pop(token, None))
        self._outgoing.put_nowait((token, batch, outbox_id))
        return sending

    def prepare(self, batch: Batch, outbox_id: str) -> None:
        """Make the frames of a batch that is to be sent later; of one at a time."""
        token = str(next(self._tokens))
        self._made = _Made(batch, token, frames(batch, outbox_id, f"{self._prefix}.{token}"))

    async def sent(self, seconds: float = 1.0) -> bool:
        """Wait until all that was queued is on its way, at most so long; True if it is."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._outgoing.join(), seconds)
            return True
        return False

    async def _send_in_order(self) -> None:
        while True:
            await self._send(*await self._outgoing.get())
            self._outgoing.task_done()

    async def _send(self, token: str, batch: Batch, outbox_id: str) -> None:
        if (sending := self._awaited.get(token)) is None:
            return  # given up before it went out
        if (made := self._made) is not None and made.token == token:
            self._made = None
            pieces, sizes = refenced(made.frames, made.batch, batch)
        else:
            pieces, sizes = frames(batch, outbox_id, f"{self._prefix}.{token}")
        if (largest := max(sizes)) > self.max_payload:
            # The server would close the connection for good, and tell nobody why.
            description = f"message of {largest} bytes is over max_payload, {self.max_payload}"
            self._tell(token, Rejected(code=MESSAGE_TOO_LARGE, description=description))
            return
        try:
            before = self._nc.clear
            await self._write(pieces)
            if before and self._nc.clear and len(pieces) <= FEW and sum(map(len, pieces)) <= UNSENT_BYTES:
                sending.arrived()  # a ping would cost as much again
            else:
                (await self._nc.echo()).add_done_callback(sending.arrived)
        except (nats.errors.Error, OSError) as error:
            self._tell(token, Unknown(why=f"not sent in full: {str(error) or type(error).__name__}"))

    async def _write(self, pieces: Sequence[bytes]) -> None:
        """Give frames to the connection, much at a time; waits while it has much to send.

        nats-py's `publish` builds a frame from parts, checks what was checked, and takes several times as long.
        """
        for chunk in _chunks(pieces):
            if self._nc.is_closed:
                raise nats.errors.ConnectionClosedError
            self._nc.wire.write(chunk)
            await self._nc.wire.drain()  # type: ignore[no-untyped-call]
            if len(chunk) > CHUNK_BYTES:
                await self._nc.echo()

    async def _on_reply(self, message: Msg) -> None:
        token = message.subject.rpartition(".")[2]
        if (asked := self._asked.get(token)) is not None:
            if not asked.done():
                asked.set_result(message)
            return
        if not message.data and not message.headers:
            return  # a message in the middle of a careful batch was staged
        self._tell(token, read_reply(message.data, (message.headers or {}).get("Status")))

    def _tell(self, token: str, outcome: Outcome) -> None:
        sending = self._awaited.pop(token, None)
        if sending is not None and not sending.outcome.done():
            sending.outcome.set_result(outcome)
            self._news()

    async def _on_error(self, error: Exception) -> None:
        # A permission violation is only an asynchronous error: to the publisher it looks like silence.
        if found := re.search(r'permissions violation for publish to "([^"]+)"', str(error), re.IGNORECASE):
            asked = [token for token, subject in self._questions.items() if subject == found[1]]
            for token in asked:
                if not self._asked[token].done():
                    self._asked[token].set_exception(Forbidden(str(error)))
                    self._asked[token].exception()  # whoever waits will look; if nobody does, asyncio need not complain
            if not asked:
                self._forbidden[found[1]] = str(error)
            self._news()
        if "permissions violation for subscription" in str(error).lower():
            self._deaf = str(error)
            self._news()

    async def _on_closed(self) -> None:
        for asked in self._asked.values():
            if not asked.done():
                asked.set_exception(nats.errors.ConnectionClosedError())
                asked.exception()  # whoever waits will look; if nobody does, asyncio need not complain
        for token in list(self._awaited):
            self._tell(token, Unknown(why="the connection was lost"))
        self._news()


def _chunks(pieces: Sequence[bytes]) -> Iterator[bytes]:
    """Whole messages, of three pieces each, joined until there are enough of them."""
    begun = size = 0
    for end in range(3, len(pieces) + 1, 3):
        size += sum(map(len, pieces[end - 3 : end]))
        if size > CHUNK_BYTES or end == len(pieces):
            yield b"".join(pieces[begun:end])
            begun, size = end, 0


@contextlib.asynccontextmanager
async def connected(settings: Settings) -> AsyncIterator[JetStream]:
    """A command's connection, closed at the end; raises as `JetStream.connect` does."""
    jetstream = await JetStream.connect(settings)
    try:
        yield jetstream
    finally:
        await jetstream.close()
