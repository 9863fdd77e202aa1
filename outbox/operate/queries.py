"""The statements of the operator's commands, as constant text, composed by `outbox.postgres.queries.compose`.

Those that the relay runs too are there. They run in sessions of their own, with the planner as it is.
"""

from __future__ import annotations

# What `outbox status` shows. `pending` goes by the cursor, the plans and the open positions, not over sent rows.
STATUS = """
SELECT r.outbox_id, r.epoch, r.leader, r.leader_since, r.cursor, r.blocked, r.blocked_since, r.paused_at, r.paused_why,
       obj_description('{schema}.events'::regclass, 'pg_class') AS comment,
       (SELECT count(*) > 0 FROM pg_locks AS l JOIN pg_stat_activity AS a ON a.pid = l.pid
         WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 2 AND l.classid = %(lock)s::bigint::oid
           AND l.objid = %(key)s::bigint::oid AND a.application_name = 'outbox relay'
           AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())) AS led,
       (SELECT count(*) FROM {schema}.pending) AS pending_transactions,
       (SELECT coalesce(sum(event_count), 0) FROM {schema}.pending) AS pending_events,
       (SELECT extract(epoch FROM clock_timestamp() - min(sealed_at))::float8 FROM {schema}.pending)
         AS oldest_pending_seconds,
       (SELECT min(position) FROM {schema}.pending) AS oldest_pending_position,
       (SELECT count(*) FROM {schema}.dead WHERE discarded_at IS NULL) AS dead_transactions,
       h.stray_events, h.drift, h.failing AS housekeeping_failing, h.failing_since AS housekeeping_failing_since,
       clock_timestamp() AS observed_at, current_setting('default_transaction_read_only')::boolean AS frozen
  FROM {schema}.relay AS r CROSS JOIN {schema}.housekeeping AS h
"""

# Who keeps relays of this outbox waiting for a lock just now, whether they lead or begin.
LOCKED_OUT = """
SELECT string_agg(DISTINCT coalesce('pid ' || b.pid || ' (' || concat_ws(', ', b.usename,
                    nullif(b.application_name, '')) || ')', 'a prepared transaction'), ' and ')
  FROM (SELECT DISTINCT l.pid FROM pg_locks AS l JOIN pg_stat_activity AS a ON a.pid = l.pid
         WHERE a.application_name = 'outbox relay' AND l.locktype = 'relation'
           AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
           AND l.relation IN ('{schema}.relay'::regclass, '{schema}.streams'::regclass, '{schema}.events'::regclass,
                              '{schema}.transactions'::regclass, '{schema}.limits'::regclass)) AS relay
 CROSS JOIN LATERAL unnest(pg_blocking_pids(relay.pid)) AS blocking (pid)
  LEFT JOIN pg_stat_activity AS b ON b.pid = blocking.pid
 WHERE b.application_name IS DISTINCT FROM 'outbox relay'
"""

STATUS_STREAMS = """
SELECT name, mode, last_sequence, sent_transactions, sent_events,
       (SELECT coalesce(sum(upper(places) - lower(places)), 0)::bigint FROM unnest(plan) AS places) AS planned,
       blocked, blocked_since, retired_at, CASE WHEN fences IS NULL THEN 'stream' ELSE 'subject' END AS fence, sharing
  FROM {schema}.streams ORDER BY name
"""

STATUS_DEAD = """
SELECT position, event_count, dead_at, dead_reason AS reason FROM {schema}.dead
 WHERE discarded_at IS NULL ORDER BY position DESC LIMIT 10
"""

# Dead letters, by transactions_dead, with the subjects of their events.
DEAD_LETTERS = """
SELECT d.position, d.event_count,
       ARRAY(SELECT DISTINCT subject FROM {schema}.events AS e WHERE e.txid = d.txid ORDER BY subject) AS subjects,
       d.sealed_at, d.dead_at, d.dead_reason AS reason, d.discarded_at, d.retried_at,
       ARRAY(SELECT stream FROM {schema}.parts AS p WHERE p.position = d.position AND p.sent_at IS NOT NULL
              ORDER BY part) AS sent_to
  FROM {schema}.dead AS d ORDER BY d.position
"""

