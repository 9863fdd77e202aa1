"""Dead letters as a whole story: set aside, looked at, retried or discarded; nothing else is lost for it. Promise 5."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import re
import threading
from collections import Counter
from pathlib import Path

import psycopg
import pytest

from outbox.config import AcrossStreams, OnDead, Settings
from outbox.core.positions import Range
from outbox.core.telemetry import Careful, Died, Marked
from outbox.core.transaction import DeadReason
from outbox.embedded import Nats
from outbox.errors import Halt
from outbox.operate import dead
from outbox.operate.dead import Selection
from outbox.postgres.rows import Page
from outbox.postgres.store import Store
from tests.support.bed import Broker, ProcessRelay, ThreadRelay, rows, until, value, wait_until_sent
from tests.support.commands import outbox
from tests.support.foreign import WRITERS_SUBJECTS, Company, ours
from tests.support.servers import Stream
from tests.support.workload import Writers, check


def add(url: str, subject: str, *payloads: str) -> int:
    """One transaction; returns its position."""
    for_each = "SELECT outbox.add(%s, p) FROM unnest(%s::text[]) AS p"
    rows(url, for_each, subject, list(payloads))
    return int(value(url, "SELECT max(position) FROM outbox.transactions"))


def test_retry_sends_it_late_and_whole_under_load(
    database: str, broker: Broker, nats: Nats, stream: Stream, settings: Settings
) -> None:
    """Fault: a transaction was too large for its stream. Promise: once the cause is gone, a retry sends it, once."""
    broker.create_stream(f"{stream.name}L", f"{stream.prefix}l.>", max_msg_size=500)
    with ThreadRelay(settings) as relay:
        position = add(database, f"{stream.prefix}l.x", "small", "x" * 1000)
        relay.wait_for(Died)
        writers = Writers(database, stream.prefix, threads=2, endless=True, seed=7).start()
        config = {**broker.info(f"{stream.name}L")["config"], "max_msg_size": -1}
        broker.api(f"STREAM.UPDATE.{stream.name}L", config)
        # What the relay learnt of the stream's limit is renewed when it reads the stream back.
        relay.stop()
    with ThreadRelay(settings):
        assert dead.retry(database, "outbox", [position]) == [position]
        until(lambda: len(broker.read(f"{stream.name}L")) == 2)
        writers.stop()
        wait_until_sent(database)
    assert [each.number for each in broker.read(f"{stream.name}L")] == [1, 2]
    assert check(database, broker.read(stream.name)).anomalies.keys() <= {"receipts"}
    kept = rows(database, "SELECT sent_at IS NOT NULL, retried_at IS NOT NULL, dead_at FROM outbox.transactions "
                "WHERE position = %s", position)  # fmt: skip
    assert kept == [(True, True, None)]
    assert value(database, "SELECT retried::text FROM outbox.relay") == "{}"
    broker.api(f"STREAM.DELETE.{stream.name}L")


def test_retry_without_a_relay_is_taken_up_by_the_next_one(
    database: str, broker: Broker, stream: Stream, settings: Settings
) -> None:
    """Fault: no relay runs while an operator retries. Promise: pending, shown, and sent by the next leader's drain."""
    broker.create_stream(f"{stream.name}B", f"{stream.prefix}b.>")
    rows(
        database,
        "INSERT INTO outbox.events (subject, payload) VALUES (%s, 'a'), (%s, 'b')",
        f"{stream.prefix}.x",
        f"{stream.prefix}b.x",
    )
    add(database, f"{stream.prefix}.x", "behind")
    whole = settings.model_copy(update={"across_streams": AcrossStreams.DEAD})
    assert ThreadRelay(whole, drain=True).ended() is None
    assert [each.position for each in dead.dead_letters(database, "outbox", Selection())] == [1]
    assert dead.retry(database, "outbox", [1, 2, 3]) == [1]
    assert rows(database, "SELECT position FROM outbox.pending") == [(1,)]
    broker.api(f"STREAM.DELETE.{stream.name}B")
    broker.api(
        f"STREAM.UPDATE.{stream.name}",
        {**broker.info(stream.name)["config"], "subjects": [f"{stream.prefix}.>", f"{stream.prefix}b.>"]},
    )
    assert ThreadRelay(settings, drain=True).ended() is None
    assert [each.payload for each in broker.read(stream.name)] == [b"behind", b"a", b"b"]


