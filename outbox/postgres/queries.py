"""Every statement that the leader and its standbys run on the outbox, as constant text; identifiers are composed.

Text only. Each has a head comment: which rows, which index, why this form. The relay's session has
`enable_seqscan`, `enable_bitmapscan` and `enable_nestloop` off: an outbox is analysed while it is empty, and the
planner must not act on it. Plan tests run these very texts on large tables.
"""

from __future__ import annotations

from psycopg import sql

from outbox.core.transaction import HEADER_WEIGHT
from outbox.schema import channel, checked_name


def compose(text: str, schema: str) -> bytes:
    """The statement for one schema, ready for psycopg: its name and its channel are put in as identifiers."""
    names = {
        "schema": sql.Identifier(checked_name(schema)),
        "channel": sql.Identifier(channel(schema)),
        "weight": sql.Literal(HEADER_WEIGHT),
        "leads": sql.Literal(f"outbox.{schema}_leads"),
    }
    return sql.SQL(text).format(**names).as_bytes()


# What lies beyond the cursor and in the open positions, sorted by position, in ONE snapshot: in two statements a gap
# can close in between and its successor overtake it. Whole transactions until `messages` or `bytes` are reached, the
# first one always. LATERAL with LIMIT keeps both reads on transactions_pkey and events_pkey whatever the statistics
# say. The LEFT JOIN shows a transaction that has no events; LIMIT event_count + 1 shows one that has too many. Sorted
# by position from the inside out and with one window, so that only the few transactions of a page are sorted. Headers
# count more than their bytes: in memory they are objects.
# `replays` is null unless the transaction is pending, and then the position that it sends again, or 0.
PAGE = """
SELECT position, event_count, replays, message_id, subject, headers, payload FROM (
  SELECT p.position, p.event_count, p.replays, p.running, e.id, e.message_id::text, e.subject, e.headers, e.payload,
         sum(octet_length(e.payload) + {weight} * coalesce(octet_length(e.headers), 0)) OVER (ORDER BY p.position)
           AS size
    FROM (
      SELECT u.*, sum(u.event_count) OVER (ORDER BY u.position) AS running FROM (
        SELECT t.* FROM (SELECT %(cursor)s::bigint + 1 AS low, 9223372036854775807 AS high
                         UNION ALL SELECT * FROM unnest(%(lows)s::bigint[], %(highs)s::bigint[])) AS r
         CROSS JOIN LATERAL (
           SELECT position, txid, event_count,
                  CASE WHEN sent_at IS NULL AND dead_at IS NULL THEN coalesce(replay_of, 0) END AS replays
             FROM {schema}.transactions WHERE position >= r.low AND position <= r.high
            ORDER BY position LIMIT %(messages)s
         ) AS t
        ORDER BY t.position LIMIT %(messages)s
      ) AS u
    ) AS p LEFT JOIN LATERAL (
      SELECT id, message_id, subject, headers::text AS headers, payload FROM {schema}.events
       WHERE txid = p.txid AND p.replays IS NOT NULL ORDER BY txid, id LIMIT p.event_count + 1
    ) AS e ON true
   WHERE p.running - p.event_count < %(messages)s
) AS s WHERE s.size IS NULL OR s.size <= %(bytes)s OR s.running = s.event_count
ORDER BY s.position, s.id
"""

# The first pending transaction beyond the cursor and in the open positions, without its events.
HEAD = """
SELECT t.position, t.attempts
  FROM (SELECT %(cursor)s::bigint + 1 AS low, 9223372036854775807 AS high
        UNION ALL SELECT * FROM unnest(%(lows)s::bigint[], %(highs)s::bigint[])) AS r
 CROSS JOIN LATERAL (
   SELECT position, attempts FROM {schema}.transactions
    WHERE position >= r.low AND position <= r.high AND sent_at IS NULL AND dead_at IS NULL ORDER BY position LIMIT 1
 ) AS t
 ORDER BY t.position LIMIT 1
"""

