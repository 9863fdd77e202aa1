"""Another writer of the stream, as a process of its own: it publishes evenly at a rate, and says what was stored when.

`python -m outbox.bench.foreign URL RATE BYTES SUBJECT…` publishes to the subjects in turn until it is terminated, and
prints a line every few milliseconds: the time in seconds since 1970, and how many messages were acked by then.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import sys
import time
from bisect import bisect
from collections.abc import Sequence
from pathlib import Path

import nats
from nats.aio.msg import Msg

from outbox.errors import OutboxError

IN_FLIGHT = 2000  # messages without an ack, at most: nobody who waits for a stream sends on without end
TOLD_SECONDS = 0.02
NAP_SECONDS = 0.0005
START_SECONDS = 20.0


async def publish(url: str, rate: float, body: bytes, subjects: Sequence[str]) -> None:
    """Publish without end, one message each 1/rate seconds; what is missed by more than 10 ms is not made up for."""
    client = await nats.connect(url.split(","))
    parent, inbox = os.getppid(), client.new_inbox()
    answered = stored = 0

    async def take(answer: Msg) -> None:
        nonlocal answered, stored
        answered += 1
        stored += b'"error"' not in answer.data

    await client.subscribe(inbox, cb=take)
    due, told = time.monotonic(), 0.0
    for sent, subject in enumerate(itertools.cycle(subjects)):
        while (wait := due - time.monotonic()) > 0 or sent - answered > IN_FLIGHT:
            # A timer of the event loop ends on a whole millisecond, and four messages would go out together.
            time.sleep(min(max(wait, 0), NAP_SECONDS))  # noqa: ASYNC251
            await asyncio.sleep(0)
            if time.time() - told > TOLD_SECONDS:
                told = time.time()
                print(f"{told:.3f} {stored}", flush=True)
                if os.getppid() != parent:
                    return
        await client.publish(subject, body, reply=inbox)
        due = max(due + 1 / rate, time.monotonic() - 0.01)


class Foreign:
    """The writer's process, which has stored its first messages when the context is entered."""

    def __init__(self, folder: Path, url: str, *, rate: float, payload: int, subjects: Sequence[str]) -> None:
        self._said = folder / "foreign.log"
        with self._said.open("wb") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __spec__.name, url, str(rate), str(payload), *subjects],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
            )

    def _samples(self) -> list[tuple[float, int]]:
        whole, _, _ = self._said.read_text().rpartition("\n")
        pairs = (line.split() for line in whole.splitlines())
        return [(float(pair[0]), int(pair[1])) for pair in pairs if len(pair) == 2 and pair[1].isdigit()]  # noqa: PLR2004

    def stored_per_second(self, began: float, ended: float) -> float:
        """What it stored between two times, in messages a second: what was acked at the last word before each."""
        samples = self._samples()
        times = [at for at, _ in samples]
        first, last = (samples[max(0, bisect(times, at) - 1)] for at in (began, ended))
        return (last[1] - first[1]) / (last[0] - first[0]) if last[0] > first[0] else 0.0

    def __enter__(self) -> Foreign:
        deadline = time.monotonic() + START_SECONDS
        while not any(stored for _, stored in self._samples()):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._process.kill()
                self._process.wait()
                raise OutboxError(f"the foreign writer stored nothing: {self._said.read_text()[-500:]}")
            time.sleep(0.02)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        ended = self._process.poll() is not None
        self._process.terminate()
        self._process.wait()
        if ended and kind is None:
            raise OutboxError(f"the foreign writer ended by itself: {self._said.read_text()[-500:]}")


if __name__ == "__main__":
    url, rate, size, *names = sys.argv[1:]
    asyncio.run(publish(url, float(rate), b"f" * int(size), names))
