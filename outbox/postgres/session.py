"""Connections to Postgres: the relay's session, a command's, and psycopg's errors by whose fault they are.

Knows nothing of the outbox's tables.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import socket
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import psycopg
from psycopg import IsolationLevel
from psycopg.rows import TupleRow

from outbox.errors import Misconfigured
from outbox.postgres.denials import fault, refusal
from outbox.postgres.heritage import OURS, disinherit, disinherit_session

# The relay's statements must not depend on statistics taken while the table was empty; its commits must be flushed;
# and a session whose process is frozen must end, because a frozen process's kernel still answers keepalives.
SESSION = {
    **OURS,
    "synchronous_commit": "on",
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "enable_nestloop": "off",  # but for LATERAL, which has no other way: a join with a whole batch would be quadratic
    "jit": "off",
    "idle_session_timeout": "5s",
    "idle_in_transaction_session_timeout": "5s",
    "statement_timeout": "15s",  # but for what fetches events: that takes as long as bytes flow
    "lock_timeout": "1s",  # a lock that somebody holds is waited for a moment at a time, and told
    "tcp_user_timeout": "10s",
    "client_min_messages": "warning",
}
LOOK = {**OURS, "statement_timeout": "30s"}
# Keepalives are not sent while data is unacknowledged: for a dead host tcp_user_timeout (ms) counts.
CONNECTION = {
    "tcp_user_timeout": 10_000,
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
}

NOWHERE = "/nonexistent"  # a folder of sockets
PROBES = 5
ANSWER_SECONDS = 20.0  # more than statement_timeout: the server's own word comes first
LAST_RECEIVED = slice(52, 56)  # of Linux' struct tcp_info: tcpi_last_data_recv, in milliseconds


async def open_session(url: str, application: str = "outbox relay") -> psycopg.AsyncConnection[TupleRow]:
    """A session of the relay, in autocommit mode, set as it must be; raises `Weather`, and `Denied` of it.

    `url` is all that libpq reads: a URL, or words such as `service=shop`.
    """
    with connecting():
        connection = await psycopg.AsyncConnection.connect(
            url, autocommit=True, prepare_threshold=0, **_given(url, application)
        )
    async with contextlib.AsyncExitStack() as undo:
        undo.push_async_callback(connection.close)
        with answered(connection):
            await refuse_pooler(connection)  # before anything is set: the server connection may be shared
            await connection.execute(disinherit_session(SESSION), prepare=False)
        undo.pop_all()
    return connection


@contextlib.contextmanager
def answered(connection: psycopg.AsyncConnection[TupleRow]) -> Iterator[None]:
    """`translated`, and hang up on a server that says nothing for long: whoever waits for it sees the session lost.

    A network that swallows packets looks like a slow statement, for hours. Cancelling would need that network. Where
    the kernel does not tell when it received bytes last, the whole answer must come within that time.
    """
    loop = asyncio.get_running_loop()
    watchdog: asyncio.TimerHandle

    def look_in(seconds: float) -> None:
        nonlocal watchdog
        watchdog = loop.call_later(seconds, look)

    def look() -> None:
        left = ANSWER_SECONDS - _silent_for(connection)
        if left > 0:
            look_in(left)
        else:
            hang_up(connection)

    look_in(ANSWER_SECONDS)
    try:
        with translated():
            yield
    finally:
        watchdog.cancel()


def _silent_for(connection: psycopg.AsyncConnection[TupleRow]) -> float:
    """Seconds since the kernel received a byte of this connection; infinite if it does not say."""
    try:
        with socket.socket(fileno=os.dup(connection.fileno())) as same:
            told = same.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, LAST_RECEIVED.stop)
    except (OSError, AttributeError, psycopg.OperationalError):  # no TCP, not Linux, closed
        return math.inf
    return int.from_bytes(told[LAST_RECEIVED], sys.byteorder) / 1000


def hang_up(connection: psycopg.AsyncConnection[TupleRow]) -> None:
    """End the connection at once, without a word: whoever waits for it sees the session lost. Idempotent."""
    with (
        contextlib.suppress(OSError, psycopg.OperationalError),
        socket.socket(fileno=os.dup(connection.fileno())) as same,
    ):
        same.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def command_session(url: str, *, reads: bool = False) -> Iterator[psycopg.Connection[TupleRow]]:
    """A command's connection: commits at the end, rolls back on an error. Raises `Weather` or `Misconfigured`.

    With `reads` all its statements see one snapshot, and none may write. It is one transaction: behind a pooler that is
    as far as what is set for it reaches.
    """
    with _connection(url, reads=reads) as connection:
        connection.autocommit = False
        begun(connection)
        yield connection


@contextlib.contextmanager
def stepping_session(url: str, *, reads: bool = False) -> Iterator[psycopg.Connection[TupleRow]]:
    """A command's connection for work in several transactions, each within `step`. Raises as `command_session`."""
    with _connection(url, reads=reads) as connection:
        yield connection


