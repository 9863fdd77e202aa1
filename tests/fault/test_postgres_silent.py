"""What dies is the network to Postgres, without a word. Promise 5: the relay gives up on the answer, and comes back."""

from __future__ import annotations

import pytest

from outbox.config import Settings
from outbox.core.telemetry import Marked, PageRead, Slept, Unreachable
from outbox.embedded import Nats, Postgres
from outbox.postgres import session
from tests.support.bed import Broker, ThreadRelay, rows, until, value, wait_until_sent
from tests.support.proxy import Proxy
from tests.support.servers import Stream


@pytest.mark.parametrize("direction", ["up", "down"])
def test_relay_gives_up_on_a_server_that_never_answers(
    postgres: Postgres, database: str, nats: Nats, stream: Stream, monkeypatch: pytest.MonkeyPatch, direction: str
) -> None:
    """Fault: packets vanish in one direction, and no reset comes. Promise: the very relay goes on when it is over."""
    monkeypatch.setattr(session, "ANSWER_SECONDS", 1.0)
    with Proxy(postgres.port) as proxy:
        url = database.replace(f":{postgres.port}/", f":{proxy.port}/")
        with ThreadRelay(Settings(database_url=url, nats_url=nats.url)) as relay:
            relay.wait_for(Slept)
            proxy.change(getattr(proxy, direction), swallowed=True)
            relay.wait_for(Unreachable, lambda each: each.server == "postgres")
            proxy.heal()
            proxy.cut()
            after = len(relay.happenings)
            rows(database, "SELECT outbox.add(%s, 'x')", f"{stream.prefix}.x")
            relay.wait_for(Marked, after=after)
            wait_until_sent(database)
    assert len(Broker(nats.url).read(stream.name)) == 1


@pytest.mark.parametrize("events", [12, pytest.param(120, marks=pytest.mark.long)])
def test_page_takes_longer_than_any_time_out(
    postgres: Postgres, database: str, nats: Nats, stream: Stream, monkeypatch: pytest.MonkeyPatch, events: int
) -> None:
    """Fault: the way from Postgres is slow, and what comes is large. Promise: nothing is cut while bytes flow; it is
    read once, and sent by the leader that began to.
    """
    monkeypatch.setattr(session, "ANSWER_SECONDS", 1.0)
    monkeypatch.setitem(session.SESSION, "statement_timeout", "1s")
    size = 11_900_000 // events  # more than the kernel buffers: Postgres cannot be done with it at once
    with Proxy(postgres.port) as proxy:
        url = database.replace(f":{postgres.port}/", f":{proxy.port}/")
        settings = Settings(database_url=url, nats_url=nats.url, max_batch_bytes=1_000_000, read_ahead_bytes=1_000_000)
        with ThreadRelay(settings) as relay:
            relay.wait_for(Slept)
            proxy.change(proxy.down, rate=4_000_000)
            rows(
                database,
                "INSERT INTO outbox.events (subject, payload) SELECT %s, decode(repeat('ab', %s), 'hex')"
                " FROM generate_series(1, %s)",
                f"{stream.prefix}.x",
                size,
                events,
            )
            until(lambda: value(database, "SELECT count(*) = 0 FROM outbox.pending"), patience=60)
            assert not [each for each in relay.happenings if isinstance(each, Unreachable)]
            assert [each.events for each in relay.happenings if isinstance(each, PageRead)] == [events]
    assert len(Broker(nats.url).read(stream.name)) == events
