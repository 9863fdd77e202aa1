"""The relay process: stand by for the lock, lead, and begin again whatever dies; for ever, until it is stopped.

Weather is waited out with a back-off that spends no attempt. `Halt` ends the relay, and so does what is wrong with its
set-up from the start; what is taken away under it later is waited for. Whatever keeps it from leading is left in the
database for the status. The lock is for liveness; that two leaders do no harm is the plan's and the chain's doing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import secrets
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace

from outbox.config import Durability, OnDead, Settings
from outbox.core.telemetry import (
    Connected,
    LeadEnded,
    Listener,
    LostLead,
    StandingBy,
    Stopped,
    Unreachable,
    Waiting,
    silent,
)
from outbox.errors import Denied, Deposed, Halt, Locked, Misconfigured, OutboxError, Unsuited, Weather
from outbox.jetstream.client import JetStream
from outbox.jetstream.connect import Servers
from outbox.postgres.hindrances import leave_word
from outbox.postgres.rows import Lead
from outbox.postgres.store import Store
from outbox.relay.background import Backoff
from outbox.relay.leader import Leader
from outbox.sources import current

STANDBY_SECONDS = 0.2
AGAIN_SECONDS = 1.0
STANDBY_TRY_SECONDS = 2.0
SOUND_TERM_SECONDS = 5.0  # a shorter term counts as a failure: the next one waits longer


class Relay:
    """One relay of one outbox. `run` blocks until it is stopped; `stop` is safe to call from a signal handler."""

    def __init__(
        self,
        settings: Settings,
        *,
        tell: Listener = silent,
        create_stream: tuple[str, list[str]] | None = None,
        locked: bool = True,
    ) -> None:
        """`create_stream` is the name and the subjects of a stream to make if there is none of that name.

        `locked=False` leads without the lock; only tests of rival leaders do that.
        """
        self._settings, self._tell, self._create, self._locked = settings, tell, create_stream, locked
        self._stop = asyncio.Event()
        self._backoff = Backoff()
        self._leader: Leader | None = None
        self._has_led = False
        self._proven = False
        self._reached: set[str] = set()
        self._servers = Servers(settings.nats_servers)
        # Process ids come again, in a container at every start: the name must be this process's alone.
        self._name = f"{secrets.token_hex(4)}@{socket.gethostname()}:{os.getpid()}"

    def stop(self) -> None:
        """Ask the relay to finish or abandon what is in flight, mark what was acked, and end. Idempotent."""
        self._stop.set()
        if self._leader is not None:
            self._leader.stopping()

    async def run(self, *, drain: bool = False) -> bool:
        """Relay until stopped, or with `drain` until nothing is pending; False if it was stopped before that.

        Raises `Halt` or `Misconfigured`.
        """
        drained = False
        while not self._stop.is_set():
            try:
                with self._reaching("postgres"):
                    store = await Store.connect(
                        current(self._settings, "database_").database_url,
                        self._settings.schema,
                        replicas=self._settings.durability is Durability.REPLICAS,
                    )
                async with store:
                    self._tell(Connected(server="postgres", version=store.version))
                    if await self._serve(store, drain=drain):
                        drained = not self._stop.is_set()
                        break
            except (Weather, Deposed) as error:
                await self._wait_out(error)
            except (Halt, Misconfigured) as error:
                await self._leave_word(f"halted: {error}")
                raise
        self._tell(Stopped())
        return drained or not drain

    async def _serve(self, store: Store, *, drain: bool) -> bool:
        """Stand by and lead on one session; True if drained or stopped, False if another term is due."""
        lead = await self._elected(store, drain=drain)
        if lead is None:
            return True
        self._leader = Leader(
            store,
            lead,
            self._settings,
            connect=self._connect,
            tell=self._tell,
            stop=self._stop,
            drain=drain,
            proven=self._proven,
        )
        clock = asyncio.get_running_loop().time
        began = clock()
        try:
            return await self._leader.run()
        finally:
            self._proven = self._leader.proven
            self._tell(LeadEnded())
            if clock() - began > SOUND_TERM_SECONDS:
                self._backoff = self._backoff.reset()

    async def _elected(self, store: Store, *, drain: bool) -> Lead | None:
        """Wait until this relay may lead, and take the lead; None if it was stopped meanwhile, or there is no need.

        A schema that does not suit is waited for, so that a migration and new relays may come in any order; so is
        whoever holds a lock; and once this process has led, all that was taken away under it. A relay that drains is
        refused: its caller waits for it.
        """
        told = ""
        while not self._stop.is_set():
            try:
                with self._reaching("outbox"):
                    return await self._candidate(store, drain=drain)
            except (Locked, Denied, Unsuited) as error:
                if drain and isinstance(error, Unsuited):
                    raise
                locked = isinstance(error, Locked)
                why = await store.locked_by(error.line) if locked else error.line
                if why != told:
                    told = why
                    self._tell(Waiting(why=why))
                    if not locked:  # that the status finds out by itself
                        await self._leave_word(why)
            await self._sleep(AGAIN_SECONDS)
        return None

    async def _candidate(self, store: Store, *, drain: bool) -> Lead | None:
        """Take the lead when nobody else has it; None if stopped meanwhile, or, with `drain`, nothing is pending."""
        home = await store.preflight(self._settings.max_batch_messages)
        if not await self._stand_by(store, drain=drain):
            return None
        if self._settings.on_dead is OnDead.HALT and (dead := await store.first_dead()) is not None:
            raise Halt(
                f"transaction {dead} is a dead letter, and this relay halts on one",
                remedy=f"outbox dead retry {dead}, or outbox dead discard {dead}; or start the relay with "
                "--on-dead continue",
            )
        self._has_led = True  # also if the answer to this is lost
        return await store.lead(self._name, home)

    async def _stand_by(self, store: Store, *, drain: bool) -> bool:
        """Wait for the lock, polling: a waiting lock request would hold back vacuum. False if stopped meanwhile.

        Who has led before says at every look that it lives: the next leader may count it as dead at any time.
        """
        told: str | None = ""  # nothing yet
        look = 0.0
        while not self._stop.is_set():
            mine = not self._locked or await store.try_lock()
            if self._has_led:
                await store.alive(self._name)
            if mine:
                return True
            if (now := asyncio.get_running_loop().time()) >= look:
                look = now + AGAIN_SECONDS
                await self._try_nats()
                leader, stranger = await store.who_leads()
                if stranger != told:
                    told = stranger
                    self._tell(Waiting(why=stranger) if stranger else StandingBy(leader=leader))
            if drain and not await store.pending():
                return False
            await self._sleep(STANDBY_SECONDS)
        return False

    async def _connect(self, news: Callable[[], None]) -> JetStream:
        with self._reaching("nats"):
            jetstream = await JetStream.connect(current(self._settings, "nats_"), news, self._servers)
        async with contextlib.AsyncExitStack() as undo:
            undo.push_async_callback(jetstream.close)
            if self._create is not None:
                await jetstream.ensure_stream(*self._create)
            undo.pop_all()
        return jetstream

    async def _try_nats(self) -> None:
        """A standby, too, finds out at its start whether NATS would take it; an outage is none of its business yet.

        It takes less time than PostgreSQL allows a session to be idle.
        """
        if "nats" not in self._reached:
            with contextlib.suppress(Weather, TimeoutError):
                async with asyncio.timeout(STANDBY_TRY_SECONDS):
                    await (await self._connect(lambda: None)).close()

    @contextlib.contextmanager
    def _reaching(self, server: str) -> Iterator[None]:
        """What is denied at first is a wrong setting; once it has let this process in, it is waited out."""
        try:
            yield
        except Unsuited:
            raise
        except (Denied, Misconfigured) as error:
            kind = Denied if server in self._reached else Misconfigured
            raise kind(error.message, remedy=error.remedy) from error
        self._reached.add(server)

    async def _leave_word(self, why: str) -> None:
        """Leave in the database, for the status, what keeps this relay from leading, if that can be done at all."""
        with contextlib.suppress(OutboxError):
            url = current(self._settings, "database_").database_url
            await asyncio.to_thread(leave_word, url, self._settings.schema, why)

    async def _wait_out(self, error: Weather | Deposed) -> None:
        if isinstance(error, Denied):
            await self._leave_word(error.line)
        self._backoff = replace(self._backoff, longest=1.0).failed()
        delay = self._backoff.delay(random.random())
        if isinstance(error, Deposed):
            self._tell(LostLead(why=error.message))
        else:
            self._tell(Unreachable(server="postgres", why=error.line, delay=delay))
        await self._sleep(delay)

    async def _sleep(self, seconds: float) -> None:
        """Sleep, or less if the stop comes."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), seconds)