# One transaction, by transactions_pkey. Its replays are looked for in all that came behind it.
SHOW = """
SELECT r.former_ids || r.outbox_id AS outbox_ids, t.position, t.txid::text,
       CASE WHEN t.sent_at IS NOT NULL THEN 'sent' WHEN t.discarded_at IS NOT NULL THEN 'discarded'
            WHEN t.dead_at IS NOT NULL THEN 'dead' ELSE 'pending' END AS state,
       t.event_count, t.sealed_at, t.attempts, nullif(t.stream, '*') AS stream,
       CASE WHEN t.stream <> '*' THEN t.first_sequence END AS first_sequence,
       CASE WHEN t.stream <> '*' THEN t.last_sequence END AS last_sequence, t.sent_at, t.dead_at,
       t.dead_reason, t.discarded_at, t.retried_at, t.replay_of,
       (SELECT retired_at FROM {schema}.streams AS s WHERE s.name = t.stream) AS stream_retired_at,
       ARRAY(SELECT position FROM {schema}.transactions AS again
              WHERE again.position > t.position AND again.replay_of = t.position ORDER BY position) AS replays
  FROM {schema}.transactions AS t CROSS JOIN {schema}.relay AS r WHERE t.position = %(position)s
"""

# Its parts, by parts_pkey, if it has any.
SHOW_PARTS = """
SELECT part, stream, CASE WHEN sent_at IS NOT NULL THEN 'sent' WHEN dead_at IS NOT NULL THEN 'dead' ELSE 'pending' END
         AS state, numbers, first_sequence, last_sequence, sent_at, dead_at, dead_reason, discarded_at
  FROM {schema}.parts WHERE position = %(position)s ORDER BY part
"""

SHOW_EVENTS = """
SELECT e.message_id, e.subject, e.headers, e.payload, e.created_at
  FROM {schema}.transactions AS t JOIN {schema}.events AS e ON e.txid = t.txid
 WHERE t.position = %(position)s ORDER BY e.id
"""

# What may be replayed, a page at a time, with the subjects of its events.
REPLAYABLE = """
SELECT t.position, t.txid::text, t.event_count, t.sent_at IS NOT NULL, t.dead_at IS NOT NULL,
       ARRAY(SELECT DISTINCT subject FROM {schema}.events AS e WHERE e.txid = t.txid),
       EXISTS (SELECT FROM {schema}.events AS e WHERE e.txid = t.txid AND e.headers ? 'Nats-Rollup'), t.stream,
       (SELECT json_object_agg(p.stream, p.numbers) FROM {schema}.parts AS p WHERE p.position = t.position)
  FROM {schema}.transactions AS t
 WHERE t.position > %(after)s AND t.position <= %(to)s AND t.replay_of IS NULL ORDER BY t.position LIMIT %(page)s
"""

HIGHEST = "SELECT coalesce(max(position), 0) FROM {schema}.transactions"

# Copies with message ids of their own, in the same order: of all events, or of those with these numbers.
REPLAY_EVENTS = """
INSERT INTO {schema}.events (message_id, subject, headers, payload)
SELECT gen_random_uuid(), subject, headers, payload FROM (
  SELECT *, row_number() OVER (ORDER BY id) AS number FROM {schema}.events WHERE txid = %(txid)s::xid8
) AS e
 WHERE %(numbers)s::int[] IS NULL OR number = ANY (%(numbers)s::int[]) ORDER BY id
"""

# The trigger writes the row of the transaction now and not at commit, so that it can be marked as a replay.
SEAL_NOW = "SET CONSTRAINTS {schema}.seal IMMEDIATE"

REPLAY_OF = """
UPDATE {schema}.transactions SET replay_of = %(position)s WHERE txid = pg_current_xact_id()
"""