# What a plan is judged by: positions, counts, the message id of each transaction's last event; and bytes in memory.
ENTRIES = """
SELECT p.position, t.event_count, t.attempts,
       (SELECT message_id FROM {schema}.events WHERE txid = t.txid ORDER BY txid DESC, id DESC LIMIT 1),
       (SELECT coalesce(sum(octet_length(payload) + {weight} * coalesce(octet_length(headers::text), 0)), 0)
          FROM {schema}.events WHERE txid = t.txid)
  FROM unnest(%(positions)s::bigint[]) AS p (position)
 CROSS JOIN LATERAL (
   SELECT * FROM {schema}.transactions
    WHERE position = p.position AND sent_at IS NULL AND dead_at IS NULL ORDER BY position LIMIT 1
 ) AS t
"""

# Transactions of a plan, by position, with all their events: as PAGE.
PLANNED = """
SELECT p.position, t.event_count, t.replays, e.message_id::text, e.subject, e.headers::text, e.payload
  FROM unnest(%(positions)s::bigint[]) AS p (position)
 CROSS JOIN LATERAL (
   SELECT txid, event_count, CASE WHEN sent_at IS NULL AND dead_at IS NULL THEN coalesce(replay_of, 0) END AS replays
     FROM {schema}.transactions WHERE position = p.position ORDER BY position LIMIT 1
 ) AS t
  LEFT JOIN LATERAL (
   SELECT * FROM {schema}.events WHERE txid = t.txid ORDER BY txid, id LIMIT t.event_count + 1
 ) AS e ON true
 ORDER BY p.position, e.id
"""

# Who holds a write lock on transactions: whoever owns a missing position is among them, or has ended. A transaction
# takes its lock before it draws the position and keeps it to its end; a prepared one has no process.
HOLDERS = """
SELECT DISTINCT virtualtransaction, pid IS NULL FROM pg_locks
 WHERE locktype = 'relation' AND relation = '{schema}.transactions'::regclass AND granted
   AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
   AND mode IN ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
   AND pid IS DISTINCT FROM pg_backend_pid()
"""

# The highest position that was drawn, by whomever; null where this role may not see it.
DRAWN = """
SELECT CASE WHEN has_sequence_privilege(name::regclass, 'SELECT') THEN pg_sequence_last_value(name::regclass) END
  FROM pg_get_serial_sequence('{schema}.transactions', 'position') AS name
"""

