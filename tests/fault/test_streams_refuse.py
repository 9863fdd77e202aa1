"""What fails is the stream's will: full, sealed, without atomic batches, out of storage. Promises 1, 2 and 5."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from outbox.config import Settings
from outbox.core.telemetry import BatchSent, Blocked, Marked
from outbox.embedded import Nats
from outbox.errors import Halt
from outbox.operate import status
from outbox.operate.rebase import accept_stream
from tests.support.bed import Broker, ThreadRelay, until, value, wait_until_sent
from tests.support.faults import add, assert_ended_well, assert_receipts_tile, more_sent, sent, unsent_ids
from tests.support.servers import Stream, own_nats
from tests.support.workload import Writers, check


@pytest.fixture
def settings(database: str, nats: Nats) -> Settings:
    return Settings(database_url=database, nats_url=nats.url, ack_timeout=2)


def reconfigure(broker: Broker, name: str, **changes: object) -> None:
    answer = broker.api(f"STREAM.UPDATE.{name}", {**broker.info(name)["config"], **changes})
    assert "error" not in answer, answer


def blocked(url: str, stream: str) -> str:
    """What the status says of the stream."""
    return next((str(each.blocked or "") for each in status.status(url).streams if each.name == stream), "")


@pytest.mark.parametrize(
    ("limit", "steps"),
    [("max_msgs", (300, 1500, -1)), ("max_bytes", (100_000, 400_000, -1))],
    ids=["messages", "bytes"],
)
def test_stream_is_full(
    database: str, broker: Broker, stream: Stream, settings: Settings, limit: str, steps: tuple[int, ...]
) -> None:
    """Fault: the stream is full, gets a little room, is full again. Promise: waited out, nothing lost or cut."""
    reconfigure(broker, stream.name, discard="new", **{limit: steps[0]})
    writers = Writers(database, stream.prefix, threads=4, endless=True, seed=127).start()
    with ThreadRelay(settings) as relay:
        for step in steps[1:]:
            after = len(relay.happenings)
            relay.wait_for(Blocked, lambda each: "exceeded (10077)" in each.why, after=after)
            until(lambda: "10077" in blocked(database, stream.name))
            reconfigure(broker, stream.name, **{limit: step})
        more_sent(database)
        writers.stop()
        wait_until_sent(database)
    assert_ended_well(writers, broker, stream.name)
    assert blocked(database, stream.name) == ""


def test_one_of_two_streams_is_sealed(database: str, broker: Broker, stream: Stream, settings: Settings) -> None:
    """Fault: a stream is sealed, for ever. Promise: it is blocked visibly, the other flows on, nothing is lost."""
    broker.create_stream("SEALED", "sealed.>")
    writers = Writers(database, stream.prefix, threads=3, endless=True, seed=131).start()
    relay = ThreadRelay(settings)
    add(database, "sealed.before", 3)
    relay.wait_for(Marked)
    until(lambda: broker.last_sequence("SEALED") == 3)
    reconfigure(broker, "SEALED", sealed=True)
    for number in range(4):
        add(database, f"sealed.{number}", 2)
    relay.wait_for(Blocked, lambda each: each.stream == "SEALED")
    until(lambda: "it is sealed" in blocked(database, "SEALED"))
    more_sent(database)
    writers.stop()
    until(lambda: value(database, "SELECT count(*) FROM outbox.pending") == 4)
    left = unsent_ids(database)
    assert len(left) == 8
    assert blocked(database, stream.name) == ""
    assert check(database, broker.read(stream.name)).anomalies.keys() <= {"receipts"}  # some are of the other stream
    assert_receipts_tile(database, stream.name, broker.last_sequence(stream.name))
    broker.api("STREAM.DELETE.SEALED")
    broker.create_stream("SEALED", "sealed.>")
    assert isinstance(relay.ended(), Halt)
    asyncio.run(accept_stream(settings, "SEALED"))
    with ThreadRelay(settings, drain=True) as after:
        assert after.ended() is None
    assert [each.message_id for each in broker.read("SEALED")] == left
    broker.api("STREAM.DELETE.SEALED")


def test_allow_atomic_is_switched_off_and_on(database: str, broker: Broker, stream: Stream, settings: Settings) -> None:
    """Fault: the stream loses allow_atomic three times under load. Promise: blocked, and no message is stored alone."""
    writers = Writers(database, stream.prefix, threads=4, endless=True, seed=137).start()
    with ThreadRelay(settings) as relay:
        relay.wait_for(Marked)
        for _ in range(3):
            after = len(relay.happenings)
            reconfigure(broker, stream.name, allow_atomic=False)
            relay.wait_for(Blocked, lambda each: "it lacks allow_atomic" in each.why, after=after)
            until(lambda: "allow_atomic" in blocked(database, stream.name))
            reconfigure(broker, stream.name, allow_atomic=True)
            more_sent(database)
        writers.stop()
        wait_until_sent(database)
    assert_ended_well(writers, broker, stream.name)


@pytest.mark.parametrize("packed", [False, True], ids=["alone", "packed"])
@pytest.mark.parametrize("limit", ["server", "account"])
def test_storage_ends_inside_a_commit(database: str, workplace: Path, limit: str, *, packed: bool) -> None:
    """Fault: the storage limit is reached inside a commit; a part of the batch stays. There is no answer, or with
    nats-server 2.12 a refusal, or an ack: that one skips what has no room and stores smaller messages behind it.

    Promise: the relay halts and says so; nothing of that batch is marked, and nothing is sent behind it.
    """
    store = f'store_dir: "{workplace / "nats"}"'
    user = "users: [{user: a, password: a}]"
    config = {
        "server": f"jetstream {{ {store}, max_file_store: 1MB }}",
        "account": f"jetstream {{ {store} }}\nno_auth_user: a\n"
        f"accounts {{ A {{ jetstream {{ max_file: 1MB }}, {user} }} }}",
    }[limit]
    with own_nats(workplace / "nats", config=config) as server:
        assert isinstance(server, Nats)
        broker = Broker(server.url)
        broker.create_stream("SMALL", "small.>")
        settings = Settings(database_url=database, nats_url=server.url, ack_timeout=2)
        add(database, "small.fits", 10, size=10_000)
        with ThreadRelay(settings):
            wait_until_sent(database)
        add(database, "small.cut", 400, size=4_000)
        if packed:
            add(database, "small.behind", 5)
        relay = ThreadRelay(settings)
        if not packed:
            relay.wait_for(BatchSent)
            add(database, "small.behind", 5)
        error = relay.ended()
        assert isinstance(error, Halt)
        assert "it ends inside a transaction at" in error.message
        assert "outbox rebase --stream SMALL" in error.remedy
        assert sent(database) == 1
        assert str(error) in str(status.status(database).blocked)
        stored = broker.read("SMALL")
    assert 10 < len(stored) < 410
    assert stored[10].subject == "small.cut"
    assert packed or stored[-1].subject == "small.cut"
    assert sum(isinstance(each, BatchSent) for each in relay.happenings) == 1
