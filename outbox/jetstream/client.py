"""The relay's only hand on NATS: one connection, stream facts, single messages, and batches with windowed acks.

Built on nats-py's public calls, but for one function that writes frames, and `connect`'s look at TLS and its end of a
connection. nats-py buffers what is published while it reconnects and sends it later, even what its caller has given up:
so this connection never reconnects. When it is lost, every batch in flight has the outcome `Unknown`, and the leader
opens a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Self

import nats.errors
from nats.aio.msg import Msg

from outbox.config import Settings
from outbox.core.batch import Batch, frames
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
from outbox.errors import Misconfigured, Weather
from outbox.jetstream.connect import Wary, close, dial
from outbox.jetstream.credentials import options
from outbox.jetstream.stream import StreamInfo, seen, stream_info

API_SECONDS, MESSAGE_SECONDS = 3.0, 10.0
READ_AT_ONCE = 32  # each answer carries the whole message


class Refused(Weather):
    """JetStream's API answered with an error."""

    def __init__(self, code: int, description: str) -> None:
        super().__init__(f"{description} ({code})")
        self.code = code


class JetStream:
    """One connection to NATS. When it is lost, `lost` says why, and a new one must be made."""

    def __init__(self, news: Callable[[], None]) -> None:
        self._news = news
        self._nc: Wary
        self._api = "$JS.API"
        self._prefix = ""
        self._tokens = 0
        self._awaited: dict[str, asyncio.Future[Outcome]] = {}
        self._outgoing: asyncio.Queue[tuple[str, Batch, str]] = asyncio.Queue()
        self._sender: asyncio.Task[None] | None = None
        self._forbidden: dict[str, str] = {}
        self._forbidden_calls: dict[str, str] = {}

    @classmethod
    async def connect(cls, settings: Settings, news: Callable[[], None] = lambda: None) -> Self:
        """Connect, with the settings' credentials and certificates as they are on disk now; close it when done.

        Raises `Weather` if no server answers, `Misconfigured` if it cannot keep the promises. Of the weather, `Denied`
        is what credentials or TLS must settle. `news` is called, without arguments, whenever a reply came in or the
        connection was lost.
        """
        self = cls(news)
        self._nc = await dial(
            settings.nats_servers, error_cb=self._on_error, closed_cb=self._on_closed, **options(settings)
        )
        self._api = f"$JS.{settings.nats_domain}.API" if settings.nats_domain else "$JS.API"
        async with contextlib.AsyncExitStack() as undo:
            undo.push_async_callback(self.close)
            self._check_version()
            await self._look_for_jetstream()
            self._prefix = self._nc.new_inbox()
            try:
                await self._nc.subscribe(f"{self._prefix}.*", cb=self._on_reply)
            except nats.errors.Error as error:
                raise Weather(f"the connection to NATS was lost at once: {error}") from error
            undo.pop_all()
        self._sender = asyncio.create_task(self._send_in_order())
        self._sender.add_done_callback(lambda _: self._news())
        return self

    def _check_version(self) -> None:
        for problem in of_nats(self.version):
            raise Misconfigured(problem.what, remedy=problem.remedy)

    async def _look_for_jetstream(self) -> None:
        """Raise `Weather` if nobody listens where JetStream should; who is only silent may lack a leader just now."""
        with contextlib.suppress(TimeoutError, nats.errors.Error):
            try:
                await self._nc.request(f"{self._api}.STREAM.NAMES", timeout=API_SECONDS)
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
            return None
        return str(self._nc.last_error or "the connection was closed")

    @property
    def version(self) -> tuple[int, int, int]:
        """Version of the connected server."""
        version = self._nc.connected_server_version
        return (version.major, version.minor, version.patch)

    @property
    def max_payload(self) -> int:
        """The most bytes of payload and headers that the server takes; more closes the connection for good."""
        return self._nc.max_payload

    async def ask(self, call: str, body: object = None) -> dict[str, Any]:
        """JetStream's own answer to a call of its API; raises `Weather`, or `Refused` with the code of its refusal."""
        return await self._request(call, body)

    async def probe(self, subject: str) -> Outcome:
        """What the stream's leader says to the second message of a batch that has no first: nothing is ever stored.

        10176 says that atomic batches are on, 10174 that they are off, 10060 that the server does not know them.
        """
        headers = {"Nats-Batch-Id": "probe", "Nats-Batch-Sequence": "2", "Nats-Expected-Stream": "~probe~"}
        try:
            reply = await self._nc.request(subject, b"", headers=headers, timeout=API_SECONDS)
        except nats.errors.NoRespondersError:
            return Unknown(why="no responders: the subject is in no stream, or the stream has no leader")
        except (TimeoutError, nats.errors.Error) as error:
            return Unknown(why=self._forbidden.pop(subject, "") or str(error) or "no answer within the time limit")
        return read_reply(reply.data)

    async def stream_of(self, subject: str) -> str | None:
        """The stream that takes `subject` by JetStream's own answer, or None if it says that there is none."""
        names = (await self._request("STREAM.NAMES", {"subject": subject})).get("streams") or []
        return str(names[0]) if names else None

    async def stream(self, name: str) -> StreamInfo | None:
        """What the stream's leader says of it now, or None if there is no such stream."""
        try:
            return stream_info(await self._request(f"STREAM.INFO.{name}"))
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
        """The headers of these messages, read from the stream's leader; None for one that is gone."""
        found: dict[int, Seen | None] = {}
        for start in range(0, len(sequences), READ_AT_ONCE):
            part = sequences[start : start + READ_AT_ONCE]
            found |= zip(part, await asyncio.gather(*(self._message(stream, place) for place in part)), strict=True)
        return found

    async def _message(self, stream: str, sequence: int) -> Seen | None:
        try:
            reply = await self._request(f"STREAM.MSG.GET.{stream}", {"seq": sequence}, MESSAGE_SECONDS)
        except Refused as refused:
            if refused.code == MESSAGE_NOT_FOUND:
                return None
            raise
        return seen(reply["message"])

    async def _request(self, call: str, body: object = None, seconds: float = API_SECONDS) -> dict[str, Any]:
        payload = json.dumps(body).encode() if body is not None else b""
        try:
            reply = await self._nc.request(f"{self._api}.{call}", payload, timeout=seconds)
            answer: dict[str, Any] = json.loads(reply.data)
        except (TimeoutError, nats.errors.Error, ValueError) as error:
            asked = f"{self._api}.{call}"
            why = self._forbidden_calls.pop(asked, "") or str(error) or type(error).__name__
            raise Weather(f"JetStream does not answer ({asked}): {why}") from error
        if refusal := answer.get("error"):
            raise Refused(int(refusal.get("err_code", 0)), str(refusal.get("description", "")))
        return answer

    def send(self, batch: Batch, outbox_id: str) -> asyncio.Future[Outcome]:
        """Queue a batch for the wire, in order; the future has its outcome. Never blocks; sets no time limit.

        Only the last message asks for a reply, but for a careful batch.
        """
        self._tokens += 1
        token = str(self._tokens)
        future = self._awaited[token] = asyncio.get_running_loop().create_future()
        future.add_done_callback(lambda _: self._awaited.pop(token, None))
        self._outgoing.put_nowait((token, batch, outbox_id))
        return future

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
        if token not in self._awaited:
            return  # given up before it went out
        pieces, sizes = frames(batch, outbox_id, f"{self._prefix}.{token}")
        if (largest := max(sizes)) > self.max_payload:
            # The server would close the connection for good, and tell nobody why.
            description = f"message of {largest} bytes is over max_payload, {self.max_payload}"
            self._tell(token, Rejected(code=MESSAGE_TOO_LARGE, description=description))
            return
        try:
            await self._write(pieces)
        except (nats.errors.Error, OSError) as error:
            self._tell(token, Unknown(why=f"not sent in full: {str(error) or type(error).__name__}"))

    async def _write(self, pieces: Sequence[bytes]) -> None:
        """Give frames to nats-py as one; waits while it has much to send. Uses its internals.

        Its public `publish` builds a frame from parts, checks what was checked, and takes several times as long.
        """
        if self._nc.is_closed:
            raise nats.errors.ConnectionClosedError
        await self._nc._send_command(b"".join(pieces))  # noqa: SLF001 - see above; guarded by a test
        await self._nc._flush_pending()  # noqa: SLF001

    async def _on_reply(self, message: Msg) -> None:
        token = message.subject.rpartition(".")[2]
        if not message.data and not message.headers:
            return  # a message in the middle of a careful batch was staged
        self._tell(token, read_reply(message.data, (message.headers or {}).get("Status")))

    def _tell(self, token: str, outcome: Outcome) -> None:
        future = self._awaited.pop(token, None)
        if future is not None and not future.done():
            future.set_result(outcome)
            self._news()

    async def _on_error(self, error: Exception) -> None:
        # A permission violation is only an asynchronous error: to the publisher it looks like silence.
        if found := re.search(r'permissions violation for publish to "([^"]+)"', str(error), re.IGNORECASE):
            where = self._forbidden_calls if found[1].startswith(self._api) else self._forbidden
            where[found[1]] = str(error)
            self._news()

    async def _on_closed(self) -> None:
        for token in list(self._awaited):
            self._tell(token, Unknown(why="the connection was lost"))
        self._news()


@contextlib.asynccontextmanager
async def connected(settings: Settings) -> AsyncIterator[JetStream]:
    """A command's connection, closed at the end; raises as `JetStream.connect` does."""
    jetstream = await JetStream.connect(settings)
    try:
        yield jetstream
    finally:
        await jetstream.close()
