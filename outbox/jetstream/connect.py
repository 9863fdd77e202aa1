"""A new connection to NATS: every address of every server that is known until one lets us in, or why none does.

nats-py does the work on the connection. What it leaves out is done here and in `wire`: addresses that are tried beside
one that is silent, servers that others have named, and errors by whose fault they are, none of them with a secret.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from urllib.parse import unquote, urlsplit

import nats.errors

from outbox.errors import Denied, Weather
from outbox.jetstream.denials import denial
from outbox.jetstream.wire import LINE_BYTES, Wary, Wire

DEFAULT_PORT, CONNECT_SECONDS = 4222, 3
HEAD_START_SECONDS = 0.5  # that one server or address has before the next one is tried beside it
GIVEN_UP_SECONDS = 0.1  # nothing is to be flushed, and after a failed handshake nats-py waits for ever
TLS_FIRST = {
    False: "if the server wants TLS from the first byte: OUTBOX_NATS_TLS_FIRST=true",
    True: "if the server does not begin with TLS: unset OUTBOX_NATS_TLS_FIRST",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """One server: where it is, the name that its certificate must have, and what lets us in there."""

    host: str
    port: int
    name: str
    secure: bool
    user: str | None
    password: str | None

    @classmethod
    def of(cls, given: str) -> Server:
        """That of a URL of the settings."""
        url = urlsplit(given)
        host = url.hostname or ""
        return cls(
            host=host,
            port=url.port or DEFAULT_PORT,
            name=host,
            secure=url.scheme == "tls",
            user=url.username,
            password=url.password,
        )

    @property
    def where(self) -> str:
        """Host and port."""
        return f"{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    @property
    def credentials(self) -> dict[str, str]:
        """Those of the URL; a user without a password is a token. nats-py does not decode them."""
        if self.user is None:
            return {}
        if self.password is None:
            return {"token": unquote(self.user)}
        return {"user": unquote(self.user), "password": unquote(self.password)}


class Servers:
    """The servers that a process knows: those of the settings, and those that one of the cluster has named last."""

    def __init__(self, urls: Iterable[str]) -> None:
        self._given = [Server.of(url) for url in urls]
        self._named: list[Server] = []
        self._leaving: set[Server] = set()
        self._last: Server | None = None

    def hear(self, server: Server, info: dict[str, Any], *, secured: bool) -> None:
        """Take in what a server says. Whom it names must be in TLS if it is: they get the same credentials."""
        if info.get("ldm"):
            self._leaving.add(server)
        if urls := info.get("connect_urls"):
            self._named = [named for url in urls if (named := _named(server, str(url), secured=secured))]

    def in_order(self) -> list[Server]:
        """All of them: first those of the settings, last those that were about to stop."""
        places = {(each.host, each.port) for each in self._given}
        named = [each for each in self._named if (each.host, each.port) not in places]
        found = [*random.sample(self._given, len(self._given)), *random.sample(named, len(named))]
        return sorted(found, key=lambda each: each in self._leaving)

    def is_given(self, server: Server) -> bool:
        """True if the settings name it."""
        return server in self._given

    def reached(self, server: Server) -> None:
        """It has let us in, whatever it has said before."""
        self._leaving.discard(server)
        self._last = server

    def last(self) -> Servers:
        """Only the one that has let us in last."""
        only = Servers([])
        only._given = self._given if self._last is None else [self._last]
        return only


def _named(by: Server, url: str, *, secured: bool) -> Server | None:
    """A server that another one names: an address is checked by the name of who told it, as all of nats.io does."""
    there = urlsplit(f"nats://{url}")
    try:
        host, port = there.hostname or "", there.port or DEFAULT_PORT
    except ValueError:
        return None
    name = by.name if re.fullmatch(r"[\d.]+|.*:.*", host) else host
    return replace(by, host=host, port=port, name=name, secure=secured)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Visit:
    """What each attempt needs; `options` are nats-py's."""

    servers: Servers
    news: Callable[[], None]
    error_cb: Callable[[Exception], Awaitable[None]]
    closed_cb: Callable[[], Awaitable[None]]
    certified: bool
    options: dict[str, Any]


async def dial(
    servers: Servers,
    *,
    news: Callable[[], None],
    error_cb: Callable[[Exception], Awaitable[None]],
    closed_cb: Callable[[], Awaitable[None]],
    certified: bool = False,
    **options: Any,
) -> Wary:
    """A client that is connected to one of the servers, and never connects again; `options` are nats-py's.

    `certified` says that the TLS context among them has a client certificate; `news` is called when the server has said
    something new of itself. Raises `Denied` if every server of the settings denies the connection, else `Weather`.
    """
    visit = _Visit(
        servers=servers, news=news, error_cb=error_cb, closed_cb=closed_cb, certified=certified, options=options
    )
    failures: dict[Server, Weather] = {}
    order = servers.in_order()

    async def tried(server: Server) -> Wary | None:
        try:
            return await _reach(server, visit)
        except Weather as failure:
            failures[server] = failure
            return None

    if (client := await _first(partial(tried, server) for server in order)) is not None:
        return client
    raise _all_of([failures[server] for server in order if servers.is_given(server)])