def test_retry_of_what_is_still_wrong_dies_again(database: str, stream: Stream, settings: Settings) -> None:
    same = "6ba7b810-9dad-11d1-80b4-00c04fd430c8"
    twice = "INSERT INTO outbox.events (subject, payload, message_id) VALUES (%s, 'a', %s), (%s, 'b', %s)"
    rows(database, twice, f"{stream.prefix}.x", same, f"{stream.prefix}.x", same)
    with ThreadRelay(settings) as relay:
        relay.wait_for(Died)
        for _ in range(2):
            after = len(relay.happenings)
            dead.retry(database, "outbox", [1])
            relay.wait_for(Died, after=after)
    assert [each.reason.split(":")[0] for each in dead.dead_letters(database, "outbox", Selection())] == [
        DeadReason.DUPLICATE_MESSAGE_ID
    ]


def test_commands_of_the_whole_story(
    database: str, environment: dict[str, str], broker: Broker, stream: Stream, settings: Settings
) -> None:
    same = "6ba7b810-9dad-11d1-80b4-00c04fd430c8"
    twice = (
        "INSERT INTO outbox.events (subject, payload, message_id) VALUES (%s, 'secret [/b] [true]', %s), (%s, 'b', %s)"
    )
    for name in "abc":
        rows(database, twice, f"{stream.prefix}.{name}", same, f"{stream.prefix}.{name}", same)
    halting = settings.model_copy(update={"on_dead": OnDead.HALT})
    for _ in range(2):
        error = ThreadRelay(halting).ended()
        assert isinstance(error, Halt)
        assert "halted: " in str(value(database, "SELECT blocked FROM outbox.relay"))
    assert "outbox dead discard 1" in str(error)
    assert ThreadRelay(settings, drain=True).ended() is None
    listed = json.loads(outbox(environment, "dead", "list", "--json").stdout)
    assert [each["position"] for each in listed] == [1, 2, 3]
    assert "[/b] [true]" in outbox(environment, "dead", "show", "1").stdout
    shown = outbox({**environment, "COLUMNS": "200"}, "dead", "list").stdout
    heads, first = (line for line in shown.splitlines() if "reason" in line or re.match(r"│ +1 │", line))
    assert [cell.strip() for cell in heads.split("┃")].index("reason") == next(
        index for index, cell in enumerate(first.split("│")) if "duplicate-message-id" in cell
    )
    assert outbox(environment, "dead", "show", "99").returncode == 1
    assert outbox(environment, "dead", "discard").returncode == 2
    assert outbox(environment, "dead", "discard", "99", "--yes").returncode == 2
    assert outbox(environment, "dead", "retry", "1").returncode == 1  # nobody answers the question
    assert "discarded: 1 dead letter" in outbox(environment, "dead", "discard", "1", "--yes").stdout
    by_subject = ("--subject", f"{stream.prefix}.b", "--all", "--yes")
    assert "discarded: 1 dead letter" in outbox(environment, "dead", "discard", *by_subject).stdout
    assert [p for (p,) in rows(database, "SELECT position FROM outbox.dead WHERE discarded_at IS NULL")] == [3]
    assert dead.retry(database, "outbox", [1]) == []  # discarded for good
    assert json.loads(outbox(environment, "dead", "list", "--reason", "unrouted", "--json").stdout) == []
    assert "pending again: 1 transaction" in outbox(environment, "dead", "retry", "--all", "--yes").stdout
    assert broker.read(stream.name) == []


def fill(broker: Broker, stream: Stream) -> None:
    """Let the stream have no room for another message."""
    broker.publish(f"{stream.prefix}.fills.it")
    full = {"max_msgs": broker.info(stream.name)["state"]["messages"], "discard": "new"}
    broker.api(f"STREAM.UPDATE.{stream.name}", {**broker.info(stream.name)["config"], **full})


