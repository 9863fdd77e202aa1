"""From a backlog to an empty outbox, and the two ceilings: the same batches without a database, and the same
transactions read and marked without a broker.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections import deque
from collections.abc import Iterator, Sequence
from uuid import uuid4

import uvloop

from outbox.bench.figures import Figures
from outbox.bench.site import SCHEMA, STREAM, RelayProcess, Site, subjects_of
from outbox.config import Settings
from outbox.core.batch import Batch, Packing, receipts, take
from outbox.core.outcome import Stored
from outbox.core.transaction import Transaction
from outbox.errors import OutboxError
from outbox.event import NO_HEADERS, Event
from outbox.jetstream.client import JetStream
from outbox.postgres.rows import Decisions, StreamRow
from outbox.postgres.store import Store

LONGEST = 3600.0  # seconds of a drain
FAR_POSITION = 1 << 50  # of transactions that no database has


def drain(
    site: Site,
    *,
    transactions: int,
    events: int,
    payload: int,
    flags: tuple[str, ...] = (),
    subjects: Sequence[str] = (),
) -> Figures:
    """Load a backlog and let `outbox relay --drain` empty it: from the lead to the last mark."""
    site.load(transactions, events, payload, subjects=subjects)
    before, wal = site.last_sequence(), wal_bytes(site)
    with RelayProcess(site, "--drain", *flags) as relay:
        cpu, memory = relay.ended(LONGEST)
        began = relay.happened("TookLead") or 0.0
    ended = float(site.value(f"SELECT extract(epoch FROM max(sent_at))::float8 FROM {SCHEMA}.transactions"))  # noqa: S608
    total = transactions * events
    if site.last_sequence() - before != total:
        raise OutboxError(f"{site.last_sequence() - before} messages were stored, not {total}: the run does not count")
    return {
        "drain_events_per_second": total / (ended - began),
        "relay_cpu_us_per_event": cpu / total * 1e6,
        "relay_peak_megabytes": memory,
        "wal_bytes_per_event": (wal_bytes(site) - wal) / total,
    }


def with_ceilings(site: Site, *, transactions: int, events: int, payload: int, subjects: Sequence[str] = ()) -> Figures:
    """A drain, and both ceilings in the same round."""
    total = transactions * events
    figures = dict(drain(site, transactions=transactions, events=events, payload=payload, subjects=subjects))
    publish = total / _run_alone(_publish(site, transactions, events, payload, subjects))
    site.load(transactions, events, payload, subjects=subjects)
    marking = total / _run_alone(_read_and_mark(site, transactions))
    # The stream has none of it: put the place back where the stream is.
    site.sql(f"UPDATE {SCHEMA}.streams SET last_sequence = %(at)s, plan_base = %(at)s", at=site.last_sequence())  # noqa: S608
    rate = figures["drain_events_per_second"]
    return {
        "drain_events_per_second": rate,
        "publish_only_events_per_second": publish,
        "read_and_mark_only_events_per_second": marking,
        "drain_of_publish_only": rate / publish,
        "drain_of_read_and_mark_only": rate / marking,
        **figures,
    }


def wal_bytes(site: Site) -> int:
    """Where the write-ahead log ends."""
    return int(site.value("SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn"))


def _run_alone(work: object) -> float:
    gc.collect()
    gc.freeze()
    gc.disable()  # the relay's process rarely collects; see the command
    try:
        return float(uvloop.run(work))  # type: ignore[arg-type]
    finally:
        gc.enable()
        gc.unfreeze()


async def _publish(site: Site, transactions: int, events: int, payload: int, subjects: Sequence[str]) -> float:
    """Seconds to publish and have acked the batches that the relay makes of them, in its window and its chain."""
    settings = Settings()
    news = asyncio.Event()
    jetstream = await JetStream.connect(Settings(nats_url=site.nats_url), news.set)
    info = await jetstream.stream(STREAM)
    base = info.last_sequence if info else 0
    batches = deque(_batches(transactions, payload, base, subjects_of(SCHEMA, subjects, events)))
    in_flight: deque[tuple[Batch, asyncio.Future[object]]] = deque()
    began = time.perf_counter()
    while batches or in_flight:
        while batches and len(in_flight) < settings.window:
            batch = batches.popleft()
            in_flight.append((batch, jetstream.send(batch, str(uuid4())).outcome))  # type: ignore[arg-type]
        batch, outcome = in_flight.popleft()
        acked = await outcome
        if not isinstance(acked, Stored) or acked.sequence != batch.last_sequence:
            raise OutboxError(f"a batch of the ceiling was not stored: {outcome.result()}")
    took = time.perf_counter() - began
    await jetstream.close()
    return took


def _batches(transactions: int, payload: int, base: int, spread: list[list[str]]) -> Iterator[Batch]:
    waiting = deque(
        Transaction.of(
            FAR_POSITION + number,
            tuple(Event(str(uuid4()), each[number % len(each)], b"x" * payload, NO_HEADERS) for each in spread),
        )
        for number in range(transactions)
    )
    term = uuid4().hex[:20]
    while waiting:
        taken = take(waiting, Packing())
        batch = Batch(id=f"{term}-{len(waiting)}", stream=STREAM, base=base, transactions=tuple(taken))
        base = batch.last_sequence
        for _ in taken:
            waiting.popleft()
        yield batch


async def _read_and_mark(site: Site, transactions: int) -> float:
    """Seconds to read every transaction and mark it, a commit a page, as if each were stored at once."""
    settings = Settings()
    async with await Store.connect(site.database_url, SCHEMA) as store:
        home = await store.preflight(settings.max_batch_messages)
        await store.try_lock()
        lead = await store.lead(f"bench-{uuid4().hex}", home)
        row = (await store.streams())[0]
        cursor, base, done = lead.cursor, row.last_sequence, 0
        began = time.perf_counter()
        while done < transactions:
            page = await store.page(
                cursor, [], messages=2 * settings.max_batch_messages, size=settings.read_ahead_bytes
            )
            cursor, done = page.positions[-1], done + len(page.transactions)
            marks = list(receipts(STREAM, base, page.transactions))
            base = marks[-1].last_sequence
            stream = StreamRow(name=STREAM, created=row.created, mode=row.mode, last_sequence=base, plan=[], since=base)
            await store.commit(
                lead.epoch,
                Decisions(
                    cursor=cursor, open_positions=[], receipts=marks, verdicts=[], streams=[stream], blocked=None
                ),
            )
        took = time.perf_counter() - began
        await store.resign(lead.epoch)
    return took
