-- Schema version 1. Statements end with a semicolon and an empty line; {schema} is composed, never formatted.
-- {added} and {sealed} name this outbox's transaction-local settings, {channel} its notification channel.

CREATE SCHEMA IF NOT EXISTS {schema};

DO $body$
BEGIN
  IF current_setting('server_version_num')::int < 140005 THEN
    RAISE EXCEPTION USING MESSAGE = 'outbox needs PostgreSQL 14.5 or later, this is ' || current_setting('server_version');
  END IF;
  IF current_setting('server_encoding') <> 'UTF8' THEN
    RAISE EXCEPTION USING MESSAGE = 'outbox needs a database with encoding UTF8, this one has ' || current_setting('server_encoding');
  END IF;
END
$body$;

CREATE TABLE {schema}.events (
  txid       xid8        NOT NULL DEFAULT pg_current_xact_id(),
  id         bigint      GENERATED ALWAYS AS IDENTITY (CACHE 1),
  message_id uuid        NOT NULL DEFAULT gen_random_uuid(),
  subject    text        NOT NULL,
  headers    jsonb,
  payload    bytea       NOT NULL,
  created_at timestamptz NOT NULL DEFAULT now(),
  CONSTRAINT events_pkey PRIMARY KEY (txid, id)
) WITH (autovacuum_vacuum_scale_factor = 0.05);

COMMENT ON TABLE {schema}.events IS 'outbox schema version 1. One row per event; append-only.';

CREATE TABLE {schema}.transactions (
  position       bigint      GENERATED ALWAYS AS IDENTITY (CACHE 1),
  txid           xid8        NOT NULL,
  event_count    integer     NOT NULL,
  sealed_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
  attempts       integer     NOT NULL DEFAULT 0,
  sent_at        timestamptz,
  stream         text,
  first_sequence bigint,
  last_sequence  bigint,
  dead_at        timestamptz,
  dead_reason    text,
  discarded_at   timestamptz,
  retried_at     timestamptz,
  replay_of      bigint,
  CONSTRAINT transactions_pkey PRIMARY KEY (position),
  CONSTRAINT transactions_have_events CHECK (event_count > 0),
  CONSTRAINT transactions_attempts_not_negative CHECK (attempts >= 0),
  CONSTRAINT transactions_receipt_is_whole CHECK (num_nulls(stream, first_sequence, last_sequence) = CASE WHEN sent_at IS NULL THEN 3 ELSE 0 END),
  CONSTRAINT transactions_receipt_fits_count CHECK (last_sequence - first_sequence + 1 = event_count),
  CONSTRAINT transactions_dead_with_reason CHECK ((dead_at IS NULL) = (dead_reason IS NULL)),
  CONSTRAINT transactions_not_sent_and_dead CHECK (sent_at IS NULL OR dead_at IS NULL),
  CONSTRAINT transactions_discarded_only_dead CHECK (discarded_at IS NULL OR dead_at IS NOT NULL),
  CONSTRAINT transactions_replay_is_later CHECK (replay_of < position)
) WITH (fillfactor = 35, autovacuum_vacuum_scale_factor = 0.05);

COMMENT ON TABLE {schema}.transactions IS 'One row per transaction that added events, in commit order; written at commit.';

CREATE INDEX transactions_txid ON {schema}.transactions (txid);

CREATE INDEX transactions_dead ON {schema}.transactions (position) WHERE dead_at IS NOT NULL;

CREATE TABLE {schema}.streams (
  name              text        NOT NULL,
  created           text        NOT NULL,
  mode              text        NOT NULL DEFAULT 'chained',
  last_sequence     bigint      NOT NULL,
  plan_base         bigint,
  plan              int8range[] NOT NULL DEFAULT ARRAY[]::int8range[],
  sent_transactions bigint      NOT NULL DEFAULT 0,
  sent_events       bigint      NOT NULL DEFAULT 0,
  blocked           text,
  blocked_since     timestamptz,
  CONSTRAINT streams_pkey PRIMARY KEY (name),
  CONSTRAINT streams_mode_is_known CHECK (mode IN ('chained', 'shared')),
  CONSTRAINT streams_plan_has_a_base CHECK (plan_base IS NOT NULL OR cardinality(plan) = 0),
  CONSTRAINT streams_blocked_has_a_time CHECK (num_nonnulls(blocked, blocked_since) IN (0, 2))
) WITH (fillfactor = 20);

COMMENT ON TABLE {schema}.streams IS 'One row per stream that this outbox publishes to: identity, mode, place, plan.';