@pytest.mark.core
@pytest.mark.parametrize("point", ["poisoned-load", "poisoned-send", "poisoned-load beside a gap"])
def test_transaction_that_kills_the_relay_is_set_aside(
    database: str,
    environment: dict[str, str],
    broker: Broker,
    stream: Stream,
    workplace: Path,
    company: Company,
    point: str,
) -> None:
    """Fault: one transaction kills every relay that touches it, as by the memory it takes.

    Promise: recognised after a few starts and set aside; all others are sent, once, in order. An open position makes
    the relay ask twice for a page, and the note must outlast both questions.
    """
    point, _, gap = point.partition(" ")
    company.joins(broker.url, stream.name, stream.prefix, subjects=[*WRITERS_SUBJECTS, "x"])
    holder = psycopg.connect(database)
    if gap:
        holder.execute("SELECT outbox.add('a.b', 'never committed')")
        holder.execute("SET CONSTRAINTS ALL IMMEDIATE")
    writers = Writers(database, stream.prefix, threads=2, transactions=60, seed=5).start()
    writers.join()
    poison = add(database, f"{stream.prefix}.x", "before", "poison", "after")
    Writers(database, stream.prefix, threads=2, transactions=60, seed=6).start().join()
    starts = 0
    while value(database, "SELECT count(*) FROM outbox.pending") and starts < 12:
        starts += 1
        with ProcessRelay(workplace, environment, "--drain", armed=(point, "SIGKILL", 1)) as relay:
            until(lambda r=relay: not r.running)  # type: ignore[misc]
    assert rows(database, "SELECT position, split_part(dead_reason, ':', 1) FROM outbox.dead") == [
        (poison, "kills-relay")
    ]
    assert 4 <= starts <= 7
    holder.close()
    stored = ours(broker.read(stream.name))
    assert check(database, stored).anomalies == {}
    assert len(stored) == value(database, "SELECT count(*) FROM ledger")


@pytest.mark.parametrize("way", ["nats away", "stream full"])
def test_kills_that_are_nobodys_fault_convict_nobody(
    database: str,
    environment: dict[str, str],
    broker: Broker,
    stream: Stream,
    workplace: Path,
    company: Company,
    way: str,
) -> None:
    """Fault: the relay is killed again and again while NATS is away, or the stream full. Promise: that is no attempt.

    A kill may hit the milliseconds of a new try, so one attempt may be counted by chance, but never a verdict.
    """
    company.joins(broker.url, stream.name, stream.prefix, subjects=["x"])
    position = add(database, f"{stream.prefix}.x", "patient")
    away = {**environment, "OUTBOX_NATS_URL": "nats://127.0.0.1:1"}
    chance = random.Random(3)
    if way == "stream full":
        away = environment
        config = broker.info(stream.name)["config"]
        fill(broker, stream)
    for _ in range(7):
        with ProcessRelay(workplace, away) as relay:
            relay.wait_for("Unreachable" if way == "nats away" else "InDoubt")
            threading.Event().wait(chance.uniform(0, 0.4))
            relay.kill()
    if way == "stream full":
        broker.api(f"STREAM.UPDATE.{stream.name}", config)
        broker.api(f"STREAM.PURGE.{stream.name}")
    assert value(database, "SELECT attempts FROM outbox.transactions WHERE position = %s", position) < 2
    with ProcessRelay(workplace, environment) as relay:
        relay.wait_for("Careful")
        wait_until_sent(database)
        relay.wait_for("Marked")
        assert relay.stop() == 0
    assert value(database, "SELECT deaths FROM outbox.relay") == 0
    assert len(ours(broker.read(stream.name))) == 1


