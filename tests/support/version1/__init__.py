"""An outbox at schema version 1, as 0.1.0 left it, with a transaction in every state, and the streams that it fits.

`outbox.sql` is a dump of the database, `streams.json` what its three streams hold. They were made once, by `make`, and
are never made again: they stand for every database that 0.1.0 has filled. `restored` puts them on a test's servers.

The relay was killed while it led: a batch is stored and not marked (in flight), two more are planned behind it, an
unrouted transaction blocks the head of the outbox, a full stream is blocked, and then an operator paused it all.
"""

from __future__ import annotations

import base64
import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from outbox.config import Settings
from outbox.embedded import Nats, Postgres
from outbox.jetstream.client import JetStream
from outbox.operate import dead, pause, purge, replay
from tests.support.bed import Broker, ThreadRelay, rows, until, value
from tests.support.servers import numbers

FOLDER = Path(__file__).parent
STREAMS: dict[str, dict[str, Any]] = {
    "V1SHOP": {"subjects": ["v1.shop.>"]},
    "V1MAIL": {"subjects": ["v1.mail.>"], "max_msg_size": 2000},
    "V1FULL": {"subjects": ["v1.full.>"], "max_msgs": 2, "discard": "new"},
}
# How to find a transaction in each state, as operators name the states.
STATES = {
    "pending": "SELECT 1 FROM outbox.pending",
    "planned": "SELECT 1 FROM outbox.streams, unnest(plan) AS p WHERE upper(p) - lower(p) >= 3 AND plan_base > 0",
    "sent": "SELECT 1 FROM outbox.transactions WHERE sent_at IS NOT NULL AND replay_of IS NULL AND retried_at IS NULL",
    "dead": "SELECT 1 FROM outbox.dead WHERE discarded_at IS NULL",
    "discarded": "SELECT 1 FROM outbox.dead WHERE discarded_at IS NOT NULL",
    "retried": "SELECT 1 FROM outbox.relay JOIN outbox.pending AS p ON retried @> p.position",
    "retried and sent": "SELECT 1 FROM outbox.transactions WHERE sent_at IS NOT NULL AND retried_at IS NOT NULL",
    "replayed": "SELECT 1 FROM outbox.transactions WHERE sent_at IS NOT NULL AND replay_of IS NOT NULL",
    "replay pending": "SELECT 1 FROM outbox.pending AS p JOIN outbox.transactions USING (position) WHERE replay_of > 0",
    "purged": "SELECT 1 FROM outbox.relay WHERE purged > 0",
    "paused": "SELECT 1 FROM outbox.relay WHERE paused_at IS NOT NULL",
    "head blocked": "SELECT 1 FROM outbox.relay WHERE blocked IS NOT NULL",
    "stream blocked": "SELECT 1 FROM outbox.streams WHERE blocked IS NOT NULL",
    "leader killed": "SELECT 1 FROM outbox.relay WHERE leader IS NOT NULL",
}


@contextmanager
def restored(server: Postgres, nats: Nats) -> Iterator[str]:
    """URL of the database on this server, at home there, beside its streams; the streams are gone at the end."""
    name, broker = f"version1_{next(numbers)}", Broker(nats.url)
    rows(server.url(), f"CREATE DATABASE {name} TEMPLATE template0")
    url = server.url(name)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute((FOLDER / "outbox.sql").read_bytes())
        newest = connection.execute("SELECT max(txid::text::bigint) FROM outbox.events").fetchall()[0][0]
        while connection.execute("SELECT pg_current_xact_id()::text::bigint").fetchall()[0][0] <= newest:
            pass  # the dump's own transactions are of this server's past
    held = json.loads((FOLDER / "streams.json").read_text())
    try:
        for stream, config in STREAMS.items():
            made = broker.create_stream(stream, *config["subjects"])
            for message in held[stream]:
                broker.publish(message["subject"], base64.b64decode(message["payload"]), message["headers"])
            broker.api(f"STREAM.UPDATE.{stream}", {**made["config"], **config})
            rows(url, "UPDATE outbox.streams SET created = %s WHERE name = %s", made["created"], stream)
        rows(
            url,
            "UPDATE outbox.relay SET system_identifier = (SELECT system_identifier FROM pg_control_system()), "
            "database_oid = (SELECT oid FROM pg_database WHERE datname = current_database()), timeline = 1",
        )
        yield url
    finally:
        for stream in STREAMS:
            broker.api(f"STREAM.DELETE.{stream}")


