"""Other writers of a stream: a process that publishes to it at a rate, and records which messages are its own.

Most of what it writes is on subjects of its own, some on those of the outbox: plain, with headers, with the headers of
an outbox that is not there, and, if asked for, copies of the outbox's own messages as a dead-letter consumer makes
them: on the same subject, with every `Outbox-*` header and none of `Nats-*`. What is foreign tells itself by its
payload, or as a copy by a header: see `Stored.foreign`; what was acked is recorded by its sequence besides.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

import nats
import nats.errors
import nats.js.errors

from tests.support.bed import COPIED, Stored, until, value

# Messages a second on subjects of its own; a twentieth of it is on the outbox's. Fewer for a machine that is slow.
RATE = float(os.environ.get("OUTBOX_TESTS_FOREIGN", "1000"))
TICK = 0.01
IN_FLIGHT = 2000
WRITERS_SUBJECTS = ("orders", "stock", "payments")
logs = itertools.count()


def ours(stored: Sequence[Stored]) -> list[Stored]:
    """What is not foreign."""
    return [each for each in stored if not each.foreign]


def of_outbox(url: str, stored: Sequence[Stored], schema: str = "outbox") -> list[Stored]:
    """What carries the id of this outbox and is no copy."""
    mine = str(value(url, f'SELECT outbox_id FROM "{schema}".relay'))
    return [each for each in ours(stored) if each.headers.get("Outbox-Id") == mine]


class Foreign:
    """The writer's process. When the context is entered it has stored its first messages; at the end it is stopped."""

    def __init__(
        self,
        directory: Path,
        url: str,
        stream: str,
        prefix: str,
        *,
        subjects: Sequence[str] = WRITERS_SUBJECTS,
        rate: float = RATE,
        copies: bool = False,
    ) -> None:
        """`prefix` is that of the stream's subjects, below which the outbox's own are `subjects`."""
        self.record = directory / f"foreign-{next(logs)}.log"
        given = [url, stream, prefix, ",".join(subjects), str(rate), str(int(copies))]
        with self.record.open("wb") as record:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.foreign", *given],
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
                stdin=subprocess.DEVNULL,
                stdout=record,
                stderr=record,
            )

    def written(self) -> dict[int, str]:
        """The kind of each message that was acked, by its sequence."""
        whole, _, _ = self.record.read_text().rpartition("\n")
        pairs = (line.split() for line in whole.splitlines())
        return {int(pair[1]): pair[0] for pair in pairs if len(pair) == 2 and pair[1].isdigit()}

    def assert_untouched(self, stored: Sequence[Stored]) -> None:
        """What was acked is where it was stored, and is foreign: nothing of the outbox is in its place."""
        written = self.written()
        assert written
        there = {each.sequence for each in stored if each.foreign}
        assert written.keys() - there == set()

    def stop(self) -> None:
        alive = self._process.poll() is None
        self._process.terminate()
        self._process.wait()
        assert alive, self.record.read_text()[-2000:]

    def __enter__(self) -> Self:
        try:
            until(lambda: self.written() or self._process.poll() is not None, what="a foreign message")
        except BaseException:
            self._process.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Company:
    """Who else writes to a test's stream: nobody, or a foreign writer from `joins` until the end of the test."""

    def __init__(self, directory: Path, *, shared: bool) -> None:
        self.shared, self._directory = shared, directory
        self._stack = contextlib.ExitStack()
        self.streams: list[str] = []

    def named(self, stream: str) -> str:
        """The name of a stream that both variants make on one server."""
        return f"{stream}SHARED" if self.shared else stream

    def joins(self, url: str, stream: str, prefix: str, **given: Any) -> None:
        """From now on somebody else writes to this stream, if this is the test's variant."""
        if self.shared:
            self.streams.append(stream)
            self._stack.enter_context(Foreign(self._directory, url, stream, prefix, **given))

    def leaves(self) -> None:
        self._stack.close()


