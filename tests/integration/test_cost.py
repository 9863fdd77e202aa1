"""What the relay costs its servers, counted: statements, bytes and notifications do not depend on the machine's speed.

A change that makes one of them grow is a change of the mechanism; see docs/performance.md.
"""

from __future__ import annotations

import asyncio
import tracemalloc
from collections import Counter
from typing import Any

import nats.aio.client
import psycopg
import pytest

from outbox import Outbox
from outbox.bench import load
from outbox.config import Settings
from outbox.core.telemetry import BatchSent, Slept
from outbox.jetstream.client import JetStream
from outbox.postgres import queries
from outbox.postgres.store import Store
from tests.support.bed import ThreadRelay, rows, until, value, wait_until_sent
from tests.support.servers import Stream

TRANSACTIONS, EVENTS, PAYLOAD = 4000, 3, 256
FILL = """
DO $$ BEGIN FOR i IN 1..{transactions} LOOP
  INSERT INTO outbox.events (subject, payload)
  SELECT '{prefix}.' || n, decode(repeat('78', {payload}), 'hex') FROM generate_series(1, {events}) AS n;
  COMMIT;
END LOOP; END $$
"""


def fill(url: str, prefix: str, transactions: int = TRANSACTIONS) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SET synchronous_commit = off")
        text = FILL.format(transactions=transactions, prefix=prefix, payload=PAYLOAD, events=EVENTS)
        connection.execute(text.encode())


def test_statements_batches_and_bytes_of_a_drain(
    database: str, stream: Stream, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A drain of 12,000 events takes 13 batches, and a few statements a page: none for each transaction."""
    statements: Counter[bytes] = Counter()
    written: list[int] = []
    run, write = Store._rows, JetStream._write

    async def counted(store: Store, text: bytes, parameters: dict[str, Any], **how: bool) -> Any:
        statements[text] += 1
        return await run(store, text, parameters, **how)

    async def weighed(jetstream: JetStream, made: list[bytes]) -> None:
        written.extend(map(len, made))
        await write(jetstream, made)

    fill(database, stream.prefix)
    wal = value(database, "SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn")
    monkeypatch.setattr(Store, "_rows", counted)
    monkeypatch.setattr(JetStream, "_write", weighed)
    relay = ThreadRelay(settings, drain=True)
    assert relay.ended() is None
    sent = [each for each in relay.happenings if isinstance(each, BatchSent)]
    assert sum(each.messages for each in sent) == TRANSACTIONS * EVENTS
    assert len(sent) <= 13 + 2  # 999 messages each; the first pages and the last may end with a smaller one
    pages = statements[queries.compose(queries.PAGE, "outbox")]
    commits = statements[queries.compose(queries.COMMIT, "outbox")]
    assert pages <= 6 + 13  # 2,000 messages each, and a look after each mark that may find nothing
    assert commits <= len(sent) + 3  # at most one plan and one mark for each batch, and mostly many in one
    assert sum(statements.values()) <= 50
    assert sum(written) / len(written) < PAYLOAD + 350  # headers and protocol
    wal = value(database, "SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn") - wal
    assert wal / TRANSACTIONS < 2000  # a mark is a HOT update; page images after a checkpoint are the most of this
    hot = "SELECT n_tup_hot_upd, n_tup_upd FROM pg_stat_user_tables WHERE relname = 'transactions'"
    until(lambda: rows(database, hot)[0][1] >= TRANSACTIONS)
    assert rows(database, hot)[0][0] == TRANSACTIONS


def test_nobody_is_notified_while_the_relay_is_busy(database: str, stream: Stream, settings: Settings) -> None:
    """NOTIFY serialises the commits of a whole cluster: only a commit that has to wake the relay sends one."""
    with psycopg.connect(database, autocommit=True) as listener:
        listener.execute("LISTEN outbox_outbox")
        fill(database, stream.prefix, 1000)
        assert list(listener.notifies(timeout=0.2)) == []  # nobody sleeps
        with ThreadRelay(settings) as relay:
            relay.wait_for(BatchSent)
            with psycopg.connect(database) as connection:
                Outbox().add(connection, f"{stream.prefix}.x", "busy")
                connection.commit()
            wait_until_sent(database)
            relay.wait_for(Slept)
            before = len(list(listener.notifies(timeout=0.2)))
            rows(database, "SELECT outbox.add(%s, 'asleep')", f"{stream.prefix}.x")
            assert len(list(listener.notifies(timeout=5, stop_after=1))) == 1
        assert before <= 1


def test_the_internals_of_nats_py_that_write_frames_are_there() -> None:
    """`JetStream._write` is the only user of them; a release without them must fail here, and not in production."""
    client = nats.aio.client.Client()
    assert client._pending == []
    assert client._pending_data_size == 0
    assert callable(client._send_command)
    assert callable(client._flush_pending)


def test_frames_arrive_as_those_of_the_public_calls(database: str, stream: Stream, settings: Settings) -> None:
    """What goes through nats-py's internals is stored as what goes through its `publish`."""
    rows(database, "SELECT outbox.add(%s, 'größe', '{\"tenant\": \"ä ö\"}')", f"{stream.prefix}.ü")
    assert ThreadRelay(settings, drain=True).ended() is None
    assert value(database, "SELECT count(*) FROM outbox.transactions WHERE sent_at IS NOT NULL") == 1


def test_writers_of_the_benchmark_write_what_they_say(database: str) -> None:
    """The writer's script is one transaction of so many events."""
    rows(database, load.script("outbox", 3, 256))
    assert rows(database, "SELECT event_count FROM outbox.transactions") == [(3,)]


def test_headers_count_for_the_memory_of_a_page(database: str) -> None:
    """Events that are nearly all headers would fill the memory many times over what may be read ahead."""
    headers = "SELECT jsonb_object_agg('h' || n, 'value') FROM generate_series(1, 1500) AS n"
    for _ in range(30):
        rows(database, f"SELECT outbox.add('a.b', '', ({headers}))")

    async def read() -> tuple[int, int]:
        async with await Store.connect(database) as store:
            page = await store.page(0, [], messages=1000, size=1_000_000)
            (planned,) = await store.entries([1])
            loaded = await store.planned([1])
            return len(page.transactions), planned.size - loaded.transactions[0].size

    tracemalloc.start()
    count, difference = asyncio.run(read())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 1 <= count < 15
    assert peak < 4_000_000
    assert abs(difference) < 20_000  # what a plan says of it is about what it takes once it is loaded
