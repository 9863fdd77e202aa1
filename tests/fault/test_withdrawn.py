"""What a relay may do or finds in the database is taken away under it, and given back. Promises 5 and 7.

At its start that is a wrong setting, which is refused. Later it stands by, says why, and goes on.
"""

from __future__ import annotations

from functools import partial

import psycopg
import pytest

from outbox.config import Settings
from outbox.core.telemetry import Connected, Marked, Unreachable, Waiting
from outbox.embedded import Nats
from outbox.errors import OutboxError
from outbox.operate import migrate
from outbox.operate.status import status
from outbox.schema import grants
from tests.support.bed import Broker, ThreadRelay, rows, until, wait_until_sent
from tests.support.servers import Stream

TAKEN = {
    "update of relay": "REVOKE UPDATE ON outbox.relay FROM {role}",
    "update of transactions": "REVOKE UPDATE ON outbox.transactions FROM {role}",
    "select of events": "REVOKE SELECT ON outbox.events FROM {role}",
    "all of streams": "REVOKE ALL ON outbox.streams FROM {role}",
    "schema": "REVOKE USAGE ON SCHEMA outbox FROM {role}",
}
TERMINATE = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE application_name = 'outbox relay' AND datname = current_database()"
)
TABLES = ("events", "transactions", "streams", "relay", "limits")


@pytest.fixture
def role(database: str) -> str:
    name = f"relay_{database.rpartition('/')[2]}"
    rows(database, f"CREATE ROLE {name} LOGIN")
    grant(database, name)
    return name


def grant(database: str, role: str) -> None:
    for statement in grants(relay=role):
        rows(database, statement)


def waits(relay: ThreadRelay, words: str, after: int = 0) -> None:
    relay.wait_for(object, lambda each: isinstance(each, Waiting | Unreachable) and words in each.why, after=after)


def marked(position: int, happening: Marked) -> bool:
    return happening.last_position == position


def add(database: str, stream: Stream) -> None:
    rows(database, "SELECT outbox.add(%s, 'x')", f"{stream.prefix}.x")


@pytest.mark.parametrize("what", TAKEN)
def test_grant_is_taken_away_and_given_back(
    database: str, role: str, nats: Nats, broker: Broker, stream: Stream, what: str
) -> None:
    """Fault: REVOKE under a relay that leads. Promise: it waits, says what is missing, and sends all in the end."""
    url = psycopg.conninfo.make_conninfo(database, user=role)
    with ThreadRelay(Settings(database_url=url, nats_url=nats.url)) as relay:
        add(database, stream)
        relay.wait_for(Marked)
        rows(database, TAKEN[what].format(role=role))
        add(database, stream)
        waits(relay, "permission denied")
        if what in ("update of transactions", "select of events"):  # the row of the relay can still be written
            until(lambda: "permission denied" in str(status(database).blocked))
        grant(database, role)
        wait_until_sent(database)
    assert [each.position for each in broker.read(stream.name)] == [1, 2]
    until(lambda: status(database).blocked is None)


def test_tables_are_moved_away_and_come_back(database: str, settings: Settings, broker: Broker, stream: Stream) -> None:
    """Fault: a table is renamed under a relay that leads. Promise: the same."""
    with ThreadRelay(settings) as relay:
        for number, table in enumerate(TABLES, start=1):
            add(database, stream)
            relay.wait_for(Marked, partial(marked, number))
            after = len(relay.happenings)
            rows(database, f"ALTER TABLE outbox.{table} RENAME TO elsewhere")
            rows(database, TERMINATE)
            waits(relay, "not in this database", after)
            rows(database, f"ALTER TABLE outbox.elsewhere RENAME TO {table}")
    wait_until_sent(database)
    assert [each.position for each in broker.read(stream.name)] == [1, 2, 3, 4, 5]


def test_row_of_the_relay_is_deleted_and_comes_back(database: str, settings: Settings, stream: Stream) -> None:
    """Fault: the table relay is emptied by hand under a relay that leads. Promise: the same."""
    with ThreadRelay(settings) as relay:
        add(database, stream)
        relay.wait_for(Marked)
        rows(database, "CREATE TABLE kept AS SELECT * FROM outbox.relay")
        rows(database, "DELETE FROM outbox.relay")
        relay.wait_for(Waiting, lambda each: "the table outbox.relay is empty" in each.why)
        rows(database, "INSERT INTO outbox.relay SELECT * FROM kept")
        add(database, stream)
        wait_until_sent(database)


@pytest.mark.parametrize("to", [0, 1])
def test_schema_is_taken_down_and_comes_back(
    database: str, settings: Settings, broker: Broker, stream: Stream, to: int
) -> None:
    """Fault: a migration down under a relay that leads. Promise: it stands by until the schema is back."""
    with ThreadRelay(settings) as relay:
        add(database, stream)
        relay.wait_for(Marked)
        migrate.migrate(database, to=to)
        waits(relay, "outbox migrate")
        migrate.migrate(database)
        add(database, stream)
        wait_until_sent(database)
    assert len(broker.read(stream.name)) == 2


def test_lock_of_a_forgotten_prepared_transaction_is_named(two_phase_database: str, nats: Nats, stream: Stream) -> None:
    """Fault: it holds the row of the relay, when one starts. Promise: named by relay and status, and waited for."""
    url = two_phase_database
    name = f"forgotten {url.rpartition('/')[2]}"
    with psycopg.connect(url) as stranger:
        stranger.execute("SELECT FROM outbox.relay FOR UPDATE")
        stranger.execute(f"PREPARE TRANSACTION '{name}'".encode())
        stranger.rollback()
    with ThreadRelay(Settings(database_url=url, nats_url=nats.url)) as relay:
        add(url, stream)
        waits(relay, f"prepared transaction '{name}' holds a lock that the relay needs")
        until(lambda: "a prepared transaction holds a lock" in str(status(url).blocked))
        rows(url, f"ROLLBACK PREPARED '{name}'")
        wait_until_sent(url)
        assert sum(isinstance(each, Connected) and each.server == "postgres" for each in relay.happenings) == 1


def test_why_a_relay_is_refused_is_left_for_the_status(database: str, settings: Settings, stream: Stream) -> None:
    """Fault: a relay that refuses at its start leaves no process that could be asked."""
    rows(database, "UPDATE outbox.limits SET max_transaction_events = 1001")
    error = ThreadRelay(settings).ended()
    assert isinstance(error, OutboxError)
    assert str(error) in str(status(database).blocked)
    rows(database, "UPDATE outbox.limits SET max_transaction_events = 1000")
    assert ThreadRelay(settings, drain=True).ended() is None
    assert status(database).blocked is None
