"""Schema version 1 is what 0.1.0 has: frozen, and whatever state 0.1.0 left it in, publishing goes on from there."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from importlib import resources

import psycopg
import pytest

from outbox.config import Settings
from outbox.core.telemetry import Blocked, TookLead, Waiting
from outbox.embedded import Nats, Postgres
from outbox.errors import Misconfigured, Unsuited, Weather
from outbox.operate import migrate, pause
from outbox.operate.verify import verify
from tests.support.bed import Broker, ThreadRelay, rows, until, value
from tests.support.servers import fingerprint, numbers
from tests.support.version1 import STATES, restored

COLUMNS = """
SELECT column_name FROM information_schema.columns WHERE table_schema = 'outbox' AND table_name = %s
 ORDER BY ordinal_position
"""
ADDED = ("suits_from", "retired_at", "fences", "sharing")
pytestmark = pytest.mark.core
FROZEN = {
    "0001_up.sql": "5e4fd4eeb97bd4d8aea7f293a00690f7db2855c76204c9139825e4add641f0f6",
    "0001_down.sql": "13804858ba183c7300bba0f302a9250fbe394b8400025892979bd759310499b6",
}


@pytest.fixture
def version1(postgres: Postgres, nats: Nats) -> Iterator[str]:
    with restored(postgres, nats) as url:
        yield url


@pytest.mark.parametrize("file", FROZEN)
def test_it_is_frozen(file: str) -> None:
    """What a database of 0.1.0 lacks is a matter of version 2."""
    text = resources.files("outbox.schema").joinpath("ddl", file).read_bytes()
    assert sha256(text).hexdigest() == FROZEN[file]


def content(url: str) -> dict[str, list[tuple[object, ...]]]:
    """Every row of every table of version 1."""
    tables = ("events", "transactions", "streams", "relay", "limits")
    columns = {each: ", ".join(name for (name,) in rows(url, COLUMNS, each) if name not in ADDED) for each in tables}
    return {each: rows(url, f"SELECT {columns[each]} FROM outbox.{each} ORDER BY {columns[each]}") for each in tables}


def test_it_goes_up_and_down_with_something_in_every_state(version1: str, postgres: Postgres) -> None:
    """Nothing is lost on either way, and what comes back has the form of version 1."""
    fresh = fingerprint(version1)
    before = content(version1)
    assert migrate.migrate(version1) == (1, 2)
    assert migrate.problems(version1) == []
    assert content(version1) == before
    rows(version1, "UPDATE outbox.housekeeping SET purged = purged + 1")
    assert migrate.migrate(version1, to=1) == (2, 1)
    assert fingerprint(version1) == fresh
    rows(version1, "UPDATE outbox.relay SET purged = purged - 1")
    assert content(version1) == before


def test_whoever_could_relay_and_look_can_still(version1: str) -> None:
    """What existing roles were granted by name of table or as a whole reaches what the migration adds."""
    number = next(numbers)
    relay, operator = f"relay_v1_{number}", f"operator_v1_{number}"
    for role in (relay, operator):
        rows(version1, f"CREATE ROLE {role}")
        rows(version1, f"GRANT USAGE ON SCHEMA outbox TO {role}")
    rows(version1, f"GRANT SELECT, UPDATE ON outbox.relay TO {relay}")
    rows(version1, f"GRANT SELECT ON ALL TABLES IN SCHEMA outbox TO {operator}")
    migrate.migrate(version1)
    may = "SELECT has_table_privilege(%s, 'outbox.housekeeping', %s)"
    assert [value(version1, may, role, "UPDATE") for role in (relay, operator)] == [True, False]
    assert value(version1, may, operator, "SELECT")
    assert value(version1, "SELECT has_sequence_privilege(%s, 'outbox.transactions_position_seq', 'SELECT')", relay)
    migrate.migrate(version1, to=1)  # a role with privileges on a sequence could not be dropped


def test_the_migration_is_online(version1: str) -> None:
    """Writers are not blocked, also those that hold locks on what they wrote; and one from before seals after it."""
    with psycopg.connect(version1) as before:
        before.execute("SELECT outbox.add('v1.shop.online', 'a')")
        assert migrate.migrate(version1) == (1, 2)
        before.execute("SELECT outbox.add('v1.shop.online', 'b')")
    assert value(version1, "SELECT event_count FROM outbox.transactions ORDER BY position DESC LIMIT 1") == 2
    with psycopg.connect(version1) as before:
        before.execute("SELECT outbox.add('v1.shop.online', 'c')")
        assert migrate.migrate(version1, to=1) == (2, 1)
        before.execute("SELECT outbox.add('v1.shop.online', 'd')")
    assert value(version1, "SELECT event_count FROM outbox.transactions ORDER BY position DESC LIMIT 1") == 2


def test_who_holds_the_migration_up_is_not_waited_for_long(version1: str) -> None:
    """A lock that is waited for is in the way of everybody behind it: the migration gives up, and says so."""
    with psycopg.connect(version1) as dump:
        dump.execute("LOCK TABLE outbox.relay IN ACCESS SHARE MODE")
        with pytest.raises(Weather, match="lock") as refused:
            migrate.migrate(version1)
        assert "again" in refused.value.remedy
    assert migrate.migrate(version1) == (1, 2)


def test_a_relay_waits_for_the_schema_that_it_needs(version1: str, nats: Nats) -> None:
    """In whatever order relays and migration come, nothing ends; and a schema that does not suit it is left alone."""
    settings = Settings(database_url=version1, nats_url=nats.url, max_batch_messages=10)
    with ThreadRelay(settings) as relay:
        assert "version 1, and version 2 is needed; remedy: outbox migrate" in relay.wait_for(Waiting).why
        migrate.migrate(version1)
        relay.wait_for(TookLead)
        rows(version1, "UPDATE outbox.relay SET suits_from = 99")
        waiting = relay.wait_for(Waiting, lambda each: "no relay before 99" in each.why)
        assert "upgrade outbox-relay" in waiting.why
        rows(version1, "UPDATE outbox.relay SET suits_from = 2")
        relay.wait_for(TookLead, lambda each: each.epoch > 2)
    rows(version1, "UPDATE outbox.relay SET suits_from = 99")
    assert isinstance(ThreadRelay(settings, drain=True).ended(), Unsuited)  # who started it waits for its end


def test_another_form_of_an_unreleased_version_is_told(version1: str) -> None:
    migrate.migrate(version1)
    rows(version1, "COMMENT ON TABLE outbox.events IS 'outbox schema version 2. One row per event. (0badc0de)'")
    assert "outbox migrate --to 1, then outbox migrate" in migrate.problems(version1)[0]
    with pytest.raises(Misconfigured, match="unfinished version 2"):
        migrate.migrate(version1)
    assert (migrate.migrate(version1, to=1), migrate.migrate(version1)) == ((2, 1), (1, 2))
    assert migrate.problems(version1) == []


def test_it_has_something_in_every_state(version1: str) -> None:
    assert [state for state, found in STATES.items() if not rows(version1, found)] == []


def test_publishing_goes_on(version1: str, nats: Nats) -> None:
    """The batch that is stored and not marked is found, what is planned follows it, and what is blocked waits."""
    broker, settings = Broker(nats.url), Settings(database_url=version1, nats_url=nats.url, max_batch_messages=10)
    migrate.migrate(version1)
    before = {name: broker.last_sequence(name) for name in ("V1SHOP", "V1MAIL", "V1FULL")}
    pause.resume(version1, "outbox")
    with ThreadRelay(settings) as relay:
        relay.wait_for(Blocked, lambda each: "v1.nowhere.x" in each.why)
        rows(
            version1,
            "UPDATE outbox.transactions SET dead_at = now(), dead_reason = 'unrouted: by hand' WHERE position = 17",
        )
        broker.api("STREAM.UPDATE.V1FULL", {**broker.info("V1FULL")["config"], "max_msgs": -1})
        until(lambda: value(version1, "SELECT count(*) FROM outbox.pending") == 0, what="all sent")
    after = {name: broker.last_sequence(name) - before[name] for name in before}
    assert after == {"V1SHOP": 3 * 10 + 1, "V1MAIL": 1, "V1FULL": 1}  # 14 to 16 and 18; the replay; 12
    assert value(version1, "SELECT dead_reason LIKE 'message-too-large%' FROM outbox.dead WHERE position = 7")
    ids = Counter(message.message_id for name in before for message in broker.read(name))
    assert set(ids.values()) == {1}
    assert [each.anomalies for each in asyncio.run(verify(settings))] == [[], [], []]
