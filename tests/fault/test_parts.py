"""Transactions over two streams while something dies, fills up, goes or refuses. Promises 1 to 3 in each stream."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from outbox.config import AcrossStreams, BatchMode, Settings
from outbox.core.telemetry import Marked
from outbox.embedded import Postgres
from outbox.operate import dead, rebase, status
from outbox.operate.verify import verify
from tests.support.armed import POINTS, came_to
from tests.support.bed import Broker, ProcessRelay, ThreadRelay, rows, until, value, wait_until_sent
from tests.support.servers import clone, numbers
from tests.support.workload import Report, Writers, check_streams


@dataclass
class Streams:
    """Two streams that share the subjects under one prefix: orders and stock here, payments there."""

    broker: Broker
    database: str
    prefix: str
    here: str
    there: str

    def subjects(self, stream: str, *names: str) -> None:
        self.change(stream, subjects=[f"{self.prefix}.{name}" for name in names])

    def change(self, stream: str, **changes: object) -> None:
        answer = self.broker.api(f"STREAM.UPDATE.{stream}", {**self.broker.info(stream)["config"], **changes})
        assert "error" not in answer, answer

    def check(self) -> Report:
        return check_streams(self.database, {name: self.broker.read(name) for name in (self.here, self.there)})

    def clean(self, settings: Settings) -> None:
        assert self.check().anomalies == {}
        assert [each.anomalies for each in asyncio.run(verify(settings))] == [[], []]


@pytest.fixture
def streams(broker: Broker, database: str) -> Iterator[Streams]:
    number = next(numbers)
    made = Streams(broker, database, f"p{number}", f"P{number}A", f"P{number}B")
    broker.create_stream(made.here, f"{made.prefix}.orders", f"{made.prefix}.stock")
    broker.create_stream(made.there, f"{made.prefix}.payments")
    yield made
    for name in (made.here, made.there):
        broker.api(f"STREAM.DELETE.{name}")


CORE = [("before-ack", 1), ("in-the-mark", 3)]
KILLS = [
    pytest.param(point, nth, marks=[] if (point, nth) in CORE else [pytest.mark.by_hand])
    for point in POINTS
    for nth in (1, 3)
]


@pytest.mark.parametrize(("point", "nth"), KILLS)
def test_killed_at(
    environment: dict[str, str], settings: Settings, streams: Streams, workplace: Path, point: str, nth: int
) -> None:
    """Fault: SIGKILL at a stop point. Promise: in each stream every part, whole, once, in order."""
    writers = Writers(streams.database, streams.prefix, threads=3, endless=True, seed=83).start()
    with ProcessRelay(workplace, environment, armed=(point, "SIGKILL", nth)) as relay:
        came_to(relay, point, "SIGKILL", streams.database)
        assert relay._process.wait(10) == -signal.SIGKILL
    with ProcessRelay(workplace, environment) as second:
        second.wait_for("Marked")
        writers.stop()
        wait_until_sent(streams.database)
        assert second.stop() == 0
    streams.clean(settings)
    assert value(streams.database, "SELECT count(DISTINCT position) FROM outbox.parts") > 0


@pytest.mark.parametrize("transactions", [200, pytest.param(2000, marks=pytest.mark.by_hand)])
def test_rival_leaders(settings: Settings, streams: Streams, transactions: int) -> None:
    """Fault: the lock does not hold, two relays lead in turns, while one stream is full and emptied, over and over.
    Promise: in each stream every part, whole, once, in order."""
    writers = Writers(streams.database, streams.prefix, threads=4, transactions=transactions, seed=91).start()
    single = settings.model_copy(update={"batch": BatchMode.TRANSACTION})
    with ThreadRelay(settings, locked=False):
        with ThreadRelay(single, locked=False):
            room = 0
            while any(thread.is_alive() for thread in writers._threads):
                room += 50
                streams.change(streams.there, max_msgs=room, discard="new")
                writers._threads[0].join(0.2)
            writers.join()
        streams.change(streams.there, max_msgs=-1)
        wait_until_sent(streams.database, patience=90)
    streams.clean(settings)


def add(streams: Streams, *names: str, headers: str | None = None) -> None:
    """One transaction with an event on each of these subjects, which are its payloads, too."""
    statement = "SELECT outbox.add(%s || '.' || name, name, %s::jsonb) FROM unnest(%s::text[]) AS name"
    rows(streams.database, statement, streams.prefix, headers, list(names))


def payloads(streams: Streams) -> list[list[bytes]]:
    return [[each.payload for each in streams.broker.read(name)] for name in (streams.here, streams.there)]


STATES = """
SELECT CASE WHEN sent_at IS NOT NULL THEN 'sent' WHEN dead_at IS NOT NULL THEN 'dead' ELSE 'open' END
  FROM outbox.parts WHERE position = %s ORDER BY part
