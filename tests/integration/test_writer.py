"""Every form of the writer joins the caller's transaction, never commits, and rolls back with it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from outbox import Outbox, OutboxError, event
from outbox.schema import grants
from tests.support.bed import rows, value

outbox = Outbox()
MY_TXID = "SELECT pg_current_xact_id()::text"
TXIDS = "SELECT txid::text FROM outbox.events ORDER BY id"


def engine(url: str) -> sa.Engine:
    return sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"), poolclass=sa.NullPool)


def run_sync(url: str, form: str, work: Callable[[Any, Callable[[str], Any]], None], *, commit: bool) -> None:
    """Open a connection of this form, do `work` in a transaction, end it."""
    if form == "psycopg":
        with psycopg.connect(url) as connection:
            work(connection, lambda text: connection.execute(text.encode()).fetchone())
            connection.commit() if commit else connection.rollback()
        return
    with engine(url).connect() as core:
        target = Session(core) if form == "session" else core
        work(target, lambda text: target.execute(sa.text(text)).one())
        target.commit() if commit else target.rollback()
        target.close()


@pytest.mark.parametrize("commit", [True, False])
@pytest.mark.parametrize("form", ["session", "connection", "psycopg"])
def test_sync_forms_join_the_callers_transaction(database: str, form: str, commit: bool) -> None:
    seen: list[str] = []

    def work(target: Any, ask: Callable[[str], Any]) -> None:
        seen.append(ask(MY_TXID)[0])
        first = outbox.add(target, "a.one", {"n": 1}, headers={"k": "v"})
        many = outbox.add_many(target, [event("a.two", "x"), event("a.three", b"y")])
        assert len({first, *many}) == 3
        assert ask(MY_TXID)[0] == seen[0]
        assert value(database, "SELECT count(*) FROM outbox.events") == 0  # not committed

    run_sync(database, form, work, commit=commit)
    assert rows(database, TXIDS) == ([(seen[0],)] * 3 if commit else [])
    assert value(database, "SELECT count(*) FROM outbox.transactions") == int(commit)
    if commit:
        assert rows(database, "SELECT subject, headers, payload FROM outbox.events ORDER BY id") == [
            ("a.one", {"k": "v"}, b'{"n":1}'),
            ("a.two", None, b"x"),
            ("a.three", None, b"y"),
        ]


AsyncWork = Callable[[Any, Callable[[str], Awaitable[Any]]], Awaitable[None]]


async def run_async(url: str, form: str, work: AsyncWork, *, commit: bool) -> None:
    if form == "psycopg":
        async with await psycopg.AsyncConnection.connect(url) as connection:

            async def ask(text: str) -> Any:
                return await (await connection.execute(text.encode())).fetchone()

            await work(connection, ask)
            await (connection.commit() if commit else connection.rollback())
        return
    driver = "asyncpg" if form.endswith("asyncpg") else "psycopg"
    made = create_async_engine(url.replace("postgresql://", f"postgresql+{driver}://"), poolclass=sa.NullPool)
    async with made.connect() as core:
        target: AsyncSession | AsyncConnection = AsyncSession(core) if form.startswith("session") else core

        async def ask_core(text: str) -> Any:
            return (await target.execute(sa.text(text))).one()

        await work(target, ask_core)
        await (target.commit() if commit else target.rollback())
        await target.close()
    await made.dispose()


@pytest.mark.parametrize("commit", [True, False])
@pytest.mark.parametrize("form", ["session", "session asyncpg", "connection", "connection asyncpg", "psycopg"])
async def test_async_forms_join_the_callers_transaction(database: str, form: str, commit: bool) -> None:
    seen: list[str] = []

    async def work(target: Any, ask: Callable[[str], Awaitable[Any]]) -> None:
        seen.append((await ask(MY_TXID))[0])
        await outbox.add_async(target, "a.one", {"n": 1}, headers={"k": "v"})
        await outbox.add_many_async(target, [event("a.two", "x"), event("a.three", b"y")])
        assert (await ask(MY_TXID))[0] == seen[0]

    await run_async(database, form, work, commit=commit)
    assert rows(database, TXIDS) == ([(seen[0],)] * 3 if commit else [])
    if commit:
        assert [r[0] for r in rows(database, "SELECT payload FROM outbox.events ORDER BY id")] == [
            b'{"n":1}',
            b"x",
            b"y",
        ]


def test_savepoint_that_is_rolled_back_takes_its_events_along(database: str) -> None:
    with Session(engine(database)) as session, session.begin():
        outbox.add(session, "a.kept", "1")
        with session.begin_nested():
            outbox.add(session, "a.kept", "2")
        savepoint = session.begin_nested()
        outbox.add(session, "a.lost", "3")
        savepoint.rollback()
        outbox.add(session, "a.kept", "4")
    assert [p for (p,) in rows(database, "SELECT payload FROM outbox.events ORDER BY id")] == [b"1", b"2", b"4"]
    assert rows(database, "SELECT event_count FROM outbox.transactions") == [(3,)]


def test_sealed_early_and_added_to_again_is_one_row_at_a_new_position(database: str) -> None:
    with psycopg.connect(database) as connection:
        outbox.add(connection, "a.b", "1")
        connection.execute("SET CONSTRAINTS ALL IMMEDIATE")
        outbox.add(connection, "a.b", "2")
        connection.commit()
    assert rows(database, "SELECT position, event_count FROM outbox.transactions") == [(2, 2)]


def test_many_events_are_one_round_trip_and_stay_in_order(database: str) -> None:
    with psycopg.connect(database) as connection:
        outbox.add_many(connection, (event("a.b", str(n)) for n in range(1000)))
        connection.commit()
    found = rows(database, "SELECT payload FROM outbox.events ORDER BY id")
    assert [int(p) for (p,) in found] == list(range(1000))


def test_autocommit_without_a_transaction_is_refused(database: str) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        with pytest.raises(OutboxError, match="no transaction is open"):
            outbox.add(connection, "a.b", "x")
        with connection.transaction():
            outbox.add(connection, "a.b", "x")
    assert value(database, "SELECT count(*) FROM outbox.events") == 1


def test_another_schema(database: str) -> None:
    from outbox.operate import migrate

    migrate.migrate(database, "order")
    with psycopg.connect(database) as connection:
        Outbox("order").add(connection, "a.b", "x")
        connection.execute('SELECT "order".add(%s, %s)', ["a.b", "y"])
        connection.commit()
    assert value(database, 'SELECT event_count FROM "order".transactions') == 2
    assert value(database, "SELECT count(*) FROM outbox.events") == 0


def test_least_privilege_of_the_application(database: str) -> None:
    role = f"app_{database.rpartition('/')[2]}"
    rows(database, f"CREATE ROLE {role} LOGIN")
    for statement in grants(application=role):
        rows(database, statement)
    url = database.replace("postgres@", f"{role}@")
    with psycopg.connect(url) as connection:
        outbox.add(connection, "a.b", "x")
        connection.execute("SELECT outbox.add('a.b', 'y')")
        connection.commit()
    for forbidden in (
        "SELECT * FROM outbox.events",
        "DELETE FROM outbox.events",
        "INSERT INTO outbox.events (id, subject, payload) OVERRIDING SYSTEM VALUE VALUES (1, 'a', '')",
        "INSERT INTO outbox.events (txid, subject, payload) VALUES (pg_current_xact_id(), 'a', '')",
        "INSERT INTO outbox.transactions (txid, event_count) VALUES ('1', 1)",
        "UPDATE outbox.limits SET max_event_bytes = 1",
        "SELECT outbox.seal()",
        "SELECT outbox.refuse('a', 'b')",
    ):
        with psycopg.connect(url) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute(forbidden.encode())
