"""What `outbox doctor` looks at in Postgres: the server, the schema, this role's privileges, and who is in the way.

Reads only; the comparison of the schema makes a copy that it rolls back. Blocks nobody.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import psycopg
from psycopg.rows import TupleRow

from outbox import schema
from outbox.config import Settings
from outbox.core import requirements
from outbox.core.positions import HIGHEST
from outbox.doctor import queries
from outbox.doctor.check import Check, Checks, Colour
from outbox.errors import Misconfigured, OutboxError, Weather
from outbox.operate import migrate
from outbox.operate.queries import STRANDED
from outbox.postgres.denials import READ_ONLY, UNWRITABLE
from outbox.postgres.queries import COUNTERS, PARTS, ROW_SECURITY, STRAYS, compose
from outbox.postgres.session import LOOK, observer_session, refuse_pooler, step

CHECKS = Checks("database")
NEWEST = 180000
LONG_SECONDS, OLD_SNAPSHOT_SECONDS = 60.0, 3600.0
PREPARED_SECONDS, FORGOTTEN_SECONDS = 5.0, 3600.0  # the second half of a two-phase commit comes at once
DEAD_ROWS, DEAD_SHARE, BLOATED_BYTES = 10_000, 0.5, 100_000_000
ROW_BYTES = {"transactions": 500}  # of a row and the room that its page keeps, at most; of events nobody knows

Connection = psycopg.Connection[TupleRow]


async def examine(connection: Connection, settings: Settings) -> AsyncIterator[Check]:
    """All checks of the database; ends early where the rest would make no sense."""
    name = settings.schema
    (server,) = _rows(connection, queries.SERVER, name, schema=name)
    *_, autovacuum, _, role, may_create, comment, sees_all, may_use, _ = server
    for check in _server(server):
        yield check
    yield await _pooler(connection, settings)
    if may_use is None:
        yield CHECKS.red("schema", f"there is no schema {name} in this database", "outbox migrate")
        return
    if not may_use:
        yield _missing(name, role, ["USAGE ON SCHEMA"])
        return
    try:
        schema.check_version(comment, name)
    except Misconfigured as error:
        yield CHECKS.red("schema", error.message, error.remedy)
        return
    lost = [row[0] for row in _rows(connection, PARTS, name, schema=name)]
    yield _lost(lost) if lost and not may_create else _drift(connection, name, may_create=may_create)
    missing = list(_not_granted(connection, name))
    yield _missing(name, role, missing) if missing else CHECKS.green("privileges", f"role {role} may all")
    if missing:
        return
    row_security = _row_security(connection, name)
    yield row_security
    if row_security.colour is Colour.RED:
        return
    yield _home(connection, name)
    for check in _limits(connection, settings):
        yield check
    for check in _counters(connection, name):
        yield check
    yield _strays(connection, name)
    holders = _holders(connection, name, role, sees_all=sees_all)
    for check in [*_tables(connection, name, autovacuum), *holders]:
        yield check


def _server(row: TupleRow) -> Iterator[Check]:
    number, standby, encoding, fsync, _, max_prepared, *_, frozen = row
    version = f"{number // 10000}.{number % 10000}"
    if problem := next(requirements.of_postgres(number), None):
        yield CHECKS.red("server", problem.what, problem.remedy)
    elif number // 10000 * 10000 > NEWEST:
        yield CHECKS.yellow("server", f"PostgreSQL {version} is newer than what was tested", "test it, or use 18")
    else:
        polls = "; it allows prepared transactions, so the relay polls" if max_prepared else ""
        yield CHECKS.green("server", f"PostgreSQL {version}{polls}")
    if standby:
        yield CHECKS.red("server", "it is a standby", "name the primary in OUTBOX_DATABASE_URL")
    elif frozen:
        words = f"{READ_ONLY}: its configuration has default_transaction_read_only on"
        yield CHECKS.red("server", words, UNWRITABLE)
    if encoding != "UTF8":
        yield CHECKS.red("encoding", f"the database has encoding {encoding}", "use a database with encoding UTF8")
    if fsync != "on":
        found = "fsync is off: a crash can undo what was published"
        yield CHECKS.red("fsync", found, "ALTER SYSTEM SET fsync = on; then reload")


async def _pooler(connection: Connection, settings: Settings) -> Check:
    ((pid,),) = _rows(connection, queries.PROCESS, settings.schema)
    try:
        if pid != connection.info.backend_pid:
            async with observer_session(settings.database_url) as other:
                await refuse_pooler(other)
    except Misconfigured as error:
        return CHECKS.red("pooler", error.message, error.remedy)
    except OutboxError as error:
        return CHECKS.yellow("pooler", f"could not be told: {error.message}", "allow this role a second connection")
    return CHECKS.green("pooler", "none, or one in session mode")


def _lost(parts: list[str]) -> Check:
    words = f"it has drifted: missing or disabled: {', '.join(parts)}"
    remedy = "as the owner: ALTER TABLE … ENABLE TRIGGER, or create it as outbox migrate --sql has it"
    return CHECKS.red("drift", words, remedy)


def _drift(connection: Connection, name: str, *, may_create: bool) -> Check:
    if not may_create:
        return CHECKS.yellow(
            "drift",
            f"version {schema.VERSION}; drift was not looked for, as this role may not CREATE in the database",
            "run as the owner: outbox migrate --check",
        )
    connection.read_only = False
    try:
        problems = migrate.differences(connection, name)
    except psycopg.Error as error:
        words = f"drift could not be looked for: {' '.join(str(error).split())}"
        return CHECKS.yellow("drift", words, "run as the owner: outbox migrate --check")
    finally:
        connection.read_only = True
    if problems:
        rest = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        return CHECKS.red(
            "drift",
            f"it has drifted: {problems[0]}{rest}",
            "outbox migrate --check names all; put them back as outbox migrate --sql has them",
        )
    return CHECKS.green("drift", f"version {schema.VERSION}, without drift")


def _not_granted(connection: Connection, name: str) -> Iterator[str]:
    """What the relay needs and this role may not."""
    for privileges, what in schema.GRANTS["relay"]:
        kinds, _, columns = privileges.partition(" (")
        if what.startswith("SCHEMA"):
            continue
        for table in what.format(schema=name).removeprefix("SEQUENCE ").split(", "):
            for kind in kinds.split(", "):
                given = {
                    "table": table,
                    "privilege": kind,
                    "columns": columns.rstrip(")").split(", ") if columns else [],
                }
                ((may,),) = _rows(connection, queries.MAY, name, **given)
                if not may:
                    yield f"{kind}{f' ({columns}' if columns else ''} ON {table}"


def _missing(name: str, role: str, missing: list[str]) -> Check:
    rest = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    remedy = f"run the doctor as the relay's role; if this is it, as the owner: outbox migrate --relay-role {role}"
    return CHECKS.red("privileges", f"role {role} lacks {missing[0]}{rest} in schema {name}", remedy)


def _row_security(connection: Connection, name: str) -> Check:
    ((role, hidden),) = _rows(connection, ROW_SECURITY, name, schema=name)
    if problem := next(requirements.of_row_security(name, role, hidden), None):
        return CHECKS.red("row security", problem.what, problem.remedy)
    return CHECKS.green("row security", "hides nothing from this role")


def _home(connection: Connection, name: str) -> Check:
    rows = _rows(connection, queries.HOME, name)
    if not rows:
        return _empty(name, "relay")
    ((cluster, database, _, now_cluster, now_database),) = rows
    if cluster is None:
        return CHECKS.green("identity", "the first relay will make this database the outbox's home")
    if (cluster, database) != (now_cluster, now_database):
        return CHECKS.red(
            "identity",
            "this is not the database, or not the cluster, that the outbox was in: it was restored, copied or moved",
            "make sure that only one copy is in use, then: outbox rebase",
        )
    return CHECKS.green("identity", "the database that the outbox was in")


def _empty(name: str, table: str) -> Check:
    words = f"the table {name}.{table} is empty: was only the schema restored?"
    return CHECKS.red(
        table, words, f"restore its row from a backup; for a new outbox: INSERT INTO {name}.{table} DEFAULT VALUES"
    )


def _limits(connection: Connection, settings: Settings) -> list[Check]:
    rows = _rows(connection, queries.LIMITS, settings.schema)
    ((cache,),) = _rows(connection, queries.CACHES, settings.schema)
    size, events = rows[0] if rows else (None, None)
    problems = requirements.of_outbox(
        settings.schema,
        max_transaction_events=events,
        identity_cache=cache,
        max_batch_messages=settings.max_batch_messages,
    )
    found = [CHECKS.red("limits", problem.what, problem.remedy) for problem in problems]
    return found or [CHECKS.green("limits", f"{events} events in a transaction, {size:,} bytes in an event")]


def _counters(connection: Connection, name: str) -> Iterator[Check]:
    """Whether all that is committed is in a relay's sight; nothing where the table relay is empty."""
    rows = _rows(connection, COUNTERS, name)
    if not rows:
        return
    counters = requirements.Counters(*rows[0])
    looked_at_all = True
    if counters.stranded is None:
        try:
            all_of_them = _rows(connection, STRANDED, name, after=0, to=HIGHEST)
            counters = counters._replace(stranded=all_of_them[0][0] if all_of_them else None)
        except Weather:
            looked_at_all = False
    problems = list(requirements.of_counters(counters))
    for each in problems:
        yield CHECKS.red("counters", each.what, each.remedy)
    if not looked_at_all:
        words = "what is pending out of a relay's sight could not be looked for in half a minute"
        yield CHECKS.yellow("counters", words, "outbox verify, which takes its time")
    elif not problems:
        yield CHECKS.green("counters", "nothing that is committed is out of a relay's sight")


