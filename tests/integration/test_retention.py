"""What was sent is deleted after the retention, with its events, and nothing else ever is."""

from __future__ import annotations

import asyncio
import math

from outbox.config import Settings
from outbox.core.telemetry import Marked, Purged
from outbox.operate import purge
from outbox.operate.verify import verify
from tests.support.bed import Broker, ThreadRelay, rows, transactions, until, value, wait_until_sent
from tests.support.commands import outbox
from tests.support.servers import Stream
from tests.support.workload import Writers, check


def kept(url: str) -> tuple[int, int]:
    return (
        value(url, "SELECT count(*) FROM outbox.transactions"),
        value(url, "SELECT count(*) FROM outbox.events"),
    )


def test_without_retention_it_goes_with_the_mark_under_load(
    database: str, broker: Broker, stream: Stream, settings: Settings
) -> None:
    """Pending and dead transactions stay, the stream is whole, and verify knows why there are no receipts."""
    same = "6ba7b810-9dad-11d1-80b4-00c04fd430c8"
    twice = "INSERT INTO outbox.events (subject, payload, message_id) VALUES (%s, 'a', %s), (%s, 'b', %s)"
    rows(database, twice, f"{stream.prefix}.x", same, f"{stream.prefix}.x", same)
    writers = Writers(database, stream.prefix, threads=3, transactions=400, seed=9).start()
    with ThreadRelay(settings.model_copy(update={"retention": 0.0})) as relay:
        writers.join()
        relay.wait_for(Purged)
        wait_until_sent(database)
        until(lambda: kept(database) == (1, 2), what="all that was sent is deleted")
    assert rows(database, "SELECT position FROM outbox.dead") == [(1,)]
    stored = broker.read(stream.name)
    assert check(database, stored).anomalies == {}
    assert len(stored) == value(database, "SELECT count(*) FROM ledger")
    (compared,) = asyncio.run(verify(settings))
    assert (compared.anomalies, compared.unknown) == ([], len(stored))


def test_only_what_is_old_enough_goes(database: str, stream: Stream, settings: Settings) -> None:
    for _ in range(3):
        rows(database, "SELECT outbox.add(%s, n::text) FROM generate_series(1, 2) AS n", f"{stream.prefix}.x")
    keeping = settings.model_copy(update={"retention": math.inf})
    assert ThreadRelay(keeping, drain=True).ended() is None
    rows(database, "UPDATE outbox.transactions SET sent_at = now() - interval '25 hours' WHERE position <= 2")
    rows(database, "SELECT outbox.add('nowhere.x', 'pending')")
    with ThreadRelay(keeping) as relay:
        rows(database, "SELECT outbox.add(%s, 'x')", f"{stream.prefix}.x")
        until(lambda: value(database, "SELECT blocked FROM outbox.relay"))
    assert not any(isinstance(each, Purged) for each in relay.happenings)
    with ThreadRelay(settings) as relay:
        assert relay.wait_for(Purged).transactions == 2
    assert rows(database, "SELECT position FROM outbox.transactions ORDER BY 1") == [(3,), (4,), (5,)]
    assert value(database, "SELECT purged FROM outbox.housekeeping") == 2


def test_purge_by_hand_goes_past_what_is_pending(database: str, stream: Stream, settings: Settings) -> None:
    transactions(database, f"{stream.prefix}.x", 2500)
    with ThreadRelay(settings) as relay:
        relay.wait_for(Marked)
        wait_until_sent(database)
    old = "UPDATE outbox.transactions SET sent_at = now() - interval '2 hours' WHERE position > 1"
    rows(database, old)
    unsent = "sent_at = NULL, stream = NULL, first_sequence = NULL, last_sequence = NULL"
    rows(database, f"UPDATE outbox.transactions SET {unsent} WHERE position <= 1200")
    assert purge.purge(database, "outbox", 3600) == 1300
    assert kept(database) == (1200, 1200)
    assert purge.purge(database, "outbox", 0) == 0


def test_one_that_was_retried_late_does_not_stop_the_purge(database: str, stream: Stream, settings: Settings) -> None:
    transactions(database, f"{stream.prefix}.x", 1200)
    assert ThreadRelay(settings, drain=True).ended() is None
    rows(database, "UPDATE outbox.transactions SET sent_at = now() - interval '2 hours' WHERE position <> 10")
    rows(database, "UPDATE outbox.transactions SET retried_at = now() WHERE position = 10")
    assert purge.purge(database, "outbox", 3600) == 1199


def test_ages_that_no_database_can_count(environment: dict[str, str]) -> None:
    for hours in ("inf", "nan", "1e12", "-1"):
        assert outbox(environment, "purge", "--older-than", hours).returncode == 2, hours
    assert outbox({**environment, "OUTBOX_RETENTION": "1e12"}, "relay", "--drain").returncode == 2
    assert outbox({**environment, "OUTBOX_RETENTION": "inf"}, "relay", "--drain").returncode == 0
