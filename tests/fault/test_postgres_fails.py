"""What fails is Postgres, without losing anything: sessions, the postmaster, locks, writes. Promises 1 to 3 and 5."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from functools import partial
from pathlib import Path

import psycopg
import pytest

from outbox.config import Settings
from outbox.core.telemetry import Blocked, Connected, LostLead, Marked, TookLead, Unreachable
from outbox.doctor.check import Colour
from outbox.doctor.examine import examine
from outbox.embedded import Nats
from outbox.errors import OutboxError
from outbox.operate.status import status
from outbox.postgres import session
from tests.support.bed import Broker, ThreadRelay, rows, until, value, wait_until_sent
from tests.support.faults import more_sent
from tests.support.servers import Stream, own_postgres, prepared
from tests.support.workload import Writers, check

TERMINATE = (
    "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
    " WHERE application_name = 'outbox relay' AND datname = current_database()"
)
MOVE = {
    "streams": "UPDATE outbox.streams SET name = name",
    "relay": "UPDATE outbox.relay SET epoch = epoch",
    "housekeeping": "UPDATE outbox.housekeeping SET purged = purged",
}
SENT = "SELECT count(*) FROM outbox.transactions WHERE sent_at IS NOT NULL"


def wait_for_times(relay: ThreadRelay, times: int, words: str) -> None:
    """Wait until the relay has met this weather so many times."""
    after = 0
    for _ in range(times):
        relay.wait_for(Unreachable, lambda each: words in each.why, after=after)
        after = next(
            at + 1
            for at, each in enumerate(relay.happenings)
            if at >= after and isinstance(each, Unreachable) and words in each.why
        )


@pytest.mark.core
def test_session_is_terminated_under_load(database: str, settings: Settings, broker: Broker, stream: Stream) -> None:
    """Fault: pg_terminate_backend of the relay, at whatever it does. Promise: the same relay goes on by itself."""
    writers = Writers(database, stream.prefix, threads=4, endless=True, seed=101).start()
    with ThreadRelay(settings) as relay:
        for _ in range(8):
            more_sent(database)
            assert value(database, TERMINATE) == 1
        more_sent(database)
        writers.stop()
        wait_until_sent(database)
        terms = sum(isinstance(each, TookLead) for each in relay.happenings)
    assert terms == 9
    report = check(database, broker.read(stream.name))
    assert report.anomalies == {}
    assert report.transactions == writers.committed


def test_postmaster_is_killed_under_load(nats: Nats, broker: Broker, stream: Stream, workplace: Path) -> None:
    """Fault: SIGKILL of the postmaster, and crash recovery, five times. Promise: the same relay goes on by itself."""
    with own_postgres(workplace / "postgres") as server:
        url = prepared(server).url()
        writers = Writers(url, stream.prefix, threads=4, endless=True, seed=103).start()
        with ThreadRelay(Settings(database_url=url, nats_url=nats.url)) as relay:
            for _ in range(5):
                more_sent(url)
                server.restart(kill=True)
            more_sent(url)
            writers.stop()
            wait_until_sent(url)
            assert sum(isinstance(each, TookLead) for each in relay.happenings) >= 6
        report = check(url, broker.read(stream.name))
    assert report.anomalies == {}
    assert report.transactions >= writers.committed


@pytest.mark.parametrize("table", ["transactions", "events", "streams", "relay"])
def test_statement_time_outs_in_a_wait_for_a_lock(
    database: str,
    settings: Settings,
    broker: Broker,
    stream: Stream,
    monkeypatch: pytest.MonkeyPatch,
    table: str,
) -> None:
    """Fault: somebody locks a table of the outbox, and every statement times out. Promise: waited out."""
    for name in ("statement_timeout", "lock_timeout"):  # what fetches events has only the second one
        monkeypatch.setitem(session.SESSION, name, "500ms")
    writers = Writers(database, stream.prefix, threads=3, endless=True, seed=107).start()
    with ThreadRelay(settings) as relay:
        more_sent(database)
        with psycopg.connect(database) as locking:
            locking.execute(f"LOCK TABLE outbox.{table} IN ACCESS EXCLUSIVE MODE".encode())
            told = (Blocked, Unreachable)  # a lock is waited for in the same term, all else in the next one
            relay.wait_for(object, lambda each: isinstance(each, told) and "timeout" in each.why)
            threading.Event().wait(3)  # a few more time out
        more_sent(database)
        writers.stop()
        wait_until_sent(database)
    report = check(database, broker.read(stream.name))
    assert report.anomalies == {}
    assert report.transactions == writers.committed


def test_lock_that_is_held_while_a_relay_stops(
    database: str, settings: Settings, broker: Broker, stream: Stream
) -> None:
    """Fault: what is to be marked is locked when the relay is stopped. Promise: marked, and no death is counted."""
    with psycopg.connect(database) as stranger, ThreadRelay(settings) as relay:
        rows(database, "SELECT outbox.add(%s, 'x')", f"{stream.prefix}.x")
        relay.wait_for(Marked)
        rows(database, "SELECT outbox.add(%s, 'x')", f"{stream.prefix}.x")
        stranger.execute("SELECT FROM outbox.relay FOR UPDATE")
        relay.wait_for(Blocked)
        ending = threading.Thread(target=relay.stop)
        ending.start()
        threading.Event().wait(1.5)  # more than the relay waits for a lock at a time
        stranger.rollback()
        ending.join()
        assert relay.error is None
    assert rows(database, "SELECT leader, deaths FROM outbox.relay") == [(None, 0)]


def test_rows_of_the_relay_that_move_end_no_term(database: str, settings: Settings, stream: Stream) -> None:
    """Fault: somebody writes to the rows that the relay knows by their place. Promise: they are looked for again."""
    with ThreadRelay(settings) as relay:
        for number, table in enumerate(("relay", "streams", "housekeeping", "streams, relay"), start=1):
            for each in table.split(", "):
                rows(database, MOVE[each])
            rows(database, "SELECT outbox.add(%s, 'x')", f"{stream.prefix}.x")
            until(partial(lambda least: value(database, SENT) >= least, number))
        assert not any(isinstance(each, LostLead | Unreachable) for each in relay.happenings)


def test_read_only_for_a_while(nats: Nats, broker: Broker, stream: Stream, workplace: Path) -> None:
    """Fault: the relay may only read, first in the midst of a term, then from its start. Promise: waited out."""
    with own_postgres(workplace / "postgres") as server:
        url = prepared(server).url()
        writing = f"{url}?options=-c%20default_transaction_read_only%3Doff"
        writers = Writers(writing, stream.prefix, threads=3, endless=True, seed=109).start()
        settings = Settings(database_url=url, nats_url=nats.url)
        with ThreadRelay(settings) as relay:
            more_sent(url)
            rows(url, "ALTER SYSTEM SET default_transaction_read_only = on")
            rows(url, "SELECT pg_reload_conf()")
            wait_for_times(relay, 2, "read-only")
            (seen, *_) = [each for each in asyncio.run(examine(settings)) if each.colour is Colour.RED]
            blocked = status(url).blocked
            assert blocked is not None
            for words in (f"{seen.found} {seen.remedy}", blocked, relay.wait_for(Unreachable).why):
                assert "the database is read-only" in words
                assert "ALTER SYSTEM RESET default_transaction_read_only" in words
            connected = sum(isinstance(each, Connected) for each in relay.happenings)
            rows(url, TERMINATE)
            until(lambda: sum(isinstance(each, Connected) for each in relay.happenings) > connected)
            assert value(url, "SELECT count(*) FROM outbox.pending") > 0
            rows(writing, "ALTER SYSTEM RESET default_transaction_read_only")
            rows(url, "SELECT pg_reload_conf()")
            more_sent(url)
            writers.stop()
            wait_until_sent(url)
            assert not any(isinstance(each, LostLead) for each in relay.happenings)
            relay.wait_for(Marked)
        report = check(url, broker.read(stream.name))
    assert report.anomalies == {}
    assert report.transactions == writers.committed


CODES = "22012 23514 26000 2F005 3F000 40001 42883 54000 57014 P0001 XX001 ZZ999"
REFUSE = """
CREATE OR REPLACE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE 'no' USING ERRCODE = '{}'; END$$;
CREATE OR REPLACE TRIGGER refuse BEFORE UPDATE ON outbox.transactions FOR EACH ROW EXECUTE FUNCTION refuse()
"""


def test_no_error_of_a_statement_is_a_crash_or_a_verdict(database: str, settings: Settings, stream: Stream) -> None:
    """Fault: marking fails in whatever way. Promise: the relay waits, or ends with a remedy, and blames none."""
    rows(database, "SELECT outbox.add(%s, 'x')", f"{stream.prefix}.x")
    for code in CODES.split():
        rows(database, REFUSE.format(code))
        relay = ThreadRelay(settings)
        with contextlib.suppress(OutboxError), relay:
            until(partial(has_met_it, relay))
        assert relay.error is None or (isinstance(relay.error, OutboxError) and relay.error.remedy), code
        rows(database, "DROP TRIGGER refuse ON outbox.transactions")
        assert rows(database, "SELECT attempts, dead_at, sent_at FROM outbox.transactions") == [(0, None, None)], code
    assert ThreadRelay(settings, drain=True).ended() is None


def has_met_it(relay: ThreadRelay) -> bool:
    return relay.error is not None or any(isinstance(each, Unreachable) for each in relay.happenings)
