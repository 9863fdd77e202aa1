"""A planned transaction that somebody changes by hand is a halt, whenever it is found."""

from __future__ import annotations

from outbox.config import Settings
from outbox.core.telemetry import BatchSent, Unreachable
from outbox.embedded import Nats
from outbox.errors import Halt
from tests.support.bed import ThreadRelay, rows, value
from tests.support.proxy import NatsProxy
from tests.support.servers import Stream


def test_planned_transaction_that_is_set_aside_while_nats_is_away(
    database: str, nats: Nats, stream: Stream, settings: Settings
) -> None:
    for _ in range(3):
        rows(database, "SELECT outbox.add(%s, 'x')", f"{stream.prefix}.x")
    with NatsProxy(nats.port) as proxy:
        proxy.acks = "drop"
        first = ThreadRelay(settings.model_copy(update={"nats_url": proxy.url}))
        first.wait_for(BatchSent)
        first.kill()
        proxy.acks = "pass"
        assert value(database, "SELECT cardinality(plan) FROM outbox.streams") > 0
        proxy.refusing = True
        proxy.cut()
        relay = ThreadRelay(settings.model_copy(update={"nats_url": proxy.url}))
        relay.wait_for(Unreachable, lambda each: each.server == "nats")
        planned = value(database, "SELECT upper(plan[cardinality(plan)]) - 1 FROM outbox.streams")
        rows(database, "UPDATE outbox.transactions SET dead_at = now(), dead_reason = 'x' WHERE position = %s", planned)
        proxy.heal()
        error = relay.ended()
    assert isinstance(error, Halt)
    assert "is in the plan" in error.message or "not all are pending" in error.message
