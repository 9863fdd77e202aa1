"""A stream is replaced, lost, or comes back as its mirror. Promise 5: what was for it is not stuck, nothing is silent.

What is for a stream that is gone goes where its subjects are now, once an operator says so; what has a copy is known.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from outbox.config import Settings
from outbox.core.telemetry import Blocked, Marked
from outbox.doctor.check import Colour
from outbox.doctor.examine import examine
from outbox.embedded import Nats
from outbox.errors import Halt
from outbox.operate import rebase
from outbox.operate.show import show
from outbox.operate.status import status
from outbox.operate.verify import verify
from tests.support.bed import Broker, ThreadRelay, rows, until, value
from tests.support.commands import outbox

NAMES = ("OLD", "NEW")


@pytest.fixture
def settings(database: str, nats: Nats, broker: Broker) -> Iterator[Settings]:
    """Two transactions are in the stream OLD."""
    broker.create_stream("OLD", "moving.>")
    found = Settings(database_url=database, nats_url=nats.url)
    add(found, "1", "2")
    drain(found)
    yield found
    for name in NAMES:
        broker.api(f"STREAM.DELETE.{name}")


def add(settings: Settings, *payloads: str) -> None:
    for payload in payloads:
        rows(settings.database_url, "SELECT outbox.add('moving.x', %s), outbox.add('moving.x', %s)", payload, payload)


def drain(settings: Settings) -> None:
    assert ThreadRelay(settings, drain=True).ended() is None


def payloads(broker: Broker, stream: str) -> list[str]:
    return [each.payload.decode() for each in broker.read(stream)][::2]


def anomalies(settings: Settings) -> dict[str, list[str]]:
    return {one.stream: [each.kind for each in one.anomalies] for one in asyncio.run(verify(settings))}


def red(settings: Settings) -> list[str]:
    return [each.name for each in asyncio.run(examine(settings)) if each.colour is Colour.RED]


@pytest.mark.parametrize("planned", [False, True], ids=["nothing planned", "planned"])
def test_stream_that_is_replaced_is_retired(
    settings: Settings, broker: Broker, environment: dict[str, str], planned: bool
) -> None:
    """Fault: a stream is deleted, another takes its subjects. Promise: named until it is retired, and then no more."""
    url = settings.database_url
    if planned:  # a relay died with it in hand
        add(settings, "3")
        rows(url, "UPDATE outbox.streams SET plan = ARRAY['[3,4)'::int8range], plan_base = last_sequence")
        rows(url, "UPDATE outbox.relay SET cursor = 3")
    broker.api("STREAM.DELETE.OLD")
    broker.create_stream("NEW", "moving.>")
    with ThreadRelay(settings) as relay:
        relay.wait_for(Blocked, lambda each: "--retire" in each.why)
        add(settings, "4")
        relay.wait_for(Marked)
        until(lambda: any(each.blocked for each in status(url).streams))
    assert anomalies(settings) == {"NEW": [], "OLD": ["missing"]}
    assert "OLD" in red(settings)
    done = outbox(environment, "rebase", "--stream", "OLD", "--retire", "--yes")
    assert (done.returncode, "is retired" in done.stdout) == (0, True), done
    drain(settings)
    assert payloads(broker, "NEW") == (["4", "3"] if planned else ["4"])
    assert anomalies(settings) == {"NEW": [], "OLD": []}
    assert red(settings) == []
    retired = {each.name: each.retired_at is not None for each in status(url).streams}
    assert retired == {"OLD": True, "NEW": False}
    assert "retired" in outbox(environment, "status").stdout
    assert "it was retired" in (asyncio.run(show(settings, 1)).problem or "")
    assert outbox(environment, "verify", "--stream", "OLD").returncode == 0
    # What has the name again is met for the first time.
    broker.api("STREAM.DELETE.NEW")
    broker.create_stream("OLD", "moving.>")
    assert outbox(environment, "rebase", "--stream", "NEW", "--retire", "--yes").returncode == 0
    add(settings, "5")
    drain(settings)
    assert payloads(broker, "OLD") == ["5"]
    assert {each.name: each.retired_at is not None for each in status(url).streams} == {"OLD": False, "NEW": True}


def test_stream_that_is_retired_by_mistake_is_taken_back(settings: Settings, broker: Broker) -> None:
    """What was in flight and is stored is found; the next relay says how the stream is taken back."""
    add(settings, "3")
    drain(settings)
    receipt = "sent_at = NULL, stream = NULL, first_sequence = NULL, last_sequence = NULL"
    rows(settings.database_url, f"UPDATE outbox.transactions SET {receipt} WHERE position = 3")
    rows(
        settings.database_url,
        "UPDATE outbox.streams SET plan = ARRAY['[3,4)'::int8range], plan_base = 4, last_sequence = 4",
    )
    edit(broker, "OLD", subjects=["elsewhere.>"])
    assert asyncio.run(rebase.retire_stream(settings, "OLD")).adopted == 1
    edit(broker, "OLD", subjects=["moving.>"])
    add(settings, "4")
    error = ThreadRelay(settings).ended()
    assert isinstance(error, Halt)
    assert "outbox rebase --stream OLD" in error.remedy
    asyncio.run(rebase.accept_stream(settings, "OLD"))
    drain(settings)
    assert payloads(broker, "OLD") == ["1", "2", "3", "4"]
    assert anomalies(settings) == {"OLD": []}


def test_stream_that_still_takes_its_subjects_is_not_retired(
    settings: Settings, broker: Broker, environment: dict[str, str]
) -> None:
    """Fault: it would be met again at once, and halt the next relay for all streams. Promise: refused, and said why."""
    words = ("rebase", "--stream", "OLD", "--retire", "--yes")
    done = outbox(environment, *words)
    assert done.returncode == 1
    assert "still takes what the outbox sends, such as subject moving.x" in done.stderr
    add(settings, "3")
    drain(settings)
    edit(broker, "OLD", subjects=["moving.else"])
    assert outbox(environment, *words).returncode == 0
    broker.create_stream("NEW", "moving.x")
    add(settings, "4")
    drain(settings)
    assert payloads(broker, "NEW") == ["4"]


def test_stream_that_only_receipts_know_is_retired(
    settings: Settings, broker: Broker, environment: dict[str, str]
) -> None:
    """Fault: the outbox has forgotten its streams, and one of them is gone. Promise: it can be put to rest."""
    broker.api("STREAM.DELETE.OLD")
    asyncio.run(rebase.rebase(settings, read_back=False))
    assert anomalies(settings) == {"OLD": ["missing"]}
    for code in (0, 1):  # it is known as retired from then on
        assert outbox(environment, "rebase", "--stream", "OLD", "--retire", "--yes").returncode == code
    assert anomalies(settings) == {"OLD": []}
    done = outbox(environment, "rebase", "--stream", "NEVER", "--retire", "--yes")
    assert "does not know a stream 'NEVER'" in done.stderr


def edit(broker: Broker, stream: str, **config: object) -> None:
    answer = broker.api(f"STREAM.UPDATE.{stream}", {**broker.info(stream)["config"], **config})
    assert "error" not in answer, answer


def promoted(broker: Broker, name: str) -> None:
    """The mirror is the stream now: it takes the subjects."""
    config = broker.info(name)["config"]
    config.pop("mirror")
    answer = broker.api(f"STREAM.UPDATE.{name}", {**config, "subjects": ["moving.>"], "allow_atomic": True})
    assert "error" not in answer, answer


def test_mirror_that_is_promoted_when_its_origin_is_lost(settings: Settings, broker: Broker) -> None:
    """Fault: the origin is lost, and its mirror, of another name, takes over. Promise: nothing twice, all accounted."""
    answer = broker.api("STREAM.CREATE.NEW", {"name": "NEW", "storage": "file", "mirror": {"name": "OLD"}})
    assert "error" not in answer, answer
    add(settings, "3")
    drain(settings)
    until(lambda: broker.last_sequence("NEW") == 6)
    url = settings.database_url
    receipt = "sent_at = NULL, stream = NULL, first_sequence = NULL, last_sequence = NULL"
    rows(url, f"UPDATE outbox.transactions SET {receipt} WHERE position = 3")  # the ack was lost with the origin
    rows(url, "UPDATE outbox.streams SET plan = ARRAY['[3,4)'::int8range], plan_base = 4, last_sequence = 4")
    broker.api("STREAM.DELETE.OLD")
    promoted(broker, "NEW")
    add(settings, "4")
    error = ThreadRelay(settings).ended()
    assert isinstance(error, Halt)
    assert "a mirror that was promoted" in error.message
    assert asyncio.run(rebase.rebase(settings)).adopted == 1
    drain(settings)
    assert payloads(broker, "NEW") == ["1", "2", "3", "4"]
    assert anomalies(settings) == {"NEW": [], "OLD": []}
    assert value(url, "SELECT count(*) FROM outbox.transactions WHERE sent_at IS NULL") == 0


def test_mirror_that_comes_back_under_the_old_name(settings: Settings, broker: Broker) -> None:
    """Fault: the same messages in a stream of another creation time. Promise: the words fit, and `verify` goes on."""
    mirrored = {"name": "NEW", "storage": "file", "sources": [{"name": "OLD"}]}
    assert "error" not in broker.api("STREAM.CREATE.NEW", mirrored)
    until(lambda: broker.last_sequence("NEW") == 4)
    broker.api("STREAM.DELETE.OLD")
    assert "error" not in broker.api("STREAM.UPDATE.NEW", {**broker.info("NEW")["config"], "sources": []})
    back = {"name": "OLD", "storage": "file", "sources": [{"name": "NEW"}]}
    assert "error" not in broker.api("STREAM.CREATE.OLD", back)
    until(lambda: broker.last_sequence("OLD") == 4)
    update = {**broker.info("OLD")["config"], "sources": [], "subjects": ["moving.>"], "allow_atomic": True}
    assert "error" not in broker.api("STREAM.UPDATE.OLD", update)
    add(settings, "3")
    with ThreadRelay(settings) as relay:
        relay.wait_for(Blocked, lambda each: each.stream == "OLD" and "promoted from a mirror" in each.why)
    assert anomalies(settings) == {"OLD": []}
    asyncio.run(rebase.accept_stream(settings, "OLD"))
    drain(settings)
    assert payloads(broker, "OLD") == ["1", "2", "3"]
    assert anomalies(settings) == {"OLD": []}
