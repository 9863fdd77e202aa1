"""What dies is the network to Postgres, without a word. Promise 5: the relay gives up on the answer, and comes back."""

from __future__ import annotations

import pytest

from outbox.config import Settings
from outbox.core.telemetry import Marked, Slept, Unreachable
from outbox.embedded import Nats, Postgres
from outbox.postgres import session
from tests.support.bed import Broker, ThreadRelay, rows, wait_until_sent
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