PAUSE = """
WITH before AS (SELECT paused_at IS NULL AS changed FROM {schema}.relay FOR UPDATE)
UPDATE {schema}.relay SET paused_at = coalesce(paused_at, clock_timestamp()), paused_why = coalesce(paused_why, %(why)s)
  FROM before RETURNING paused_at, paused_why, changed
"""

RESUME = """
WITH before AS (SELECT paused_at IS NOT NULL AS changed FROM {schema}.relay FOR UPDATE)
UPDATE {schema}.relay SET paused_at = NULL, paused_why = NULL FROM before RETURNING paused_at, paused_why, changed
"""

# An order about dead letters comes before or behind a commit of the leader, not in between.
MY_TURN = "SELECT FROM {schema}.relay FOR UPDATE"

# A dead letter is pending again, or its dead parts are; these may go to another stream if no other part is open. The
# leader takes its position from relay.retried into its open positions: in the column open_positions it would be written
# over by the leader's next commit.
RETRY = """
WITH parted AS (
  UPDATE {schema}.parts AS p SET dead_at = NULL, dead_reason = NULL, moves = t.dead_at IS NOT NULL
    FROM {schema}.transactions AS t
   WHERE p.position = ANY (%(positions)s) AND p.dead_at IS NOT NULL AND p.discarded_at IS NULL
     AND t.position = p.position AND t.discarded_at IS NULL RETURNING p.position
), again AS (
  UPDATE {schema}.transactions SET dead_at = NULL, dead_reason = NULL, attempts = 0, retried_at = clock_timestamp()
   WHERE position = ANY (%(positions)s) AND discarded_at IS NULL
     AND (dead_at IS NOT NULL OR position IN (SELECT position FROM parted)) RETURNING position
), asked AS (
  UPDATE {schema}.relay SET retried = retried + (
    SELECT coalesce(range_agg(int8range(position, position, '[]')), int8multirange()) FROM again)
   WHERE EXISTS (SELECT FROM again)
)
SELECT position FROM again
"""

# What is pending of it for other streams is sent all the same; with the last of it the transaction is discarded.
DISCARD = """
WITH parted AS (
  UPDATE {schema}.parts SET discarded_at = clock_timestamp()
   WHERE position = ANY (%(positions)s) AND dead_at IS NOT NULL AND discarded_at IS NULL RETURNING position
), whole AS (
  UPDATE {schema}.transactions SET discarded_at = clock_timestamp()
   WHERE position = ANY (%(positions)s) AND dead_at IS NOT NULL AND discarded_at IS NULL RETURNING position
)
SELECT position FROM parted UNION SELECT position FROM whole
"""

# What `outbox verify` and `outbox rebase` compare messages with: transactions, and the ids of their events in order.
KNOWN = """
SELECT t.position, e.ids, e.digests, t.dead_at IS NOT NULL, t.stream, t.first_sequence, t.last_sequence
  FROM {schema}.transactions AS t CROSS JOIN LATERAL (
    SELECT string_agg(message_id::text, ' ' ORDER BY id) AS ids,
           string_agg(sha256(payload), '' ORDER BY id) AS digests
      FROM {schema}.events WHERE txid = t.txid
  ) AS e
 WHERE t.position = ANY (%(positions)s)
"""

# The parts of those that have no receipt of their own; as KNOWN, but for the numbers of their events.
KNOWN_PARTS = """
SELECT position, part, numbers, dead_at IS NOT NULL, CASE WHEN sent_at IS NOT NULL THEN stream END, first_sequence,
       last_sequence
  FROM {schema}.parts WHERE position = ANY (%(positions)s) ORDER BY position, part
"""

# Receipts, a page at a time.
RECEIPTS = """
SELECT position, stream, first_sequence, last_sequence FROM {schema}.transactions
 WHERE position > %(after)s AND position <= %(to)s AND sent_at IS NOT NULL AND stream <> '*'
 ORDER BY position LIMIT 5000
"""

# The same of parts: whole transactions, though more rows then.
RECEIPTS_OF_PARTS = """
SELECT position, stream, first_sequence, last_sequence FROM {schema}.parts
 WHERE sent_at IS NOT NULL AND position IN (
   SELECT DISTINCT position FROM {schema}.parts
    WHERE position > %(after)s AND position <= %(to)s AND sent_at IS NOT NULL ORDER BY position LIMIT 5000)
 ORDER BY position
"""

