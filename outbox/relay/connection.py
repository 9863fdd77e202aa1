"""The leader's connection to NATS: one at a time, made again with a back-off whenever it is lost.

The leader's loop asks whether it was lost, and goes on; connecting runs beside the loop. That a server lets us in says
little: it may hang up over what is sent. A connection is sound when it has lasted, or something was stored over it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator

from outbox.core.telemetry import Connected, Listener, Unreachable
from outbox.errors import Weather
from outbox.jetstream.client import JetStream
from outbox.relay.background import Errand

SOUND_SECONDS = 5.0
AWAY_SECONDS = 2.0


class Connection:
    """`jetstream` is the connection, or None while there is none. `news` is called when something has changed.

    `deaths` is how many in a row were lost before they were sound; `blamed` tells of the last one what
    `JetStream.blames` does.
    """

    def __init__(
        self,
        connect: Callable[[Callable[[], None]], Awaitable[JetStream]],
        *,
        tell: Listener,
        news: Callable[[], None],
    ) -> None:
        self.jetstream: JetStream | None = None
        self.deaths = 0
        self._failing: tuple[str, float] | None = None  # why there is no connection, and since when
        self.blamed: bool | None = False
        self._since = 0.0
        self._sound = False
        self._connect, self._tell, self._news = connect, tell, news
        self._connecting: Errand[JetStream] = Errand(news)
        self._closing: set[asyncio.Future[None]] = set()

    def lost(self, now: float, *, sent: bool) -> str | None:
        """Why the connection was lost, once; it is closed and forgotten. `sent` says that something had no answer."""
        if self.jetstream is None or (why := self.jetstream.lost) is None:
            return None
        if not self._sound and (sent or now - self._since < SOUND_SECONDS):
            self.deaths += 1
            self._connecting.fail(now)
        self.blamed = self.jetstream.blames
        self._failing = self._failing or (why, now)
        self._tell(Unreachable(server="nats", why=why, delay=max(0.0, self._connecting.due - now)))
        closing = asyncio.ensure_future(self.jetstream.close())
        closing.add_done_callback(self._closing.discard)
        self._closing.add(closing)
        self.jetstream = None
        return why

    def sound(self) -> None:
        """Something was stored: the server takes what it is sent."""
        self._sound = True
        self.deaths = 0
        self._connecting.reset()

    def reach(self, now: float, *, sent: bool) -> None:
        """Connect if there is no connection; raises `Misconfigured` if the server can never be used.

        One that has lasted is sound, unless what was `sent` over it is still without an answer.
        """
        if self.jetstream is not None:
            if not self._sound and not sent and now - self._since >= SOUND_SECONDS:
                self.sound()
            return
        self._connecting.start(lambda: self._connect(self._news), now)
        came = self._connecting.taken(now)
        if isinstance(came, Weather):
            self._failing = self._failing or (came.line, now)
            self._tell(Unreachable(server="nats", why=came.line, delay=self._connecting.due - now))
        elif came is not None:
            self.jetstream, self._since, self._sound, self._failing = came, now, False, None
            self._tell(Connected(server="nats", version=".".join(map(str, came.version))))

    def problem(self, now: float) -> str | None:
        """Why there has been no connection for a while, in words that stay the same; for the status."""
        if self._failing is None or now - self._failing[1] < AWAY_SECONDS:
            return None
        return f"no connection to NATS: {self._failing[0]}"

    def dues(self, now: float) -> Iterator[float]:
        """The loop's times of the next try, and of the word that there is no connection."""
        if not self._connecting.running:
            yield self._connecting.due
        if self._failing is not None and (told := self._failing[1] + AWAY_SECONDS) > now:
            yield told

    async def close(self) -> None:
        """Close what is open and what is being opened; idempotent, blocks for at most two seconds."""
        closing = [self._abandon(), *self._closing]
        if self.jetstream is not None:
            closing.append(self.jetstream.close())
        await asyncio.gather(*closing)

    async def _abandon(self) -> None:
        if (made := await self._connecting.end()) is not None:
            await made.close()
