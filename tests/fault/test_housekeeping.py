"""Housekeeping stops nothing: locks of strangers, a session that cannot be had, and what it costs. Promises 4 and 7."""

from __future__ import annotations

import psycopg
import pytest

from outbox.config import Settings
from outbox.core.telemetry import Drifted, HousekeepingFailed, HousekeepingWorks, LeadEnded, Strayed
from outbox.operate import purge, status
from outbox.operate.migrate import grant
from tests.support.bed import ThreadRelay, rows, transactions, until, value, wait_until_sent
from tests.support.servers import Stream

LOCKS = {
    "a transaction": "SELECT FROM outbox.transactions WHERE position = 3 FOR UPDATE",
    "an event": "SELECT FROM outbox.events ORDER BY id OFFSET 2 LIMIT 1 FOR UPDATE",
    "all events, to share": "SELECT FROM outbox.events FOR SHARE",
    "the row of housekeeping": "SELECT FROM outbox.housekeeping FOR UPDATE",
    "the table of events": "LOCK TABLE outbox.events IN SHARE MODE",
}


CHECK_EVENT = """
CREATE TRIGGER check_event BEFORE INSERT ON outbox.events FOR EACH ROW EXECUTE FUNCTION outbox.check_event()
"""


@pytest.mark.parametrize("lock", LOCKS)
def test_what_strangers_lock_stops_nothing_but_its_own_purge(
    database: str, settings: Settings, stream: Stream, lock: str
) -> None:
    """Fault: somebody holds locks on what is old. Publishing goes on, status tells, and later all is deleted."""
    transactions(database, f"{stream.prefix}.x", 20)
    assert ThreadRelay(settings.model_copy(update={"retention": 9.0}), drain=True).ended() is None
    with psycopg.connect(database) as stranger:
        stranger.execute(LOCKS[lock].encode())
        with ThreadRelay(settings.model_copy(update={"retention": 0.0})) as relay:
            relay.wait_for(HousekeepingFailed)
            if "table" not in lock:  # such a lock stops the application itself
                transactions(database, f"{stream.prefix}.x", 5)
                wait_until_sent(database)
            if "row of" not in lock:
                until(lambda: status.status(database).housekeeping_failing, what="status tells")
            stranger.rollback()
            relay.wait_for(HousekeepingWorks, after=len(relay.happenings))
            until(lambda: value(database, "SELECT count(*) FROM outbox.transactions") == 0, what="all is deleted")
            until(lambda: status.status(database).housekeeping_failing is None, what="status tells no more")
            assert not any(isinstance(each, LeadEnded) for each in relay.happenings)
    assert value(database, "SELECT count(*) FROM outbox.events") == 0


def test_no_session_of_its_own(database: str, settings: Settings, stream: Stream) -> None:
    """Fault: the role may have one connection only, and the leader has it. Publishing goes on, and status tells."""
    role = f"one_{database.rpartition('/')[2]}"
    rows(database, f"CREATE ROLE {role} LOGIN SUPERUSER")
    rows(database, f"ALTER ROLE {role} NOSUPERUSER CONNECTION LIMIT 1")
    purge.purge(database, "outbox", 0)
    grant(database, "outbox", relay=role)
    single = settings.model_copy(update={"database_url": database.replace("postgres@", f"{role}@")})
    with ThreadRelay(single) as relay:
        relay.wait_for(HousekeepingFailed, lambda each: "too many connections" in each.why)
        transactions(database, f"{stream.prefix}.x", 5)
        wait_until_sent(database)
        until(lambda: "too many connections" in (status.status(database).housekeeping_failing or ""))
        rows(database, f"ALTER ROLE {role} CONNECTION LIMIT 5")
        relay.wait_for(HousekeepingWorks)
        assert not any(isinstance(each, LeadEnded) for each in relay.happenings)