# The barrier, the mark and the verdicts in one commit, under the leader's epoch. Nothing happens unless the epoch is
# ours and every transaction to settle is still pending, so the count that comes back tells which of the two failed.
# Runs with synchronous_commit = on: when it returns, all WAL before it is flushed. transactions_pkey throughout.
# The rows of `relay` and `streams` are told by their place (ctid): an index would lead over every dead version of them,
# and while a stranger holds a snapshot each commit leaves one. Nothing happens if the leader's row has moved; if a
# stream's has, all of it fails (1 / 0).
# The positions are sorted: width_bucket finds each one's place among them, which costs less than to join them.
# Long arrays come as text, which is quicker to make; a plan is ranges in its order, or it would be toasted each time.
COMMIT = """
WITH lead AS (
  UPDATE {schema}.relay SET cursor = %(cursor)s, open_positions = %(open)s::int8multirange,
         retried = retried - %(retried)s::int8multirange, deaths = CASE WHEN %(sound)s THEN 0 ELSE deaths END,
         blocked = %(blocked)s, blocked_since = CASE WHEN %(blocked)s::text IS NULL THEN NULL
           WHEN blocked IS NULL THEN now() ELSE blocked_since END
   WHERE ctid = %(place)s::text::tid AND epoch = %(epoch)s AND cardinality(%(settling)s::bigint[]) = (
     SELECT count(*) FROM {schema}.transactions
      WHERE position = ANY (%(settling)s::bigint[]) AND sent_at IS NULL AND dead_at IS NULL)
  RETURNING ctid
), marked AS (
  UPDATE {schema}.transactions AS t
     SET sent_at = clock_timestamp(),
         stream = (%(names)s::text[])[(%(lanes)s::int[])[width_bucket(position, %(positions)s::bigint[])]],
         first_sequence = (%(lasts)s::bigint[])[width_bucket(position, %(positions)s::bigint[])] - event_count + 1,
         last_sequence = (%(lasts)s::bigint[])[width_bucket(position, %(positions)s::bigint[])]
    FROM lead WHERE t.position = ANY (%(positions)s::bigint[])
  RETURNING t.stream, t.event_count
), buried AS (
  UPDATE {schema}.transactions AS t
     SET dead_at = clock_timestamp(), dead_reason = d.reason
    FROM lead, unnest(%(dead)s::bigint[], %(reasons)s::text[]) AS d (position, reason)
   WHERE t.position = d.position AND t.position = ANY (%(dead)s::bigint[])
  RETURNING t.position
), planned AS (
  UPDATE {schema}.streams AS s
     SET mode = p.mode, last_sequence = p.base, plan_base = p.since, plan = p.plan::int8range[],
         fences = p.fences::jsonb, sharing = p.sharing,
         sent_transactions = s.sent_transactions + coalesce(done.transactions, 0),
         sent_events = s.sent_events + coalesce(done.events, 0),
         blocked = p.blocked, blocked_since = CASE WHEN p.blocked IS NULL THEN NULL
           WHEN s.blocked IS NULL THEN now() ELSE s.blocked_since END
    FROM lead, unnest(%(names)s::text[], %(modes)s::text[], %(bases)s::bigint[], %(sinces)s::bigint[],
                      %(plans)s::text[], %(fences)s::text[], %(costs)s::text[], %(blocks)s::text[])
         AS p (name, mode, base, since, plan, fences, sharing, blocked)
    LEFT JOIN (SELECT stream, count(*) AS transactions, sum(event_count) AS events FROM marked GROUP BY stream) AS done
         ON done.stream = p.name
   WHERE s.name = p.name AND s.ctid = ANY (%(places)s::text[]::tid[])
  RETURNING s.name, s.ctid
)
SELECT (SELECT count(*) FROM lead), (SELECT count(*) FROM marked), (SELECT count(*) FROM buried),
       (SELECT count(*) FROM planned), (SELECT ctid::text FROM lead), (SELECT array_agg(name) FROM planned),
       (SELECT array_agg(ctid::text) FROM planned),
       1 / (NOT EXISTS (SELECT FROM lead)
            OR (SELECT count(*) FROM planned) = cardinality(%(names)s::text[]))::int
"""

# The same where parts were sent, which count for their streams too.
COMMIT_OF_PARTS = (
    COMMIT.replace("coalesce(done.transactions, 0)", "coalesce(done.transactions, 0) + p.parts")
    .replace("coalesce(done.events, 0)", "coalesce(done.events, 0) + p.events")
    .replace("%(blocks)s::text[])", "%(blocks)s::text[], %(parts)s::bigint[], %(events)s::bigint[])")
    .replace("sharing, blocked)", "sharing, blocked, parts, events)")
)

# In the same transaction, after COMMIT has told that the lead is ours: rows of parts that are new, or have another
# stream by now, and what became of parts that were open. By parts_pkey.
PARTS_SETTLED = """
WITH written AS (
  INSERT INTO {schema}.parts AS p (position, part, stream, numbers)
  SELECT n.position, n.part, n.stream, n.numbers::int[]
    FROM unnest(%(positions)s::bigint[], %(parts)s::int[], %(streams)s::text[], %(numbers)s::text[])
      AS n (position, part, stream, numbers)
  ON CONFLICT (position, part) DO UPDATE SET stream = excluded.stream WHERE p.sent_at IS NULL AND p.dead_at IS NULL
  RETURNING position
), settled AS (
  UPDATE {schema}.parts AS p
     SET sent_at = CASE WHEN d.reason IS NULL THEN clock_timestamp() END, first_sequence = d.first,
         last_sequence = d.last, dead_at = CASE WHEN d.reason IS NOT NULL THEN clock_timestamp() END,
         dead_reason = d.reason
    FROM unnest(%(settling)s::bigint[], %(settled)s::int[], %(firsts)s::bigint[], %(lasts)s::bigint[],
                %(reasons)s::text[]) AS d (position, part, first, last, reason)
   WHERE p.position = d.position AND p.position = ANY (%(settling)s::bigint[]) AND p.part = d.part
     AND p.sent_at IS NULL AND p.dead_at IS NULL
  RETURNING p.position
)
SELECT (SELECT count(*) FROM written), (SELECT count(*) FROM settled)
"""