# Reads all receipts: only for commands that look at everything anyway.
RECEIPT_STREAMS = """
SELECT stream FROM {schema}.transactions WHERE sent_at IS NOT NULL AND stream <> '*'
 UNION SELECT stream FROM {schema}.parts WHERE sent_at IS NOT NULL ORDER BY stream
"""

# The subjects of what is pending, each once.
PENDING_SUBJECTS = """
SELECT DISTINCT e.subject FROM {schema}.pending AS p JOIN {schema}.events AS e ON e.txid = p.txid ORDER BY e.subject
"""

# Pending transactions that no relay will look at: behind the cursor, in no plan, and not open. Reads all rows up to the
# cursor; a page at a time.
STRANDED = """
WITH known AS MATERIALIZED (
  SELECT cursor, open_positions + retried + (SELECT coalesce(range_agg(places), int8multirange())
                                               FROM {schema}.streams, unnest(plan) AS places) AS open
    FROM {schema}.relay
)
SELECT t.position FROM known AS k JOIN {schema}.transactions AS t ON t.position <= k.cursor
 WHERE t.position > %(after)s AND t.position <= %(to)s AND t.sent_at IS NULL AND t.dead_at IS NULL
   AND NOT k.open @> t.position
 ORDER BY t.position LIMIT 5000
"""

# What there is to verify. One row.
EXTENT = """
SELECT outbox_id, former_ids, greatest(purged, (SELECT h.purged FROM {schema}.housekeeping AS h)),
       (SELECT coalesce(max(position), 0) FROM {schema}.transactions)
  FROM {schema}.relay
"""

SENT_RANGE = """
SELECT min(first_sequence), max(last_sequence) FROM (
  SELECT position, stream, first_sequence, last_sequence FROM {schema}.transactions
  UNION ALL SELECT position, stream, first_sequence, last_sequence FROM {schema}.parts
) AS sent
 WHERE position >= %(from)s AND position <= %(to)s AND stream = %(stream)s
"""

# The streams that the outbox has forgotten as places to send to; as STREAMS.
RETIRED = """
SELECT name, created, mode, last_sequence, plan, blocked FROM {schema}.streams
 WHERE retired_at IS NOT NULL ORDER BY name
"""

# A stream that only receipts speak of, so that it can be retired.
KNOW_STREAM = """
INSERT INTO {schema}.streams (name, created, last_sequence, plan_base) SELECT %(name)s, '', 0, 0
 WHERE EXISTS (SELECT FROM {schema}.transactions WHERE stream = %(name)s AND sent_at IS NOT NULL)
ON CONFLICT (name) DO NOTHING
"""

# The subjects of what was sent to a stream, as far as it is kept, and of what is pending. Reads all rows.
SUBJECTS = """
SELECT DISTINCT e.subject FROM {schema}.transactions AS t JOIN {schema}.events AS e ON e.txid = t.txid
 WHERE t.stream = %(name)s OR (t.sent_at IS NULL AND t.dead_at IS NULL)
"""

# Accept a stream as it is now, or retire it: nothing is planned for it, but for a head that may still be stored, with
# its fence; what else was planned and not found in it is pending again.
SETTLE_STREAM = """
WITH accepted AS (
  UPDATE {schema}.streams AS s SET created = %(created)s, last_sequence = %(last)s,
         plan_base = CASE WHEN k.head IS NULL THEN %(last)s ELSE before.plan_base END,
         plan = CASE WHEN k.head IS NULL THEN ARRAY[]::int8range[] ELSE ARRAY[int8range(k.head, k.head, '[]')] END,
         fences = CASE WHEN k.head IS NOT NULL
           THEN jsonb_build_object(k.head::text, before.fences -> k.head::text) END,
         mode = CASE WHEN k.head IS NULL THEN 'chained' ELSE before.mode END, blocked = NULL, blocked_since = NULL,
         sharing = NULL, retired_at = CASE WHEN %(retire)s THEN clock_timestamp() END
    FROM (SELECT name, mode, plan, plan_base, fences FROM {schema}.streams WHERE name = %(name)s FOR UPDATE) AS before,
         (SELECT %(head)s::bigint AS head) AS k
   WHERE s.name = before.name RETURNING before.plan, k.head
)
UPDATE {schema}.relay SET epoch = epoch + 1, open_positions = open_positions + (
  SELECT coalesce(range_agg(places), int8multirange())
         - coalesce(range_agg(int8range(head, head, '[]')) FILTER (WHERE head IS NOT NULL), int8multirange())
    FROM accepted, unnest(plan) AS places)
 WHERE EXISTS (SELECT FROM accepted)
"""

