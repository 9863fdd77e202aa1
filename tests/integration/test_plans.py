"""The planner cannot ruin the relay: the very statements, on a large table, in four states of the statistics.

An outbox is mostly analysed while it is empty; a plan made for that reads everything at every poll. Checked are
buffers, not milliseconds: what a statement touches must not grow with what was sent or what is pending.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from outbox.embedded import Postgres
from outbox.postgres import queries
from outbox.postgres.heritage import disinherit_session
from outbox.postgres.rows import array, ranges
from outbox.postgres.session import SESSION
from tests.support.bed import rows
from tests.support.servers import clone

pytestmark = pytest.mark.core

ROWS = 60_000
FILL = f"""
INSERT INTO outbox.transactions (txid, event_count, sent_at, stream, first_sequence, last_sequence)
  SELECT (1000000 + n)::text::xid8, 3, CASE WHEN n <= {ROWS} / 2 THEN now() END, CASE WHEN n <= {ROWS} / 2 THEN 'S' END,
         CASE WHEN n <= {ROWS} / 2 THEN n * 3 - 2 END, CASE WHEN n <= {ROWS} / 2 THEN n * 3 END
    FROM generate_series(1, {ROWS}) AS n;
SET session_replication_role = replica;
INSERT INTO outbox.events (txid, subject, payload)
  SELECT (1000000 + n)::text::xid8, 'a.b', 'x' FROM generate_series(1, {ROWS}) AS n, generate_series(1, 3);
RESET session_replication_role;
"""
STATES = {
    "never analysed": ("", FILL, ""),
    "analysed empty": ("ANALYZE outbox.events, outbox.transactions", FILL, ""),
    "drained and vacuumed": (
        FILL + "DELETE FROM outbox.events; DELETE FROM outbox.transactions;",
        "VACUUM ANALYZE outbox.events, outbox.transactions",
        FILL,
    ),
    "analysed big": (FILL, "ANALYZE outbox.events, outbox.transactions", ""),
}


KEEPS = {"relay": "epoch = epoch", "streams": "last_sequence = last_sequence", "housekeeping": "purged = purged"}
NOTHING: dict[str, Any] = {
    "cursor": 0,
    "open": "{}",
    "retried": "{}",
    "sound": True,
    "blocked": None,
    "epoch": 0,
    **dict.fromkeys(("settling", "positions", "lanes", "lasts"), "{}"),
    **{each: [] for each in ("dead", "reasons", "names", "modes", "bases", "plans", "blocks", "places")},
    **{each: [] for each in ("sinces", "fences", "costs")},
}


@pytest.fixture(scope="session", params=list(STATES))
def large(request: pytest.FixtureRequest, two_phase_postgres: Postgres) -> str:
    """URL of a large outbox, in one of the states; half of it is pending."""
    url = clone(two_phase_postgres)
    rows(url, "ALTER TABLE outbox.events SET (autovacuum_enabled = off)")
    rows(url, "ALTER TABLE outbox.transactions SET (autovacuum_enabled = off)")
    for step in STATES[request.param]:
        if step:
            rows(url, step)
    return url


@pytest.fixture
def filled(large: str) -> Iterator[psycopg.Connection[Any]]:
    """A session like the relay's on a large outbox, which is left as it was."""
    with psycopg.connect(large, autocommit=True) as connection:
        connection.execute(disinherit_session(SESSION))
        connection.autocommit = False
        connection.execute("SET plan_cache_mode = force_generic_plan")
        yield connection
        connection.rollback()


def touched(connection: psycopg.Connection[Any], query: str, **parameters: Any) -> int:
    """Buffers that the statement touches, planned generically as a prepared statement is in the end."""
    text = b"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) " + queries.compose(query, "outbox")
    plan = connection.execute(text, parameters, prepare=True).fetchall()[0][0][0]["Plan"]
    return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])


def place(connection: psycopg.Connection[Any], table: str) -> str:
    """Where the one row of this table is."""
    rows = connection.execute(f"SELECT ctid::text FROM outbox.{table}".encode()).fetchall()
    return str(rows[0][0])


def middle(connection: psycopg.Connection[Any]) -> int:
    row = connection.execute("SELECT max(position) FROM outbox.transactions WHERE sent_at IS NOT NULL").fetchone()
    assert row is not None
    return int(row[0])


def test_page(filled: psycopg.Connection[Any]) -> None:
    cursor = middle(filled)
    page = {
        "cursor": cursor,
        "lows": [cursor - 5],
        "highs": [cursor - 3],
        "messages": 300,
        "bytes": 1 << 26,
    }
    assert touched(filled, queries.PAGE, **page) < 1500
    assert touched(filled, queries.PAGE, **{**page, "cursor": cursor * 2 + 10_000}) < 60


def test_counters_cost_the_same_whatever_was_sent(filled: psycopg.Connection[Any]) -> None:
    """All of it is behind the cursor."""
    filled.execute("UPDATE outbox.relay SET cursor = %s, open_positions = '{[5,9]}'", [middle(filled)])
    assert touched(filled, queries.COUNTERS) < 400


def test_plan_of_a_new_leader(filled: psycopg.Connection[Any]) -> None:
    cursor = middle(filled)
    assert touched(filled, queries.PLANNED, positions=list(range(cursor + 1, cursor + 101))) < 1500


