"""The drain rate on bad days next to that on a good one: much pending or sent, a snapshot held, statistics that lie."""

from __future__ import annotations

import time

import psycopg

from outbox.bench.drain import LONGEST, drain
from outbox.bench.figures import Figures, Say
from outbox.bench.site import FAR_TXID, SCHEMA, RelayProcess, Site
from outbox.errors import OutboxError

TABLES = f"{SCHEMA}.events, {SCHEMA}.transactions"
# Rows that were sent long ago; the leader's cursor is behind them.
SENT = f"""
WITH t AS (
  INSERT INTO {SCHEMA}.transactions (txid, event_count, sent_at, stream, first_sequence, last_sequence)
  SELECT (%(first)s + n)::text::xid8, 3, now(), 'OLD', 3 * n - 2, 3 * n FROM generate_series(1, %(transactions)s) AS n
  RETURNING position
), moved AS (
  UPDATE {SCHEMA}.relay SET cursor = (SELECT max(position) FROM t)
)
INSERT INTO {SCHEMA}.events (txid, subject, payload)
SELECT (%(first)s + n)::text::xid8, 'old', decode(repeat('78', %(payload)s), 'hex')
  FROM generate_series(1, %(transactions)s) AS n, generate_series(1, 3)
"""  # noqa: S608 - constants


def pending(site: Site, *, transactions: int, backlog: int, say: Say) -> Figures:
    """The rate of the same number of transactions alone, and at the head of a large backlog."""
    alone = drain(site, transactions=transactions, events=3, payload=256)["drain_events_per_second"]
    say(f"loading {backlog:,} transactions")
    site.load(backlog, 3, 256)
    sent = int(site.value(f"SELECT max(position) FROM {SCHEMA}.transactions WHERE sent_at IS NOT NULL"))  # noqa: S608
    wanted = sent + transactions
    with RelayProcess(site) as relay:
        began, deadline = relay.wait_until_ready(), time.monotonic() + LONGEST
        at = f"SELECT extract(epoch FROM sent_at)::float8 FROM {SCHEMA}.transactions WHERE position = {wanted}"  # noqa: S608
        while (ended := site.value(at)) is None:
            if time.monotonic() > deadline:
                raise OutboxError("the relay does not get on")
            time.sleep(0.2)
        memory = relay.peak_megabytes
    site.prepare()
    rate = transactions * 3 / (ended - began)
    return {**_compared(alone, rate), "relay_peak_megabytes": memory}


def sent(site: Site, *, transactions: int, rows: int, say: Say) -> Figures:
    """The rate without and with so many sent events in the tables."""
    alone = drain(site, transactions=transactions, events=3, payload=256)["drain_events_per_second"]
    say(f"writing {rows:,} sent events")
    with psycopg.connect(site.database_url) as connection:
        for table in ("events", "transactions"):
            connection.execute(f"ALTER TABLE {SCHEMA}.{table} DISABLE TRIGGER USER")
        for start in range(0, rows // 3, 100_000):
            part = {"first": 2 * FAR_TXID + start, "transactions": min(100_000, rows // 3 - start), "payload": 100}
            connection.execute(SENT.encode(), part)
        for table in ("events", "transactions"):
            connection.execute(f"ALTER TABLE {SCHEMA}.{table} ENABLE TRIGGER USER")
    site.sql("CHECKPOINT")
    found = _compared(alone, drain(site, transactions=transactions, events=3, payload=256)["drain_events_per_second"])
    site.prepare()
    return found


def snapshot(site: Site, *, transactions: int, times: int, say: Say) -> Figures:
    """The rate without, and at the end of so many backlogs that passed while a snapshot was held."""
    alone = drain(site, transactions=transactions, events=3, payload=256)["drain_events_per_second"]
    with psycopg.connect(site.database_url) as holder:
        holder.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        holder.execute(f"SELECT count(*) FROM {SCHEMA}.relay")  # noqa: S608
        for number in range(times):
            rate = drain(site, transactions=transactions, events=3, payload=256)["drain_events_per_second"]
            say(f"backlog {number + 1} of {times}: {rate:,.0f} events/s")
    site.prepare()
    return _compared(alone, rate)


def statistics(site: Site, *, transactions: int) -> Figures:
    """The rate in four states of the planner's statistics, autovacuum being off."""

    def rate() -> float:
        return drain(site, transactions=transactions, events=3, payload=256)["drain_events_per_second"]

    def fresh() -> None:
        site.prepare()
        for table in TABLES.split(", "):
            site.sql(f"ALTER TABLE {table} SET (autovacuum_enabled = off)")

    fresh()
    found = {"never_analysed_events_per_second": rate()}
    fresh()
    site.sql(f"ANALYZE {TABLES}")
    found["analysed_empty_events_per_second"] = rate()
    site.sql(f"DELETE FROM {SCHEMA}.events")  # noqa: S608
    site.sql(f"DELETE FROM {SCHEMA}.transactions")  # noqa: S608
    site.sql(f"VACUUM (ANALYZE, TRUNCATE off) {TABLES}")
    found["drained_and_vacuumed_events_per_second"] = rate()
    site.sql(f"ANALYZE {TABLES}")
    site.sql(f"TRUNCATE {TABLES}")
    found["analysed_big_then_emptied_events_per_second"] = rate()
    site.prepare()
    return {**found, "slowest_of_fastest": min(found.values()) / max(found.values())}


def _compared(alone: float, rate: float) -> Figures:
    return {"without_events_per_second": alone, "with_events_per_second": rate, "with_of_without": rate / alone}
