"""The test bed: relays as threads and as processes, a stream reader, and the clocks that tests wait with.

A test awaits what happened (telemetry, a row, a message); the deadlines here only keep a broken run from hanging.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import nats
import nats.js.errors
import psycopg
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

from outbox.config import Settings
from outbox.core import telemetry
from outbox.jetstream.credentials import options
from outbox.relay.relay import Relay

T = TypeVar("T")
PATIENCE = 25.0
COPIED = "Copied-By"  # header of what a foreign writer has from the outbox
logs = itertools.count()


class Waited(AssertionError):
    """Something did not happen in time. On a machine that is busy with something else a test is run again for this,
    and for nothing else: a broken promise never is."""


def until(condition: Callable[[], T], *, patience: float = PATIENCE, what: str = "") -> T:
    """Wait until `condition` is true and return what it gave; fails the test after `patience` seconds."""
    deadline, pause = time.monotonic() + patience, 0.01
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise Waited(f"waited {patience} s for {what or condition}")
        threading.Event().wait(pause)
        pause = min(1.5 * pause, 0.1)  # most conditions ask a server over a new connection


@dataclass(frozen=True, slots=True)
class Stored:
    """A message as the stream has it."""

    sequence: int
    subject: str
    headers: dict[str, str]
    payload: bytes
    time: float

    @property
    def position(self) -> int:
        return int(self.headers["Outbox-Replay-Position" if self.replay_of else "Outbox-Transaction"])

    @property
    def replay_of(self) -> int | None:
        """The position of the transaction that this is a replay of."""
        return int(self.headers["Outbox-Replay"]) if "Outbox-Replay" in self.headers else None

    @property
    def number(self) -> int:
        return int(self.headers["Outbox-Transaction-Sequence"])

    @property
    def count(self) -> int:
        return int(self.headers["Outbox-Transaction-Count"])

    @property
    def part(self) -> int:
        """Which part of its transaction; 0 where that is in one stream alone."""
        return int(self.headers.get("Outbox-Transaction-Part", 0))

    @property
    def parts(self) -> int:
        return int(self.headers.get("Outbox-Transaction-Parts", 0))

    @property
    def message_id(self) -> str:
        return self.headers["Nats-Msg-Id"]

    @property
    def foreign(self) -> bool:
        """True if another writer of the tests wrote it, or copied it."""
        return self.payload.startswith(b"foreign") or COPIED in self.headers


class Broker:
    """What a test asks of nats-server itself, through nats-py; each call opens its own connection."""

    def __init__(self, url: str, **options: Any) -> None:
        """`options` are nats-py's, for credentials and TLS."""
        self.url, self._options = url, options

    def api(self, call: str, body: object = None, *, timeout: float = 10) -> dict[str, Any]:
        async def ask(client: Any) -> dict[str, Any]:
            payload = json.dumps(body).encode() if body is not None else b""
            reply = await client.request(f"$JS.API.{call}", payload, timeout=timeout)
            answer: dict[str, Any] = json.loads(reply.data)
            return answer

        answer: dict[str, Any] = self._with(ask)
        return answer

    def create_stream(self, name: str, *subjects: str, **config: Any) -> dict[str, Any]:
        given = {"name": name, "subjects": list(subjects), "storage": "file", "allow_atomic": True, **config}
        answer = self.api(f"STREAM.CREATE.{name}", given)
        assert "error" not in answer, answer
        return answer

    def info(self, name: str) -> dict[str, Any]:
        return self.api(f"STREAM.INFO.{name}")

    def last_sequence(self, name: str) -> int:
        return int(self.info(name)["state"]["last_seq"])

    def publish(self, subject: str, payload: bytes = b"foreign", headers: dict[str, str] | None = None) -> None:
        async def send(client: Any) -> None:
            await client.jetstream().publish(subject, payload, headers=headers)

        self._with(send)

    def read(self, name: str) -> list[Stored]:
        """The whole stream, message by message, through a consumer."""

        async def pull(client: Any) -> list[Stored]:
            js = client.jetstream()
            wanted = int((await js.stream_info(name)).state.messages)
            config = ConsumerConfig(ack_policy=AckPolicy.NONE, deliver_policy=DeliverPolicy.ALL, mem_storage=True)
            subscription = await js.pull_subscribe("", stream=name, config=config)
            found: list[Stored] = []
            while len(found) < wanted:
                for message in await subscription.fetch(min(1000, wanted - len(found)), timeout=10):
                    place, at = message.metadata.sequence.stream, message.metadata.timestamp.timestamp()
                    found.append(Stored(place, message.subject, dict(message.headers or {}), message.data, at))
            return found

        def tried() -> list[list[Stored]]:
            with contextlib.suppress(nats.js.errors.ServiceUnavailableError):  # a cluster between two leaders
                return [self._with(pull)]
            return []

        (messages,) = until(tried, what=f"stream {name} to be read")
        return messages

    def _with(self, work: Callable[[Any], Any]) -> Any:
        async def run() -> Any:
            client = await nats.connect(self.url, connect_timeout=5, max_reconnect_attempts=3, **self._options)
            try:
                return await work(client)
            finally:
                await client.close()

        return asyncio.run(run())


