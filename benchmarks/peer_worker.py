"""A peer in its own interpreter: fills the peer's outbox, or runs its relay until the backlog is in the stream.

Started by `benchmarks.peers` as a script, since the peers live in a virtual environment of their own; so it imports
nothing of this project. A relay is built as the peer's documentation builds it, with the fastest documented settings
that were found. `drain` says "ready", waits for a line, and answers with one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import resource
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

import nats
import uvloop
from nats.js import JetStreamContext
from sqlalchemy import MetaData, text
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine

LOOK_SECONDS = 0.02
LONGEST_SECONDS = 600.0

# nats-outbox: the most that its settings take. A tick is one transaction: read so many, publish each, commit.
BATCH_SIZE = 1000

# faststream-outbox: handlers at once, rows claimed at once, and rows deleted at once; its page on performance names
# these three. Several workers give up the order of events.
MAX_WORKERS, FETCH_BATCH_SIZE, TERMINAL_FLUSH_BATCH_SIZE = 16, 500, 100
QUEUE = "events"

# In both loads the application's transactions are a millisecond apart and over, and the events of one are as the
# peer's own call would write them: nats-outbox takes a JSON object, so the payload is one of the wanted size.
LOAD_NATS_OUTBOX = """
WITH row AS MATERIALIZED (
  SELECT n, e, gen_random_uuid() AS id, now() - make_interval(secs => (:transactions - n + 1) / 1000.0) AS at
    FROM generate_series(1, :transactions) AS n, generate_series(1, :events) AS e
)
INSERT INTO outbox_events (event_id, subject, headers, payload, status, retry_count, created_at, scheduled_at)
SELECT id, :subject || '.' || e, jsonb_build_object('Nats-Msg-Id', id),
       jsonb_build_object('data', repeat('x', :payload - length('{"data": ""}'))), 'pending', 0, at, at
  FROM row ORDER BY n, e
"""
LOAD_FASTSTREAM_OUTBOX = """
WITH row AS MATERIALIZED (
  SELECT n, e, gen_random_uuid() AS id, now() - make_interval(secs => (:transactions - n + 1) / 1000.0) AS at
    FROM generate_series(1, :transactions) AS n, generate_series(1, :events) AS e
)
INSERT INTO outbox (queue, payload, headers, created_at, next_attempt_at)
SELECT :queue, decode(repeat('78', :payload), 'hex'), jsonb_build_object('correlation_id', id), at, at
  FROM row ORDER BY n, e
"""

Start = Callable[[], Awaitable[None]]


async def load_nats_outbox(engine: AsyncEngine, job: argparse.Namespace) -> None:
    """A backlog in nats-outbox's own table, as `publish_event` would write it."""
    from nats_outbox.core.models import create_tables, drop_tables  # type: ignore[import-not-found]

    await drop_tables(engine)
    await create_tables(engine)
    sizes = {"transactions": job.transactions, "events": job.events, "payload": job.payload}
    await _fill(engine, "outbox_events", LOAD_NATS_OUTBOX, {"subject": job.subject, **sizes})


async def load_faststream_outbox(engine: AsyncEngine, job: argparse.Namespace) -> None:
    """A backlog in faststream-outbox's own table, as `broker.publish` would write it, with its autovacuum settings."""
    from faststream_outbox import make_outbox_table, outbox_autovacuum_ddl  # type: ignore[import-not-found]

    metadata = MetaData()
    make_outbox_table(metadata, table_name="outbox")
    async with engine.begin() as connection:
        await connection.run_sync(metadata.drop_all)
        await connection.run_sync(metadata.create_all)
        await connection.execute(text(outbox_autovacuum_ddl("outbox")))
    sizes = {"transactions": job.transactions, "events": job.events, "payload": job.payload}
    await _fill(engine, "outbox", LOAD_FASTSTREAM_OUTBOX, {"queue": QUEUE, **sizes})


async def _fill(engine: AsyncEngine, table: str, statement: str, parameters: dict[str, object]) -> None:
    async with engine.begin() as connection:
        await connection.execute(text(statement), parameters)
    async with engine.connect() as connection:
        autocommit = await connection.execution_options(isolation_level="AUTOCOMMIT")
        await autocommit.execute(text(f"VACUUM ANALYZE {table}"))


@asynccontextmanager
async def nats_outbox(engine: AsyncEngine, job: argparse.Namespace) -> AsyncIterator[Start]:
    """`nats-outbox relay start --log-level WARNING`, put together as its cli.py does."""
    from nats_outbox.publishers.nats_publisher import NatsPublisher  # type: ignore[import-not-found]
    from nats_outbox.relay.polling import PollingRelay  # type: ignore[import-not-found]
    from nats_outbox.settings import OutboxSettings  # type: ignore[import-not-found]

    settings = OutboxSettings(
        database_url=engine.url.render_as_string(hide_password=False), nats_url=job.nats_url, batch_size=BATCH_SIZE
    )
    client = await nats.connect(settings.nats_url)
    publisher = await NatsPublisher.from_nats_client(client)
    relay = PollingRelay(async_sessionmaker(engine, expire_on_commit=False), publisher, settings)
    running: list[asyncio.Task[None]] = []

    async def start() -> None:
        running.append(asyncio.create_task(relay.start()))

    yield start
    await relay.stop()
    await asyncio.gather(*running)
    await client.drain()