def _strays(connection: Connection, name: str) -> Check:
    strays = _rows(connection, STRAYS, name)
    if strays:
        words = f"{strays[0][1]} events of txid {strays[0][0]} belong to no transaction: they are never sent"
        return CHECKS.red(
            "strays", words, "an application overwrote the settings of the triggers: add them again, then delete these"
        )
    return CHECKS.green("strays", "every event lately added belongs to a transaction")


def _tables(connection: Connection, name: str, autovacuum: str) -> list[Check]:
    found = []
    for table, size, live, dead, enabled, seconds in _rows(connection, queries.TABLES, name, schema=name):
        if autovacuum != "on" or not enabled:
            remedy = "ALTER SYSTEM SET autovacuum = on" if autovacuum != "on" else f"ALTER TABLE {name}.{table} RESET"
            remedy += "" if autovacuum != "on" else " (autovacuum_enabled)"
            found.append(CHECKS.red("vacuum", f"autovacuum is off for {table}", remedy))
        elif dead > DEAD_ROWS and dead > DEAD_SHARE * live:
            last = f"{_ago(seconds)} ago" if seconds is not None else "never"
            words = f"{table} has {dead:,} dead rows beside {live:,} live ones; vacuumed {last}"
            found.append(CHECKS.yellow("vacuum", words, f"VACUUM {name}.{table}; see long transactions"))
        elif live and table in ROW_BYTES and size > max(BLOATED_BYTES, 4 * live * ROW_BYTES[table]):
            words = f"{table} takes {size / 1e6:,.0f} MB for {live:,} rows"
            found.append(CHECKS.yellow("bloat", words, f"in a quiet hour: VACUUM FULL {name}.{table}, which blocks"))
    return found or [CHECKS.green("vacuum", "autovacuum keeps up, and no table is bloated")]