# And then, by what the rows are now: a transaction none of whose parts is open is sent, or dead if one of them is. Its
# receipts are those of its parts: its own stream is *, which none is called.
WHOLE_SETTLED = """
UPDATE {schema}.transactions AS t
   SET sent_at = CASE WHEN s.dead = 0 THEN clock_timestamp() END, stream = CASE WHEN s.dead = 0 THEN '*' END,
       first_sequence = CASE WHEN s.dead = 0 THEN 1 END, last_sequence = CASE WHEN s.dead = 0 THEN t.event_count END,
       dead_at = CASE WHEN s.dead > 0 THEN clock_timestamp() END, dead_reason = s.reason,
       discarded_at = CASE WHEN s.dead > 0 AND s.discarded = s.dead THEN clock_timestamp() END
  FROM (SELECT position, count(*) FILTER (WHERE sent_at IS NULL AND dead_at IS NULL) AS open, count(dead_at) AS dead,
               count(discarded_at) AS discarded,
               (array_agg(dead_reason ORDER BY part) FILTER (WHERE dead_at IS NOT NULL))[1] AS reason
          FROM {schema}.parts WHERE position = ANY (%(positions)s::bigint[]) GROUP BY position) AS s
 WHERE t.position = s.position AND t.position = ANY (%(positions)s::bigint[]) AND s.open = 0
   AND t.sent_at IS NULL AND t.dead_at IS NULL
"""

# The parts of transactions, by position, with the message id of each one's last event; most have none. By parts_pkey,
# transactions_pkey, events_pkey.
PARTS_OF = """
SELECT p.position, p.part, p.stream, p.numbers, p.sent_at IS NULL AND p.dead_at IS NULL, p.moves,
       (SELECT message_id::text FROM {schema}.events AS e WHERE e.txid = t.txid ORDER BY e.txid, e.id
        OFFSET p.numbers[cardinality(p.numbers)] - 1 LIMIT 1)
  FROM unnest(%(positions)s::bigint[]) AS given (position)
 CROSS JOIN LATERAL (SELECT * FROM {schema}.parts AS p WHERE p.position = given.position ORDER BY p.position, p.part)
         AS p
 CROSS JOIN LATERAL (
   SELECT txid FROM {schema}.transactions WHERE position = given.position ORDER BY position LIMIT 1
 ) AS t
 ORDER BY p.position, p.part
"""

# Where the rows are that each commit updates.
PLACES = "SELECT '', ctid::text FROM {schema}.relay UNION ALL SELECT name, ctid::text FROM {schema}.streams"
# How long the statements from here on may take.
HURRY = "SELECT set_config('statement_timeout', %(limit)s, false)"

MAY_MONITOR = "SELECT pg_has_role(current_user, 'pg_monitor', 'USAGE')"

WRITTEN = "SELECT pg_current_wal_flush_lsn()::text"

# How far the standbys are that could take over; needs pg_monitor. Who only receives (pg_receivewal, a base backup under
# way) replays nothing, and a subscriber, which has a logical slot, has no copy of this database.
REPLICATED = """
SELECT count(*) > 0 AND coalesce(bool_and(coalesce(r.flush_lsn >= %(lsn)s::text::pg_lsn, false)), false)
  FROM pg_stat_replication AS r
 WHERE r.state IN ('streaming', 'catchup') AND r.replay_lsn IS NOT NULL
   AND NOT EXISTS (SELECT FROM pg_replication_slots AS s WHERE s.active_pid = r.pid AND s.slot_type = 'logical')
"""

# The lead is laid down in an orderly way; after a halt with a word of why.
RESIGN = """
UPDATE {schema}.relay SET leader = NULL, leader_since = NULL, deaths = 0, suspect = NULL, blocked = %(why)s,
       blocked_since = CASE WHEN %(why)s::text IS NOT NULL THEN now() END
 WHERE epoch = %(epoch)s
"""

# Something holds everything back, and so the next COMMIT, which would say so.
BLOCKS = """
UPDATE {schema}.relay SET blocked = %(why)s, blocked_since = coalesce(blocked_since, now()) WHERE epoch = %(epoch)s
"""

SUSPECT = "UPDATE {schema}.relay SET suspect = %(position)s WHERE epoch = %(epoch)s"