# The head of a stream's plan that is fenced by a subject, and that is pending still; by transactions_pkey.
FENCED_HEAD = """
SELECT t.position, s.fences -> t.position::text ->> 0 AS subject,
       (s.fences -> t.position::text ->> 1)::bigint AS sequence, s.plan_base AS since
  FROM {schema}.streams AS s JOIN {schema}.transactions AS t ON t.position = lower(s.plan[1])
 WHERE s.name = %(name)s AND s.fences ? t.position::text AND t.sent_at IS NULL AND t.dead_at IS NULL
"""

# Transactions that were found in a stream, whole, though the database had not learnt of it.
ADOPT = """
UPDATE {schema}.transactions AS t
   SET sent_at = clock_timestamp(), stream = %(stream)s, first_sequence = a.first,
       last_sequence = a.first + event_count - 1
  FROM unnest(%(positions)s::bigint[], %(firsts)s::bigint[]) AS a (position, first)
 WHERE t.position = a.position AND t.sent_at IS NULL AND t.dead_at IS NULL
"""

# The same with parts.
ADOPT_PARTS = """
UPDATE {schema}.parts AS p
   SET sent_at = clock_timestamp(), stream = %(stream)s, first_sequence = a.first,
       last_sequence = a.first + cardinality(numbers) - 1
  FROM unnest(%(positions)s::bigint[], %(parts)s::int[], %(firsts)s::bigint[]) AS a (position, part, first)
 WHERE p.position = a.position AND p.part = a.part AND p.sent_at IS NULL AND p.dead_at IS NULL
"""

# Parts that a backup is too old to know: as they were found in a stream; and then what was found in none, as one part
# more, for wherever its subjects are.
FOUND_PARTS = """
INSERT INTO {schema}.parts (position, part, stream, numbers, sent_at, first_sequence, last_sequence)
SELECT position, part, stream, numbers::int[], clock_timestamp(), first, first + cardinality(numbers::int[]) - 1
  FROM unnest(%(positions)s::bigint[], %(parts)s::int[], %(streams)s::text[], %(numbers)s::text[],
              %(firsts)s::bigint[]) AS f (position, part, stream, numbers, first)
ON CONFLICT DO NOTHING
"""
LEFT_PARTS = """
INSERT INTO {schema}.parts (position, part, moves, stream, numbers)
SELECT t.position, (SELECT min(n) FROM generate_series(1, t.event_count) AS n
                     WHERE n NOT IN (SELECT part FROM {schema}.parts AS p WHERE p.position = t.position)), true, '',
       l.numbers
  FROM {schema}.transactions AS t CROSS JOIN LATERAL (
    SELECT array_agg(n) AS numbers FROM generate_series(1, t.event_count) AS n
     WHERE n NOT IN (SELECT unnest(numbers) FROM {schema}.parts AS p WHERE p.position = t.position)) AS l
 WHERE t.position = ANY (%(positions)s) AND l.numbers IS NOT NULL
"""

# What is open for a stream that is given up can be sent nowhere else as it is: it is dead, until somebody retries it.
RETIRE_PARTS = """
UPDATE {schema}.parts AS p
   SET dead_at = clock_timestamp(), dead_reason = %(reason)s || ': part ' || p.part || ', for stream ' || p.stream
  FROM {schema}.transactions AS t
 WHERE p.stream = %(name)s AND p.sent_at IS NULL AND p.dead_at IS NULL AND t.position = p.position
RETURNING p.position
"""

