-- Removes what version 1 created. The schema itself goes only if nothing of anybody else is left in it.

DROP VIEW {schema}.dead;

DROP VIEW {schema}.pending;

DROP TABLE {schema}.events, {schema}.transactions, {schema}.streams, {schema}.relay, {schema}.limits;

DROP FUNCTION {schema}.add(text, jsonb, jsonb, uuid), {schema}.add(text, text, jsonb, uuid), {schema}.add(text, bytea, jsonb, uuid);

DROP FUNCTION {schema}.seal(), {schema}.check_event(), {schema}.check_closely(text, jsonb, bigint), {schema}.refuse(text, text);

DROP FUNCTION {schema}.header_bytes(jsonb), {schema}.header_problem(jsonb), {schema}.subject_problem(text);

DO $body$
BEGIN
  IF NOT EXISTS (SELECT FROM pg_depend WHERE refclassid = 'pg_namespace'::regclass AND refobjid = {literal}::regnamespace
                 AND deptype = 'n' AND classid <> 'pg_default_acl'::regclass) THEN
    DROP SCHEMA {schema};
  END IF;
END
$body$;
