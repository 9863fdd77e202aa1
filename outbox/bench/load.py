"""The relay beside writers: latency at several loads, a backlog under sustained writing, what the writer pays."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import time
from collections.abc import Sequence
from datetime import datetime
from uuid import UUID, uuid4

import nats
import psycopg
import uvloop
from nats.aio.client import Client

from outbox import Outbox, event
from outbox.bench.figures import Figures, Say, quantiles
from outbox.bench.site import BARE, SCHEMA, STREAM, RelayProcess, Site, made, schemas, subjects_of

SAMPLES_PER_SECOND = 20
BARE_SCHEMA, NUMBERED_SCHEMA = f"{SCHEMA}_bare", f"{SCHEMA}_numbered"
DROP = f"DROP SCHEMA IF EXISTS {BARE_SCHEMA}, {NUMBERED_SCHEMA} CASCADE"
BARE_TABLE = f"""
CREATE SCHEMA {BARE_SCHEMA}
CREATE TABLE events (
  txid xid8 NOT NULL DEFAULT pg_current_xact_id(), id bigint GENERATED ALWAYS AS IDENTITY,
  message_id uuid NOT NULL DEFAULT gen_random_uuid(), subject text NOT NULL, headers jsonb, payload bytea NOT NULL,
  created_at timestamptz NOT NULL DEFAULT now(), PRIMARY KEY (txid, id))
"""
# The least that numbers transactions at commit: no event is checked or counted, and nobody is woken.
NUMBERED_TABLE = f"""
CREATE SCHEMA {NUMBERED_SCHEMA}
CREATE TABLE events (LIKE {BARE_SCHEMA}.events INCLUDING ALL)
CREATE TABLE transactions (position bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, txid xid8 NOT NULL);
CREATE FUNCTION {NUMBERED_SCHEMA}.seal() RETURNS trigger LANGUAGE plpgsql AS $body$
BEGIN
  IF current_setting('{NUMBERED_SCHEMA}.sealed', true) <> '' THEN
    RETURN NULL;
  END IF;
  INSERT INTO {NUMBERED_SCHEMA}.transactions (txid) VALUES (pg_current_xact_id());
  PERFORM set_config('{NUMBERED_SCHEMA}.sealed', 'true', true);
  RETURN NULL;
END
$body$;
CREATE CONSTRAINT TRIGGER seal AFTER INSERT ON {NUMBERED_SCHEMA}.events
  DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION {NUMBERED_SCHEMA}.seal()
"""  # noqa: S608


def script(schema: str, events: int, payload: int) -> str:
    """One transaction for pgbench: a single INSERT of so many events."""
    row = f"(gen_random_uuid(), '{SCHEMA}.1', decode(repeat('78', {payload}), 'hex'))"
    return f"INSERT INTO {schema}.events (message_id, subject, payload) VALUES {', '.join([row] * events)};\n"  # noqa: S608


def writer(site: Site, *, clients: int, events: int, payload: int, seconds: float) -> Figures:
    """The writer's transactions a second into a bare table, into one that only numbers them, and into the outbox."""
    for statement in (DROP, BARE_TABLE, NUMBERED_TABLE):
        site.sql(statement)
    try:
        bare, numbered, outbox = (
            made(site.writers(script(schema, events, payload), clients=clients, seconds=seconds))
            for schema in (BARE_SCHEMA, NUMBERED_SCHEMA, SCHEMA)
        )
    finally:
        site.sql(f"TRUNCATE {SCHEMA}.events, {SCHEMA}.transactions")
        site.sql(DROP)
    return {
        "bare_transactions_per_second": bare,
        "numbered_transactions_per_second": numbered,
        "outbox_transactions_per_second": outbox,
        "numbered_time_of_bare": bare / numbered,
        "outbox_time_of_bare": bare / outbox,
    }


def most(site: Site, *, clients: int, events: int, payload: int, seconds: float) -> float:
    """Transactions a second that the writers make at most, without a relay; they are thrown away."""
    rate = made(site.writers(script(SCHEMA, events, payload), clients=clients, seconds=seconds))
    site.sql(f"TRUNCATE {SCHEMA}.events, {SCHEMA}.transactions")
    return rate