def test_commit(filled: psycopg.Connection[Any]) -> None:
    filled.execute("INSERT INTO outbox.streams (name, created, last_sequence) VALUES ('S', 'x', 0)")
    cursor = middle(filled)
    some = list(range(cursor + 1, cursor + 101))
    parameters: dict[str, Any] = {
        **NOTHING,
        "cursor": cursor + 200,
        "settling": array(some),
        "positions": array(some[:90]),
        "lanes": array([1] * 90),
        "lasts": array(end * 3 for end in some[:90]),
        "dead": some[90:],
        "reasons": ["too-many-events: x"] * 10,
        "names": ["S"],
        "modes": ["chained"],
        "bases": [1],
        "plans": [ranges([1, 2, 5])],
        "sinces": [1],
        "fences": [None],
        "costs": [None],
        "blocks": [None],
        "place": place(filled, "relay"),
        "places": [place(filled, "streams")],
    }
    assert touched(filled, queries.COMMIT, **parameters) < 5000
    row = filled.execute("SELECT count(*) FROM outbox.transactions WHERE dead_at IS NOT NULL").fetchone()
    assert row == (10,)


def test_parts(filled: psycopg.Connection[Any]) -> None:
    """Every transaction has two parts, and a hundred are settled."""
    filled.execute("INSERT INTO outbox.parts (position, part, stream, numbers) SELECT position, part, 'S' || part, "
                   "CASE part WHEN 1 THEN ARRAY[1, 3] ELSE ARRAY[2] END "
                   "FROM outbox.transactions, generate_series(1, 2) AS part")  # fmt: skip
    some = list(range(middle(filled) + 1, middle(filled) + 101))
    assert touched(filled, queries.PARTS_OF, positions=some) < 2500
    settled: dict[str, Any] = {
        **{each: [] for each in ("positions", "parts", "streams", "numbers")},
        "settling": [position for position in some for _ in "ab"],
        "settled": [1, 2] * 100,
        "firsts": [1, None] * 100,
        "lasts": [2, None] * 100,
        "reasons": [None, "invalid-ttl: x"] * 100,
    }
    assert touched(filled, queries.PARTS_SETTLED, **settled) < 5000
    assert touched(filled, queries.WHOLE_SETTLED, positions=some) < 2500
    row = filled.execute("SELECT count(*) FROM outbox.transactions WHERE dead_at IS NOT NULL").fetchone()
    assert row == (100,)
    assert touched(filled, queries.FIRST_DEAD) < 30


def test_purge_touches_only_what_goes(filled: psycopg.Connection[Any]) -> None:
    filled.execute("UPDATE outbox.relay SET cursor = (SELECT max(position) FROM outbox.transactions)")
    assert touched(filled, queries.OLD, after=0, upto=None, seconds=3600, most=100) < 150
    filled.execute("UPDATE outbox.transactions SET sent_at = now() - interval '2 hours' WHERE position IN "
                   "(SELECT position FROM outbox.transactions ORDER BY position LIMIT 100)")  # fmt: skip
    old = [row[0] for row in filled.execute(queries.compose(queries.OLD, "outbox"),
                                            {"after": 0, "upto": None, "seconds": 3600, "most": 100})]  # fmt: skip
    assert len(old) == 100
    assert touched(filled, queries.PURGE, positions=old, seconds=3600, place=place(filled, "housekeeping")) < 4000
    assert filled.execute("SELECT count(*) FROM outbox.transactions").fetchone() == (ROWS - 100,)


def test_what_each_commit_updates_is_found_past_every_dead_version(filled: psycopg.Connection[Any]) -> None:
    """A stranger holds a snapshot, and each commit leaves versions of these rows that nobody can remove."""
    filled.execute("INSERT INTO outbox.streams (name, created, last_sequence) VALUES ('S', 'x', 0)")
    filled.commit()
    with psycopg.connect(filled.info.dsn) as stranger, psycopg.connect(filled.info.dsn, autocommit=True) as writer:
        stranger.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        stranger.execute("SELECT txid_current()")
        for table, keeps in KEEPS.items():
            update = f"UPDATE outbox.{table} SET {keeps}"
            writer.execute(f"DO $$ BEGIN FOR n IN 1 .. 2000 LOOP {update}; END LOOP; END $$".encode())
        ping = {"place": place(filled, "relay")}
        assert touched(filled, queries.PING, **ping) < 10
        assert touched(filled, queries.PING, place=None) > 20  # without it they are all looked at
        given = {**NOTHING, **ping, "names": ["S"], "modes": ["chained"], "bases": [1], "plans": ["{}"],
                 "sinces": [1], "fences": [None], "costs": [None],
                 "blocks": [None], "places": [place(filled, "streams")]}  # fmt: skip
        assert touched(filled, queries.COMMIT, **given) < 40
        there = place(filled, "housekeeping")
        assert touched(filled, queries.PURGE, positions=[], seconds=3600, place=there) < 40
    filled.execute("DELETE FROM outbox.streams")
    filled.commit()
    rows(filled.info.dsn, "VACUUM outbox.relay, outbox.streams, outbox.housekeeping")


def test_pending_view_does_not_read_what_was_sent(filled: psycopg.Connection[Any]) -> None:
    cursor = middle(filled)
    filled.execute("UPDATE outbox.relay SET cursor = %s", [cursor * 2 + 10_000])
    assert touched(filled, queries.ANY_PENDING) < 60