CREATE TABLE {schema}.relay (
  singleton         boolean        NOT NULL DEFAULT true,
  outbox_id         uuid           NOT NULL DEFAULT gen_random_uuid(),
  former_ids        uuid[]         NOT NULL DEFAULT ARRAY[]::uuid[],
  system_identifier bigint,
  database_oid      oid,
  timeline          bigint,
  epoch             bigint         NOT NULL DEFAULT 0,
  leader            text,
  leader_since      timestamptz,
  deaths            integer        NOT NULL DEFAULT 0,
  suspect           bigint,
  last_death        text,
  blamed            bigint,
  cursor            bigint         NOT NULL DEFAULT 0,
  open_positions    int8multirange NOT NULL DEFAULT int8multirange(),
  retried           int8multirange NOT NULL DEFAULT int8multirange(),
  purged            bigint         NOT NULL DEFAULT 0,
  blocked           text,
  blocked_since     timestamptz,
  paused_at         timestamptz,
  paused_why        text,
  CONSTRAINT relay_pkey PRIMARY KEY (singleton),
  CONSTRAINT relay_has_one_row CHECK (singleton),
  CONSTRAINT relay_blocked_has_a_time CHECK (num_nonnulls(blocked, blocked_since) IN (0, 2)),
  CONSTRAINT relay_paused_has_a_time CHECK (num_nonnulls(paused_at, paused_why) IN (0, 2))
) WITH (fillfactor = 20);

COMMENT ON TABLE {schema}.relay IS 'One row: who this outbox is, who leads, and how far it has read.';

INSERT INTO {schema}.relay DEFAULT VALUES;

CREATE TABLE {schema}.limits (
  singleton              boolean NOT NULL DEFAULT true,
  max_event_bytes        integer NOT NULL DEFAULT 1000000,
  max_header_bytes       integer NOT NULL DEFAULT 61440,
  max_transaction_events integer NOT NULL DEFAULT 1000,
  CONSTRAINT limits_pkey PRIMARY KEY (singleton),
  CONSTRAINT limits_have_one_row CHECK (singleton),
  CONSTRAINT limits_are_not_tiny CHECK (max_event_bytes >= 1000 AND max_header_bytes > 0 AND max_transaction_events >= 10),
  CONSTRAINT limits_header_bytes_fit_nats CHECK (max_header_bytes <= 61440)
);

COMMENT ON TABLE {schema}.limits IS 'One row: what an application may add. Changed by UPDATE; the triggers read it.';

INSERT INTO {schema}.limits DEFAULT VALUES;

CREATE FUNCTION {schema}.subject_problem(subject text) RETURNS text
LANGUAGE sql IMMUTABLE AS $body$
  SELECT CASE
    WHEN subject = '' THEN 'is empty'
    WHEN octet_length(subject) > 255 THEN 'is longer than 255 bytes'
    WHEN subject ~ '[\u0001-\u0020\u007f-\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]'
      THEN 'contains white space or a control character'
    WHEN subject ~ '[*>]' THEN 'contains a wildcard (* or >)'
    WHEN left(subject, 1) = '$' THEN 'begins with $, which is reserved'
    WHEN left(subject, 1) = '.' OR right(subject, 1) = '.' OR position('..' in subject) > 0
      THEN 'has an empty token'
  END
$body$;

CREATE FUNCTION {schema}.header_problem(headers jsonb) RETURNS text
LANGUAGE sql IMMUTABLE AS $body$
  SELECT CASE WHEN jsonb_typeof(headers) <> 'object' THEN 'must be an object of strings'
  ELSE (
    SELECT min(CASE
      WHEN jsonb_typeof(h.value) <> 'string' THEN 'value of ' || quote_literal(h.key) || ' is not a string'
      WHEN h.key !~ '^[!#$&''*+.^_`|~0-9A-Za-z\u0025-]+$' THEN 'name ' || quote_literal(h.key) || ' is not a token'
      WHEN h.value #>> ARRAY[]::text[] ~ '[\r\n]' THEN 'value of ' || quote_literal(h.key) || ' has a line break'
      WHEN h.key = 'Nats-TTL' OR (h.key = 'Nats-Rollup' AND h.value = '"sub"') THEN NULL
      WHEN h.key = 'Nats-Rollup' THEN 'Nats-Rollup may only have the value sub'
      WHEN lower(h.key) ~ '^(nats|outbox)-' THEN 'name ' || quote_literal(h.key) || ' is reserved'
    END)
    FROM jsonb_each(headers) AS h
  ) END
$body$;