def sustained(site: Site, *, events: int, payload: int, share: float, seconds: float, say: Say) -> Figures:
    """Writers at a share of their maximum and the relay together: the backlog over time, in transactions."""
    rate = share * most(site, clients=4, events=events, payload=payload, seconds=10)
    with RelayProcess(site) as relay:
        relay.wait_until_ready()
        cpu, backlog = relay.cpu_seconds, list[int]()
        writers = site.writers(script(SCHEMA, events, payload), clients=4, seconds=seconds, rate=rate)
        began = time.monotonic()
        while writers.poll() is None:
            time.sleep(1)
            backlog.append(int(site.value(f"SELECT count(*) FROM {SCHEMA}.pending")))  # noqa: S608
            say(f"{time.monotonic() - began:.0f} s, backlog {backlog[-1]}")
        written = made(writers)
        cpu = relay.cpu_seconds - cpu
        memory = relay.peak_megabytes
        site.wait_until_sent()
    third = max(1, len(backlog) // 3)
    return {
        "written_events_per_second": written * events,
        "backlog_first_third_transactions": sum(backlog[:third]) / third,
        "backlog_last_third_transactions": sum(backlog[-third:]) / third,
        "backlog_highest_transactions": max(backlog),
        "relay_cpu_percent": 100 * cpu / seconds,
        "relay_peak_megabytes": memory,
    }


def latency(site: Site, *, events: int, payload: int, share: float, seconds: float) -> Figures:
    """Commit to stored, and in turn with it a bare awaited publish (or atomic batch), on another stream.

    Stored is the time that nats-server gives the message; an outbox sample begins when COMMIT has returned, a bare
    one when its first byte is sent, and `acked` is when its ack was there.
    """
    rate = share * most(site, clients=4, events=events, payload=payload, seconds=5) if share else 0.0
    with RelayProcess(site) as relay:
        relay.wait_until_ready()
        load = script(SCHEMA, events, payload)
        writers = site.writers(load, clients=4, seconds=seconds + 2, rate=rate) if share else None
        try:
            return uvloop.run(_samples(site, events, payload, round(seconds * SAMPLES_PER_SECOND)))
        finally:
            if writers is not None:
                made(writers)
                site.wait_until_sent()


def latency_together(
    site: Site, *, outboxes: int, events: int, payload: int, rate: float, seconds: float, subjects: Sequence[str]
) -> Figures:
    """Commit to stored where several outboxes with their relays share a stream, each with transactions at this rate."""
    site.prepare(outboxes)
    names = schemas(outboxes)
    with contextlib.ExitStack() as stack:
        given = [RelayProcess(site, schema=schema) for schema in names]
        relays = [stack.enter_context(relay) for relay in given]
        for relay in relays:
            relay.wait_until_it_leads()
        relays[-1].wait_until_ready()

        async def all_of_them() -> list[list[float]]:
            each = (_paced(site, name, subjects_of(name, subjects, events), payload, rate, seconds) for name in names)
            return await asyncio.gather(*each)

        found = uvloop.run(all_of_them())
    site.prepare()
    return {
        "written_transactions_per_second": sum(map(len, found)) / seconds,
        **quantiles(itertools.chain(*found), "commit_to_stored"),
        "commit_to_stored_p99_of_the_slowest_outbox_ms": max(quantiles(each, "x")["x_p99_ms"] for each in found),
    }


async def _paced(
    site: Site, schema: str, spread: Sequence[Sequence[str]], payload: int, rate: float, seconds: float
) -> list[float]:
    """Add transactions at a rate; the milliseconds of each from the return of COMMIT to stored."""
    outbox, body = Outbox(schema), b"x" * payload
    client = await nats.connect(site.nats_url.split(","))
    connection = await psycopg.AsyncConnection.connect(site.database_url)
    committed: list[tuple[UUID, float]] = []
    began = time.monotonic()
    for number in range(round(rate * seconds)):
        await asyncio.sleep(began + (number + random.random()) / rate - time.monotonic())
        ids = await outbox.add_many_async(connection, [event(each[number % len(each)], body) for each in spread])
        await connection.commit()
        committed.append((ids[-1], time.time()))
    await asyncio.to_thread(site.wait_until_sent, schema)
    sequences = await _sequences(connection, [message_id for message_id, _ in committed], schema)
    stored = await _times(client, STREAM, [sequences[message_id] for message_id, _ in committed])
    await connection.close()
    await client.close()
    return [1000 * (at - when) for at, (_, when) in zip(stored, committed, strict=True)]


async def _samples(site: Site, events: int, payload: int, count: int) -> Figures:
    outbox, body = Outbox(SCHEMA), b"x" * payload
    client = await nats.connect(site.nats_url.split(","))
    connection = await psycopg.AsyncConnection.connect(site.database_url)
    committed: list[tuple[UUID, float]] = []
    bare: list[tuple[int, float, float]] = []
    for _ in range(count):
        await asyncio.sleep(random.uniform(0.5, 1.5) / SAMPLES_PER_SECOND / 2)
        ids = await outbox.add_many_async(connection, [event(f"{SCHEMA}.1", body) for _ in range(events)])
        await connection.commit()
        committed.append((ids[-1], time.time()))
        await asyncio.sleep(random.uniform(0.5, 1.5) / SAMPLES_PER_SECOND / 2)
        began = time.time()
        sequence = await _publish(client, body, events)
        bare.append((sequence, began, time.time()))
    await asyncio.sleep(1)
    sequences = await _sequences(connection, [message_id for message_id, _ in committed])
    stored = await _times(client, STREAM, [sequences[message_id] for message_id, _ in committed])
    bare_stored = await _times(client, BARE, [sequence for sequence, _, _ in bare])
    await connection.close()
    await client.close()
    own = quantiles([1000 * (at - began) for at, (_, began) in zip(stored, committed, strict=True)], "commit_to_stored")
    acked = quantiles([1000 * (ended - began) for _, began, ended in bare], "bare_acked")
    arrived = [1000 * (at - began) for at, (_, began, _) in zip(bare_stored, bare, strict=True)]
    above = {
        f"above_bare_acked_{name}_ms": own[f"commit_to_stored_{name}_ms"] - acked[f"bare_acked_{name}_ms"]
        for name in ("p50", "p99")
    }
    return {**own, **acked, **quantiles(arrived, "bare_stored"), **above}


async def _publish(client: Client, body: bytes, events: int) -> int:
    """A bare awaited publish, or an atomic batch of several; the sequence of its last message (ADR-50)."""
    batch, subject = uuid4().hex, f"{BARE.lower()}.1"
    for number in range(1, events + 1):
        headers = {"Nats-Msg-Id": str(uuid4())}
        if events > 1:
            headers |= {"Nats-Batch-Id": batch, "Nats-Batch-Sequence": str(number)}
        if number < events:
            await client.publish(subject, body, headers=headers)
        else:
            headers |= {"Nats-Batch-Commit": "1"} if events > 1 else {}
            reply = await client.request(subject, body, headers=headers, timeout=5)
    return int(json.loads(reply.data)["seq"])


async def _sequences(
    connection: psycopg.AsyncConnection[tuple[object, ...]], ids: Sequence[UUID], schema: str = SCHEMA
) -> dict[UUID, int]:
    receipts = f"""
    SELECT e.message_id, t.last_sequence FROM {schema}.events AS e JOIN {schema}.transactions AS t USING (txid)
     WHERE e.message_id = ANY (%s)"""  # noqa: S608
    found = await (await connection.execute(receipts.encode(), [list(ids)])).fetchall()
    return {row[0]: int(row[1]) for row in found}  # type: ignore[misc, call-overload]


async def _times(client: Client, stream: str, sequences: Sequence[int]) -> list[float]:
    """When nats-server stored these messages, in seconds since 1970."""
    times = []
    for sequence in sequences:
        reply = await client.request(f"$JS.API.STREAM.MSG.GET.{stream}", json.dumps({"seq": sequence}).encode())
        stamp, _, rest = json.loads(reply.data)["message"]["time"].partition(".")
        fraction = rest.rstrip("Z") or "0"
        times.append(datetime.fromisoformat(f"{stamp}+00:00").timestamp() + float(f"0.{fraction}"))
    return times
