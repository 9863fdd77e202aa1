"""Counters that were put back, or rows that came without theirs. Promise 5: nothing committed is ever out of sight.

Whatever happened to sequences, tables, the cursor or transaction ids: a relay says so and halts, as do the doctor, the
status and `verify`, and a rebase settles it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import psycopg
import pytest

from outbox.config import Settings
from outbox.core.telemetry import Marked
from outbox.doctor.check import Colour
from outbox.doctor.examine import examine
from outbox.embedded import Nats
from outbox.errors import Halt, Misconfigured
from outbox.operate import queries, rebase, txids
from outbox.operate.status import status
from outbox.operate.verify import verify
from outbox.relay import housekeeping
from tests.support.bed import Broker, ThreadRelay, rows, until, value
from tests.support.servers import Stream

Damage = Callable[[str], object]
WHOLE = """
SELECT t.position FROM outbox.transactions AS t JOIN outbox.events AS e USING (txid) GROUP BY 1 HAVING count(*) = 2
"""
MOVED = "SELECT count(*) FROM outbox.transactions WHERE txid >= '9223372036854775808'::xid8"
TRUNCATE = "TRUNCATE outbox.events, outbox.transactions RESTART IDENTITY"


def add(url: str, stream: Stream, *payloads: str) -> None:
    """A transaction of two events for each payload."""
    for payload in payloads:
        rows(url, "SELECT outbox.add(%s, %s), outbox.add(%s, %s)", *[f"{stream.prefix}.x", payload] * 2)


def drained(settings: Settings) -> BaseException | None:
    return ThreadRelay(settings, drain=True).ended()


def payloads(broker: Broker, stream: Stream) -> list[str]:
    """The payload of each transaction in the stream, which are whole."""
    stored = broker.read(stream.name)
    assert [each.number for each in stored] == [1, 2] * (len(stored) // 2)
    return [each.payload.decode() for each in stored[::2]]


def anomalies(settings: Settings) -> list[str]:
    return [each.kind for one in asyncio.run(verify(settings)) for each in one.anomalies]


def counters(settings: Settings) -> Colour:
    """The worst that the doctor says of the counters."""
    found = [each.colour for each in asyncio.run(examine(settings)) if each.name == "counters"]
    return Colour.RED if Colour.RED in found else found[0]


def halts(settings: Settings) -> str:
    error = drained(settings)
    assert isinstance(error, Halt), error
    assert "outbox rebase" in error.remedy
    return error.message


@pytest.fixture
def sent(database: str, stream: Stream, settings: Settings) -> Settings:
    """Five transactions of two events, sent."""
    add(database, stream, "1", "2", "3", "4", "5")
    assert drained(settings) is None
    assert counters(settings) is Colour.GREEN
    assert status(database).unreconciled is None
    return settings


def statements(*texts: str) -> Damage:
    return lambda url: [rows(url, text) for text in texts]


def restored_from_another_cluster(url: str) -> None:
    """The rows alone, with their sequences, beside a fresh row of `relay`: their ids are still to be handed out."""
    with psycopg.connect(url) as connection:
        for table in ("events", "transactions"):
            connection.execute(f"UPDATE outbox.{table} SET txid = (txid::text::bigint + 1000000)::text::xid8".encode())
        connection.execute("DELETE FROM outbox.relay")
        connection.execute("DELETE FROM outbox.streams")
        connection.execute("INSERT INTO outbox.relay DEFAULT VALUES")


def logically_copied(url: str) -> None:
    """The same, without their sequences."""
    restored_from_another_cluster(url)
    rows(url, "SELECT setval('outbox.transactions_position_seq', 1, false), setval('outbox.events_id_seq', 1, false)")


# What was done, whether before the three new transactions are added, and what the relay says.
BEFORE = {
    "truncate": (statements(TRUNCATE), "positions began anew"),
    "setval": (
        statements(
            "DELETE FROM outbox.events",
            "DELETE FROM outbox.transactions",
            "SELECT setval('outbox.transactions_position_seq', 1)",
        ),
        "positions began anew",
    ),
    "restart": (
        statements(
            "TRUNCATE outbox.events, outbox.transactions",
            "ALTER TABLE outbox.transactions ALTER COLUMN position RESTART WITH 2",
        ),
        "positions began anew",
    ),
    "cursor set by hand": (statements("UPDATE outbox.relay SET cursor = 1000"), "positions began anew"),
    "cursor set out of reach": (
        statements("UPDATE outbox.relay SET cursor = 9223372036854775807"),
        "positions began anew",
    ),
    "open positions of another time": (
        statements("UPDATE outbox.relay SET open_positions = '{[900,950)}'"),
        "positions began anew",
    ),
    "a plan of another time": (
        statements("UPDATE outbox.streams SET plan = ARRAY['[900,950)'::int8range]"),
        "positions began anew",
    ),
}
AFTER = {
    "sequences not restored": (
        statements("SELECT setval('outbox.transactions_position_seq', 1, false)"),
        "positions began anew",
    ),
    "relay of another time": (
        statements("UPDATE outbox.relay SET cursor = 8"),
        "transaction 6 is committed and neither sent nor dead",
    ),
    "dead and undone by hand": (
        statements(
            "UPDATE outbox.transactions SET dead_at = now(), dead_reason = 'x' WHERE position = 7",
            "UPDATE outbox.relay SET cursor = 7, open_positions = '{[6,6]}'",
            "UPDATE outbox.transactions SET dead_at = NULL, dead_reason = NULL WHERE position = 7",
        ),
        "transaction 7 is committed and neither sent nor dead",
    ),
    "logical copy": (logically_copied, "positions began anew"),
    "rows of another cluster": (restored_from_another_cluster, "has yet to hand out"),
}


@pytest.mark.core
@pytest.mark.parametrize("what", [*BEFORE, *AFTER])
def test_counters_that_contradict_the_rows_are_loud_and_a_rebase_settles_it(
    what: str, sent: Settings, broker: Broker, stream: Stream
) -> None:
    url = sent.database_url
    damage, words = (BEFORE | AFTER)[what]
    if what in BEFORE:
        damage(url)
    add(url, stream, "6", "7", "8")
    if what in AFTER:
        damage(url)
    assert words in halts(sent)
    assert words in halts(sent)  # a supervisor starts it again
    assert words in (status(url).unreconciled or "")
    assert counters(sent) is Colour.RED
    assert {"counters", "stranded"} & set(anomalies(sent))
    asyncio.run(rebase.rebase(sent))
    assert counters(sent) is Colour.GREEN
    assert status(url).pending_transactions == 3
    reached = max(5, value(url, "SELECT max(position) FROM outbox.transactions"))
    add(url, stream, "9")
    assert value(url, "SELECT max(position) FROM outbox.transactions") > reached
    assert drained(sent) is None
    assert payloads(broker, stream) == ["1", "2", "3", "4", "5", "6", "7", "8", "9"]
    if what not in (
        "logical copy",
        "rows of another cluster",
    ):  # where the row of `relay` is fresh, what was sent under its old id is foreign
        assert anomalies(sent) == []
    assert value(url, "SELECT count(DISTINCT txid) = count(*) FROM outbox.transactions")


def test_counter_that_has_caught_up_hides_nothing(sent: Settings, broker: Broker, stream: Stream) -> None:
    """Fault: TRUNCATE … RESTART IDENTITY, and more transactions than ever were sent. Promise: the first are seen."""
    rows(sent.database_url, TRUNCATE)
    add(sent.database_url, stream, "a", "b", "c", "d", "e", "f", "g")
    assert "transaction 1 is committed and neither sent nor dead" in halts(sent)
    stranded = [each for one in asyncio.run(verify(sent)) for each in one.anomalies if each.kind == "stranded"]
    assert [(each.position, each.last_position) for each in stranded] == [(1, 5)]
    asyncio.run(rebase.rebase(sent))
    assert drained(sent) is None
    assert payloads(broker, stream)[5:] == ["a", "b", "c", "d", "e", "f", "g"]


def test_what_lies_between_many_sent_ones_is_found_by_doctor_and_verify(
    database: str, settings: Settings, stream: Stream
) -> None:
    """Fault: a pending transaction behind the cursor, thousands of sent ones around it. Promise: both name it."""
    rows(
        database,
        "INSERT INTO outbox.transactions (txid, event_count, sent_at, stream, first_sequence, last_sequence) "
        "SELECT (9300000000000000000 + n)::text::xid8, 1, now(), 'S', n, n FROM generate_series(1, 5000) AS n",
    )
    rows(
        database,
        "UPDATE outbox.transactions SET sent_at = NULL, stream = NULL, first_sequence = NULL, last_sequence = NULL "
        "WHERE position = 2500",
    )
    rows(database, "UPDATE outbox.relay SET cursor = 5000")
    assert status(database).unreconciled is None
    assert counters(settings) is Colour.RED
    found = asyncio.run(verify(settings, first=2000, last=3000))[-1]
    assert [(found.stream, each.kind, each.position) for each in found.anomalies] == [("", "stranded", 2500)]


def test_truncate_under_a_relay_that_leads(
    database: str, settings: Settings, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(housekeeping, "COUNTER_SECONDS", 0.1)
    relay = ThreadRelay(settings)
    add(database, stream, "1", "2")
    relay.wait_for(Marked)
    until(lambda: status(database).pending_transactions == 0)
    rows(database, TRUNCATE)
    add(database, stream, "3")
    error = relay.ended()
    assert isinstance(error, Halt)
    assert "positions began anew" in error.message
    assert "positions began anew" in (status(database).blocked or "")


def hand_out(url: str, number: int) -> None:
    """Let the cluster hand out so many transaction ids."""
    with psycopg.connect(url, autocommit=True) as connection:
        for _ in range(number):
            connection.execute("SELECT pg_current_xact_id()")


def shift_txids(url: str, where: str, txid: str) -> None:
    """Rows as if another cluster had written them: with this id, SQL on the old one."""
    for table in ("events", "transactions"):
        rows(url, f"UPDATE outbox.{table} SET txid = ({txid})::text::xid8 WHERE {where.format(table=table)}")


def test_second_rebase_gives_no_transaction_the_id_of_another(sent: Settings, broker: Broker, stream: Stream) -> None:
    """Fault: from cluster A to B to C, rows kept across both, whose ids were equal. Promise: purged one by one."""
    url = sent.database_url
    ahead = "txid::text::bigint + 1000000"
    lower = "txid < '9223372036854775808'::xid8"
    equal = value(url, "SELECT (max(txid::text::bigint) + 2000000)::text FROM outbox.transactions")
    first = "txid = (SELECT txid FROM outbox.transactions WHERE position = 1)"
    rows(url, f"UPDATE outbox.events SET txid = '{equal}'::xid8 WHERE {first}")
    rows(url, f"UPDATE outbox.transactions SET txid = '{equal}'::xid8 WHERE position = 1")
    shift_txids(url, f"{lower} AND txid <> '{equal}'::xid8", ahead)
    asyncio.run(rebase.rebase(sent))
    add(url, stream, "6")
    shift_txids(url, lower, f"'{equal}'")
    asyncio.run(rebase.rebase(sent))
    moved = rows(url, "SELECT position, txid::text::numeric - %s FROM outbox.transactions", queries.MOVED_TXIDS)
    assert all(position == offset for position, offset in moved)
    assert len(moved) == 6
    assert len(rows(url, WHOLE)) == 6
    assert drained(sent) is None
    assert anomalies(sent) == []


def test_two_transactions_with_one_id_are_told_apart(sent: Settings, broker: Broker, stream: Stream) -> None:
    """Fault: a restored transaction's id was handed out again before anybody rebased. Promise: neither is the other."""
    url = sent.database_url
    add(url, stream, "6")
    rows(url, "SELECT outbox.add(%s, '7')", f"{stream.prefix}.x")
    of = "(SELECT txid FROM outbox.transactions WHERE position = {})"
    rows(url, f"UPDATE outbox.events SET txid = {of.format(6)} WHERE txid = {of.format(7)}")
    rows(url, f"UPDATE outbox.transactions SET txid = {of.format(6)} WHERE position = 7")
    asyncio.run(rebase.rebase(sent))
    assert drained(sent) is None
    stored = [(each.position, each.payload) for each in broker.read(stream.name)]
    assert stored[10:] == [(6, b"6"), (6, b"6"), (7, b"7")]
    rows(url, f"UPDATE outbox.events SET txid = {of.format(6)} WHERE txid = {of.format(7)}")
    rows(url, f"UPDATE outbox.transactions SET txid = {of.format(6)} WHERE position = 7")
    rows(url, f"UPDATE outbox.events SET created_at = now() WHERE txid = {of.format(6)}")
    with pytest.raises(Halt, match="cannot be told which events are whose"):
        asyncio.run(rebase.rebase(sent))