# What a rebase builds on, before writers are locked out: what is stranded by now, the highest id of an event, and the
# oldest transaction that may still write. Reads all rows.
BEFORE_REBASE = """
SELECT (SELECT coalesce(range_agg(int8range(position, position, '[]')), int8multirange())::text
          FROM {schema}.transactions WHERE sent_at IS NULL AND dead_at IS NULL
           AND position <= (SELECT cursor FROM {schema}.relay)) AS behind,
       (SELECT coalesce(max(id), 0) FROM {schema}.events) AS event_id,
       pg_snapshot_xmin(pg_current_snapshot())::text AS oldest
"""

# For a transaction: no time limits, which a role or a database may have; and the planner as the relay has it, for what
# goes by the indexes, page by page and under the lock.
BY_INDEX = """
SELECT set_config(name, 'off', true)
  FROM unnest(ARRAY['enable_seqscan', 'enable_bitmapscan', 'enable_hashjoin', 'enable_mergejoin']) AS name
"""

# Take a moved or restored database as the outbox's new home: a new id, no stream remembered but those that are gone, as
# retired, and pending again what was planned, and what is pending behind the cursor, by now or when it was looked for.
REBASE = (
    """
UPDATE {schema}.relay SET outbox_id = gen_random_uuid(), former_ids = former_ids || outbox_id, epoch = epoch + 1,
       cursor = least(cursor, 1000000000000000), system_identifier = NULL, database_oid = NULL, timeline = NULL,
       leader = NULL, leader_since = NULL, deaths = 0, suspect = NULL,
       open_positions = open_positions + %(behind)s::int8multirange
         + (SELECT coalesce(range_agg(places), int8multirange()) FROM {schema}.streams AS s, unnest(s.plan) AS places)
         + (SELECT coalesce(range_agg(int8range(position, position, '[]')), int8multirange())
              FROM {schema}.transactions AS t
             WHERE t.txid >= %(oldest)s::xid8 AND t.txid < '9223372036854775808'::xid8 AND t.position <= cursor
               AND t.sent_at IS NULL AND t.dead_at IS NULL)
""",
    "DELETE FROM {schema}.streams",
    """
INSERT INTO {schema}.streams (name, created, last_sequence, plan_base, retired_at)
SELECT name, '', 0, 0, clock_timestamp() FROM unnest(%(gone)s::text[]) AS name
""",
    # Positions above all that was ever reached, and all that lies in the streams, are drawn from here on; ids too. A
    # cursor that somebody has set out of reach must not use them up.
    """
SELECT setval('{schema}.transactions_position_seq',
              greatest(1, %(highest)s, cursor, upper(open_positions) - 1,
                       (SELECT max(position) FROM {schema}.transactions),
                       (SELECT last_value FROM {schema}.transactions_position_seq)))
  FROM {schema}.relay
""",
    """
SELECT setval('{schema}.events_id_seq',
              greatest(1, %(event_id)s, (SELECT last_value FROM {schema}.events_id_seq)))
""",
)

MOVED_TXIDS = 3 << 62  # from here on are the ids of what was moved, by position: no cluster gets there

# How many transactions have an id that one of this cluster may still get, and what all such ids are above.
TO_MOVE = """
SELECT count(*), greatest(0, pg_snapshot_xmin(pg_current_snapshot())::text::bigint - 1)::text
  FROM {schema}.transactions
 WHERE txid >= pg_snapshot_xmin(pg_current_snapshot()) AND txid < '9223372036854775808'::xid8
   AND NOT pg_visible_in_snapshot(txid, pg_current_snapshot())
"""

