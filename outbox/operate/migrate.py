"""`outbox migrate`: bring the database to a schema version, print the SQL, find drift, grant to roles.

Alembic with its version table inside the outbox's own schema, so that it never meets the application's history. One
migration at a time: a transaction-level advisory lock makes a second one wait. Alembic and SQLAlchemy are loaded when
they are used: the relay's process starts faster without them.
"""

from __future__ import annotations

import contextlib
import io
import re
import secrets
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg.rows import TupleRow

from outbox import schema
from outbox.errors import Locked, Misconfigured
from outbox.operate import queries
from outbox.postgres.heritage import disinherit_script
from outbox.postgres.queries import compose
from outbox.postgres.session import begun, command_session, stepping_session

if TYPE_CHECKING:
    import sqlalchemy as sa
    from alembic.config import Config

MIGRATION_LOCK = 0x0B0C_0003
TRIES, LOCK_SECONDS, PAUSE_SECONDS = 3, 2, 1.0


def scripts() -> Path:
    """The folder of Alembic revisions: inside the wheel, or beside the package in a working copy."""
    package = Path(__file__).parents[1]
    shipped = package / "_migrations"
    return shipped if shipped.exists() else package.parent / "migrations"


def migrate(url: str, name: str = schema.DEFAULT_SCHEMA, *, to: int = schema.VERSION) -> tuple[int, int]:
    """Bring schema `name` to version `to`, 0 for none at all; returns the versions before and after.

    Commits, all or nothing. Raises `Misconfigured` where the application's own Alembic history owns the outbox.
    """
    _known(to)
    for _ in range(TRIES - 1):
        with contextlib.suppress(Locked):
            return _migrated(url, name, to)
        time.sleep(PAUSE_SECONDS)
    return _migrated(url, name, to)


def _migrated(url: str, name: str, to: int) -> tuple[int, int]:
    from alembic import command

    with _connected(url) as connection:
        connection.exec_driver_sql("SET LOCAL lock_timeout = 0")  # another migration is waited for
        keys = {"lock": MIGRATION_LOCK, "key": schema.lock_key(name)}
        connection.exec_driver_sql(compose(queries.ONE_MIGRATION_AT_A_TIME, name).decode(), keys)
        # Who waits for a lock is in the way of everybody behind: for a moment only, and again.
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{LOCK_SECONDS}s'")
        before, told = installed(_raw(connection), name), _told(_raw(connection), name)
        if not before and _there(_raw(connection), name, "events"):
            version = _closest(_raw(connection), name)
            raise Misconfigured(
                f"the version of schema {name} cannot be told: the comment on {name}.events is gone, and the history "
                "of outbox migrate is not there",
                remedy=f"if it is what the application's Alembic history made, and it looks like version {version}: "
                f"COMMENT ON TABLE {name}.events IS '{schema.events_comment(version)}'",
            )
        if before and not _there(_raw(connection), name, "alembic_version"):
            raise Misconfigured(
                f"schema {name} was made by an application's own Alembic history, at version {before}",
                remedy=f"write a revision there: outbox.schema.upgrade(op, since={before}, schema={name!r})",
            )
        config = _config(name)
        config.attributes["connection"] = connection
        if to >= before and (problem := _unfinished(_raw(connection), name)):
            raise problem
        move = command.upgrade if to >= before else command.downgrade
        move(config, _revision(to))
        if to == 0:
            _sweep(_raw(connection), name)
        elif before and not told:  # pg_restore --no-comments
            for statement in schema.comments(to, name):
                _raw(connection).execute(statement.encode())
        after = installed(_raw(connection), name)
        connection.commit()
        return before, after


def migration_sql(name: str = schema.DEFAULT_SCHEMA, *, to: int = schema.VERSION, **roles: str | None) -> str:
    """The SQL that `migrate` and `grant` run on an empty database, for other tools. Needs no connection."""
    from alembic import command

    _known(to)
    config = _config(name)
    printed = config.output_buffer = io.StringIO()
    command.upgrade(config, _revision(to), sql=True)
    if statements := list(schema.grants(name, **roles)):
        printed.write("".join(f"{line};\n\n" for line in ("BEGIN", disinherit_script(), *statements, "COMMIT")))
    return printed.getvalue()


def problems(url: str, name: str = schema.DEFAULT_SCHEMA) -> list[str]:
    """What differs from the current schema version: nothing, that it is behind, or every line that has drifted.

    Compares with a copy that is created in a transaction and rolled back; needs CREATE on the database.
    """
    with stepping_session(url) as connection:
        return differences(connection, name)


def differences(connection: psycopg.Connection[TupleRow], name: str) -> list[str]:
    """The same, within a `stepping_session`."""
    with connection.transaction(force_rollback=True):
        begun(connection)
        found = installed(connection, name)
        if problem := _unfinished(connection, name):
            return [problem.line]
        if not _told(connection, name) and found:
            return [f"missing: the comment on {name}.events, which tells the version: outbox migrate"]
        if found != schema.VERSION:
            return [f"schema {name} is at version {found}, not {schema.VERSION}: outbox migrate"]
        *_, wanted = _wanted(connection, name)
        actual = _actual(connection, name)
    missing = [f"missing: {_short(line)}" for line in sorted(wanted - actual)]
    return missing + [f"unexpected: {_short(line)}" for line in sorted(actual - wanted)]