def test_nothing_is_moved_where_transaction_ids_go_on(sent: Settings, stream: Stream) -> None:
    add(sent.database_url, stream, "6")
    before = rows(sent.database_url, "SELECT txid::text FROM outbox.transactions ORDER BY position")
    asyncio.run(rebase.rebase(sent))
    assert rows(sent.database_url, "SELECT txid::text FROM outbox.transactions ORDER BY position") == before


def test_rebase_that_is_interrupted_between_pages_is_run_again(
    sent: Settings, broker: Broker, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(txids, "PAGE", 2)
    url = sent.database_url
    add(url, stream, "6", "7")
    shift_txids(url, "true", "txid::text::bigint + 1000000")

    def interrupted(what: str, done: int, total: int) -> None:
        if what == "transaction ids" and done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(rebase.rebase(sent, progress=interrupted))
    assert value(url, MOVED) == 4
    assert len(rows(url, WHOLE)) == 7
    asyncio.run(rebase.rebase(sent))
    assert (value(url, MOVED), len(rows(url, WHOLE))) == (7, 7)
    assert drained(sent) is None
    assert payloads(broker, stream) == ["1", "2", "3", "4", "5", "6", "7"]


def test_writers_that_do_not_end_are_named_and_hold_nobody_up(
    sent: Settings, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: a transaction that has added something stays open. Promise: others write on, and the words say who."""
    monkeypatch.setattr(rebase, "WRITER_TRIES", 3)
    url = sent.database_url
    subject = f"{stream.prefix}.x"
    with psycopg.connect(url, application_name="the long one") as writer:
        writer.execute("SELECT outbox.add(%s, 'late')", [subject])
        with pytest.raises(Exception, match="the long one") as refused:
            asyncio.run(rebase.rebase(sent))
        assert f"pid {writer.info.backend_pid}" in str(refused.value)
        monkeypatch.setattr(rebase, "WRITER_TRIES", 1000)
        rebasing = threading.Thread(target=lambda: asyncio.run(rebase.rebase(sent)))
        rebasing.start()
        for _ in range(5):
            add(url, stream, "meanwhile")
        assert rebasing.is_alive()
        writer.commit()
    rebasing.join()
    assert drained(sent) is None


def test_prepared_transaction_that_holds_a_rebase_up_is_named(
    two_phase_database: str, nats: Nats, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rebase, "WRITER_TRIES", 2)
    settings = Settings(database_url=two_phase_database, nats_url=nats.url)
    gid = f"late {stream.name}"
    with psycopg.connect(two_phase_database, autocommit=True) as connection:
        connection.execute("BEGIN")
        connection.execute("SELECT outbox.add(%s, 'late')", [f"{stream.prefix}.x"])
        connection.execute(f"PREPARE TRANSACTION '{gid}'")
        with pytest.raises(Misconfigured, match=f"prepared transaction '{gid}'"):
            asyncio.run(rebase.rebase(settings))
        connection.execute(f"COMMIT PREPARED '{gid}'")
    asyncio.run(rebase.rebase(settings))
    assert drained(settings) is None


def test_rebase_of_many_rows_does_not_stop_writers(database: str, settings: Settings, stream: Stream) -> None:
    """Fault: a table full of another cluster's rows. Promise: writers go on from page to page."""
    rows(
        database,
        "INSERT INTO outbox.transactions (txid, event_count, sent_at, stream, first_sequence, last_sequence) "
        "SELECT (1000000000 + n)::text::xid8, 1, now(), 'S', n, n FROM generate_series(1, 20000) AS n",
    )
    rows(
        database,
        "SET session_replication_role = replica; INSERT INTO outbox.events (txid, subject, payload) "
        "SELECT (1000000000 + n)::text::xid8, 'a', 'x' FROM generate_series(1, 20000) AS n",
    )
    rows(database, "UPDATE outbox.relay SET cursor = 20000")
    written: list[str] = []

    def write_on(what: str, done: int, total: int) -> None:
        add(database, stream, f"{what} {done} of {total}")  # would wait for ever if writers were locked out
        written.append(what)

    asyncio.run(rebase.rebase(settings, progress=write_on))
    assert written == ["transaction ids"] * (20_000 // txids.PAGE)
    assert value(database, MOVED) == 20_000
    assert status(database).pending_transactions == len(written)
    assert drained(settings) is None