ARRIVED = "UPDATE {schema}.relay SET timeline = %(timeline)s WHERE epoch = %(epoch)s"

# The first contact with a stream, under the leader's epoch; one of that name may have been retired.
ADD_STREAM = """
INSERT INTO {schema}.streams AS s (name, created, mode, last_sequence, plan_base)
SELECT %(name)s, %(created)s, %(mode)s, %(last)s, %(last)s FROM {schema}.relay WHERE epoch = %(epoch)s
ON CONFLICT (name) DO UPDATE SET created = excluded.created, mode = excluded.mode,
       last_sequence = excluded.last_sequence, plan_base = excluded.plan_base, fences = NULL, sharing = NULL,
       retired_at = NULL
 WHERE s.retired_at IS NOT NULL
"""

# Take the lead: a new epoch. Run it only under the lock. The setting tells a trigger that we know of parts. A last
# leader that is still named did not end in an orderly way: if it is another process, it died, and a transaction that it
# suspected has one more relay on its conscience.
LEAD = """
WITH last AS (
  SELECT leader IS NOT NULL AND leader <> %(leader)s AS died, leader, suspect, set_config({leads}, '2', true) AS told
    FROM {schema}.relay
), blamed AS (
  UPDATE {schema}.transactions AS t SET attempts = attempts + 1
    FROM last WHERE last.died AND t.position = last.suspect AND t.sent_at IS NULL AND t.dead_at IS NULL
)
UPDATE {schema}.relay AS r SET epoch = epoch + 1, leader = %(leader)s, leader_since = now(), blocked = NULL,
       blocked_since = NULL, system_identifier = %(cluster)s, database_oid = %(database)s,
       timeline = coalesce(r.timeline, %(timeline)s), suspect = NULL, deaths = deaths + last.died::int,
       last_death = CASE WHEN last.died THEN last.leader ELSE last_death END,
       blamed = CASE WHEN last.died THEN last.suspect ELSE blamed END
  FROM last
 WHERE coalesce(system_identifier, %(cluster)s) = %(cluster)s AND coalesce(database_oid, %(database)s) = %(database)s
RETURNING outbox_id, epoch, cursor,
          (SELECT coalesce(array_agg(lower(g)), ARRAY[]::bigint[]) FROM unnest(open_positions) AS g),
          (SELECT coalesce(array_agg(upper(g) - 1), ARRAY[]::bigint[]) FROM unnest(open_positions) AS g),
          r.timeline <> %(timeline)s, deaths, last.suspect, paused_why
"""

# The highest position that has parts. Not within LEAD: that may have waited for the commit of the leader before, whose
# rows its snapshot lacks.
PARTED = "SELECT coalesce((SELECT position FROM {schema}.parts ORDER BY position DESC LIMIT 1), 0)"

# A leader that was taken for dead has only lost its session: it takes back what was counted against it.
ALIVE = """
WITH returned AS (
  UPDATE {schema}.relay AS r SET deaths = greatest(r.deaths - 1, 0), last_death = NULL, blamed = NULL
    FROM (SELECT blamed FROM {schema}.relay WHERE last_death = %(leader)s FOR UPDATE) AS before
   WHERE r.last_death = %(leader)s RETURNING before.blamed
)
UPDATE {schema}.transactions AS t SET attempts = attempts - 1
  FROM returned WHERE t.position = returned.blamed AND t.attempts > 0
"""

# The streams that the outbox publishes to: not those that an operator has retired.
STREAMS = """
SELECT name, created, mode, last_sequence, plan, blocked, plan_base, fences FROM {schema}.streams
 WHERE retired_at IS NULL ORDER BY name
"""

ANY_PENDING = "SELECT position FROM {schema}.pending LIMIT 1"

STILL_PENDING = (
    "SELECT 1 FROM {schema}.transactions WHERE position = %(position)s AND sent_at IS NULL AND dead_at IS NULL"
)

