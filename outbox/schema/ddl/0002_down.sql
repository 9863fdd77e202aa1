-- Back to version 1.

UPDATE {schema}.relay SET purged = greatest(purged, (SELECT h.purged FROM {schema}.housekeeping AS h));

DO $body$
DECLARE
  unsettled bigint;
BEGIN
  SELECT min(p.position) INTO unsettled FROM {schema}.parts AS p JOIN {schema}.transactions AS t ON t.position = p.position
   WHERE t.sent_at IS NULL AND t.discarded_at IS NULL;
  IF unsettled IS NOT NULL THEN
    RAISE EXCEPTION USING MESSAGE = 'outbox: transaction ' || unsettled
      || ' has parts in several streams and is not settled: version 1 would send it again as a whole',
      HINT = 'Let the relay send it; or outbox dead retry, or outbox dead discard.';
  END IF;
END
$body$;

-- What is settled goes as by a purge: version 1 does not know where its parts are.
WITH gone AS (
  DELETE FROM {schema}.transactions AS t USING {schema}.parts AS p WHERE t.position = p.position
  RETURNING t.position, t.txid
), events AS (
  DELETE FROM {schema}.events AS e USING gone WHERE e.txid = gone.txid
)
UPDATE {schema}.relay SET purged = greatest(purged, (SELECT max(position) FROM gone));

CREATE OR REPLACE VIEW {schema}.pending AS
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

CREATE OR REPLACE VIEW {schema}.dead AS
  SELECT t.position, t.txid, t.event_count, t.sealed_at, t.attempts, t.dead_at, t.dead_reason, t.discarded_at,
         t.retried_at
    FROM {schema}.transactions AS t WHERE t.dead_at IS NOT NULL;

COMMENT ON VIEW {schema}.dead IS 'Dead letters: transactions that were set aside whole, with the reason.';

DROP TRIGGER check_leader ON {schema}.relay;

DROP FUNCTION {schema}.check_leader();

DROP TABLE {schema}.parts;

DROP TABLE {schema}.housekeeping;

DO $body$
BEGIN
  IF EXISTS (SELECT FROM {schema}.streams WHERE fences IS NOT NULL AND cardinality(plan) > 0) THEN
    RAISE EXCEPTION USING MESSAGE = 'outbox: what is planned for a stream of several writers is not settled',
      HINT = 'Run: outbox relay --drain. Relays of the schema before would send it again.';
  END IF;
END
$body$;

ALTER TABLE {schema}.streams DROP COLUMN retired_at, DROP COLUMN fences, DROP COLUMN sharing;

ALTER TABLE {schema}.relay DROP COLUMN suits_from;

DO $body$
DECLARE
  given record;
BEGIN
  FOR given IN
    SELECT c.oid::regclass AS sequence, a.grantee FROM pg_catalog.pg_class AS c, pg_catalog.aclexplode(c.relacl) AS a
     WHERE c.oid IN (pg_get_serial_sequence({events}, 'id')::regclass,
                     pg_get_serial_sequence({transactions}, 'position')::regclass)
       AND a.grantee NOT IN (0, c.relowner)
  LOOP
    EXECUTE format('REVOKE ALL ON SEQUENCE %s FROM %s', given.sequence, given.grantee::regrole);
  END LOOP;
END
$body$;

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
  added := set_config({added},
    mine || CASE WHEN starts_with(added, mine) THEN split_part(added, ':', 2)::bigint + 1 ELSE 1 END, true);
  RETURN NEW;
END
$body$;

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

COMMENT ON TABLE {schema}.events IS 'outbox schema version 1. One row per event; append-only.';