@pytest.mark.parametrize(
    ("change", "mend", "words"),
    [
        (
            "ALTER TABLE outbox.events DISABLE TRIGGER seal",
            "ALTER TABLE outbox.events ENABLE TRIGGER seal",
            "trigger seal",
        ),
        (
            "DROP TRIGGER check_event ON outbox.events",
            CHECK_EVENT,
            "trigger check_event",
        ),
        (
            "DROP INDEX outbox.transactions_dead",
            "CREATE INDEX transactions_dead ON outbox.transactions (position) WHERE dead_at IS NOT NULL",
            "index transactions_dead",
        ),
    ],
)
def test_a_schema_that_drifts_is_told(database: str, settings: Settings, change: str, mend: str, words: str) -> None:
    """Fault: somebody switches a part of the schema off while a relay leads: events would never go out, in silence."""
    with ThreadRelay(settings) as relay:
        relay.wait_for(HousekeepingWorks)
        rows(database, change)
        assert words in relay.wait_for(Drifted).what
        until(lambda: words in (status.status(database).drift or ""))
        rows(database, mend)
        relay.wait_for(Drifted, lambda each: each.what == "")
        until(lambda: status.status(database).drift is None)


def test_strays_are_told_by_a_leader(database: str, settings: Settings, stream: Stream) -> None:
    """Fault: events were added while the trigger was off."""
    rows(database, "ALTER TABLE outbox.events DISABLE TRIGGER seal")
    rows(database, "SELECT outbox.add(%s, 'x') FROM generate_series(1, 3)", f"{stream.prefix}.x")
    rows(database, "ALTER TABLE outbox.events ENABLE TRIGGER seal")
    with ThreadRelay(settings) as relay:
        assert relay.wait_for(Strayed).events == 3
        until(lambda: status.status(database).stray_events == 3)


def test_a_purge_never_takes_events_of_another_transaction(database: str, settings: Settings, stream: Stream) -> None:
    """Fault: two transactions have one txid. What was sent goes; what is pending beside it keeps its events."""
    transactions(database, f"{stream.prefix}.x", 3)
    assert ThreadRelay(settings, drain=True).ended() is None
    rows(database, "INSERT INTO outbox.streams (name, created, last_sequence) VALUES ('Z', 'x', 0)")
    transactions(database, "nowhere.x", 1)
    same = "(SELECT txid FROM outbox.transactions WHERE position = 2)"
    rows(database, "ALTER TABLE outbox.events DISABLE TRIGGER ALL")
    rows(database, f"UPDATE outbox.events SET txid = {same} WHERE subject = 'nowhere.x'")
    rows(database, f"UPDATE outbox.transactions SET txid = {same} WHERE position = 4")
    rows(database, "ALTER TABLE outbox.events ENABLE TRIGGER ALL")
    with ThreadRelay(settings.model_copy(update={"retention": 0.0})) as relay:
        assert "transaction 2 cannot be deleted" in relay.wait_for(HousekeepingFailed).why
        until(lambda: value(database, "SELECT count(*) FROM outbox.transactions") == 2)
    assert value(database, "SELECT count(*) FROM outbox.events WHERE subject = 'nowhere.x'") == 1


def test_a_role_that_may_not_keep_house_publishes_all_the_same(
    database: str, settings: Settings, stream: Stream
) -> None:
    """Fault: the relay's role was granted by hand, and lacks what housekeeping needs. Its remedy is told."""
    role = f"poor_{database.rpartition('/')[2]}"
    rows(database, f"CREATE ROLE {role} LOGIN")
    grant(database, "outbox", relay=role)
    rows(database, f"REVOKE ALL ON outbox.housekeeping FROM {role}")
    rows(database, f"REVOKE DELETE ON outbox.events FROM {role}")
    poor = settings.model_copy(update={"database_url": database.replace("postgres@", f"{role}@")})
    with ThreadRelay(poor) as relay:
        relay.wait_for(HousekeepingFailed, lambda each: "--relay-role" in each.why)
        transactions(database, f"{stream.prefix}.x", 5)
        wait_until_sent(database)
        assert not any(isinstance(each, LeadEnded) for each in relay.happenings)
