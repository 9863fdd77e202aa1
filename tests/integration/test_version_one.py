"""Schema version 1 is what 0.1.0 has: frozen, and whatever state 0.1.0 left it in, publishing goes on from there."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from importlib import resources

import pytest

from outbox.config import Settings
from outbox.core.telemetry import Blocked
from outbox.embedded import Nats, Postgres
from outbox.operate import migrate, pause
from outbox.operate.verify import verify
from tests.support.bed import Broker, ThreadRelay, rows, until, value
from tests.support.version1 import STATES, restored

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


def test_a_database_of_it_has_no_drift(version1: str) -> None:
    assert migrate.problems(version1) == []


def test_it_has_something_in_every_state(version1: str) -> None:
    assert [state for state, found in STATES.items() if not rows(version1, found)] == []


def test_publishing_goes_on(version1: str, nats: Nats) -> None:
    """The batch that is stored and not marked is found, what is planned follows it, and what is blocked waits."""
    broker, settings = Broker(nats.url), Settings(database_url=version1, nats_url=nats.url, max_batch_messages=10)
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