# By the partial indexes transactions_dead and parts_dead.
FIRST_DEAD = """
SELECT least((SELECT position FROM {schema}.transactions
               WHERE dead_at IS NOT NULL AND discarded_at IS NULL ORDER BY position LIMIT 1),
             (SELECT p.position FROM {schema}.parts AS p CROSS JOIN LATERAL (
                SELECT discarded_at FROM {schema}.transactions WHERE position = p.position ORDER BY position LIMIT 1
              ) AS t
               WHERE p.dead_at IS NOT NULL AND p.discarded_at IS NULL AND t.discarded_at IS NULL
               ORDER BY p.position LIMIT 1))
"""

# Keeps the session from idle_session_timeout; tells whether we still lead, and what operators want: which dead letters
# are to be retried, and why to pause, if to.
PING = """
SELECT epoch, suits_from, paused_why,
       (SELECT coalesce(array_agg(lower(g)), ARRAY[]::bigint[]) FROM unnest(retried) AS g),
       (SELECT coalesce(array_agg(upper(g) - 1), ARRAY[]::bigint[]) FROM unnest(retried) AS g)
  FROM {schema}.relay WHERE ctid = coalesce(%(place)s::text::tid, (SELECT r.ctid FROM {schema}.relay AS r))
"""

# How far the counters are; see `Counters`. A sequence is read as it is now, after the snapshot: never too low. What is
# stranded is looked for among a thousand rows at either end of what was read, sent ones included, so that the cost is
# the same whatever was sent; the doctor and `verify` look at all. By transactions_pkey, transactions_txid, events_pkey.
COUNTERS = """
WITH known AS MATERIALIZED (
  SELECT cursor, open_positions + retried + (SELECT coalesce(range_agg(places), int8multirange())
                                               FROM {schema}.streams, unnest(plan) AS places) AS open
    FROM {schema}.relay
)
SELECT greatest(k.cursor, upper(k.open) - 1, (SELECT max(position) FROM {schema}.transactions)) AS reached,
       (SELECT last_value - 1 + is_called::int FROM {schema}.transactions_position_seq) AS drawn,
       greatest(0, (SELECT t.txid::text::bigint FROM {schema}.transactions AS t
                     WHERE t.txid < '9223372036854775808'::xid8 ORDER BY t.txid DESC LIMIT 1),
                   (SELECT e.txid::text::bigint FROM {schema}.events AS e
                     WHERE e.txid < '9223372036854775808'::xid8 ORDER BY e.txid DESC LIMIT 1)) AS kept,
       pg_snapshot_xmax(pg_current_snapshot())::text::bigint AS running,
       (SELECT min(t.position) FROM (
          (SELECT position, sent_at FROM {schema}.transactions
            WHERE position <= k.cursor AND dead_at IS NULL AND NOT k.open @> position ORDER BY position LIMIT 1000)
          UNION ALL
          (SELECT position, sent_at FROM {schema}.transactions
            WHERE position <= k.cursor AND dead_at IS NULL AND NOT k.open @> position
            ORDER BY position DESC LIMIT 1000)
        ) AS t WHERE t.sent_at IS NULL) AS stranded
  FROM known AS k
"""

# Facts that the relay needs to be true before it starts. One row. `suits_from` came with schema version 2.
PREFLIGHT = """
SELECT current_setting('server_version_num')::int, (SELECT system_identifier FROM pg_control_system()),
       current_setting('max_prepared_transactions')::int, pg_is_in_recovery(),
       (SELECT max_transaction_events FROM {schema}.limits),
       (SELECT coalesce(max(s.seqcache), 1) FROM pg_sequence AS s JOIN pg_depend AS d ON d.objid = s.seqrelid
         WHERE d.classid = 'pg_class'::regclass AND d.deptype = 'i'
           AND d.refobjid IN ('{schema}.events'::regclass, '{schema}.transactions'::regclass)),
       obj_description('{schema}.events'::regclass, 'pg_class'),
       (SELECT (to_jsonb(r) ->> 'suits_from')::int FROM {schema}.relay AS r),
       (SELECT oid FROM pg_database WHERE datname = current_database()),
       CASE WHEN pg_is_in_recovery() THEN 0
            ELSE ('x' || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8))::bit(32)::bigint END
"""

# This role, and the tables whose rows row security may hide from it. Asked first: to read them would fail.
ROW_SECURITY = """
SELECT current_user::text, ARRAY(
  SELECT c.relname::text FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
   WHERE n.nspname = %(schema)s AND c.relkind = 'r' AND row_security_active(c.oid) ORDER BY c.relname)
"""

