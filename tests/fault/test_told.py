"""Whenever nothing is sent, `outbox status` and `/readyz` name the reason within seconds. Promise 7.

One table: what is in the way, the words that name it, and how it goes away again. Afterwards everything is sent, in the
same term where the relay need not begin anew.
"""

from __future__ import annotations

import contextlib
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest

from outbox import schema
from outbox.embedded import Nats, Postgres, free_port
from outbox.errors import OutboxError
from outbox.operate import pause, status
from tests.support.bed import Broker, ProcessRelay, rows, until, value, wait_until_sent
from tests.support.commands import outbox
from tests.support.pooler import pooler
from tests.support.proxy import NatsProxy, Proxy
from tests.support.servers import clone, numbers, own_nats, templated

SECONDS = 8.0  # five are promised; a busy machine gets some more
RELAY = "outbox relay"
LEADER_LOCK = f"SELECT pg_try_advisory_lock({schema.LEADER_LOCK}, {schema.lock_key('outbox')})"
CONFIG = """
max_control_line: 250
accounts { A {
  jetstream: enabled
  users: [ { user: relay, password: pw, permissions: { publish: { deny: ["s.forbidden"] } } } ]
} }
"""


@dataclass
class Scene:
    """The servers of one case, a proxy before each, and a relay that has sent something."""

    url: str
    broker: Broker
    nats: NatsProxy
    postgres: Proxy
    server: Postgres
    directory: Path

    @contextmanager
    def away(self) -> Iterator[None]:
        """The relay has no session while the block runs."""
        self.postgres.refusing = True
        self.postgres.cut()
        until(lambda: value(self.url, "SELECT count(*) = 0 FROM pg_stat_activity WHERE application_name = %s", RELAY))
        yield
        self.postgres.refusing = False

    def add(self, subject: str = "s.x", payload: str = "x") -> None:
        rows(self.url, "SELECT outbox.add(%s, %s)", subject, payload)

    def configure(self, **config: Any) -> None:
        self.broker.api("STREAM.UPDATE.S", {**self.broker.info("S")["config"], **config})


Fault = Callable[[Scene], AbstractContextManager[None]]
FAULTS: dict[str, tuple[Fault, str]] = {}


def fault(words: str) -> Callable[[Callable[[Scene], Iterator[None]]], None]:
    """One row of the table: the words that must be told while the block runs."""

    def register(function: Callable[[Scene], Iterator[None]]) -> None:
        FAULTS[function.__name__.replace("_", " ")] = contextmanager(function), words

    return register


@fault("no connection to NATS")
def nats_is_down(scene: Scene) -> Iterator[None]:
    scene.nats.refusing = True
    scene.nats.cut()
    yield
    scene.nats.heal()


@fault("no connection to NATS")
def nats_is_silent(scene: Scene) -> Iterator[None]:
    scene.nats.change(scene.nats.down, stalled=True)
    scene.nats.cut()
    yield
    scene.nats.heal()


@fault("maximum messages exceeded")
def the_stream_is_full(scene: Scene) -> Iterator[None]:
    scene.configure(discard="new", max_msgs=1)
    yield
    scene.configure(max_msgs=-1)


@fault("ermissions violation")
def forbidden(scene: Scene) -> Iterator[None]:
    scene.add("s.forbidden")
    yield


@fault("control line")
def the_server_hangs_up(scene: Scene) -> Iterator[None]:
    for number in range(5):
        scene.add(f"s.{'x' * 250}.{'y' * 1}{number}"[:255])
    yield


@fault("on the way")
def the_link_is_slow(scene: Scene) -> Iterator[None]:
    scene.nats.change(scene.nats.up, rate=2000)
    scene.add(payload="x" * 40_000)
    yield
    scene.nats.heal()


@fault("holds a lock")
def somebody_locks_what_is_to_be_marked(scene: Scene) -> Iterator[None]:
    scene.nats.change(scene.nats.up, stalled=True)
    scene.add()
    until(lambda: value(scene.url, "SELECT count(*) FROM outbox.pending") > 0)
    with psycopg.connect(scene.url) as stranger:
        stranger.execute("SELECT FROM outbox.transactions WHERE sent_at IS NULL FOR UPDATE")
        scene.nats.heal()
        yield