def test_lost_sessions_are_no_deaths(
    database: str, broker: Broker, stream: Stream, settings: Settings, company: Company
) -> None:
    """Fault: the leader's session is cut again and again, and the other relay takes over. Promise: nobody died."""
    company.joins(broker.url, stream.name, stream.prefix, subjects=["x"])
    config = broker.info(stream.name)["config"]
    fill(broker, stream)
    position = add(database, f"{stream.prefix}.x", "patient")
    cut = "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 2 AND granted "
    cut += "AND pid IN (SELECT pid FROM pg_stat_activity WHERE datname = current_database())"
    with ThreadRelay(settings) as one, ThreadRelay(settings) as other:
        for _ in range(8):
            before = value(database, "SELECT epoch FROM outbox.relay")
            rows(database, cut)
            until(lambda b=before: value(database, "SELECT epoch FROM outbox.relay") > b)  # type: ignore[misc]
        for relay in (one, other):
            assert relay.error is None
        broker.api(f"STREAM.UPDATE.{stream.name}", config)
        wait_until_sent(database)
        until(lambda: value(database, "SELECT deaths FROM outbox.relay") == 0)
    assert value(database, "SELECT attempts FROM outbox.transactions WHERE position = %s", position) == 0
    assert value(database, "SELECT count(*) FROM outbox.dead") == 0


def test_careful_leader_begins_a_term_without_care(
    database: str, broker: Broker, stream: Stream, settings: Settings
) -> None:
    """After two deaths a leader goes one by one; when what can have killed them is through, it packs again."""
    rows(database, "UPDATE outbox.relay SET deaths = 2, leader = 'gone'")
    Writers(database, stream.prefix, threads=2, transactions=100, seed=8).start().join()
    with ThreadRelay(settings.model_copy(update={"read_ahead_messages": 50})) as relay:
        relay.wait_for(Careful)
        wait_until_sent(database)
        relay.wait_for(Marked, lambda each: each.transactions > 5)
    assert check(database, broker.read(stream.name)).anomalies == {}
    assert value(database, "SELECT deaths FROM outbox.relay") == 0


@pytest.mark.parametrize("when", ["before the page", "after its snapshot"])
def test_retry_of_one_that_lies_among_open_positions(
    database: str, broker: Broker, nats: Nats, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Fault: a new leader finds open positions written in few ranges, with a dead letter in one, which is retried just

    then. Promise: it is sent, and once.
    """
    broker.create_stream("AMONG", "among.>", duplicate_window=100_000_000)
    for _ in range(20):
        add(database, "among.x", "x")
    rows(
        database, "UPDATE outbox.transactions SET dead_at = now(), dead_reason = 'unrouted: by hand' WHERE position = 6"
    )
    assert ThreadRelay(Settings(database_url=database, nats_url=nats.url), drain=True).ended() is None
    rows(database, "UPDATE outbox.relay SET open_positions = '{[1,21)}'")
    page, pages = Store.page, itertools.count()

    async def late(store: Store, cursor: int, ranges: list[Range], *, messages: int, size: int) -> Page:
        first = next(pages) == 0
        if first and when == "before the page":
            assert dead.retry(database, "outbox", [6]) == [6]
        found = await page(store, cursor, ranges, messages=messages, size=size)
        if first and when == "after its snapshot":
            assert dead.retry(database, "outbox", [6]) == [6]
            # Until the leader's next word to its session waits behind the page.
            while not store._turns._waiters:  # noqa: ASYNC110 - a lock tells nobody who waits for it
                await asyncio.sleep(0)
        return found

    monkeypatch.setattr(Store, "page", late)
    with ThreadRelay(Settings(database_url=database, nats_url=nats.url)) as relay:
        until(lambda: value(database, "SELECT sent_at FROM outbox.transactions WHERE position = 6"), what="it is sent")
        add(database, "among.x", "x")
        relay.wait_for(Marked, lambda each: each.last_position == 21)
        until(lambda: value(database, "SELECT isempty(retried) FROM outbox.relay"))
        add(database, "among.x", "x")
        relay.wait_for(Marked, lambda each: each.last_position == 22)
    assert Counter(each.position for each in broker.read("AMONG")) == dict.fromkeys(range(1, 23), 1)
    broker.api("STREAM.DELETE.AMONG")