async def _reach(server: Server, visit: _Visit) -> Wary:
    """One server by the first of its addresses that lets us in."""
    failures: list[Weather] = []

    async def tried(family: int, address: Any, where: str) -> Wary | None:
        try:
            return await _dial(server, family, address, where, visit)
        except Weather as failure:
            failures.append(failure)
            return None

    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            found = await asyncio.get_running_loop().getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM)
    except OSError as error:  # a TimeoutError is one
        raise _sorted(server.where, error) from error
    addresses = {address[:2]: (family, address) for family, _, _, _, address in found}
    names = [server.where if len(addresses) == 1 else f"{server.where} ({host})" for host, _ in addresses]
    attempts = (partial(tried, *each, where) for each, where in zip(addresses.values(), names, strict=True))
    if (client := await _first(attempts)) is not None:
        visit.servers.reached(server)
        return client
    raise _all_of(failures)


async def _first(attempts: Iterable[Callable[[], Coroutine[Any, Any, Wary | None]]]) -> Wary | None:
    """The first client that comes of one of these, or None; each but the first begins a little after the one before it.

    One that waits for somebody who is silent holds up nobody; what comes too late is closed.
    """
    waiting, running = list(attempts)[::-1], set[asyncio.Task[Wary | None]]()
    try:
        while waiting or running:
            if waiting:
                running.add(asyncio.ensure_future(waiting.pop()()))
            done, running = await asyncio.wait(
                running, timeout=HEAD_START_SECONDS if waiting else None, return_when=asyncio.FIRST_COMPLETED
            )
            clients = [client for each in done if (client := each.result()) is not None]
            for late in clients[1:]:
                await close(late, GIVEN_UP_SECONDS)
            if clients:
                return clients[0]
        return None
    finally:
        for each in running:
            each.cancel()
        for came in await asyncio.gather(*running, return_exceptions=True):
            if isinstance(came, Wary):
                await close(came, GIVEN_UP_SECONDS)


def _all_of(failures: list[Weather]) -> Weather:
    if all(isinstance(failure, Denied) for failure in failures):
        return failures[0]
    return Weather("; ".join(failure.message for failure in failures))


async def _dial(server: Server, family: int, address: Any, where: str, visit: _Visit) -> Wary:
    swallowed: list[Exception] = []
    options = visit.options

    async def on_error(error: Exception) -> None:
        swallowed.append(error)
        await visit.error_cb(error)

    def told(info: dict[str, Any]) -> None:
        visit.servers.hear(server, info, secured=client.secured)
        visit.news()

    wire = await _opened(family, address, where)
    client = Wary(wire, where, secure=server.secure or "tls" in options, certified=visit.certified, told=told)
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            await client.connect(
                servers=[f"nats://{server.where}"],
                name="outbox relay",
                allow_reconnect=False,
                error_cb=on_error,
                closed_cb=visit.closed_cb,
                **{"tls_hostname": server.name, **options, **server.credentials},
            )
    except (TimeoutError, nats.errors.Error, OSError) as error:
        await close(client, GIVEN_UP_SECONDS)
        # That there are no more servers is no reason: what went before it is.
        last = swallowed[-1] if swallowed and isinstance(error, nats.errors.NoServersError) else error
        first = bool(options.get("tls_handshake_first"))
        if visit.certified and isinstance(last, ConnectionError):
            last = await _objection(server, family, address, options["tls"], first=first) or last
        silent = isinstance(last, TimeoutError) or "expecting INFO" in str(last)
        raise _sorted(where, last, hint=TLS_FIRST[first] if silent else "") from error
    except (Denied, asyncio.CancelledError):
        await close(client, GIVEN_UP_SECONDS)
        raise
    return client


async def _opened(family: int, address: Any, where: str) -> Wire:
    wire = Wire()
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            await wire.open(family, address)
    except OSError as error:
        raise _sorted(where, error) from error
    return wire


async def close(client: Wary, seconds: float = 2) -> None:
    """Close a client; idempotent, blocks for at most so long. What the server does not take by then is not sent."""
    with contextlib.suppress(TimeoutError, OSError):
        await asyncio.wait_for(client.close(), seconds)
    client.wire.abort()


async def _objection(
    server: Server, family: int, address: Any, context: ssl.SSLContext, *, first: bool
) -> ssl.SSLError | None:
    """What the server has against our certificate. It says so after the handshake, when nats-py only writes."""
    try:
        wire = await _opened(family, address, server.where)
    except Weather:
        return None
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            if not first:
                await wire.readline()  # type: ignore[no-untyped-call]
            await wire.connect_tls(server.name, context, LINE_BYTES, CONNECT_SECONDS)
            await wire.read(1)
    except ssl.SSLError as error:
        return error
    except (OSError, ValueError):  # a TimeoutError is an OSError; a line may be too long
        pass
    finally:
        wire.abort()
    return None


def _sorted(where: str, error: Exception, hint: str = "") -> Weather:
    if denied := denial(where, error):
        return denied
    words = str(error) or ("no answer in time" if isinstance(error, TimeoutError) else type(error).__name__)
    return Weather(f"NATS at {where} cannot be reached: {words}{hint and f' ({hint})'}")