"""


def states(streams: Streams, position: int) -> list[str]:
    return [state for (state,) in rows(streams.database, STATES, position)]


def test_one_stream_is_full_under_kills(settings: Settings, streams: Streams) -> None:
    """Fault: one stream is full, and relays are killed over and over. Promise: the other one goes on, and none twice.

    What is sent here waits there: its position is planned, or sent in part, and open at once.
    """
    streams.change(streams.there, max_msgs=20, discard="new")
    writers = Writers(streams.database, streams.prefix, threads=3, endless=True, seed=89).start()
    for _ in range(2):
        relay = ThreadRelay(settings)
        relay.wait_for(Marked, lambda each: each.stream == streams.here)
        until(lambda: value(streams.database, "SELECT deaths FROM outbox.relay") == 0)  # else care is taken
        relay.kill()
    writers.stop()
    with ThreadRelay(settings):
        until(lambda: value(streams.database, "SELECT count(*) FROM outbox.pending") == waiting(streams))
    streams.change(streams.there, max_msgs=-1)
    with ThreadRelay(settings):
        wait_until_sent(streams.database)
    streams.clean(settings)


def waiting(streams: Streams) -> int:
    """How many transactions have events for the stream that is full, and are not sent there."""
    wanted = value(
        streams.database,
        "SELECT count(DISTINCT txid) FROM outbox.events WHERE subject = %s",
        f"{streams.prefix}.payments",
    )
    return int(wanted) - len({each.position for each in streams.broker.read(streams.there)})


def test_a_planned_and_open_position_is_sent_once_in_each(settings: Settings, streams: Streams) -> None:
    """Fault: the leader dies with a part planned here and the other one waiting there. Promise: neither comes twice."""
    streams.change(streams.there, max_msgs=1, discard="new")
    streams.change(streams.here, max_msgs=1, discard="new")
    add(streams, "orders")
    add(streams, "payments")
    relay = ThreadRelay(settings)
    wait_until_sent(streams.database)
    add(streams, "orders", "payments")
    until(lambda: states(streams, 3) == ["open", "open"])
    relay.kill()
    # As if the plan there had not been written yet.
    rows(
        streams.database,
        "WITH was AS (UPDATE outbox.streams SET plan = '{}' WHERE name = %s)"
        " UPDATE outbox.relay SET open_positions = open_positions + '{[3,3]}'::int8multirange",
        streams.there,
    )
    for name in (streams.here, streams.there):
        streams.change(name, max_msgs=-1)
    with ThreadRelay(settings):
        wait_until_sent(streams.database)
        add(streams, "stock", "payments")  # behind whatever else might still be sent
        wait_until_sent(streams.database)
    assert payloads(streams) == [[b"orders", b"orders", b"stock"], [b"payments"] * 3]
    assert states(streams, 3) == ["sent", "sent"]


@pytest.mark.parametrize("same_relay", [True, False])
def test_verdict_on_one_part_while_the_other_is_in_flight(
    settings: Settings, streams: Streams, *, same_relay: bool
) -> None:
    """Fault: one stream refuses its part, and the other one is full. Promise: each has its own end, and a retry sends
    what is missing alone, also while the other part still waits."""
    streams.change(streams.here, max_msgs=1, discard="new", allow_msg_ttl=True)
    add(streams, "orders")
    add(streams, "orders", "payments", headers='{"Nats-TTL": "1h"}')
    relay = ThreadRelay(settings)
    until(lambda: states(streams, 2) == ["open", "dead"])
    found = status.status(streams.database)
    assert (found.pending_transactions, found.dead_transactions) == (1, 1)
    assert found.dead[0].reason.startswith(f"ttl-not-permitted: part 2 of 2, for stream {streams.there}")
    if not same_relay:
        relay.kill()
    streams.change(streams.there, allow_msg_ttl=True)
    assert dead.retry(streams.database, "outbox", [2]) == [2]
    if not same_relay:
        relay = ThreadRelay(settings)
    until(lambda: states(streams, 2) == ["open", "sent"])
    assert value(streams.database, "SELECT position FROM outbox.pending") == 2
    streams.change(streams.here, max_msgs=-1)
    wait_until_sent(streams.database)
    assert relay.stop() is None
    assert payloads(streams) == [[b"orders", b"orders"], [b"payments"]]
    assert asyncio.run(verify(settings))[0].anomalies == []


def test_a_stream_holds_one_part_at_most(settings: Settings, streams: Streams) -> None:
    """Fault: the subjects of a dead part move to the stream with the other one. Promise: it stays dead and says so."""
    add(streams, "orders", "payments", headers='{"Nats-TTL": "1h"}')
    streams.change(streams.here, allow_msg_ttl=True)
    with ThreadRelay(settings):
        until(lambda: rows(streams.database, "SELECT 1 FROM outbox.transactions WHERE dead_at IS NOT NULL"))
    streams.subjects(streams.there, "nothing")
    streams.subjects(streams.here, "orders", "stock", "payments")
    dead.retry(streams.database, "outbox", [1])
    with ThreadRelay(settings):
        wait_until_sent(streams.database)
    assert "which has another part of the transaction" in value(streams.database, "SELECT dead_reason FROM outbox.dead")
    streams.subjects(streams.here, "orders", "stock")
    streams.subjects(streams.there, "payments")
    streams.change(streams.there, allow_msg_ttl=True)
    dead.retry(streams.database, "outbox", [1])
    with ThreadRelay(settings):
        wait_until_sent(streams.database)
    assert payloads(streams) == [[b"orders"], [b"payments"]]


def test_the_split_is_decided_once(settings: Settings, streams: Streams) -> None:
    """Fault: subjects move while a part waits and the leader dies. Promise: each part stays what it was, and is for the
    stream that it was for; that one says what it waits for. What is new goes where its subjects are.
    """
    third = f"{streams.there}C"
    streams.change(streams.there, max_msgs=2, discard="new")
    add(streams, "payments", "payments")
    add(streams, "orders", "payments", "stock", "payments")
    relay = ThreadRelay(settings)
    until(lambda: states(streams, 2) == ["sent", "open"])
    relay.kill()
    asyncio.run(rebase.accept_stream(settings, streams.there))  # no plan holds it any more
    streams.subjects(streams.there, "nothing")
    streams.broker.create_stream(third, f"{streams.prefix}.payments")
    with ThreadRelay(settings.model_copy(update={"across_streams": AcrossStreams.DEAD})):  # too late for this one
        add(streams, "payments")
        until(lambda: value(streams.database, "SELECT stream FROM outbox.transactions WHERE position = 3") == third)
        until(lambda: any(each.blocked for each in status.status(streams.database).streams))
        assert states(streams, 2) == ["sent", "open"]
        assert len(streams.broker.read(third)) == 1
        streams.broker.api(f"STREAM.DELETE.{third}")
        streams.subjects(streams.there, "payments")
        streams.change(streams.there, max_msgs=-1)
        wait_until_sent(streams.database)
    assert payloads(streams) == [[b"orders", b"stock"], [b"payments"] * 4]
    told = [(each.part, each.parts, each.number, each.count) for each in streams.broker.read(streams.there)]
    assert told[2:] == [(2, 2, 1, 2), (2, 2, 2, 2)]


def test_a_retried_part_follows_its_subjects(settings: Settings, streams: Streams) -> None:
    """Fault: a stream is given up with an open part. Promise: retried, it goes where its subjects are by then."""
    third = f"{streams.there}C"
    streams.change(streams.there, max_msgs=2, discard="new")
    add(streams, "payments", "payments")
    add(streams, "orders", "payments", "stock", "payments")
    with ThreadRelay(settings):
        until(lambda: states(streams, 2) == ["sent", "open"])
    streams.subjects(streams.there, "nothing")
    asyncio.run(rebase.retire_stream(settings, streams.there))
    streams.broker.create_stream(third, f"{streams.prefix}.payments")
    dead.retry(streams.database, "outbox", [2])
    with ThreadRelay(settings):
        wait_until_sent(streams.database)
    assert payloads(streams) == [[b"orders", b"stock"], [b"payments"] * 2]
    moved = streams.broker.read(third)
    assert [(each.part, each.parts, each.number, each.count) for each in moved] == [(2, 2, 1, 2), (2, 2, 2, 2)]
    assert rows(streams.database, "SELECT stream FROM outbox.parts ORDER BY part") == [(streams.here,), (third,)]
    assert [each.anomalies for each in asyncio.run(verify(settings))] == [[], [], []]
    streams.broker.api(f"STREAM.DELETE.{third}")


@pytest.mark.parametrize("lost", [True, False])
def test_a_stream_is_given_up(settings: Settings, streams: Streams, *, lost: bool) -> None:
    """Fault: a stream is gone for good with parts that are planned for it. Promise: the other parts are sent, and those
    are dead letters that say so; what was stored there meanwhile is known."""
    streams.change(streams.there, max_msgs=1, discard="new")
    add(streams, "payments")
    add(streams, "orders", "payments")
    with ThreadRelay(settings):
        until(lambda: states(streams, 2) == ["sent", "open"])
    if lost:
        streams.broker.api(f"STREAM.DELETE.{streams.there}")
    else:
        streams.subjects(streams.there, "nothing")
    asyncio.run(rebase.retire_stream(settings, streams.there))
    assert states(streams, 2) == ["sent", "dead"]
    assert str(value(streams.database, "SELECT dead_reason FROM outbox.dead")).startswith("stream-retired: part 2")
    if lost:
        streams.broker.create_stream(f"{streams.there}", f"{streams.prefix}.payments")
        asyncio.run(rebase.accept_stream(settings, streams.there))
    else:
        streams.subjects(streams.there, "payments")
        asyncio.run(rebase.accept_stream(settings, streams.there))
        streams.change(streams.there, max_msgs=-1)
    dead.retry(streams.database, "outbox", [2])
    with ThreadRelay(settings):
        wait_until_sent(streams.database)
    assert payloads(streams) == [[b"orders"], [b"payments"] if lost else [b"payments", b"payments"]]


@pytest.mark.parametrize("stored", ["here", "both"])
def test_older_copy_learns_of_parts_that_are_stored(
    settings: Settings, streams: Streams, postgres: Postgres, stored: str
) -> None:
    """Fault: a restored database does not know that a transaction was split, and what of it was stored. Promise: after
    a rebase nothing is sent twice, and what is missing comes."""
    if stored == "here":
        streams.change(streams.there, max_msgs=2, discard="new")
        add(streams, "payments", "payments")
    add(streams, "orders", "payments", "stock", "payments")
    older = clone(postgres)
    name, copy = (url.rpartition("/")[2] for url in (streams.database, older))
    rows(postgres.url(), f"DROP DATABASE {copy}")
    rows(postgres.url(), f"CREATE DATABASE {copy} TEMPLATE {name}")
    position = value(older, "SELECT max(position) FROM outbox.transactions")
    with ThreadRelay(settings):
        until(lambda: states(streams, position) == ["sent", "open" if stored == "here" else "sent"])
    streams.change(streams.there, max_msgs=-1)
    restored = settings.model_copy(update={"database_url": older})
    asyncio.run(rebase.rebase(restored))
    with ThreadRelay(restored):
        wait_until_sent(older)
    assert payloads(streams) == [[b"orders", b"stock"], [b"payments"] * (4 if stored == "here" else 2)]
    assert [each.anomalies for each in asyncio.run(verify(restored))] == [[], []]


@pytest.mark.long
@pytest.mark.parametrize("point", ["poisoned-load", "poisoned-send"])
def test_part_that_kills_the_relay_is_set_aside(
    environment: dict[str, str], settings: Settings, streams: Streams, workplace: Path, point: str
) -> None:
    """Fault: one event kills every relay that touches it, when another part is stored already, as the stream with the
    event was full. Promise: that part is set aside after a few starts; what is sent stays so, and the rest flows."""
    streams.change(streams.there, max_msgs=1, discard="new")
    add(streams, "payments")
    statement = "SELECT outbox.add(%s || '.orders', 'o'), outbox.add(%s || '.payments', 'poison')"
    rows(streams.database, statement, streams.prefix, streams.prefix)
    with ThreadRelay(settings):
        until(lambda: states(streams, 2) == ["sent", "open"])
    streams.change(streams.there, max_msgs=-1)
    add(streams, "orders", "payments")
    starts = 0
    while value(streams.database, "SELECT count(*) FROM outbox.pending") and starts < 12:
        starts += 1
        with ProcessRelay(workplace, environment, "--drain", armed=(point, "SIGKILL", 1)) as relay:
            until(lambda r=relay: not r.running)  # type: ignore[misc]
    reason = str(value(streams.database, "SELECT dead_reason FROM outbox.dead WHERE position = 2"))
    assert reason.startswith(f"kills-relay: part 2 of 2, for stream {streams.there}")
    assert states(streams, 2) == ["sent", "dead"]
    assert payloads(streams) == [[b"o", b"orders"], [b"payments", b"payments"]]
    assert [each.anomalies for each in asyncio.run(verify(settings))] == [[], []]