@contextlib.contextmanager
def step(connection: psycopg.Connection[TupleRow], ours: Mapping[str, str] = OURS) -> Iterator[None]:
    """One transaction of a `stepping_session`."""
    with connection.transaction():
        begun(connection, ours)
        yield


def begun(connection: psycopg.Connection[TupleRow], ours: Mapping[str, str] = OURS) -> None:
    """Nothing that is inherited counts in this transaction; the first statement in it."""
    connection.execute(disinherit(ours).encode(), prepare=False)


@contextlib.contextmanager
def _connection(url: str, *, reads: bool) -> Iterator[psycopg.Connection[TupleRow]]:
    with connecting():
        opened = psycopg.connect(url, autocommit=True, **_given(url, "outbox"))
    with translated(), opened as connection:
        connection.execute(disinherit_session(pid=connection.info.backend_pid), prepare=False)
        # Said with each BEGIN, which behind a pooler would take what is inherited there.
        connection.isolation_level = IsolationLevel.REPEATABLE_READ if reads else IsolationLevel.READ_COMMITTED
        connection.read_only, connection.deferrable = reads, False
        yield connection


@contextlib.asynccontextmanager
async def observer_session(url: str) -> AsyncIterator[psycopg.AsyncConnection[TupleRow]]:
    """A connection for `looking`, in autocommit mode; raises `Weather` or `Misconfigured`.

    It leaves nothing behind on its server connection, which behind a pooler is the application's next.
    """
    with connecting():
        connection = await psycopg.AsyncConnection.connect(
            url, autocommit=True, prepare_threshold=None, **_given(url, "outbox observer")
        )
    with translated():
        async with connection:
            await connection.execute(disinherit_session(pid=connection.info.backend_pid), prepare=False)
            await connection.set_isolation_level(IsolationLevel.REPEATABLE_READ)
            await connection.set_read_only(True)
            await connection.set_deferrable(False)
            yield connection


@contextlib.asynccontextmanager
async def looking(connection: psycopg.AsyncConnection[TupleRow]) -> AsyncIterator[None]:
    """One transaction of an `observer_session`."""
    async with connection.transaction():
        await connection.execute(disinherit(LOOK).encode(), prepare=False)
        yield


async def refuse_pooler(connection: psycopg.AsyncConnection[TupleRow]) -> None:
    """Raise `Misconfigured` behind a pooler in transaction mode: it breaks session locks silently.

    Behind any pooler the process id of the protocol is not the server's. Then a second connection, within a
    transaction, tells the modes apart: in transaction mode it gets the server connection that the first one had, unless
    somebody else is quicker; so it is asked several times.
    """
    if await _server_pid(connection) == connection.info.backend_pid:
        return
    again_there = psycopg.conninfo.make_conninfo(connection.info.dsn, password=connection.info.password or None)
    for _ in range(PROBES):
        pid = await _server_pid(connection)
        with connecting():
            other = await psycopg.AsyncConnection.connect(again_there)
        async with other:
            taken, again = await _server_pid(other), await _server_pid(connection)
        if taken == pid or again != pid:
            raise Misconfigured(
                "the database is behind a pooler in transaction mode, which breaks session locks silently",
                remedy="give the relay a direct connection, or one pooled in session mode (OUTBOX_DATABASE_URL)",
            )


async def _server_pid(connection: psycopg.AsyncConnection[TupleRow]) -> int:
    # Not prepared: behind such a pooler the next server connection does not know the statement.
    row = await (await connection.execute("SELECT pg_catalog.pg_backend_pid()", prepare=False)).fetchone()
    return int(row[0]) if row else 0


@contextlib.contextmanager
def connecting() -> Iterator[None]:
    """psycopg's errors while a connection is made: what must be set up otherwise is `Denied`, all else `Weather`."""
    try:
        yield
    except psycopg.ProgrammingError as error:
        raise Misconfigured(
            "the connection to PostgreSQL is named by words that libpq does not read",
            remedy="see OUTBOX_DATABASE_URL, and libpq's variables (PG…)",
        ) from error
    except psycopg.Error as error:
        raise refusal(str(error)) from error


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """psycopg's errors, by whose fault they are: an outage is weather, a missing table or grant the operator's."""
    try:
        yield
    except psycopg.Error as error:
        raise fault(error.sqlstate, error.diag.source_function, str(error) or type(error).__name__) from error


def _given(url: str, name: str) -> dict[str, Any]:
    """What is given with every connection: our name, the encoding, and parameters of ours that nobody else sets."""
    return {"application_name": name, "client_encoding": "UTF8", **_kept(url)}


def _kept(url: str) -> dict[str, Any]:
    """Connection parameters of ours, but for those that the URL, its service file or the environment set."""
    # libpq reads all of these, and then finds that it cannot connect there: without a name to look up, at once.
    known = psycopg.pq.PGconn.connect_start(psycopg.conninfo.make_conninfo(url, host=NOWHERE, hostaddr="").encode())
    given = {option.keyword.decode(): option.val.decode() for option in known.info if option.val is not None}
    known.finish()
    return {key: given.get(key, value) for key, value in CONNECTION.items()}