# A page of them, by transactions_txid, with their events, by events_pkey. Those that share an id are `_separate`'s.
MOVE = """
WITH page AS MATERIALIZED (
  SELECT position, txid, (13835058055282163712 + position)::text::xid8 AS moved FROM {schema}.transactions AS t
   WHERE txid > %(after)s::xid8 AND txid < '9223372036854775808'::xid8
     AND NOT pg_visible_in_snapshot(txid, pg_current_snapshot())
     AND NOT EXISTS (SELECT FROM {schema}.transactions AS other
                      WHERE other.txid = t.txid AND other.position <> t.position)
   ORDER BY txid LIMIT %(page)s
), events AS (
  UPDATE {schema}.events AS e SET txid = page.moved FROM page WHERE e.txid = page.txid
), transactions AS (
  UPDATE {schema}.transactions AS t SET txid = page.moved FROM page WHERE t.position = page.position
)
SELECT count(*), (array_agg(txid ORDER BY txid DESC))[1]::text FROM page
"""

# Events without a transaction have no position: they keep their ids beside each other, in a place of their own.
MOVE_STRAYS = """
UPDATE {schema}.events AS e SET txid = (11529215046068469760 + txid::text::numeric)::text::xid8
 WHERE txid >= pg_snapshot_xmin(pg_current_snapshot()) AND txid < '9223372036854775808'::xid8
   AND NOT pg_visible_in_snapshot(txid, pg_current_snapshot())
   AND NOT EXISTS (SELECT FROM {schema}.transactions AS t WHERE t.txid = e.txid)
"""

# Ids of more than one transaction. Reads all of transactions_txid.
SHARED_TXIDS = "SELECT txid::text FROM {schema}.transactions GROUP BY txid HAVING count(*) > 1 ORDER BY txid"

SHARERS = """
SELECT position, event_count, sealed_at FROM {schema}.transactions WHERE txid = %(txid)s::xid8 ORDER BY sealed_at
"""

EVENTS_BY_TIME = """
SELECT created_at, count(*) FROM {schema}.events WHERE txid = %(txid)s::xid8 GROUP BY created_at ORDER BY created_at
"""

MOVE_ONE = """
WITH events AS (
  UPDATE {schema}.events SET txid = (13835058055282163712 + %(position)s::bigint)::text::xid8
   WHERE txid = %(txid)s::xid8 AND created_at = %(began)s
)
UPDATE {schema}.transactions SET txid = (13835058055282163712 + %(position)s::bigint)::text::xid8
 WHERE position = %(position)s
"""

# Everything that makes up a schema, a line each, as the server prints it: what Alembic does not compare is here too.
FINGERPRINT = """
WITH home AS (SELECT oid FROM pg_namespace WHERE nspname = %(schema)s),
     mine AS (SELECT c.* FROM pg_class AS c JOIN home ON c.relnamespace = home.oid WHERE c.relname <> 'alembic_version')
SELECT 'table ' || relname || ' ' || relkind::text || ' ' || coalesce(array_to_string(reloptions, ','), '') ||
       ' row security ' || relrowsecurity FROM mine WHERE relkind IN ('r', 'p', 'v')
UNION ALL
SELECT 'column ' || c.relname || '.' || a.attname || ' ' || format_type(a.atttypid, a.atttypmod) || ' not null ' ||
       a.attnotnull || ' identity ' || a.attidentity::text ||
       ' default ' || coalesce(pg_get_expr(d.adbin, d.adrelid), '')
  FROM mine AS c JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
  LEFT JOIN pg_attrdef AS d ON d.adrelid = c.oid AND d.adnum = a.attnum WHERE c.relkind IN ('r', 'p')
UNION ALL
SELECT 'constraint ' || c.relname || '.' || k.conname || ' ' || pg_get_constraintdef(k.oid)
  FROM pg_constraint AS k JOIN mine AS c ON c.oid = k.conrelid WHERE k.contype <> 'n'
UNION ALL
SELECT 'index ' || pg_get_indexdef(i.indexrelid) || ' valid ' || i.indisvalid
  FROM pg_index AS i JOIN mine ON mine.oid = i.indrelid
UNION ALL
SELECT 'trigger ' || pg_get_triggerdef(t.oid) || ' enabled ' || t.tgenabled::text
  FROM pg_trigger AS t JOIN mine ON mine.oid = t.tgrelid WHERE NOT t.tgisinternal
UNION ALL
SELECT 'function ' || pg_get_functiondef(p.oid) FROM pg_proc AS p JOIN home ON p.pronamespace = home.oid
UNION ALL
SELECT 'view ' || relname || ' ' || pg_get_viewdef(oid) FROM mine WHERE relkind = 'v'
UNION ALL
SELECT 'sequence ' || mine.relname || ' cache ' || s.seqcache || ' cycle ' || s.seqcycle
  FROM pg_sequence AS s JOIN mine ON mine.oid = s.seqrelid
"""