@fault("lock")
def somebody_locks_the_row_of_the_relay(scene: Scene) -> Iterator[None]:
    with psycopg.connect(scene.url) as stranger:
        stranger.execute("SELECT FROM outbox.relay FOR UPDATE")
        yield


@fault("holds a lock")
def somebody_locks_the_table_of_streams(scene: Scene) -> Iterator[None]:
    with psycopg.connect(scene.url) as stranger:
        stranger.execute("LOCK TABLE outbox.streams IN SHARE MODE")
        yield


@fault("holds a lock")
def somebody_locks_a_table_before_the_term_begins(scene: Scene) -> Iterator[None]:
    with psycopg.connect(scene.url, application_name="nightly") as stranger, contextlib.ExitStack() as stack:
        stack.enter_context(scene.away())
        stranger.execute("LOCK TABLE outbox.limits, outbox.transactions IN ACCESS EXCLUSIVE MODE")
        stack.close()
        yield


@fault("nightly")
def somebody_locks_the_row_of_the_relay_before_it_leads(scene: Scene) -> Iterator[None]:
    with psycopg.connect(scene.url, application_name="nightly") as stranger, contextlib.ExitStack() as stack:
        stack.enter_context(scene.away())
        stranger.execute("SELECT FROM outbox.relay FOR UPDATE")
        stack.close()
        yield


@fault("nightly) holds the lock of the leader")
def somebody_holds_the_lock_of_the_leader(scene: Scene) -> Iterator[None]:
    with psycopg.connect(scene.url, application_name="nightly") as stranger, contextlib.ExitStack() as stack:
        stack.enter_context(scene.away())
        assert stranger.execute(LEADER_LOCK).fetchone() == (True,)
        stranger.commit()
        stack.close()
        yield


@fault("pooler in transaction mode")
def a_pooler_comes_in_between(scene: Scene) -> Iterator[None]:
    with pooler(scene.server, scene.url, scene.directory, "transaction") as url:
        before, scene.postgres.target = scene.postgres.target, int(url.rpartition(":")[2].partition("/")[0])
        scene.postgres.cut()
        yield
        scene.postgres.target = before
        scene.postgres.cut()


@fault("may add 5000 events")
def a_limit_is_raised_over_what_the_relay_takes(scene: Scene) -> Iterator[None]:
    rows(scene.url, "UPDATE outbox.limits SET max_transaction_events = 5000")
    scene.postgres.cut()
    yield
    rows(scene.url, "UPDATE outbox.limits SET max_transaction_events = 1000")


@fault("not in this database")
def a_table_is_renamed(scene: Scene) -> Iterator[None]:
    scene.add()
    rows(scene.url, "ALTER TABLE outbox.events RENAME TO elsewhere")
    yield
    rows(scene.url, "ALTER TABLE outbox.elsewhere RENAME TO events")


@fault("no_ack")
def the_stream_does_not_suit(scene: Scene) -> Iterator[None]:
    scene.configure(no_ack=True)
    scene.nats.cut()
    yield
    scene.configure(no_ack=False)


@fault("does not exist")
def the_stream_is_gone(scene: Scene) -> Iterator[None]:
    config = scene.broker.info("S")["config"]
    scene.broker.api("STREAM.DELETE.S")
    yield
    del config


@fault("in no stream")
def the_subject_is_in_no_stream(scene: Scene) -> Iterator[None]:
    scene.add("nowhere.x")
    yield
    scene.broker.create_stream("NOWHERE", "nowhere.>")


@fault("for the night")
def an_operator_has_paused_it(scene: Scene) -> Iterator[None]:
    pause.pause(scene.url, "outbox", "for the night")
    yield
    pause.resume(scene.url, "outbox")


@fault("trigger seal")
def the_schema_has_drifted(scene: Scene) -> Iterator[None]:
    rows(scene.url, "ALTER TABLE outbox.events DISABLE TRIGGER seal")
    yield
    rows(scene.url, "ALTER TABLE outbox.events ENABLE TRIGGER seal")


