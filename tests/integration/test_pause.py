"""An operator's pause: nothing more is published, nothing is lost, and it survives the relay."""

from __future__ import annotations

from outbox import schema
from outbox.config import Settings
from outbox.core.telemetry import Marked, PageRead, Paused, Resumed, Slept
from outbox.operate import pause, status
from tests.support.bed import Broker, ThreadRelay, rows, until, value, wait_until_sent
from tests.support.servers import Stream


def add(url: str, stream: Stream) -> None:
    rows(url, "SELECT outbox.add(%s, 'x')", f"{stream.prefix}.x")


def test_nothing_is_published_until_it_is_resumed(settings: Settings, broker: Broker, stream: Stream) -> None:
    url = settings.database_url
    with ThreadRelay(settings) as relay:
        add(url, stream)
        wait_until_sent(url)
        relay.wait_for(Slept)
        assert pause.pause(url, "outbox", "moving the stream").changed
        assert not pause.pause(url, "outbox", "again").changed
        assert relay.wait_for(Paused).why == "moving the stream"
        at = len(relay.happenings)
        for _ in range(20):
            add(url, stream)
        found = status.status(url)
        assert (found.paused_why, found.pending_transactions) == ("moving the stream", 20)
        assert found.leader
        assert not [each for each in relay.happenings[at:] if isinstance(each, PageRead | Marked)]
        assert broker.last_sequence(stream.name) == 1
        assert pause.resume(url, "outbox").changed
        relay.wait_for(Resumed)
        wait_until_sent(url)
    assert broker.last_sequence(stream.name) == 21
    assert not pause.resume(url, "outbox").changed
    assert status.status(url).paused_at is None


def test_a_new_leader_is_paused_from_its_first_moment(settings: Settings, broker: Broker, stream: Stream) -> None:
    url = settings.database_url
    add(url, stream)
    pause.pause(url, "outbox", "not yet")
    with ThreadRelay(settings) as relay:
        relay.wait_for(Paused)
        until(lambda: status.status(url).leader)
        assert not [each for each in relay.happenings if isinstance(each, PageRead)]
    assert broker.last_sequence(stream.name) == 0
    with ThreadRelay(settings):
        pause.resume(url, "outbox")
        wait_until_sent(url)
    assert broker.last_sequence(stream.name) == 1


def test_drain_of_a_paused_outbox_ends_when_nothing_is_pending(settings: Settings) -> None:
    pause.pause(settings.database_url, "outbox", "x")
    assert ThreadRelay(settings, drain=True).ended() is None


def test_writers_do_not_notify_a_relay_that_is_paused(settings: Settings, stream: Stream) -> None:
    """It slept when it was paused: left asleep, every commit would pay for a notification that nobody needs."""
    url = settings.database_url
    with ThreadRelay(settings) as relay:
        relay.wait_for(Slept)
        pause.pause(url, "outbox", "x")
        relay.wait_for(Paused)
        asleep = "SELECT pg_try_advisory_xact_lock_shared(%s, %s)"
        until(lambda: value(url, asleep, schema.AWAKE_LOCK, schema.lock_key("outbox")))