# Sent transactions beyond the position `after`, by transactions_pkey, and how old each is: old goes, young ends the
# page, and what is pending, or was retried late, is passed by; what lies beyond the cursor is not sent. So the cost
# grows neither with what is kept nor with what waits.
OLD = """
SELECT position, event_count,
       CASE WHEN sent_at <= now() - make_interval(secs => %(seconds)s) THEN 'old'
            WHEN sent_at IS NOT NULL AND retried_at IS NULL THEN 'young' ELSE 'passed' END
  FROM {schema}.transactions
 WHERE position > %(after)s AND dead_at IS NULL
   AND position <= coalesce(%(upto)s::bigint, (SELECT cursor FROM {schema}.relay))
 ORDER BY position LIMIT %(most)s
"""

# Old sent transactions with their events, by transactions_pkey and events_pkey, but for those whose row somebody has
# locked. Events go by their txid: were there more of them than are counted, some would be another transaction's, and
# the whole statement fails (1 / 0). `purged` tells `verify` up to where rows may be missing. Its row is told by its
# place (ctid): an index would lead over every dead version of it that a stranger's snapshot keeps.
PURGE = """
WITH going AS MATERIALIZED (
  SELECT position, txid, event_count FROM {schema}.transactions
   WHERE position = ANY (%(positions)s::bigint[]) AND dead_at IS NULL
     AND sent_at <= now() - make_interval(secs => %(seconds)s) FOR UPDATE SKIP LOCKED
), events AS (
  DELETE FROM {schema}.events WHERE txid = ANY (ARRAY(SELECT txid FROM going)) RETURNING txid
), gone AS (
  DELETE FROM {schema}.transactions WHERE position = ANY (ARRAY(SELECT position FROM going)) RETURNING position
), parts AS (
  DELETE FROM {schema}.parts WHERE position = ANY (ARRAY(SELECT position FROM going))
), told AS (
  UPDATE {schema}.housekeeping SET purged = greatest(purged, (SELECT max(position) FROM going))
   WHERE ctid = coalesce(%(place)s::text::tid, (SELECT h.ctid FROM {schema}.housekeeping AS h)) RETURNING ctid
)
SELECT (SELECT count(*) FROM gone), (SELECT ctid::text FROM told),
       1 / ((SELECT count(*) FROM events) <= (SELECT coalesce(sum(event_count), 0) FROM going)
            AND EXISTS (SELECT FROM told))::int
"""

# The same by hand: somebody else may purge at the same time, and what either tells must stay.
PURGE_BY_HAND = PURGE.replace(
    "ctid = coalesce(%(place)s::text::tid, (SELECT h.ctid FROM {schema}.housekeeping AS h))", "singleton"
)

# What housekeeping has found, for the status.
NOTE = """
UPDATE {schema}.housekeeping SET stray_events = %(strays)s, drift = %(drift)s, failing = %(failing)s,
       failing_since = CASE WHEN %(failing)s::text IS NULL THEN NULL ELSE coalesce(failing_since, now()) END
RETURNING ctid::text
"""

# The same where it has no session of its own: written by the leader, who waits for nobody.
FAILS = """
UPDATE {schema}.housekeeping SET failing = %(why)s, failing_since = coalesce(failing_since, now())
 WHERE ctid = (SELECT ctid FROM {schema}.housekeeping FOR UPDATE SKIP LOCKED)
"""

# What of the schema is missing or switched off, as far as any role can see it.
PARTS = """
SELECT what FROM (
  SELECT 'trigger ' || name AS what, EXISTS (
           SELECT FROM pg_trigger AS t
            WHERE t.tgname = name AND t.tgenabled IN ('O', 'A') AND t.tgrelid = c.oid) AS there
    FROM unnest(ARRAY['check_event', 'seal']) AS name, pg_class AS c
   WHERE c.relname = 'events' AND c.relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = %(schema)s)
  UNION ALL
  SELECT 'index ' || name, EXISTS (
           SELECT FROM pg_index AS i JOIN pg_class AS c ON c.oid = i.indexrelid
            WHERE c.relname = name AND i.indisvalid
              AND c.relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = %(schema)s))
    FROM unnest(ARRAY['events_pkey', 'transactions_pkey', 'transactions_txid', 'transactions_dead']) AS name
) AS parts WHERE NOT there
"""