def broker_of(settings: Settings) -> Broker:
    """The first server of the settings, with their credentials and TLS."""
    return Broker(settings.nats_servers[0], **{n: each for n, each in options(settings).items() if n != "certified"})


class ThreadRelay:
    """A relay in a thread of this process: its telemetry can be awaited, its code be broken on purpose."""

    def __init__(
        self,
        settings: Settings,
        *,
        drain: bool = False,
        locked: bool = True,
        listener: telemetry.Listener = telemetry.silent,
    ) -> None:
        self.happenings: list[telemetry.Happening] = []
        self._listener = listener
        self.error: BaseException | None = None
        self._changed = threading.Condition()
        self._relay: Relay | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[bool] | None = None
        self._thread = threading.Thread(target=self._run, args=(settings, drain, locked), daemon=True)
        self._thread.start()

    def _run(self, settings: Settings, drain: bool, locked: bool) -> None:
        async def work() -> None:
            self._loop = asyncio.get_running_loop()
            self._relay = Relay(settings, tell=self._tell, locked=locked)
            self._task = asyncio.ensure_future(self._relay.run(drain=drain))
            await self._task

        try:
            asyncio.run(work())
        except BaseException as error:  # noqa: BLE001 - kept for the test, which looks at it
            self.error = error
        with self._changed:
            self._changed.notify_all()

    def _tell(self, happening: telemetry.Happening) -> None:
        self._listener(happening)
        with self._changed:
            self.happenings.append(happening)
            self._changed.notify_all()

    def wait_for(self, kind: type[T], when: Callable[[T], bool] = lambda _: True, *, after: int = 0) -> T:
        """Wait until something of this kind has happened (behind the first `after` happenings)."""
        found: list[T] = []

        def happened() -> bool:
            found[:] = [each for each in self.happenings[after:] if isinstance(each, kind) and when(each)]
            return bool(found) or not self._thread.is_alive()

        with self._changed:
            if not self._changed.wait_for(happened, PATIENCE):
                raise Waited(f"no {kind.__name__} in {self.happenings[-10:]}")
        assert found, f"the relay ended before {kind.__name__}: {self.error!r}, {self.happenings[-5:]}"
        return found[0]

    def ended(self, patience: float = PATIENCE) -> BaseException | None:
        """Wait for the relay's own end; returns what it died of."""
        self._thread.join(patience)
        if self._thread.is_alive():
            raise Waited(f"the relay goes on: {self.happenings[-10:]}")
        return self.error

    def kill(self) -> None:
        """End it in the middle of what it does, without a last word: nothing is finished or marked."""
        until(lambda: self._task is not None or not self._thread.is_alive())
        # Like a killed process it closes nothing: what it leaves behind is collected here, and not in another test.
        with warnings.catch_warnings(), _collected_in_silence():
            warnings.simplefilter("ignore", ResourceWarning)
            deadline = time.monotonic() + PATIENCE
            while self._thread.is_alive() and time.monotonic() < deadline:
                # Python 3.11's wait_for swallows a cancellation that meets the end of what it waits for: say it again.
                if self._task is not None and self._loop is not None and not self._loop.is_closed():
                    self._loop.call_soon_threadsafe(self._task.cancel)
                self._thread.join(1)
            assert not self._thread.is_alive(), self.happenings[-10:]
            if isinstance(self.error, asyncio.CancelledError):
                self.error = None
            self._relay = self._task = self._loop = None
            gc.collect()

    def stop(self) -> BaseException | None:
        until(lambda: self._relay is not None or not self._thread.is_alive())
        if self._relay is not None and self._loop is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._relay.stop)
        return self.ended()

    def __enter__(self) -> ThreadRelay:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        error = self.stop()
        if kind is not None:
            print("the relay's last happenings:", *self.happenings[-25:], repr(error), sep="\n  ")
        if kind is None and error is not None:
            raise error


