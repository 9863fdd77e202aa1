-- Schema version 2. Online: writers go on, and a transaction that began under version 1 seals under this one.

ALTER TABLE {schema}.relay ADD COLUMN suits_from integer NOT NULL DEFAULT 2;

COMMENT ON COLUMN {schema}.relay.suits_from IS 'Relays that were written for this schema version, or a later one, can work with it.';

ALTER TABLE {schema}.streams ADD COLUMN retired_at timestamptz;

ALTER TABLE {schema}.streams ADD COLUMN fences jsonb;

COMMENT ON COLUMN {schema}.streams.fences IS 'Where others write too: by position, the subject and its last sequence that fence a head.';

ALTER TABLE {schema}.streams ADD COLUMN sharing text;

COMMENT ON COLUMN {schema}.streams.sharing IS 'What other writers cost, where they cost much.';

CREATE TABLE {schema}.housekeeping (
  singleton     boolean NOT NULL DEFAULT true,
  purged        bigint  NOT NULL DEFAULT 0,
  stray_events  bigint  NOT NULL DEFAULT 0,
  drift         text,
  failing       text,
  failing_since timestamptz,
  CONSTRAINT housekeeping_pkey PRIMARY KEY (singleton),
  CONSTRAINT housekeeping_has_one_row CHECK (singleton),
  CONSTRAINT housekeeping_failing_has_a_time CHECK (num_nonnulls(failing, failing_since) IN (0, 2))
) WITH (fillfactor = 20);

COMMENT ON TABLE {schema}.housekeeping IS 'One row: what the purge and the search for strays and drift came to, beside the relay.';

INSERT INTO {schema}.housekeeping (purged) SELECT purged FROM {schema}.relay UNION ALL SELECT 0 LIMIT 1;

-- A transaction that was sent in parts has the stream * and the sequences 1 to its count: the receipts are here.
CREATE TABLE {schema}.parts (
  position       bigint    NOT NULL,
  part           integer   NOT NULL,
  stream         text      NOT NULL,
  numbers        integer[] NOT NULL,
  sent_at        timestamptz,
  first_sequence bigint,
  last_sequence  bigint,
  dead_at        timestamptz,
  dead_reason    text,
  discarded_at   timestamptz,
  moves          boolean   NOT NULL DEFAULT false,
  CONSTRAINT parts_pkey PRIMARY KEY (position, part),
  CONSTRAINT parts_one_a_stream UNIQUE (position, stream),
  CONSTRAINT parts_have_events CHECK (cardinality(numbers) > 0),
  CONSTRAINT parts_receipt_is_whole CHECK (num_nulls(first_sequence, last_sequence) = CASE WHEN sent_at IS NULL THEN 2 ELSE 0 END),
  CONSTRAINT parts_receipt_fits_count CHECK (last_sequence - first_sequence + 1 = cardinality(numbers)),
  CONSTRAINT parts_dead_with_reason CHECK ((dead_at IS NULL) = (dead_reason IS NULL)),
  CONSTRAINT parts_not_sent_and_dead CHECK (sent_at IS NULL OR dead_at IS NULL),
  CONSTRAINT parts_discarded_only_dead CHECK (discarded_at IS NULL OR dead_at IS NOT NULL)
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.05);

COMMENT ON TABLE {schema}.parts IS 'The parts of each transaction over several streams: their events by number, and what became of them.';

CREATE INDEX parts_dead ON {schema}.parts (position) WHERE dead_at IS NOT NULL;

-- By the cursor, the plans and the open positions; one of several parts may be in some of them, and is shown once.
CREATE OR REPLACE VIEW {schema}.pending AS
  SELECT t.position, t.txid, t.event_count, t.sealed_at, t.attempts
    FROM {schema}.relay AS r CROSS JOIN LATERAL (
      SELECT * FROM {schema}.transactions AS beyond WHERE beyond.position > r.cursor
      UNION ALL
      SELECT passed.* FROM unnest(r.open_positions + r.retried + (
          SELECT coalesce(range_agg(places), int8multirange()) FROM {schema}.streams AS s, unnest(s.plan) AS places)) AS gap
        JOIN {schema}.transactions AS passed
          ON passed.position >= lower(gap) AND passed.position < least(upper(gap), r.cursor + 1)
    ) AS t
   WHERE t.sent_at IS NULL AND t.dead_at IS NULL;

