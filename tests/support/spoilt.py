"""Settings that a role, a database or an environment hands down, all of them wrong, and names that stand in the way."""

from __future__ import annotations

import psycopg
from psycopg import sql

from outbox.embedded import Postgres
from outbox.postgres.heritage import disinherit_session
from tests.support.bed import rows

# With these nobody could connect, or every answer would be late, or long; and what belongs to a transaction, not to us.
SPARED = """
client_min_messages debug_print_parse debug_print_plan debug_print_rewritten default_table_access_method exit_on_error
idle_session_timeout local_preload_libraries transaction_deferrable transaction_isolation transaction_read_only
transaction_timeout
"""
WRONG = {
    "DateStyle": "SQL, DMY",
    "TimeZone": "America/St_Johns",
    "application_name": "somebody else",
    "client_encoding": "LATIN1",
    "lock_timeout": "20",
    "restrict_nonsystem_relation_kind": "view",
    "search_path": "public, pg_catalog",
    "statement_timeout": "20",
    "timezone_abbreviations": "India",
}
SPOILABLE = """
SELECT name, vartype, boot_val, min_val, max_val, enumvals FROM pg_settings
 WHERE context = 'user' AND name <> ALL (string_to_array(%s, ' ')) ORDER BY name
"""
# Every function of concrete types that PostgreSQL has, each operator on them, and the ranges' own: in `public` they
# only say that they ran.
TRAPS = """
DO $traps$
DECLARE it record;
BEGIN
  FOR it IN
    SELECT p.proname, pg_get_function_identity_arguments(p.oid) AS arguments, format_type(p.prorettype, NULL) AS gives
      FROM pg_proc AS p JOIN pg_language AS l ON l.oid = p.prolang
     WHERE p.pronamespace = 'pg_catalog'::regnamespace AND p.prokind = 'f' AND NOT p.proretset AND p.pronargs > 0
       AND p.provariadic = 0 AND p.proargmodes IS NULL
       AND NOT EXISTS (SELECT FROM pg_type AS t WHERE t.typtype = 'p' AND t.oid = ANY (p.proargtypes || p.prorettype))
    UNION ALL VALUES ('lower', 'int8range', 'bigint'), ('upper', 'int8range', 'bigint'), ('pg_backend_pid', '', 'int'),
      ('lower', 'int8multirange', 'bigint'), ('upper', 'int8multirange', 'bigint'), ('now', '', 'timestamptz'),
      ('clock_timestamp', '', 'timestamptz'), ('gen_random_uuid', '', 'uuid'), ('pg_is_in_recovery', '', 'boolean')
  LOOP
    EXECUTE format('CREATE FUNCTION public.%%I(%%s) RETURNS %%s LANGUAGE plpgsql AS '
      '$$BEGIN RAISE EXCEPTION ''trapped by %%s''; END$$', it.proname, it.arguments, it.gives, it.proname);
  END LOOP;
  FOR it IN
    SELECT o.oprname, o.oprleft::regtype AS l, o.oprright::regtype AS r, p.proname
      FROM pg_operator AS o JOIN pg_proc AS p ON p.oid = o.oprcode
      JOIN pg_proc AS trap ON trap.pronamespace = 'public'::regnamespace AND trap.proname = p.proname
       AND trap.proargtypes = p.proargtypes
     WHERE o.oprnamespace = 'pg_catalog'::regnamespace AND o.oprkind = 'b'
  LOOP
    EXECUTE format('CREATE OPERATOR public.%%s (FUNCTION = public.%%I, LEFTARG = %%s, RIGHTARG = %%s)',
      it.oprname, it.proname, it.l, it.r);
  END LOOP;
END $traps$
""".replace("%%", "%")


def wrongly(postgres: Postgres) -> dict[str, str]:
    """For each setting that a session may change another value than the built-in one."""
    found = dict(WRONG)
    for name, vartype, boot, low, high, words in rows(postgres.url(), SPOILABLE, " ".join(SPARED.split())):
        others = {
            "bool": ["off" if boot == "on" else "on"],
            "enum": [word for word in words or () if word != boot],
            "integer": [limit for limit in (low, high) if limit != boot],
            "real": [limit for limit in (low, high) if limit and float(limit) != float(boot)],
            "string": [],
        }[vartype]
        if others:
            found.setdefault(name, others[0])
    return {
        name: wrong
        for name, wrong in found.items()
        if rows(postgres.url(), "SELECT 1 FROM pg_settings WHERE name = %s", name)
    }


def spoil(url: str, whose: str, wrong: dict[str, str]) -> None:
    """Everything that this role or database has from here on, but for connections of `whole`."""
    with whole(url) as connection:
        for name, setting in wrong.items():
            words = sql.SQL(", ").join(map(sql.Literal, setting.split(", ")))  # a list is not one word
            values = {"whose": sql.SQL(whose), "name": sql.Identifier(name), "words": words}
            connection.execute(sql.SQL("ALTER {whose} SET {name} = {words}").format(**values))


def whole(url: str) -> psycopg.Connection[tuple[object, ...]]:
    """A connection as the application may have it: nothing is inherited."""
    connection = psycopg.connect(url, autocommit=True)
    connection.execute(disinherit_session(), prepare=False)
    return connection
