"""A new connection to NATS: one server after the other until one lets us in, or why none does.

nats-py does the work. What it leaves out is done here: TLS where it was asked for, whatever the server offers, before
any credential is sent; and errors by whose fault they are, none of them with a secret.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

import nats.errors
from nats.aio.client import Client

from outbox.errors import Denied, Weather
from outbox.jetstream.denials import denial

DEFAULT_PORT, CONNECT_SECONDS = 4222, 3
GIVEN_UP_SECONDS = 0.1  # nothing is to be flushed, and after a failed handshake nats-py waits for ever
NO_TLS = (
    "turn TLS on in the server; or, on a network that you trust, ask for none: nats:// in OUTBOX_NATS_URL, and no "
    "OUTBOX_NATS_TLS_…"
)
NO_CERTIFICATE = "give one: OUTBOX_NATS_TLS_CERT and OUTBOX_NATS_TLS_KEY"
TLS_FIRST = {
    False: "if the server wants TLS from the first byte: OUTBOX_NATS_TLS_FIRST=true",
    True: "if the server does not begin with TLS: unset OUTBOX_NATS_TLS_FIRST",
}


class Wary(Client):
    """nats-py's client, which looks at what a server says of TLS before it answers; raises `Denied`.

    By itself nats-py talks in the clear to a server that only offers TLS, or has none, and learns that a client
    certificate is missing from a broken pipe.
    """

    def __init__(self, where: str, *, secure: bool, certified: bool) -> None:
        super().__init__()
        self._where, self._secure, self._certified = where, secure, certified

    def abort(self) -> None:
        """Close the socket at once; idempotent. nats-py waits until the server has read all, which may be never."""
        writer = getattr(self._transport, "_io_writer", None)
        if writer is not None:
            writer.transport.abort()

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        if initial_connection:
            if self._secure and not (info.get("tls_required") or info.get("tls_available")):
                raise Denied(f"NATS at {self._where} has no TLS, and TLS is asked for", remedy=NO_TLS)
            if info.get("tls_verify") and not self._certified:
                raise Denied(f"NATS at {self._where} asks for a client certificate", remedy=NO_CERTIFICATE)
            info["tls_required"] = info.get("tls_required") or self._secure
        await super()._process_info(info, initial_connection)


async def dial(
    servers: Sequence[str],
    *,
    error_cb: Callable[[Exception], Awaitable[None]],
    closed_cb: Callable[[], Awaitable[None]],
    certified: bool = False,
    **options: Any,
) -> Wary:
    """A client that is connected to one of the servers, and never connects again; `options` are nats-py's.

    `certified` says that the TLS context among them has a client certificate. Raises `Denied` if every server denies
    the connection, else `Weather`.
    """
    failures: list[Weather] = []
    for server in random.sample(servers, len(servers)):
        try:
            return await _dial(server, error_cb, closed_cb, certified, **options)
        except Weather as failure:
            failures.append(failure)
    if all(isinstance(failure, Denied) for failure in failures):
        raise failures[0]
    raise Weather("; ".join(failure.message for failure in failures))


async def _dial(
    server: str,
    error_cb: Callable[[Exception], Awaitable[None]],
    closed_cb: Callable[[], Awaitable[None]],
    certified: bool,
    **options: Any,
) -> Wary:
    url = urlsplit(server)
    host = f"[{url.hostname}]" if ":" in str(url.hostname) else url.hostname
    where = f"{host}:{url.port or DEFAULT_PORT}"
    swallowed: list[Exception] = []

    async def on_error(error: Exception) -> None:
        swallowed.append(error)
        await error_cb(error)

    client = Wary(where, secure=url.scheme == "tls" or "tls" in options, certified=certified)
    try:
        await client.connect(
            servers=[f"{url.scheme}://{where}"],
            name="outbox relay",
            allow_reconnect=False,
            # nats-py tries the first connection again by itself, 60 times: the back-off is ours. 0 means for ever.
            max_reconnect_attempts=1,
            reconnect_time_wait=0,
            connect_timeout=CONNECT_SECONDS,
            ping_interval=5,
            max_outstanding_pings=2,
            error_cb=on_error,
            closed_cb=closed_cb,
            **{**options, **_credentials(url.username, url.password)},
        )
    except (TimeoutError, nats.errors.Error, OSError) as error:
        await close(client, GIVEN_UP_SECONDS)
        # That there are no more servers is no reason: what went before it is.
        last = swallowed[-1] if swallowed and isinstance(error, nats.errors.NoServersError) else error
        first = bool(options.get("tls_handshake_first"))
        if certified and isinstance(last, ConnectionError):
            last = await _objection(url, options["tls"], first=first) or last
        raise _sorted(where, last, first=first) from error
    except (Denied, asyncio.CancelledError):
        await close(client, GIVEN_UP_SECONDS)
        raise
    return client


async def close(client: Wary, seconds: float = 2) -> None:
    """Close a client; idempotent, blocks for at most so long. What the server does not take by then is not sent."""
    with contextlib.suppress(TimeoutError, OSError):
        await asyncio.wait_for(client.close(), seconds)
    client.abort()


async def _objection(url: SplitResult, context: ssl.SSLContext, *, first: bool) -> ssl.SSLError | None:
    """What the server has against our certificate. It says so after the handshake, when nats-py only writes."""
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            reader, writer = await asyncio.open_connection(url.hostname, url.port or DEFAULT_PORT)
            try:
                if not first:
                    await reader.readline()
                await writer.start_tls(context, server_hostname=url.hostname)
                await reader.read(1)
            finally:
                writer.close()
    except ssl.SSLError as error:
        return error
    except (OSError, ValueError):  # a TimeoutError is an OSError; a line may be too long
        pass
    return None


def _credentials(user: str | None, password: str | None) -> dict[str, str]:
    """Those of the URL; a user without a password is a token. nats-py does not decode them."""
    if user is None:
        return {}
    return {"token": unquote(user)} if password is None else {"user": unquote(user), "password": unquote(password)}


def _sorted(where: str, error: Exception, *, first: bool) -> Weather:
    if denied := denial(where, error):
        return denied
    silent = isinstance(error, TimeoutError) or "expecting INFO" in str(error)
    hint = f" ({TLS_FIRST[first]})" if silent else ""
    return Weather(f"NATS at {where} cannot be reached: {str(error) or type(error).__name__}{hint}")
