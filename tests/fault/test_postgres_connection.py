"""What fails is the relay's connection to Postgres: it stalls, in each direction, or is cut. Promises 1 to 3 and 5."""

from __future__ import annotations

import itertools
import queue
import threading

import pytest

from outbox.config import Settings
from outbox.core.telemetry import Marked, StandingBy, TookLead
from outbox.embedded import Nats, Postgres
from outbox.postgres.rows import Decisions
from outbox.postgres.store import Store
from tests.support.bed import PATIENCE, Broker, ThreadRelay, until, value, wait_until_sent
from tests.support.faults import more_sent
from tests.support.proxy import Proxy
from tests.support.servers import Stream
from tests.support.workload import Writers, check


def through(proxy: Proxy, url: str) -> str:
    """The same database through the proxy."""
    return url.replace(f":{proxy.target}/", f":{proxy.port}/")


@pytest.mark.parametrize("directions", ["up", "down", "up down"])
def test_stalled_leader_is_replaced_and_does_no_harm_when_it_heals(
    postgres: Postgres, database: str, nats: Nats, stream: Stream, directions: str
) -> None:
    """Fault: nothing comes through any more, and nobody says so. Promise: a standby takes over, nothing is doubled."""
    broker = Broker(nats.url)
    with Proxy(postgres.port) as proxy:
        writers = Writers(database, stream.prefix, threads=3, endless=True, seed=113).start()
        with ThreadRelay(Settings(database_url=through(proxy, database), nats_url=nats.url)) as stalled:
            stalled.wait_for(Marked)
            with ThreadRelay(Settings(database_url=database, nats_url=nats.url)) as successor:
                successor.wait_for(StandingBy)
                for direction in directions.split():
                    proxy.change(getattr(proxy, direction), stalled=True)
                successor.wait_for(TookLead)
                more_sent(database)
                seen = len(stalled.happenings)
                proxy.heal()
                stalled.wait_for(StandingBy, after=seen)
                more_sent(database)
                writers.stop()
                wait_until_sent(database)
                assert sum(isinstance(each, TookLead) for each in successor.happenings) == 1
            stalled.wait_for(TookLead, after=seen)
    report = check(database, broker.read(stream.name))
    assert report.anomalies == {}
    assert report.transactions == writers.committed


@pytest.mark.core
def test_connection_is_cut_under_load(postgres: Postgres, database: str, nats: Nats, stream: Stream) -> None:
    """Fault: resets, in the midst of statements and commits too. Promise: the same relay goes on by itself."""
    broker = Broker(nats.url)
    with Proxy(postgres.port) as proxy:
        writers = Writers(database, stream.prefix, threads=3, endless=True, seed=127).start()
        with ThreadRelay(Settings(database_url=through(proxy, database), nats_url=nats.url)) as relay:
            for turn in range(8):
                more_sent(database, 5)
                threading.Event().wait(turn / 1000)  # another moment in the relay's round each time
                proxy.cut()
            more_sent(database)
            writers.stop()
            wait_until_sent(database)
            terms = sum(isinstance(each, TookLead) for each in relay.happenings)
    assert terms >= 9
    report = check(database, broker.read(stream.name))
    assert report.anomalies == {}
    assert report.transactions == writers.committed


def test_marks_whose_answer_is_lost(
    postgres: Postgres, database: str, nats: Nats, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: the server commits a mark, and its answer never comes. Promise: what was marked is not sent again."""
    broker = Broker(nats.url)
    unheard: queue.Queue[int] = queue.Queue()
    commit, commits = Store.commit, itertools.count(1)

    async def deaf(store: Store, epoch: int, decisions: Decisions) -> None:
        if decisions.receipts and next(commits) % 10 == 0:
            async with store.turn():  # a page may be on its way: it arrives, and the answer to the mark does not
                proxy.change(proxy.down, swallowed=True)
            unheard.put(decisions.receipts[-1].position)
        await commit(store, epoch, decisions)

    monkeypatch.setattr(Store, "commit", deaf)
    marked = "SELECT sent_at IS NOT NULL FROM outbox.transactions WHERE position = %s"
    with Proxy(postgres.port) as proxy:
        writers = Writers(database, stream.prefix, threads=3, endless=True, seed=131).start()
        with ThreadRelay(Settings(database_url=through(proxy, database), nats_url=nats.url)) as relay:
            for _ in range(5):
                position = unheard.get(timeout=PATIENCE)
                until(lambda p=position: value(database, marked, p))  # type: ignore[misc]
                assert not any(isinstance(each, Marked) and each.last_position == position for each in relay.happenings)
                proxy.cut()
                proxy.heal()
            monkeypatch.setattr(Store, "commit", commit)
            proxy.heal()
            more_sent(database)
            writers.stop()
            wait_until_sent(database)
    report = check(database, broker.read(stream.name))
    assert report.anomalies == {}
    assert report.transactions == writers.committed