CREATE OR REPLACE VIEW {schema}.dead AS
  SELECT t.position, t.txid, t.event_count, t.sealed_at, t.attempts, t.dead_at, t.dead_reason, t.discarded_at,
         t.retried_at
    FROM {schema}.transactions AS t WHERE t.dead_at IS NOT NULL
  UNION ALL (
  SELECT DISTINCT ON (t.position) t.position, t.txid, t.event_count, t.sealed_at, t.attempts, p.dead_at, p.dead_reason,
         p.discarded_at, t.retried_at
    FROM {schema}.parts AS p JOIN {schema}.transactions AS t ON t.position = p.position
   WHERE p.dead_at IS NOT NULL AND t.dead_at IS NULL ORDER BY t.position, p.discarded_at DESC, p.part
  );

COMMENT ON VIEW {schema}.dead IS 'Dead letters: transactions that were set aside whole, or of which a part was, with the reason.';

-- A relay of version 1 that stood by when this version came would send a transaction again as a whole.
CREATE FUNCTION {schema}.check_leader() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
  unsettled bigint;
BEGIN
  IF current_setting({leads}, true) IS DISTINCT FROM '2' THEN
    SELECT min(p.position) INTO unsettled FROM {schema}.parts AS p
      JOIN {schema}.transactions AS t ON t.position = p.position WHERE t.sent_at IS NULL AND t.discarded_at IS NULL;
    IF unsettled IS NOT NULL THEN
      RAISE EXCEPTION USING MESSAGE = 'outbox: transaction ' || unsettled
        || ' has parts in several streams, of which a relay before 0.2 knows nothing', HINT = 'Upgrade outbox-relay.';
    END IF;
  END IF;
  RETURN NEW;
END
$body$;

REVOKE ALL ON FUNCTION {schema}.check_leader() FROM PUBLIC;

CREATE TRIGGER check_leader BEFORE UPDATE ON {schema}.relay
  FOR EACH ROW WHEN (NEW.leader IS NOT NULL AND NEW.leader IS DISTINCT FROM OLD.leader)
  EXECUTE FUNCTION {schema}.check_leader();

-- Whoever may read or write what the relay keeps may do so with what is new.
DO $body$
DECLARE
  given record;
BEGIN
  FOR given IN
    SELECT a.grantee, bool_or(a.privilege_type = 'UPDATE') AS writes
      FROM pg_catalog.pg_class AS c, pg_catalog.aclexplode(c.relacl) AS a
     WHERE c.oid = {relay}::regclass AND a.privilege_type IN ('SELECT', 'UPDATE') AND a.grantee NOT IN (0, c.relowner)
     GROUP BY a.grantee
  LOOP
    EXECUTE format('GRANT SELECT %s ON %s TO %s', CASE WHEN given.writes THEN ', UPDATE' END,
      {housekeeping}, given.grantee::regrole);
    EXECUTE format('GRANT SELECT %s ON %s TO %s', CASE WHEN given.writes THEN ', INSERT, UPDATE, DELETE' END,
      {parts}, given.grantee::regrole);
    IF given.writes THEN
      EXECUTE format('GRANT UPDATE (discarded_at) ON %s TO %s', {transactions}, given.grantee::regrole);
    END IF;
    EXECUTE format('GRANT SELECT ON SEQUENCE %s, %s TO %s', pg_get_serial_sequence({events}, 'id'),
      pg_get_serial_sequence({transactions}, 'position'), given.grantee::regrole);
  END LOOP;
END
$body$;

-- The setting {added} is xid:count:id, with the id of the first event that was counted.
CREATE OR REPLACE FUNCTION {schema}.check_event() RETURNS trigger
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
  added := set_config({added}, mine || CASE WHEN starts_with(added, mine)
    THEN split_part(added, ':', 2)::bigint + 1 || ':' || split_part(added, ':', 3) ELSE '1:' || NEW.id END, true);
  RETURN NEW;
END
$body$;

-- The setting {sealed} is what was added when it was sealed, and where the row is: xid:count:id@(page,item).
CREATE OR REPLACE FUNCTION {schema}.seal() RETURNS trigger
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
  -- Ids rise within a transaction. RESET ALL clears the setting: what was added before it would not be counted. A
  -- transaction that began before this version has no id in there.
  IF NEW.id < nullif(split_part(added, ':', 3), '')::bigint THEN
    PERFORM {schema}.refuse('the setting ' || {added} || ' was cleared within the transaction',
      'Leave the settings of outbox alone: no RESET ALL between the events of a transaction.');
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

COMMENT ON TABLE {schema}.events IS {comment};
