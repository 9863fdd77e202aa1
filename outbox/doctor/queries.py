"""The doctor's own statements, as constant text, composed by `outbox.postgres.queries.compose`.

What the relay or a command asks too is in their `queries`, and the schema's fingerprint with `outbox migrate`.
"""

from __future__ import annotations

SERVER = """
SELECT current_setting('server_version_num')::int, pg_is_in_recovery(), current_setting('server_encoding'),
       current_setting('fsync'), current_setting('autovacuum'), current_setting('max_prepared_transactions')::int,
       current_user::text, has_database_privilege(current_database(), 'CREATE'),
       (SELECT obj_description(c.oid, 'pg_class') FROM pg_class AS c
         WHERE c.relname = 'events' AND c.relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = %(schema)s)),
       pg_has_role(current_user, 'pg_read_all_stats', 'USAGE'),
       has_schema_privilege((SELECT oid FROM pg_namespace WHERE nspname = %(schema)s), 'USAGE'),
       current_setting('default_transaction_read_only')::boolean
"""

PROCESS = "SELECT pg_backend_pid()"

# Whether this role may: one row for each privilege on each table, with columns where the privilege is on columns.
MAY = """
SELECT CASE WHEN %(columns)s::text[] = ARRAY[]::text[] THEN has_table_privilege(%(table)s, %(privilege)s)
            ELSE (SELECT bool_and(has_column_privilege(%(table)s, c, %(privilege)s))
                    FROM unnest(%(columns)s::text[]) AS c) END
"""

# Sizes and dead rows, as the statistics collector knows them.
TABLES = """
SELECT c.relname, pg_table_size(c.oid), greatest(s.n_live_tup, 0), s.n_dead_tup,
       coalesce((SELECT option_value FROM pg_options_to_table(c.reloptions)
                  WHERE option_name = 'autovacuum_enabled'), 'true')::boolean,
       extract(epoch FROM now() - greatest(s.last_autovacuum, s.last_vacuum))::float8
  FROM pg_class AS c JOIN pg_stat_user_tables AS s ON s.relid = c.oid
 WHERE c.relnamespace = to_regnamespace(%(schema)s)::oid ORDER BY c.relname
"""

# Who is between drawing a position and its commit, or holds a write lock on transactions for another reason. Never what
# they run: a statement may hold a password.
WRITERS = """
SELECT a.pid, a.usename::text, a.application_name, extract(epoch FROM clock_timestamp() - a.xact_start)::float8
  FROM pg_stat_activity AS a JOIN pg_locks AS l ON l.pid = a.pid
 WHERE l.locktype = 'relation' AND l.relation = '{schema}.transactions'::regclass AND l.granted
   AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
   AND l.mode IN ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
   AND clock_timestamp() - a.xact_start > make_interval(secs => %(seconds)s)
 ORDER BY 4 DESC
"""

# Whose snapshot, wherever in the cluster, keeps dead rows from being removed.
SNAPSHOTS = """
SELECT pid, usename::text, application_name, extract(epoch FROM clock_timestamp() - xact_start)::float8
  FROM pg_stat_activity
 WHERE (backend_xmin IS NOT NULL OR backend_xid IS NOT NULL) AND pid <> pg_backend_pid()
   AND clock_timestamp() - xact_start > make_interval(secs => %(seconds)s)
 ORDER BY 4 DESC LIMIT 5
"""

PREPARED = """
SELECT p.gid, p.owner::text, extract(epoch FROM clock_timestamp() - p.prepared)::float8
  FROM pg_prepared_xacts AS p
 WHERE p.database = current_database() AND clock_timestamp() - p.prepared > make_interval(secs => %(seconds)s)
 ORDER BY p.prepared
"""

HOME = """
SELECT r.system_identifier, r.database_oid, r.timeline, (SELECT system_identifier FROM pg_control_system()),
       (SELECT oid FROM pg_database WHERE datname = current_database())
  FROM {schema}.relay AS r
"""

LIMITS = "SELECT max_event_bytes, max_transaction_events FROM {schema}.limits"

CACHES = """
SELECT coalesce(max(s.seqcache), 1) FROM pg_sequence AS s JOIN pg_depend AS d ON d.objid = s.seqrelid
 WHERE d.classid = 'pg_class'::regclass AND d.deptype = 'i'
   AND d.refobjid IN ('{schema}.events'::regclass, '{schema}.transactions'::regclass)
"""

# The subjects of the newest transactions, those of one transaction together.
RECENT_SUBJECTS = """
SELECT DISTINCT array_agg(DISTINCT e.subject ORDER BY e.subject) FROM (
  SELECT txid FROM {schema}.transactions ORDER BY position DESC LIMIT 1000
) AS t JOIN {schema}.events AS e ON e.txid = t.txid GROUP BY t.txid LIMIT 200
"""

OUTBOX_IDS = "SELECT former_ids || outbox_id FROM {schema}.relay"

# The streams that the outbox publishes to, with what holds them back and what other writers cost.
STREAMS = """
SELECT name, created, mode, last_sequence, blocked, sharing FROM {schema}.streams WHERE retired_at IS NULL ORDER BY name
"""