# Events that no transaction row counts: the application forged the settings of the trigger. Newest ones, by
# events_pkey backwards and transactions_txid; a slow check, so bounded.
STRAYS = """
SELECT e.txid::text, count(*) FROM (
  SELECT txid FROM {schema}.events ORDER BY txid DESC, id DESC LIMIT 10000
) AS e
 WHERE NOT EXISTS (SELECT FROM {schema}.transactions AS t WHERE t.txid = e.txid)
 GROUP BY e.txid ORDER BY e.txid LIMIT 10
"""

# Host and process id of the last relay that took the lead; and who holds the leader's lock, if that is no relay.
WHO_LEADS = """
SELECT r.leader,
       (SELECT string_agg(concat_ws(' ', 'pid', l.pid, '(' || concat_ws(', ', a.usename, nullif(a.application_name, ''))
                                                       || ')'), ' and ')
          FROM pg_locks AS l LEFT JOIN pg_stat_activity AS a ON a.pid = l.pid
         WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 2 AND l.classid = %(lock)s::bigint::oid
           AND l.objid = %(key)s::bigint::oid AND a.application_name IS DISTINCT FROM 'outbox relay'
           AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())) AS stranger
  FROM {schema}.relay AS r
"""

# Who has locked what the relay needs, as far as their kind of lock tells: nobody else writes to the tables `relay`,
# `streams`, `limits` and `housekeeping`, and who adds events locks no rows of the others. Who reads is in nobody's way,
# nor is vacuum. A prepared one has no process.
LOCKERS = """
SELECT string_agg(DISTINCT coalesce(
         'pid ' || a.pid || ' (' || concat_ws(', ', a.usename, nullif(a.application_name, ''),
                                              nullif(a.backend_type, 'client backend')) || ')',
         'prepared transaction ' || quote_literal(p.gid)), ' and ')
  FROM pg_locks AS l LEFT JOIN pg_stat_activity AS a ON a.pid = l.pid
  LEFT JOIN pg_locks AS x ON l.pid IS NULL AND x.pid IS NULL AND x.locktype = 'transactionid'
                         AND x.virtualtransaction = l.virtualtransaction
  LEFT JOIN pg_prepared_xacts AS p ON p.transaction = x.transactionid
 WHERE l.locktype = 'relation' AND l.granted
   AND l.mode NOT IN ('AccessShareLock', 'ShareUpdateExclusiveLock')
   AND (l.relation IN (to_regclass('{schema}.relay'), to_regclass('{schema}.streams'),
                       to_regclass('{schema}.housekeeping'), to_regclass('{schema}.limits'))
        OR (l.relation IN (to_regclass('{schema}.transactions'), to_regclass('{schema}.events'))
            AND l.mode <> 'RowExclusiveLock'))
   AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
   AND coalesce(a.application_name, '') NOT IN ('outbox relay', 'outbox housekeeping')
   AND l.pid IS DISTINCT FROM pg_backend_pid()
"""

# Why a relay does not lead, for the status; not while another one does.
LEAVE_WORD = """
UPDATE {schema}.relay SET blocked = %(why)s, blocked_since = now()
 WHERE blocked IS DISTINCT FROM %(why)s AND NOT EXISTS (
   SELECT FROM pg_locks AS l JOIN pg_stat_activity AS a ON a.pid = l.pid AND a.application_name = 'outbox relay'
    WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 2 AND l.classid = %(lock)s::bigint::oid
      AND l.objid = %(key)s::bigint::oid
      AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database()))
"""

# Once, before the relay sleeps for the first time.
LISTEN = "LISTEN {channel}"

# The two locks of an outbox: the leader's, and that of a relay that is asleep. Neither call ever blocks.
TRY_LOCK = "SELECT pg_try_advisory_lock(%(purpose)s::int, %(key)s::int)"

# Gives back the lock of a relay that is asleep: commits need not notify any more.
UNLOCK = "SELECT pg_advisory_unlock(%(purpose)s::int, %(key)s::int)"
