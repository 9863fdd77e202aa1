"""What a session inherits from its role, its database, its client and the environment; and the SQL that puts it back.

Pure. What only the server's configuration file says stays as it is there, but for what changes what we read and write.
"""

from __future__ import annotations

from collections.abc import Mapping

from psycopg import sql

# What every session of ours has. A name in `public` is never taken for one of PostgreSQL's own; rows that row security
# hides are an error, not missing; values look as psycopg reads them; and nothing is cut short.
OURS = {
    "search_path": "pg_catalog, pg_temp",
    "row_security": "off",
    "session_replication_role": "origin",  # otherwise the outbox's triggers do not fire
    "DateStyle": "ISO, MDY",
    "IntervalStyle": "postgres",
    "timezone_abbreviations": "Default",
    "bytea_output": "hex",
    "extra_float_digits": "1",
    "standard_conforming_strings": "on",
    "backslash_quote": "safe_encoding",
    "transform_null_equals": "off",
    "array_nulls": "on",
    "quote_all_identifiers": "off",
    "restrict_nonsystem_relation_kind": "",
    "default_transaction_isolation": "read committed",
    "default_transaction_deferrable": "off",
    "statement_timeout": "0",
    "lock_timeout": "3s",  # who is on call wants a word within seconds
    "transaction_timeout": "0",
    "idle_session_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
}

# Where it may come from, in the words of pg_settings.source; the others are the server's own.
SOURCES = ("global", "database", "user", "database user", "client", "session")
KEPT = (
    "application_name",  # given with the connection
    "client_encoding",  # the same: psycopg must know it
    "temp_buffers",  # cannot change once they are in use, which behind a pooler they may be
    "transaction_isolation",  # said with BEGIN
    "transaction_read_only",
    "transaction_deferrable",
)

# The first two by themselves: what follows must not be cut, nor find an operator or a function of somebody else.
DISINHERIT = """SET LOCAL statement_timeout = 0;
SET LOCAL search_path = pg_catalog, pg_temp;
SELECT count(set_config(s.name, coalesce(o.value, s.boot_val), {local}))
  FROM pg_settings AS s LEFT JOIN unnest(ARRAY[{names}], ARRAY[{values}]) AS o (name, value) ON o.name = s.name
 WHERE (o.name IS NOT NULL AND (s.context = 'user' OR s.setting <> o.value))
    OR (s.context = 'user' AND s.source IN ({sources}) AND s.name NOT IN ({kept}));
SELECT set_config('transaction_read_only', 'on', true) WHERE current_setting('default_transaction_read_only') = 'on'"""


def disinherit(ours: Mapping[str, str] = OURS) -> str:
    """SQL that puts back to its built-in value whatever a session inherited and may change, and sets `ours`.

    For the transaction that it runs in. A setting that this server does not have yet is passed over. A database that is
    read-only by its server's configuration stays so.
    """
    return _disinherit(ours, sql.SQL("true"))


def disinherit_script() -> str:
    """The same for SQL that is printed: the first of its transaction, or of that of the tool that runs it."""
    return f"SET TRANSACTION ISOLATION LEVEL READ COMMITTED, READ WRITE;\n{disinherit()}"


def disinherit_session(ours: Mapping[str, str] = OURS, *, pid: int | None = None) -> bytes:
    """The same for the session; with `pid`, which the server said at its start, unless it is behind a pooler.

    Behind any pooler the process id of the protocol is not the server's, whose connection may be shared.
    """
    pooled = sql.SQL("false") if pid is None else sql.SQL("pg_backend_pid() <> {}").format(sql.Literal(pid))
    return f"BEGIN; {_disinherit(ours, pooled)}; COMMIT".encode()


def _disinherit(ours: Mapping[str, str], local: sql.Composable) -> str:
    lists = {"names": ours, "values": ours.values(), "sources": SOURCES, "kept": KEPT}
    texts = {name: sql.SQL(", ").join(map(sql.Literal, words)) for name, words in lists.items()}
    return sql.SQL(DISINHERIT).format(local=local, **texts).as_string()