class _Publisher:
    """The coroutine's side: one connection, which comes back whatever dies, and the acks in a record."""

    def __init__(self, stream: str, prefix: str, subjects: Sequence[str]) -> None:
        self.stream, self.prefix = stream, prefix
        self.own = itertools.cycle([f"{prefix}.{each}" for each in subjects])
        self.elsewhere = itertools.cycle([f"{prefix}.elsewhere.{number}" for number in range(10)])
        self.kinds = itertools.cycle(["plain", "headers", "another outbox"])
        self.waiting: dict[str, tuple[str, float]] = {}
        self.last = 0
        self._numbers = itertools.count()

    async def begin(self, url: str) -> None:
        self.client = await nats.connect(
            url.split(","), max_reconnect_attempts=-1, reconnect_time_wait=0.1, ping_interval=2, error_cb=_silent
        )
        self._inbox = self.client.new_inbox()
        await self.client.subscribe(f"{self._inbox}.*", cb=self._take)

    async def _take(self, answer: Any) -> None:
        kind, _ = self.waiting.pop(answer.subject, ("", 0.0))
        with contextlib.suppress(ValueError):  # nobody there: an answer without a body
            said = json.loads(answer.data)
            if kind and "error" not in said:
                self.last = int(said["seq"])
                sys.stdout.write(f"{kind.replace(' ', '-')} {self.last}\n")

    async def send(self, kind: str, subject: str, payload: bytes, headers: dict[str, str] | None) -> None:
        if not self.client.is_connected or len(self.waiting) > IN_FLIGHT:
            return
        reply = f"{self._inbox}.{next(self._numbers)}"
        self.waiting[reply] = kind, time.monotonic()
        with contextlib.suppress(nats.errors.Error):
            await self.client.publish(subject, payload, reply=reply, headers=headers)

    async def write(self, subject: str) -> None:
        kind = next(self.kinds)
        headers = {
            "plain": None,
            "headers": {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"},
            "another outbox": {
                "Outbox-Id": str(uuid4()),
                "Outbox-Transaction": str(self.last + 1),
                "Outbox-Transaction-Sequence": "1",
                "Outbox-Transaction-Count": "2",
                "Nats-Msg-Id": str(uuid4()),
            },
        }[kind]
        await self.send(kind, subject, b"foreign " + kind.encode(), headers)

    async def copy(self) -> None:
        """Republish one of the outbox's last messages."""
        with contextlib.suppress(nats.errors.Error, nats.js.errors.Error):
            for back in range(50):
                found = await self.client.jetstream().get_msg(self.stream, max(1, self.last - back))
                headers = dict(found.headers or {})
                if "Outbox-Id" in headers and COPIED not in headers and not (found.data or b"").startswith(b"foreign"):
                    kept = {name: text for name, text in headers.items() if name.startswith("Outbox-")}
                    await self.send("copy", str(found.subject), found.data or b"", {**kept, COPIED: "dead letters"})
                    return

    def forget(self) -> None:
        """What has no answer after a while will have none; and let the record be read."""
        old = time.monotonic() - 2
        for reply in [reply for reply, (_, at) in self.waiting.items() if at < old]:
            del self.waiting[reply]
        sys.stdout.flush()


async def _silent(_: Exception) -> None:
    """A server that is away is no news."""


async def main(url: str, stream: str, prefix: str, subjects: str, rate: str, copies: str) -> None:
    """Write until terminated: so many messages a second elsewhere, a twentieth on the outbox's, two copies a second."""
    publisher, parent = _Publisher(stream, prefix, subjects.split(",")), os.getppid()
    await publisher.begin(url)
    began, sent, beside, copied = time.monotonic(), 0, 0, 0
    for tick in itertools.count(1):
        await asyncio.sleep(max(0.0, began + tick * TICK - time.monotonic()))
        if os.getppid() != parent:
            return
        passed = tick * TICK
        while sent < passed * float(rate):
            await publisher.write(next(publisher.elsewhere))
            sent += 1
        while beside < passed * float(rate) / 20:
            await publisher.write(next(publisher.own))
            beside += 1
        if int(copies) and copied < passed * 2:
            copied += 1
            await publisher.copy()
        publisher.forget()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