@contextmanager
def _collected_in_silence() -> Iterator[None]:
    """What a coroutine says when it is collected after its loop was closed is nobody's finding."""
    before, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        yield
    finally:
        sys.unraisablehook = before


class ProcessRelay:
    """A relay as its own process, with its log as JSON lines."""

    def __init__(
        self, directory: Path, environment: dict[str, str], *flags: str, armed: tuple[str, str, int] | None = None
    ) -> None:
        """`armed` is a stop point, the signal it gives there, and at which time; see `tests.support.armed`."""
        module = ["tests.support.armed", *map(str, armed)] if armed else ["outbox"]
        self.log = directory / f"relay-{next(logs)}.log"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *module, "relay", "--log", "json", "--verbose", *flags],
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
                stdin=subprocess.DEVNULL,
                stderr=log,
                stdout=log,
                cwd=directory,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def happenings(self) -> list[dict[str, Any]]:
        whole, _, _ = self.log.read_text(errors="replace").rpartition("\n")  # the last line may be half written
        lines = whole.splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def wait_for(self, event: str, *, after: int = 0, **fields: Any) -> dict[str, Any]:
        def happened() -> dict[str, Any] | None:
            for each in self.happenings()[after:]:
                if each["event"] == event and all(each[name] == value for name, value in fields.items()):
                    return each
            assert self._process.poll() is None, f"the relay ended: {self.log.read_text()[-2000:]}"
            return None

        found = until(happened, what=f"{event} in {self.log}")
        assert found is not None
        return found

    def send_signal(self, number: int) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def stop(self) -> int:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
            self._process.terminate()
        try:
            return self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.running:
            self.kill()


@contextmanager
def running(*relays: ProcessRelay) -> Iterator[None]:
    try:
        yield
    finally:
        for relay in relays:
            if relay.running:
                relay.kill()


def rows(url: str, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(statement.encode(), parameters or None)
        return cursor.fetchall() if cursor.description else []


def transactions(url: str, subject: str, number: int) -> None:
    """So many transactions of one event each, over one connection."""
    with psycopg.connect(url, autocommit=True) as connection:
        for _ in range(number):
            connection.execute("SELECT outbox.add(%s, 'x')", [subject])


def value(url: str, statement: str, *parameters: Any) -> Any:
    return rows(url, statement, *parameters)[0][0]


def wait_until_sent(url: str, schema: str = "outbox", *, patience: float = PATIENCE) -> None:
    """Wait until nothing is pending."""
    until(lambda: value(url, f'SELECT count(*) FROM "{schema}".pending') == 0, patience=patience, what="all sent")