def grant(url: str, name: str, **roles: str | None) -> None:
    """Give existing roles what they need; see `outbox.schema.grants`. Commits."""
    with command_session(url) as connection:
        for statement in schema.grants(name, **roles):
            try:
                connection.execute(statement.encode())
            except psycopg.errors.UndefinedObject as error:
                words = f"{error.diag.message_primary}"
                raise Misconfigured(words, remedy="create the role first: CREATE ROLE … LOGIN") from error


def installed(connection: psycopg.Connection[Any], name: str) -> int:
    """The schema version in the database, 0 if there is none: by its comment, or by the history of `migrate`."""
    if (told := _told(connection, name)) or not _there(connection, name, "alembic_version"):
        return told
    rows = connection.execute(compose(queries.HISTORY, name)).fetchall()
    return int(rows[0][0]) if rows and _there(connection, name, "events") else 0


def _told(connection: psycopg.Connection[Any], name: str) -> int:
    """The schema version that the comment on the table `events` tells, 0 without one."""
    events = f"{schema.checked_name(name)}.events"
    ((comment,),) = connection.execute(compose(queries.INSTALLED, name), {"events": events})
    return schema.version_of(comment)


def _unfinished(connection: psycopg.Connection[Any], name: str) -> Misconfigured | None:
    """Why nothing but a way down is possible: the database has another form of an unreleased version."""
    ((comment,),) = connection.execute(compose(queries.INSTALLED, name), {"events": f"{name}.events"})
    found = schema.installed(comment)
    return found.unsuitable(name) if found.unfinished else None


def _there(connection: psycopg.Connection[Any], name: str, table: str) -> bool:
    """True if the schema has this table; `alembic_version` is there if `outbox migrate` made it."""
    ((there,),) = connection.execute(compose(queries.THERE, name), {"table": f"{name}.{table}"})
    return bool(there)


def _closest(connection: psycopg.Connection[Any], name: str) -> int:
    """The version that the schema looks most like. Leaves a copy behind, for the caller to roll back."""
    actual = _actual(connection, name)
    differences = [len(wanted ^ actual) for wanted in _wanted(connection, name)]
    return differences.index(min(differences)) + 1


def _wanted(connection: psycopg.Connection[Any], name: str) -> Iterator[set[str]]:
    """What each version has, as a copy of it has. Leaves the copy behind, for the caller to roll back."""
    copy = f"{name[:30]}_{secrets.token_hex(8)}"
    for version in range(1, schema.VERSION + 1):
        for statement in schema.statements(version, "up", copy):
            connection.execute(statement.encode())
        yield {_as_if(line, copy, name) for line in _fingerprint(connection, copy)}


def _actual(connection: psycopg.Connection[Any], name: str) -> set[str]:
    return {_as_if(line, name, name) for line in _fingerprint(connection, name)}


def _sweep(connection: psycopg.Connection[Any], name: str) -> None:
    """After the last downgrade: the version table, and the schema if nothing else is in it."""
    connection.execute(compose(queries.DROP_HISTORY, name))
    ((left,),) = connection.execute(compose(queries.WHAT_IS_LEFT, name), {"schema": name})
    if left == 0:
        connection.execute(compose(queries.DROP_SCHEMA, name))


def _fingerprint(connection: psycopg.Connection[Any], name: str) -> Iterator[str]:
    for (line,) in connection.execute(queries.FINGERPRINT, {"schema": name}):
        yield line


def _as_if(line: str, copy: str, name: str) -> str:
    line = line.replace(copy, name).replace(str(schema.lock_key(copy)), str(schema.lock_key(name)))
    return re.sub(r"[ ]+", " ", line.replace('"', ""))


def _short(line: str) -> str:
    return textwrap.shorten(line, width=160, placeholder="...")


def _known(version: int) -> None:
    if not 0 <= version <= schema.VERSION:
        raise Misconfigured(f"there is no schema version {version}", remedy=f"choose 0 to {schema.VERSION}")


def _revision(version: int) -> str:
    return f"{version:04}" if version else "base"


def _config(name: str) -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(scripts()).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["schema"] = schema.checked_name(name)
    return config


@contextmanager
def _connected(url: str) -> Iterator[sa.Connection]:
    import sqlalchemy as sa

    with command_session(url) as raw:
        engine = sa.create_engine("postgresql+psycopg://", creator=lambda: raw, poolclass=sa.StaticPool)
        try:
            with engine.connect() as connection:
                begun(raw)  # again: SQLAlchemy has rolled back after a look at the server
                yield connection
        except sa.exc.DBAPIError as error:
            if isinstance(error.orig, psycopg.errors.RaiseException):  # a step refuses
                said = error.orig.diag
                raise Misconfigured(said.message_primary or "", remedy=said.message_hint or "") from error
            raise error.orig or error from error  # psycopg's own, which is told by whose fault it is


def _raw(connection: sa.Connection) -> psycopg.Connection[Any]:
    raw: psycopg.Connection[Any] = connection.connection.driver_connection  # type: ignore[assignment]
    return raw
