"""Connections to Postgres: the relay's session, a command's, and psycopg's errors by whose fault they are.

Knows nothing of the outbox's tables.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, TypeVar, overload

import psycopg
from psycopg.rows import AsyncRowFactory, TupleRow, tuple_row

from outbox.errors import Halt, Locked, Misconfigured, Weather
from outbox.postgres.denials import denial
from outbox.text import masked

Row = TypeVar("Row")
# The relay's statements must not depend on statistics taken while the table was empty; its commits must be flushed;
# and a session whose process is frozen must end, because a frozen process's kernel still answers keepalives.
SESSION = {
    "synchronous_commit": "on",
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "enable_nestloop": "off",  # but for LATERAL, which has no other way: a join with a whole batch would be quadratic
    "jit": "off",
    "default_transaction_isolation": "read committed",
    "idle_session_timeout": "5s",
    "idle_in_transaction_session_timeout": "5s",
    "statement_timeout": "15s",
    "tcp_user_timeout": "10s",
    "client_min_messages": "warning",
}
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


async def open_session(url: str) -> psycopg.AsyncConnection[TupleRow]:
    """The relay's session, in autocommit mode, set as it must be; raises `Weather`, and `Denied` of it.

    `url` is all that libpq reads: a URL, or words such as `service=shop`.
    """
    with connecting():
        connection = await psycopg.AsyncConnection.connect(
            url, autocommit=True, prepare_threshold=0, application_name="outbox relay", **_kept(url)
        )
    settings = ", ".join(f"set_config('{key}', '{value}', false)" for key, value in SESSION.items())
    async with contextlib.AsyncExitStack() as undo:
        undo.push_async_callback(connection.close)
        with answered(connection):
            await refuse_pooler(connection)  # before anything is set: the server connection may be shared
            await connection.execute(f"SELECT {settings}".encode(), prepare=False)
        undo.pop_all()
    return connection


@contextlib.contextmanager
def answered(connection: psycopg.AsyncConnection[TupleRow]) -> Iterator[None]:
    """`translated`, and hang up on a server that says nothing for long: whoever waits for it sees the session lost.

    A network that swallows packets looks like a slow statement, for hours. Cancelling would need that network.
    """
    watchdog = asyncio.get_running_loop().call_later(ANSWER_SECONDS, _hang_up, connection)
    try:
        with translated():
            yield
    finally:
        watchdog.cancel()


def _hang_up(connection: psycopg.AsyncConnection[TupleRow]) -> None:
    with contextlib.suppress(OSError, psycopg.OperationalError):
        same = socket.socket(fileno=os.dup(connection.fileno()))
        same.shutdown(socket.SHUT_RDWR)
        same.close()


@contextlib.contextmanager
def command_session(url: str) -> Iterator[psycopg.Connection[TupleRow]]:
    """A command's connection: commits at the end, rolls back on an error. Raises `Weather` or `Misconfigured`."""
    with connecting():
        opened = psycopg.connect(url, application_name="outbox", **_kept(url))
    with translated(), opened as connection:
        yield connection


@contextlib.asynccontextmanager
async def observer_session(url: str) -> AsyncIterator[psycopg.AsyncConnection[TupleRow]]:
    """A connection for `looked`, in autocommit mode; raises `Weather` or `Misconfigured`.

    It leaves nothing behind on its server connection, which behind a pooler is the application's next.
    """
    with connecting():
        connection = await psycopg.AsyncConnection.connect(
            url, autocommit=True, prepare_threshold=None, application_name="outbox observer", **_kept(url)
        )
    with translated():
        async with connection:
            yield connection


@overload
async def looked(
    connection: psycopg.AsyncConnection[TupleRow], text: bytes, given: Mapping[str, Any] | None = None
) -> list[TupleRow]: ...


@overload
async def looked(
    connection: psycopg.AsyncConnection[TupleRow],
    text: bytes,
    given: Mapping[str, Any] | None = None,
    *,
    rows: AsyncRowFactory[Row],
) -> list[Row]: ...


async def looked(
    connection: psycopg.AsyncConnection[TupleRow],
    text: bytes,
    given: Mapping[str, Any] | None = None,
    *,
    rows: AsyncRowFactory[Any] = tuple_row,
) -> list[Any]:
    """The rows of a statement in a transaction of its own, which may only read and takes half a minute at most."""
    async with connection.transaction():
        await connection.execute("SET TRANSACTION READ ONLY")
        await connection.execute("SET LOCAL statement_timeout = '30s'")
        return await (await connection.cursor(row_factory=rows).execute(text, given)).fetchall()


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
    row = await (await connection.execute("SELECT pg_backend_pid()", prepare=False)).fetchone()
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
    except (psycopg.OperationalError, psycopg.InterfaceError) as error:
        raise denial(str(error)) or Weather(_masked(error)) from error


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """psycopg's errors, by whose fault they are: an outage is weather, a missing table or grant the operator's."""
    try:
        yield
    except psycopg.errors.LockNotAvailable as error:
        remedy = "see who holds it: pg_blocking_pids and pg_stat_activity; then run it again"
        raise Locked(_masked(error), remedy=remedy) from error
    except (psycopg.OperationalError, psycopg.InterfaceError) as error:
        raise Weather(_masked(error)) from error
    except (psycopg.errors.ReadOnlySqlTransaction, psycopg.errors.InternalError_) as error:
        raise Weather(_masked(error)) from error
    except (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn, psycopg.errors.InvalidSchemaName) as error:
        raise Misconfigured(f"the outbox is not in this database: {_masked(error)}", remedy="outbox migrate") from error
    except psycopg.errors.UndefinedObject as error:
        raise Misconfigured(_masked(error), remedy="create the role first: CREATE ROLE … LOGIN") from error
    except psycopg.IntegrityError as error:
        raise Halt(
            _masked(error), remedy="find out who changes the outbox's tables by hand, then start again"
        ) from error
    except psycopg.errors.InsufficientPrivilege as error:
        raise Misconfigured(
            _masked(error),
            remedy="as the owner: outbox migrate --relay-role ROLE (or --operator-role, --application-role); "
            "outbox migrate and outbox rebase of a database are the owner's own, outbox purge is the relay's",
        ) from error


def _kept(url: str) -> dict[str, Any]:
    """Connection parameters of ours, but for those that the URL, its service file or the environment set."""
    # libpq reads all of these, and then finds that it cannot connect there: without a name to look up, at once.
    known = psycopg.pq.PGconn.connect_start(psycopg.conninfo.make_conninfo(url, host=NOWHERE, hostaddr="").encode())
    given = {option.keyword.decode(): option.val.decode() for option in known.info if option.val is not None}
    known.finish()
    return {key: given.get(key, value) for key, value in CONNECTION.items()}


def _masked(error: psycopg.Error) -> str:
    """The server's words on one line; a password never gets out."""
    return masked(" ".join(str(error).split())) or type(error).__name__