def _holders(connection: Connection, name: str, role: str, *, sees_all: bool) -> list[Check]:
    found = []
    for gid, owner, age in _rows(connection, queries.PREPARED, name, seconds=PREPARED_SECONDS):
        words = f"prepared transaction {gid!r} of {owner} is {_ago(age)} old: what it added waits"
        literal = gid.replace("'", "''")
        remedy = f"ask who made it, then COMMIT PREPARED '{literal}' or ROLLBACK PREPARED '{literal}'"
        found.append((CHECKS.red if age > FORGOTTEN_SECONDS else CHECKS.yellow)("prepared transactions", words, remedy))
    for pid, user, application, age in _rows(connection, queries.WRITERS, name, seconds=LONG_SECONDS):
        words = f"pid {pid} ({user}, {application}) has added events and is open for {_ago(age)}"
        remedy = f"end it in the application, or pg_terminate_backend({pid})"
        found.append(CHECKS.yellow("long transactions", words, remedy))
    for pid, user, application, age in _rows(connection, queries.SNAPSHOTS, name, seconds=OLD_SNAPSHOT_SECONDS):
        words = f"pid {pid} ({user}, {application}) keeps dead rows from being removed for {_ago(age)}"
        found.append(CHECKS.yellow("long transactions", words, f"end it, or pg_terminate_backend({pid})"))
    if not sees_all:
        words = f"role {role} does not see the transactions of other roles"
        found.append(CHECKS.yellow("long transactions", words, f"GRANT pg_read_all_stats TO {role}"))
    return found or [CHECKS.green("long transactions", "nobody holds anything up")]


def _ago(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _rows(connection: Connection, query: str, name: str, **given: Any) -> list[TupleRow]:
    with step(connection, LOOK):
        return connection.execute(compose(query, name), given).fetchall()