@asynccontextmanager
async def faststream_outbox(engine: AsyncEngine, job: argparse.Namespace) -> AsyncIterator[Start]:
    """The documented relay: a publisher of a NATS broker stacked on a subscriber of the outbox.

    `stream` makes FastStream publish to JetStream and await the ack; without it, as in the line of the relay's
    documentation, it is core NATS without an ack, which loses what the server never got.
    """
    from faststream.nats import JStream, NatsBroker  # type: ignore[import-not-found]
    from faststream_outbox import OutboxBroker, make_outbox_table

    table = make_outbox_table(MetaData(), table_name="outbox")
    broker_outbox = OutboxBroker(engine, outbox_table=table, logger=None, apply_types=False)
    broker_nats = NatsBroker(job.nats_url, logger=None)
    publisher = broker_nats.publisher(f"{job.subject}.1", stream=JStream(job.stream, declare=False), timeout=5.0)

    @publisher  # type: ignore[untyped-decorator, unused-ignore]
    @broker_outbox.subscriber(  # type: ignore[untyped-decorator, unused-ignore]
        QUEUE,
        max_workers=MAX_WORKERS,
        fetch_batch_size=FETCH_BATCH_SIZE,
        terminal_flush_batch_size=TERMINAL_FLUSH_BATCH_SIZE,
    )
    async def relay(body: bytes) -> bytes:
        return body

    await broker_nats.start()
    yield broker_outbox.start
    await broker_outbox.stop()
    await broker_nats.stop()


@dataclass(frozen=True, kw_only=True)
class Peer:
    """How a peer's outbox is filled, its relay made (entered: connected; called: started), and what is not sent yet."""

    load: Callable[[AsyncEngine, argparse.Namespace], Awaitable[None]]
    relay: Callable[[AsyncEngine, argparse.Namespace], AbstractAsyncContextManager[Start]]
    left: str


PEERS = {
    "nats-outbox": Peer(
        load=load_nats_outbox,
        relay=nats_outbox,
        left="SELECT EXISTS (SELECT FROM outbox_events WHERE status = 'pending')",
    ),
    "faststream-outbox": Peer(
        load=load_faststream_outbox,
        relay=faststream_outbox,
        left="SELECT EXISTS (SELECT FROM outbox)",
    ),
}


async def drain(engine: AsyncEngine, job: argparse.Namespace) -> dict[str, float]:
    """Run the relay from a go on standard input until all is stored and marked; seconds since 1970, and of CPU."""
    peer = PEERS[job.peer]
    watcher = await nats.connect(job.nats_url)
    async with engine.connect() as connection:  # so that the clock does not count SQLAlchemy's first connection
        await connection.execute(text(peer.left))
    async with peer.relay(engine, job) as start:
        print("ready", flush=True)
        await asyncio.to_thread(input)
        began, before = time.time(), resource.getrusage(resource.RUSAGE_SELF)
        await start()
        await _wait(engine, watcher.jetstream(), job, peer.left)
        ended, after = time.time(), resource.getrusage(resource.RUSAGE_SELF)
    await watcher.close()
    return {
        "began": began,
        "ended": ended,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    }


async def _wait(engine: AsyncEngine, jetstream: JetStreamContext, job: argparse.Namespace, left: str) -> None:
    """Until the stream holds every event, and after that, until no row is left to send.

    The database is asked only at the end, so that the looking costs the relay next to nothing.
    """
    total = job.transactions * job.events
    async with asyncio.timeout(LONGEST_SECONDS):
        while (await jetstream.stream_info(job.stream)).state.messages < total:  # noqa: ASYNC110 - of another process
            await asyncio.sleep(LOOK_SECONDS)
        async with engine.connect() as connection:
            autocommit = await connection.execution_options(isolation_level="AUTOCOMMIT")
            while (await autocommit.execute(text(left))).scalar_one():  # noqa: ASYNC110 - same
                await asyncio.sleep(LOOK_SECONDS)


async def main(job: argparse.Namespace) -> None:
    """Load, or drain and print the figures."""
    engine = create_async_engine(
        job.database_url.replace("postgresql://", "postgresql+asyncpg://"), pool_size=MAX_WORKERS + 4
    )
    if job.work == "load":
        await PEERS[job.peer].load(engine, job)
    else:
        print(json.dumps(await drain(engine, job)), flush=True)
    await engine.dispose()


def arguments() -> argparse.Namespace:
    """What `benchmarks.peers` asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", choices=["load", "drain"])
    parser.add_argument("peer", choices=list(PEERS))
    for name in ("--database-url", "--nats-url", "--stream", "--subject"):
        parser.add_argument(name, required=True)
    for name in ("--transactions", "--events", "--payload"):
        parser.add_argument(name, required=True, type=int)
    return parser.parse_args()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    uvloop.run(main(arguments()))  # as `faststream run` does where uvloop is installed; nats-outbox gains by it too