CREATE FUNCTION {schema}.header_bytes(headers jsonb) RETURNS bigint
LANGUAGE sql IMMUTABLE AS $body$
  SELECT coalesce(sum(octet_length(h.key) + octet_length(h.value) + 4), 0) + 12 FROM jsonb_each_text(headers) AS h
$body$;

CREATE FUNCTION {schema}.refuse(message text, hint text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $body$
BEGIN
  RAISE EXCEPTION USING ERRCODE = 'check_violation', MESSAGE = 'outbox: ' || message, HINT = hint;
END
$body$;

-- Checks one event and counts it, in a setting that rolls back with a savepoint. Never reads events or transactions.
-- What is spared here is spared in every event: an ordinary subject is told by one expression, the limits are only read
-- for what could be over one (see limits_are_not_tiny), and an assignment costs a third of PERFORM.
CREATE FUNCTION {schema}.check_event() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
  mine text := pg_current_xact_id()::text || ':';
  added text := current_setting({added}, true);
BEGIN
  IF NEW.txid <> pg_current_xact_id() THEN
    PERFORM {schema}.refuse('txid of an event must be that of its transaction', 'Leave out the column txid.');
  END IF;
  IF NEW.subject !~ '^[0-9A-Za-z_-]+([.][0-9A-Za-z_-]+)*$' OR octet_length(NEW.subject) > 255
     OR NEW.headers IS NOT NULL OR octet_length(NEW.payload) > 1000 THEN
    PERFORM {schema}.check_closely(NEW.subject, NEW.headers, octet_length(NEW.payload));
  END IF;
  added := set_config({added},
    mine || CASE WHEN starts_with(added, mine) THEN split_part(added, ':', 2)::bigint + 1 ELSE 1 END, true);
  RETURN NEW;
END
$body$;

CREATE FUNCTION {schema}.check_closely(subject text, headers jsonb, payload_size bigint) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
  allowed {schema}.limits;
  header_size bigint := 0;
BEGIN
  IF {schema}.subject_problem(subject) IS NOT NULL THEN
    PERFORM {schema}.refuse('subject ' || quote_literal(left(subject, 80)) || ' ' || {schema}.subject_problem(subject),
      'A subject is one or more tokens separated by dots, such as orders.created.');
  END IF;
  SELECT * INTO allowed FROM {schema}.limits;
  IF headers IS NOT NULL THEN
    IF {schema}.header_problem(headers) IS NOT NULL THEN
      PERFORM {schema}.refuse('headers: ' || {schema}.header_problem(headers),
        'Headers are an object of strings; of the names in Nats- only Nats-TTL and Nats-Rollup (sub) may be given.');
    END IF;
    header_size := {schema}.header_bytes(headers);
    IF header_size > allowed.max_header_bytes THEN
      PERFORM {schema}.refuse('headers of ' || header_size || ' bytes are over the limit of ' || allowed.max_header_bytes,
        'Shorten them; the limit is max_header_bytes in ' || {limits} || '.');
    END IF;
  END IF;
  IF payload_size + header_size > allowed.max_event_bytes THEN
    PERFORM {schema}.refuse('payload and headers of ' || payload_size + header_size
      || ' bytes are over the limit of ' || allowed.max_event_bytes,
      'Send a reference instead, or raise max_event_bytes in ' || {limits} || ' and max_payload of nats-server.');
  END IF;
END
$body$;

-- Runs at commit, while the transaction still holds its locks, and draws its position. Fires per event: all but the
-- first find the transaction sealed. Events added after sealing seal again, at a new position, in the same row. The
-- setting {sealed} is what was added when it was sealed, and where the row is: xid:count@(page,item).
CREATE FUNCTION {schema}.seal() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
  added text := current_setting({added}, true);
  sealed text := current_setting({sealed}, true);
  mine text;
  events bigint;
  allowed bigint;
  place tid;
BEGIN
  IF starts_with(sealed, added || '@') THEN
    RETURN NULL;
  END IF;
  mine := pg_current_xact_id()::text || ':';
  IF NOT starts_with(coalesce(added, ''), mine) THEN
    PERFORM {schema}.refuse('the setting ' || {added} || ' was overwritten', 'Leave the settings of outbox alone.');
  END IF;
  events := split_part(added, ':', 2)::bigint;
  IF events > 10 THEN
    SELECT l.max_transaction_events INTO allowed FROM {schema}.limits AS l;
    IF events > allowed THEN
      PERFORM {schema}.refuse('the transaction added ' || events || ' events, over the limit of ' || allowed,
        'Commit in smaller transactions, or raise max_transaction_events in ' || {limits}
        || ', --max-batch-messages of the relay and jetstream.limits.batch.max_msgs of nats-server.');
    END IF;
  END IF;
  IF starts_with(sealed, mine) THEN
    -- By ctid: a look-up in the index would be a predicate lock that fails strangers under SERIALIZABLE.
    UPDATE {schema}.transactions AS t SET position = DEFAULT, event_count = events, sealed_at = clock_timestamp()
     WHERE t.ctid = split_part(sealed, '@', 2)::tid AND t.txid = pg_current_xact_id() RETURNING t.ctid INTO place;
    IF place IS NULL THEN
      PERFORM {schema}.refuse('the setting ' || {sealed} || ' was overwritten', 'Leave the settings of outbox alone.');
    END IF;
  ELSE
    INSERT INTO {schema}.transactions AS t (txid, event_count) VALUES (pg_current_xact_id(), events)
    RETURNING t.ctid INTO place;
  END IF;
  sealed := set_config({sealed}, added || '@' || place::text, true);
  -- NOTIFY serialises commits cluster-wide and makes PREPARE TRANSACTION fail: only to wake a relay that sleeps.
  IF current_setting('max_prepared_transactions') = '0' AND NOT pg_try_advisory_xact_lock_shared({awake}, {key}) THEN
    PERFORM pg_notify({channel}, '');
  END IF;
  RETURN NULL;
END
$body$;

CREATE TRIGGER check_event BEFORE INSERT ON {schema}.events
  FOR EACH ROW EXECUTE FUNCTION {schema}.check_event();

CREATE CONSTRAINT TRIGGER seal AFTER INSERT ON {schema}.events
  DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION {schema}.seal();

CREATE FUNCTION {schema}.add(subject text, payload bytea, headers jsonb DEFAULT NULL, message_id uuid DEFAULT NULL)
RETURNS uuid LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
  made uuid := coalesce($4, gen_random_uuid());
BEGIN
  INSERT INTO {schema}.events (message_id, subject, headers, payload) VALUES (made, $1, $3, $2);
  RETURN made;
END
$body$;

CREATE FUNCTION {schema}.add(subject text, payload text, headers jsonb DEFAULT NULL, message_id uuid DEFAULT NULL)
RETURNS uuid LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $body$
  SELECT {schema}.add($1, convert_to($2, 'UTF8'), $3, $4)
$body$;

CREATE FUNCTION {schema}.add(subject text, payload jsonb, headers jsonb DEFAULT NULL, message_id uuid DEFAULT NULL)
RETURNS uuid LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $body$
  SELECT {schema}.add($1, convert_to($2::text, 'UTF8'), $3, $4)
$body$;

-- By the cursor, the plans and the open positions: the cost does not grow with the number of sent rows.
CREATE VIEW {schema}.pending AS
  SELECT t.position, t.txid, t.event_count, t.sealed_at, t.attempts
    FROM {schema}.relay AS r CROSS JOIN LATERAL (
      SELECT * FROM {schema}.transactions AS beyond WHERE beyond.position > r.cursor
      UNION ALL
      SELECT planned.* FROM {schema}.streams AS s CROSS JOIN LATERAL unnest(s.plan) AS places
        JOIN {schema}.transactions AS planned
          ON planned.position >= lower(places) AND planned.position < least(upper(places), r.cursor + 1)
      UNION ALL
      SELECT opened.* FROM unnest(r.open_positions + r.retried) AS gap
        JOIN {schema}.transactions AS opened
          ON opened.position >= lower(gap) AND opened.position < least(upper(gap), r.cursor + 1)
    ) AS t
   WHERE t.sent_at IS NULL AND t.dead_at IS NULL;

COMMENT ON VIEW {schema}.pending IS 'Transactions that are committed and neither sent nor dead.';

CREATE VIEW {schema}.dead AS
  SELECT t.position, t.txid, t.event_count, t.sealed_at, t.attempts, t.dead_at, t.dead_reason, t.discarded_at,
         t.retried_at
    FROM {schema}.transactions AS t WHERE t.dead_at IS NOT NULL;

COMMENT ON VIEW {schema}.dead IS 'Dead letters: transactions that were set aside whole, with the reason.';

REVOKE ALL ON FUNCTION {schema}.add(text, bytea, jsonb, uuid), {schema}.add(text, text, jsonb, uuid),
  {schema}.add(text, jsonb, jsonb, uuid), {schema}.seal(), {schema}.check_event(),
  {schema}.check_closely(text, jsonb, bigint), {schema}.refuse(text, text),
  {schema}.header_bytes(jsonb), {schema}.header_problem(jsonb), {schema}.subject_problem(text) FROM PUBLIC;
