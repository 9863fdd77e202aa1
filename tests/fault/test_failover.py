"""What dies is the primary, and a streaming standby is promoted under load. Promises 1 to 3, 5, and 6 on request."""

from __future__ import annotations

from pathlib import Path

import pytest

from outbox.config import Durability, Settings
from outbox.core.telemetry import Blocked, Marked, TookLead, Unblocked, Unreachable
from outbox.embedded import Nats
from tests.support.bed import Broker, ThreadRelay, rows, until, value, wait_until_sent
from tests.support.faults import more_sent
from tests.support.proxy import Proxy
from tests.support.servers import Stream, own_postgres, prepared, standby_of
from tests.support.workload import Writers, check

STREAMING = "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'"
COUNT = "SELECT count(*) FROM outbox.transactions"


@pytest.mark.parametrize("way", ["proxy", "hosts"])
def test_relay_follows_to_the_promoted_standby(nats: Nats, stream: Stream, workplace: Path, way: str) -> None:
    """Fault: switch-over to a standby that has everything. Promise: the same relay goes on there, by itself."""
    broker = Broker(nats.url)
    primary = own_postgres(workplace / "primary")
    with primary:
        prepared(primary)
        standby = standby_of(primary, workplace / "standby")
        with standby, Proxy(primary.port) as proxy:
            until(lambda: value(primary.url(), STREAMING) == 1)
            ports = f"{primary.port},{standby.port}"
            url = {
                "proxy": f"postgresql://postgres@127.0.0.1:{proxy.port}/postgres",
                "hosts": f"postgresql://postgres@/postgres?host=127.0.0.1,127.0.0.1&port={ports}"
                "&target_session_attrs=read-write",
            }[way]
            writers = Writers(url, stream.prefix, threads=3, endless=True, seed=137).start()
            with ThreadRelay(Settings(database_url=url, nats_url=nats.url)) as relay:
                more_sent(primary.url())
                primary.stop()
                relay.wait_for(Unreachable)
                rows(standby.url(), "SELECT pg_promote()")
                proxy.target = standby.port
                more_sent(standby.url(), 100)
                writers.stop()
                wait_until_sent(standby.url())
                assert sum(isinstance(each, TookLead) for each in relay.happenings) >= 2
            report = check(standby.url(), broker.read(stream.name))
    assert report.anomalies == {}
    assert report.transactions >= writers.committed


CANCEL = "SELECT count(pg_cancel_backend(pid)) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"


@pytest.mark.parametrize("mode", [pytest.param("asynchronous", marks=pytest.mark.core), "synchronous"])
def test_failover_that_loses_transactions_loses_none_that_is_published(
    nats: Nats, stream: Stream, workplace: Path, mode: str
) -> None:
    """Fault: the standby lags when the primary dies, and is promoted. Promise: no phantom, if asked for.

    Asked for by --durability replicas; or by a synchronous standby, whose confirmation everybody's commits are
    cancelled waiting for: they are visible then, and nowhere but on the primary.
    """
    broker = Broker(nats.url)
    primary = own_postgres(workplace / "primary")
    with primary, Proxy(primary.port) as line:
        url = prepared(primary).url()
        standby = standby_of(primary, workplace / "standby", f"postgresql://postgres@127.0.0.1:{line.port}/postgres")
        with standby:
            until(lambda: value(url, STREAMING) == 1)
            if mode == "synchronous":
                rows(url, "ALTER SYSTEM SET synchronous_standby_names = '*'")
                rows(url, "SELECT pg_reload_conf()")
                until(lambda: value(url, "SELECT sync_state FROM pg_stat_replication") == "sync")
            durability = Durability.REPLICAS if mode == "asynchronous" else Durability.LOCAL
            writers = Writers(url, stream.prefix, threads=3, endless=True, seed=139).start()
            with ThreadRelay(Settings(database_url=url, nats_url=nats.url, durability=durability)) as relay:
                more_sent(url, 50)
                line.change(line.down, stalled=True)  # what the primary sends stays here, and is lost with it
                _not_durable(relay, url, 1)
                written, published = int(value(url, COUNT)), len(broker.read(stream.name))
                until(lambda: value(url, CANCEL) + 1 and value(url, COUNT) > written + 50)
                _not_durable(relay, url, 4)
                assert len(broker.read(stream.name)) == published
                written = int(value(url, COUNT))
                writers._stop.set()
                primary.kill()
                line.refusing = True
                line.cut()
                writers.join()
            rows(standby.url(), "SELECT pg_promote()")
            assert int(value(standby.url(), COUNT)) < written, "nothing was lost in the failover"
            assert check(standby.url(), broker.read(stream.name)).phantom == []
            again = Writers(standby.url(), stream.prefix, threads=3, transactions=200, seed=149).start()
            with ThreadRelay(Settings(database_url=standby.url(), nats_url=nats.url)) as successor:
                successor.wait_for(Marked)
                again.join()
                wait_until_sent(standby.url())
            report = check(standby.url(), broker.read(stream.name))
    assert report.anomalies == {}
    assert report.transactions >= again.committed


def _not_durable(relay: ThreadRelay, url: str, times: int) -> None:
    """Wait until the relay has found so many times again that what it would send is not on the standby."""

    def found() -> int:
        weather = [each.why for each in relay.happenings if isinstance(each, Unreachable)]
        return sum("not known to be durable" in why for why in weather)

    def blocked() -> bool:
        told = [each for each in relay.happenings if isinstance(each, Blocked | Unblocked) and not each.stream]
        return bool(told) and isinstance(told[-1], Blocked) and "standby" in told[-1].why

    before = found()
    waits = lambda: blocked() or (value(url, CANCEL) + 1 and found() >= before + times)  # noqa: E731 - of one use
    until(waits, what="the relay waiting for the standby")