def _create(broker: Broker, stream: str, config: dict[str, Any]) -> dict[str, Any]:
    return broker.create_stream(stream, *config["subjects"], **{k: v for k, v in config.items() if k != "subjects"})


def make(server: Postgres, nats: Nats, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill the migrated database `url` and write both files, as it was done once with 0.1.0."""
    broker, settings = Broker(nats.url), Settings(database_url=url, nats_url=nats.url, max_batch_messages=10)
    for stream, config in STREAMS.items():
        _create(broker, stream, config)
    rows(url, "UPDATE outbox.limits SET max_transaction_events = 10")

    def add(subject: str, count: int = 1, payload: str = "x") -> None:
        rows(url, "SELECT outbox.add(%s, %s || n) FROM generate_series(1, %s) AS n", subject, payload, count)

    def drain() -> None:
        assert ThreadRelay(settings, drain=True).ended() is None

    add("v1.shop.old", 3)
    add("v1.shop.old")
    drain()
    purge.purge(url, "outbox", 0)  # purged: 1 and 2
    add("v1.shop.a", 2)  # 3: sent, and replayed later
    add("v1.mail.large", payload="y" * 3000)  # 4 to 7: dead letters
    add("v1.mail.large", payload="y" * 3000)
    add("v1.mail.large", payload="y" * 3000)
    add("v1.mail.large", payload="y" * 3000)
    add("v1.mail.b")  # 8: sent
    drain()
    assert dead.discard(url, "outbox", [5]) == [5]
    broker.api("STREAM.UPDATE.V1MAIL", {**broker.info("V1MAIL")["config"], "max_msg_size": 10_000})
    assert dead.retry(url, "outbox", [6]) == [6]
    drain()  # 6: retried and sent
    broker.api("STREAM.UPDATE.V1MAIL", {**broker.info("V1MAIL")["config"], "max_msg_size": 2000})
    replay.replay(url, "outbox", replay.Wanted(first=3, last=3))  # 9
    drain()
    add("v1.full.x")
    add("v1.full.x")
    drain()  # 10 and 11 fill the stream
    relay = ThreadRelay(settings)
    add("v1.full.x")  # 12: waits for room
    until(lambda: value(url, "SELECT blocked FROM outbox.streams WHERE name = 'V1FULL'"))
    with monkeypatch.context() as patch:
        patch.setattr(JetStream, "_tell", lambda *_: None)  # no ack is heard any more
        for _ in range(4):
            add("v1.shop.flying", 10)  # 13 is stored, 14 and 15 are planned behind it, 16 waits
        until(lambda: broker.last_sequence("V1SHOP") == 4 + 2 + 2 + 10)
        until(lambda: value(url, "SELECT sum(upper(p) - lower(p)) FROM outbox.streams, unnest(plan) AS p") == 4)
        add("v1.nowhere.x")  # 17: in no stream
        until(lambda: value(url, "SELECT blocked FROM outbox.relay"))
        relay.kill()
    add("v1.shop.late")  # 18
    replay.replay(url, "outbox", replay.Wanted(first=8, last=8))  # 19: pending
    assert dead.retry(url, "outbox", [7]) == [7]
    pause.pause(url, "outbox", "the stream is being moved")
    _write(server, url, broker)


def _write(server: Postgres, url: str, broker: Broker) -> None:
    command = [str(server.installation / "bin" / "pg_dump"), "--inserts", "--no-owner", "--no-privileges"]
    command += ["--schema=outbox", "-d", url]
    dump = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    # What only psql, or only a newer server, reads; and the comments.
    lines = [line for line in dump.splitlines() if not re.match(r"\\|--|SET transaction_timeout|$", line)]
    (FOLDER / "outbox.sql").write_text("\n".join(lines) + "\n")
    held = {
        stream: [
            {
                "subject": each.subject,
                "headers": {k: v for k, v in each.headers.items() if not re.match("Nats-(Batch|Expected)", k)},
                "payload": base64.b64encode(each.payload).decode(),
            }
            for each in broker.read(stream)
        ]
        for stream in STREAMS
    }
    (FOLDER / "streams.json").write_text(json.dumps(held, indent=1) + "\n")