# Up to where transactions may be purged.
PURGED = "SELECT greatest(purged, (SELECT h.purged FROM {schema}.housekeeping AS h)) FROM {schema}.relay"

# The id that the outbox has now.
OUTBOX_ID = "SELECT outbox_id FROM {schema}.relay"

# A sleeping relay reads its orders at once.
WAKE = "SELECT pg_notify(%(channel)s, '')"

# The leader's own lock, for as long as a rebase takes.
LOCK_OUT_LEADERS = "SELECT pg_try_advisory_xact_lock(%(lock)s, %(key)s)"

# Nobody adds or marks while positions are lifted; readers go on.
LOCK_OUT_WRITERS = "LOCK {schema}.events, {schema}.transactions IN EXCLUSIVE MODE"

LOCK_TIMEOUT = "SELECT set_config('lock_timeout', %(milliseconds)s::text, true)"

# Who keeps the lock from being had: those who have added something and are not at their end, vacuum, a prepared one.
LOCK_HOLDERS = """
SELECT DISTINCT coalesce('pid ' || a.pid || ' (' || concat_ws(', ', a.usename, nullif(a.application_name, ''),
                         nullif(a.backend_type, 'client backend')) || ')',
                         'prepared transaction ' || quote_literal(p.gid), 'somebody') AS who,
       coalesce(a.backend_type = 'autovacuum worker', false) AS vacuums
  FROM pg_locks AS l LEFT JOIN pg_stat_activity AS a ON a.pid = l.pid
  LEFT JOIN pg_locks AS x ON l.pid IS NULL AND x.pid IS NULL AND x.locktype = 'transactionid'
                         AND x.virtualtransaction = l.virtualtransaction
  LEFT JOIN pg_prepared_xacts AS p ON p.transaction = x.transactionid
 WHERE l.locktype = 'relation' AND l.granted AND l.pid IS DISTINCT FROM pg_backend_pid()
   AND l.relation IN ('{schema}.events'::regclass, '{schema}.transactions'::regclass)
   AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
   AND l.mode NOT IN ('AccessShareLock', 'RowShareLock')
 ORDER BY who
"""

# The first statement of a migration: a second one waits for its end.
ONE_MIGRATION_AT_A_TIME = "SELECT pg_advisory_xact_lock(%(lock)s, %(key)s)"

# The comment on the table events, which has the version; null where there is no such table.
INSTALLED = "SELECT obj_description(to_regclass(%(events)s), 'pg_class')"

# The same, and whether there is that table.
TOLD_VERSION = "SELECT to_regclass(%(events)s) IS NOT NULL, obj_description(to_regclass(%(events)s), 'pg_class')"

# Whether there is this table. If `outbox migrate` made the schema, its version table is there.
THERE = "SELECT to_regclass(%(table)s) IS NOT NULL"

HISTORY = "SELECT version_num FROM {schema}.alembic_version"

# After the last downgrade, when nothing is left that it tells of.
DROP_HISTORY = "DROP TABLE IF EXISTS {schema}.alembic_version"

# How much else is in the schema, of whomever.
WHAT_IS_LEFT = """
SELECT count(*) FROM pg_depend WHERE refclassid = 'pg_namespace'::regclass AND deptype = 'n'
   AND refobjid = (SELECT oid FROM pg_namespace WHERE nspname = %(schema)s)
"""

# Only when nothing is left in it.
DROP_SCHEMA = "DROP SCHEMA IF EXISTS {schema}"