@fault("read-only")
def the_database_is_read_only(scene: Scene) -> Iterator[None]:
    rows(scene.url, "ALTER SYSTEM SET default_transaction_read_only = on")
    rows(scene.url, "SELECT pg_reload_conf()")
    scene.postgres.cut()  # a session that is there already has its own word on that
    try:
        yield
    finally:
        rows(scene.url, "ALTER SYSTEM RESET default_transaction_read_only")
        rows(scene.url, "SELECT pg_reload_conf()")


@fault("postgres")
def the_way_to_the_database_is_cut(scene: Scene) -> Iterator[None]:
    scene.postgres.refusing = True
    scene.postgres.cut()
    yield
    scene.postgres.heal()


# The database itself cannot tell of these: `outbox status` says that nobody leads.
NOBODY_LEADS = ("the way to the database is cut",)
NOTHING_IS_ADDED = ("the database is read only", "a table is renamed", "somebody locks a table before the term begins")
NO_STATUS = ("a table is renamed", "somebody locks a table before the term begins")
TAKE_LONG = ("somebody locks a table before the term begins", "a table is renamed")
ENDS_THE_TEST = ("the stream is gone", "the server hangs up", "forbidden")


@pytest.fixture(scope="module")
def guarded(home: Path) -> Iterator[Nats]:
    with own_nats(home / f"nats-told-{next(numbers)}", config=CONFIG) as server:
        yield server


@pytest.fixture(scope="module")
def own(home: Path) -> Iterator[Postgres]:
    server = templated(home / f"postgres-told-{next(numbers)}")
    yield server
    server.stop()


@pytest.mark.parametrize(
    "what", [pytest.param(each, marks=pytest.mark.long if each in TAKE_LONG else ()) for each in FAULTS]
)
def test_the_reason_is_named_within_seconds(own: Postgres, guarded: Nats, workplace: Path, what: str) -> None:
    begin, words = FAULTS[what]
    url, port = clone(own), free_port()
    credentials = {"user": "relay", "password": "pw"}
    broker = Broker(guarded.url, **credentials)
    broker.create_stream("S", "s.>")
    with NatsProxy(guarded.port) as nats, Proxy(own.port) as postgres, contextlib.ExitStack() as stack:
        through = url.replace(f":{own.port}/", f":{postgres.port}/")
        environment = {
            "OUTBOX_DATABASE_URL": through,
            "OUTBOX_NATS_URL": nats.url,
            "OUTBOX_NATS_USER": "relay",
            "OUTBOX_NATS_PASSWORD": "pw",
            "OUTBOX_LISTEN": f"127.0.0.1:{port}",
        }
        scene = Scene(url, broker, nats, postgres, own, workplace)
        relay = stack.enter_context(ProcessRelay(workplace, environment))
        scene.add()
        relay.wait_for("Marked")
        shown = {"OUTBOX_DATABASE_URL": url}
        with begin(scene):
            if what not in NOTHING_IS_ADDED:
                scene.add()
            until(lambda: words in ready(port), patience=SECONDS, what=f"{words!r} in /readyz")
            until(lambda: words in told(url) or what in NOBODY_LEADS, patience=SECONDS, what=f"{words!r} in the status")
            assert what in (*NOBODY_LEADS, *NO_STATUS) or all(words in told(url) for _ in range(5))
            assert outbox(shown, "status").returncode == (1 if what in NO_STATUS else 0)
        if what not in ENDS_THE_TEST:
            wait_until_sent(url)
            until(lambda: words not in ready(port), what="all is well")
            until(lambda: words not in told(url), what="all is well")
            assert relay.stop() == 0
    for each in ("S", "NOWHERE"):
        broker.api(f"STREAM.DELETE.{each}")


def ready(port: int) -> str:
    """What /readyz says, whatever its status."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as response:
            return str(json.loads(response.read()))
    except urllib.error.HTTPError as error:
        with error:
            return str(json.loads(error.read()))


def told(url: str) -> str:
    """What `outbox status` says of what is in the way."""
    try:
        found = status.status(url)
    except OutboxError as error:
        return error.line
    streams = [each.blocked for each in found.streams]
    return str([found.blocked, found.drift, found.paused_why, found.housekeeping_failing, found.unreconciled, *streams])
