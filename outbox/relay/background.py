"""Something slow that runs beside the leader's loop, one at a time, and again after a back-off.

The loop starts it and takes in what it came to; it never waits for it. Knows asyncio and nothing of the outbox.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from outbox.errors import Weather

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """Delays in seconds: `first`, then doubled up to `longest`; each is shortened by up to half, by chance."""

    first: float = 0.05
    longest: float = 2.0
    failures: int = 0

    def delay(self, chance: float) -> float:
        """The wait after this failure, in seconds; `chance` is from 0 to 1."""
        if self.failures == 0:
            return 0.0
        full = min(self.longest, self.first * 2.0 ** min(self.failures - 1, 30))
        return full * (1 - chance / 2)

    def failed(self) -> Backoff:
        """After one more failure."""
        return Backoff(first=self.first, longest=self.longest, failures=self.failures + 1)

    def reset(self) -> Backoff:
        """After a success."""
        return Backoff(first=self.first, longest=self.longest)


class Errand(Generic[T]):
    """`news` is called when it has ended; `due` is the loop's time before which it does not start again."""

    def __init__(self, news: Callable[[], None]) -> None:
        self.due = 0.0
        self._news = news
        self._backoff = Backoff()
        self._task: asyncio.Task[T] | None = None

    @property
    def running(self) -> bool:
        """True from its start until its result is taken."""
        return self._task is not None

    def start(self, work: Callable[[], Awaitable[T]], now: float) -> None:
        """Start it, unless it runs or its back-off is not over."""

        async def run() -> T:
            try:
                return await work()
            finally:
                self._news()

        if self._task is None and now >= self.due:
            self._task = asyncio.ensure_future(run())

    def taken(self, now: float) -> T | Weather | None:
        """What it came to, once: a value or the weather; None while it runs. Raises its other errors."""
        if self._task is None or not self._task.done():
            return None
        task, self._task = self._task, None
        try:
            value = task.result()
        except Weather as weather:
            self.fail(now)
            return weather
        return value

    def reset(self) -> None:
        """It has served its end: the next one starts at once."""
        self._backoff, self.due = self._backoff.reset(), 0.0

    def postpone(self, due: float) -> None:
        """Do not start it before this time of the loop."""
        self.due = due

    def fail(self, now: float) -> None:
        """What it came to did not help: wait longer before the next time."""
        self._backoff = self._backoff.failed()
        self.due = now + self._backoff.delay(random.random())

    def cancel(self) -> None:
        """Stop it and forget what it came to; idempotent."""
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def end(self) -> T | None:
        """Stop it, and wait until it has stopped; what it came to all the same, or None. Idempotent."""
        task, self._task = self._task, None
        if task is None:
            return None
        task.cancel()
        await asyncio.wait([task])
        return None if task.cancelled() or task.exception() else task.result()
