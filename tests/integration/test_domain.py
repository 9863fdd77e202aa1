"""JetStream domains: a relay at a leaf node publishes to a stream of the hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from outbox.config import Settings
from outbox.core.telemetry import Blocked, Unreachable
from outbox.embedded import Nats, free_port
from tests.support.bed import Broker, ThreadRelay, rows, wait_until_sent
from tests.support.servers import own_nats


def in_domain(folder: Path, domain: str, more: str) -> Nats:
    config = f'server_name: {domain}\njetstream {{ store_dir: "{folder}", domain: {domain} }}\nleafnodes {{ {more} }}'
    return own_nats(folder, config=config)


@pytest.fixture
def hub_and_leaf(workplace: Path) -> Iterator[tuple[Broker, str]]:
    """A hub that has the stream FAR, and the URL of a leaf node with JetStream of its own."""
    port = free_port()
    hub = in_domain(workplace / "hub", "hub", f"listen: 127.0.0.1:{port}")
    leaf = in_domain(workplace / "leaf", "leaf", f'remotes: [ {{ url: "nats-leaf://127.0.0.1:{port}" }} ]')
    with hub, leaf:
        Broker(hub.url).create_stream("FAR", "far.>")
        yield Broker(hub.url), leaf.url


def test_relay_at_a_leaf_publishes_to_the_hub(database: str, hub_and_leaf: tuple[Broker, str]) -> None:
    hub, leaf = hub_and_leaf
    rows(database, "SELECT outbox.add('far.x', n::text) FROM generate_series(1, 3) AS n")
    with ThreadRelay(Settings(database_url=database, nats_url=leaf, nats_domain="hub")):
        wait_until_sent(database)
    assert rows(database, "SELECT stream, first_sequence, last_sequence FROM outbox.transactions") == [("FAR", 1, 3)]
    assert [each.payload for each in hub.read("FAR")] == [b"1", b"2", b"3"]


def test_without_the_domain_the_leaf_answers_for_itself(database: str, hub_and_leaf: tuple[Broker, str]) -> None:
    _, leaf = hub_and_leaf
    rows(database, "SELECT outbox.add('far.x', 'y')")
    with ThreadRelay(Settings(database_url=database, nats_url=leaf)) as relay:
        relay.wait_for(Blocked, lambda each: "is in no stream" in each.why)


@pytest.mark.parametrize("domain", ["nowhere", None])
def test_no_jetstream_there_is_named(domain: str | None, database: str, workplace: Path) -> None:
    """Without a domain: a server without JetStream. It may come, so it is weather, but told."""
    without = own_nats(workplace / "nats", config="# no JetStream, and so no store_dir")
    with without if domain is None else in_domain(workplace / "hub", "hub", "") as server:
        given = Settings(database_url=database, nats_url=server.url, nats_domain=domain)
        with ThreadRelay(given) as relay:
            told = relay.wait_for(Unreachable, lambda each: each.server == "nats")
    assert "OUTBOX_NATS_DOMAIN" in told.why
