"""Sent transactions are sent again on purpose: whole, as new messages that say what they repeat."""

from __future__ import annotations

import asyncio

import psycopg
import pytest

from outbox.config import Settings
from outbox.errors import Misconfigured
from outbox.operate import migrate, replay, show
from outbox.operate.replay import Wanted
from tests.support.bed import Broker, Stored, ThreadRelay, rows, value, wait_until_sent
from tests.support.servers import Stream
from tests.support.workload import check

ALL = Wanted(first=1, last=1 << 60)


def add(url: str, *events: tuple[str, str]) -> None:
    with psycopg.connect(url) as connection:
        for subject, payload in events:
            connection.execute('SELECT outbox.add(%s, %s::text, \'{"kind": "x"}\')', [subject, payload])


def contents(messages: list[Stored]) -> list[tuple[str, bytes, int, int]]:
    return [(each.subject, each.payload, each.number, each.count) for each in messages]


def test_replay_is_new_messages_that_say_what_they_repeat(settings: Settings, broker: Broker, stream: Stream) -> None:
    url, subject = settings.database_url, stream.prefix
    add(url, (f"{subject}.a", "1"), (f"{subject}.b", "2"))
    add(url, (f"{subject}.b", "3"))
    add(url, (f"{subject}.a", "4"))
    with ThreadRelay(settings):
        wait_until_sent(url)
        done = replay.replay(url, "outbox", Wanted(first=1, last=2))
        assert (done.transactions, done.events, done.last) == (2, 3, 2)
        wait_until_sent(url)
    stored = broker.read(stream.name)
    assert contents(stored[4:]) == contents(stored[:3])
    assert [(each.replay_of, each.position) for each in stored[4:]] == [(1, 4), (1, 4), (2, 5)]
    for original, again in zip(stored, stored[4:], strict=False):
        assert "Outbox-Transaction" not in again.headers
        assert again.headers["Outbox-Id"] == original.headers["Outbox-Id"]
        assert again.headers["kind"] == "x"
    assert len({each.message_id for each in stored}) == 7
    shown = asyncio.run(show.show(settings, 1))
    assert (shown.state, shown.replays, shown.replay_of) == ("sent", [4], None)
    assert [each.in_stream for each in shown.events] == ["there", "there"]
    assert asyncio.run(show.show(settings, 4)).replay_of == 1


def test_replay_chooses_by_subject_and_passes_over_what_was_not_sent(
    settings: Settings, broker: Broker, stream: Stream
) -> None:
    url, subject = settings.database_url, stream.prefix
    add(url, (f"{subject}.a", "1"), (f"{subject}.b", "2"))
    add(url, (f"{subject}.b", "3"))
    with ThreadRelay(settings):
        wait_until_sent(url)
    add(url, (f"{subject}.a", "pending"))
    rows(url, "UPDATE outbox.transactions SET dead_at = now(), dead_reason = 'by hand' WHERE position = 3")
    add(url, (f"{subject}.a", "pending"))
    chosen = Wanted(first=1, last=100, subject=f"{subject}.*.>")
    assert replay.replay(url, "outbox", chosen).transactions == 0
    chosen = Wanted(first=1, last=100, subject="*.a")
    counted = replay.replay(url, "outbox", chosen, dry_run=True)
    assert value(url, "SELECT count(*) FROM outbox.transactions") == 4
    done = replay.replay(url, "outbox", chosen)
    assert (done.transactions, done.events, done.pending, done.dead, done.last) == (1, 2, 1, 1, 1)
    assert counted == done
    assert value(url, "SELECT replay_of FROM outbox.transactions WHERE position = 5") == 1


def test_replays_are_not_replayed_again(settings: Settings, stream: Stream) -> None:
    url = settings.database_url
    add(url, (f"{stream.prefix}.a", "1"))
    with ThreadRelay(settings):
        wait_until_sent(url)
        for _ in range(3):
            assert replay.replay(url, "outbox", ALL).transactions == 1
            wait_until_sent(url)
    assert rows(url, "SELECT replay_of FROM outbox.transactions ORDER BY position") == [(None,), (1,), (1,), (1,)]


def test_what_does_not_fit_the_limits_any_more_is_refused_and_nothing_is_added(
    settings: Settings, stream: Stream
) -> None:
    url = settings.database_url
    add(url, (f"{stream.prefix}.a", "x" * 5000))
    with ThreadRelay(settings):
        wait_until_sent(url)
    rows(url, "UPDATE outbox.limits SET max_event_bytes = 2000")
    with pytest.raises(Misconfigured, match=r"transaction 1 cannot be added again: .*over the limit of 2000"):
        replay.replay(url, "outbox", ALL)
    rows(url, "DELETE FROM outbox.events")
    assert replay.replay(url, "outbox", ALL).transactions == 0
    assert value(url, "SELECT count(*) FROM outbox.transactions") == 1


def test_the_operators_role_may_replay_and_pause(settings: Settings, stream: Stream) -> None:
    url = settings.database_url
    add(url, (f"{stream.prefix}.a", "1"))
    with ThreadRelay(settings):
        wait_until_sent(url)
    name = f"operator_{stream.prefix}"
    rows(url, f"CREATE ROLE {name}")
    migrate.grant(url, "outbox", operator=name)
    as_operator = psycopg.conninfo.make_conninfo(url, options=f"-c role={name}")
    assert replay.replay(as_operator, "outbox", ALL).transactions == 1
    shown = asyncio.run(show.show(settings.model_copy(update={"database_url": as_operator}), 2))
    assert (shown.state, shown.replay_of) == ("pending", 1)


def test_verify_and_the_checker_see_a_damaged_replay(settings: Settings, broker: Broker, stream: Stream) -> None:
    """A replay is judged like any other transaction: by its own position, and by what it repeats."""
    url = settings.database_url
    add(url, (f"{stream.prefix}.a", "1"), (f"{stream.prefix}.a", "2"))
    with ThreadRelay(settings):
        wait_until_sent(url)
        replay.replay(url, "outbox", ALL)
        wait_until_sent(url)
    stored = broker.read(stream.name)
    whole, part = check(url, stored), check(url, stored[:3])
    assert whole.replays == 1

    def replays(split: list[object]) -> list[object]:
        return [each for each in split if isinstance(each, tuple) and each[0] > 2]

    assert replays(whole.split) == []
    assert replays(part.split)
