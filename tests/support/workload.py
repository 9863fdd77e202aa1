"""Concurrent writers whose transactions bump versions of shared aggregates, and the check against what they committed.

Each transaction writes, in itself, what it did to a ledger; so the ledger is what the database committed. The stream
is then checked message by message against it: nothing missing, doubled, split, phantom, or out of order.
"""

from __future__ import annotations

import json
import random
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid4

import psycopg
from psycopg import errors

from outbox import Outbox, event
from outbox.core.comparison import Comparison, Row
from outbox.core.plan import Seen
from outbox.operate.verify import known_rows
from tests.support.bed import Stored

AGGREGATES = 20
REST_SECONDS = 0.005  # between two transactions of an endless writer: a load, and no starving of who is under test
LEDGER = """
CREATE TABLE aggregates (id int PRIMARY KEY, version int NOT NULL DEFAULT 0);
INSERT INTO aggregates (id) SELECT generate_series(1, 40);
CREATE TABLE bumps (marker uuid, aggregate int, version int);
CREATE TABLE ledger (message_id uuid, marker uuid, n int);
"""
RETRIED = (errors.SerializationFailure, errors.DeadlockDetected)
RESTART = (psycopg.OperationalError, psycopg.InterfaceError, errors.ReadOnlySqlTransaction)


@dataclass
class Report:
    """What was found, by kind; empty lists are what is promised."""

    missing: list[Any] = field(default_factory=list)
    doubled: list[Any] = field(default_factory=list)
    split: list[Any] = field(default_factory=list)
    phantom: list[Any] = field(default_factory=list)
    disordered: list[Any] = field(default_factory=list)
    receipts: list[Any] = field(default_factory=list)
    transactions: int = 0
    replays: int = 0
    messages: int = 0

    @property
    def anomalies(self) -> dict[str, list[Any]]:
        kinds = ("missing", "doubled", "split", "phantom", "disordered", "receipts")
        return {kind: found for kind in kinds if (found := getattr(self, kind))}


def check(url: str, stored: Sequence[Stored], schema: str = "outbox") -> Report:
    """Compare the whole stream with the ledger, by message, and by `outbox.core.comparison` with the receipts.

    What is foreign is left out. Of a stream that several outboxes share, give the messages of one.
    """
    stored = [each for each in stored if not each.foreign]
    report = Report(messages=len(stored))
    with psycopg.connect(url) as connection:
        ledger = {str(m): (marker, n) for m, marker, n in connection.execute("SELECT * FROM ledger")}
        bumps: dict[UUID, list[tuple[int, int]]] = defaultdict(list)
        for marker, aggregate, version in connection.execute("SELECT * FROM bumps"):
            bumps[marker].append((aggregate, version))
        compared = compare(connection, stored, schema)
        copies = replayable(connection, stored, schema)
    ids = Counter(message.message_id for message in stored)
    report.doubled = [each for each, times in ids.items() if times > 1]
    originals = {message.message_id for message in stored if not message.replay_of}
    report.missing = sorted(ledger.keys() - originals)
    report.phantom = sorted(originals - ledger.keys())
    sizes = Counter(marker for marker, _ in ledger.values())
    versions: Counter[int] = Counter()
    at = 0
    while at < len(stored):
        first = stored[at]
        whole = stored[at : at + first.count]
        numbers = [(m.position, m.number, m.count) for m in whole]
        if first.replay_of:
            # The same events in the same order, as a whole, under ids that nothing else has.
            original = copies.get(first.replay_of)
            same = original is None or [(m.subject, m.payload) for m in whole] == original
            if not same or not _is_whole(whole):
                report.split.append((first.sequence, numbers[:3], first.replay_of))
            report.replays += 1
            at += first.count
            continue
        markers = {ledger[m.message_id][0] for m in whole if m.message_id in ledger}
        order = [ledger[m.message_id][1] for m in whole if m.message_id in ledger]
        if (
            not _is_whole(whole)
            or len(markers) != 1
            or sizes[next(iter(markers))] != first.count
            or order != sorted(order)
        ):
            report.split.append((first.sequence, numbers[:3], len(markers), order))
            at += 1
            continue
        for aggregate, version in sorted(bumps[next(iter(markers))]):
            if version != versions[aggregate] + 1:
                report.disordered.append((first.sequence, aggregate, versions[aggregate], version))
            versions[aggregate] = version
        report.transactions += 1
        at += first.count
    kinds = {"duplicated": report.doubled, "split": report.split, "phantom": report.phantom, "missing": report.receipts}
    for anomaly in compared.anomalies:
        kinds[anomaly.kind].append(anomaly)
    return report


def check_streams(url: str, streams: Mapping[str, Sequence[Stored]]) -> Report:
    """The same of several streams: each holds of every transaction its part, whole and in order, and no event twice.

    In one stream versions may be missing, but never go back.
    """
    report = Report(messages=sum(map(len, streams.values())))
    with psycopg.connect(url) as connection:
        ledger = {str(m): (marker, n) for m, marker, n in connection.execute("SELECT * FROM ledger")}
        bumps: dict[UUID, dict[int, int]] = defaultdict(dict)
        for marker, aggregate, version in connection.execute("SELECT * FROM bumps"):
            bumps[marker][aggregate] = version
        compared = [compare(connection, stored, "outbox", name) for name, stored in streams.items()]
    ids = Counter(message.message_id for stored in streams.values() for message in stored)
    report.doubled = [each for each, times in ids.items() if times > 1]
    report.missing, report.phantom = sorted(ledger.keys() - ids.keys()), sorted(ids.keys() - ledger.keys())
    sizes = Counter(marker for marker, _ in ledger.values())
    found: dict[UUID, list[Stored]] = defaultdict(list)
    for name, stored in streams.items():
        versions: Counter[int] = Counter()
        at = 0
        while at < len(stored):
            first = stored[at]
            whole = stored[at : at + first.count]
            at += first.count
            markers = {ledger[m.message_id][0] for m in whole if m.message_id in ledger}
            order = [ledger[m.message_id][1] for m in whole if m.message_id in ledger]
            same = len({(m.part, m.parts) for m in whole}) == 1
            if not _is_whole(whole) or not same or len(markers) != 1 or order != sorted(order):
                report.split.append((name, first.sequence, first.position, len(markers), order))
                continue
            (marker,) = markers
            found[marker].append(first)
            for aggregate, version in bumps[marker].items():
                if version <= versions[aggregate]:
                    report.disordered.append((name, first.sequence, aggregate, versions[aggregate], version))
                versions[aggregate] = version
    for marker, firsts in found.items():
        parts = sorted((each.part, each.parts) for each in firsts)
        wanted = [(n, len(firsts)) for n in range(1, len(firsts) + 1)] if len(firsts) > 1 else [(0, 0)]
        if parts != wanted or sum(each.count for each in firsts) != sizes[marker]:
            report.missing.append((marker, parts, sizes[marker]))
    report.transactions = len(found)
    report.receipts = [anomaly for comparison in compared for anomaly in comparison.anomalies]
    return report


def _is_whole(messages: Sequence[Stored]) -> bool:
    first = messages[0]
    wanted = [(first.position, first.replay_of, n, first.count) for n in range(1, first.count + 1)]
    return [(m.position, m.replay_of, m.number, m.count) for m in messages] == wanted


def replayable(
    connection: psycopg.Connection[Any], stored: Sequence[Stored], schema: str
) -> dict[int, list[tuple[str, bytes]]]:
    """Subject and payload of each event, by position, of what these messages are replays of, unless it is purged."""
    statement = (
        f'SELECT position, subject, payload FROM "{schema}".transactions JOIN "{schema}".events USING (txid) '
        "WHERE position = ANY (%s) ORDER BY position, id"
    )
    found: dict[int, list[tuple[str, bytes]]] = defaultdict(list)
    for position, subject, payload in connection.execute(
        statement.encode(), [[m.replay_of for m in stored if m.replay_of]]
    ):
        found[position].append((subject, payload))
    return found


def compare(
    connection: psycopg.Connection[Any], stored: Sequence[Stored], schema: str, stream: str | None = None
) -> Comparison:
    """What `outbox verify` says of these messages, all of one stream: of this one, or where most have their receipt."""
    statement = f'SELECT outbox_id::text, h.purged FROM "{schema}".relay, "{schema}".housekeeping AS h'
    (outbox_id, purged) = connection.execute(statement.encode()).fetchall()[0]
    sent = (
        'SELECT position, stream, first_sequence, last_sequence FROM "{0}".transactions WHERE sent_at IS NOT NULL '
        'UNION ALL SELECT position, stream, first_sequence, last_sequence FROM "{0}".parts WHERE sent_at IS NOT NULL'
    )
    receipts = [
        Row(position=p, message_ids=(), stream=s, first=low, last=high)
        for p, s, low, high in connection.execute(sent.format(schema).encode())
    ]
    rows = known_rows(connection, schema, sorted({message.position for message in stored}))
    names = Counter(row.stream for row in (*rows.values(), *receipts) if row.stream)
    stream = stream or max(names, key=lambda n: names[n], default="")
    comparison = Comparison(outbox_id=outbox_id, stream=stream, shared=True)
    payloads = {message.sequence: message.payload for message in stored}
    comparison.take({message.sequence: seen(message) for message in stored}, rows, payloads)
    comparison.recheck(rows, purged, stored[-1].sequence if stored else 0)
    if stored:
        low, high = stored[0].sequence, stored[-1].sequence
        comparison.confirm(receipts, first=low, last=high, end=high)
    return comparison


def seen(message: Stored) -> Seen:
    """A message of a consumer as the relay sees one that it reads back."""

    def number(name: str) -> int | None:
        return int(message.headers[name]) if name in message.headers else None

    return Seen(
        outbox_id=message.headers.get("Outbox-Id"),
        message_id=message.message_id,
        position=message.position,
        number=message.number,
        count=message.count,
        replayed=message.replay_of is not None,
        batch_id=message.headers.get("Nats-Batch-Id"),
        fence=number("Nats-Expected-Last-Subject-Sequence"),
        follows=number("Nats-Expected-Last-Sequence"),
        part=message.part or None,
    )


@dataclass
class Writers:
    """Threads that run random transactions until `transactions` have committed, or until stopped."""

    url: str
    subject: str
    threads: int = 8
    transactions: int = 3000
    seed: int = 1
    prepared: bool = False
    slow: float = 0.002
    endless: bool = False
    schema: str = "outbox"
    events: int = 12
    committed: int = 0
    rolled_back: int = 0
    retried: Counter[str] = field(default_factory=Counter)
    _stop: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _threads: list[threading.Thread] = field(default_factory=list)
    _errors: list[BaseException] = field(default_factory=list)

    def start(self) -> Writers:
        for number in range(self.threads):
            thread = threading.Thread(target=self._write, args=(number,), daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def join(self) -> None:
        for thread in self._threads:
            thread.join(300)
            assert not thread.is_alive(), "a writer hangs"
        if self._errors:
            raise self._errors[0]

    def stop(self) -> None:
        self._stop.set()
        self.join()

    def _write(self, number: int) -> None:
        chance = random.Random(self.seed * 1000 + number)
        try:
            while not self._stop.is_set() and (self.endless or self.committed < self.transactions):
                try:
                    self._session(chance)
                except RESTART:
                    self._stop.wait(0.05)  # the server is down: come again
        except BaseException as error:  # noqa: BLE001 - raised again in join
            self._errors.append(error)

    def _session(self, chance: random.Random) -> None:
        with psycopg.connect(self.url, autocommit=False) as connection:
            while not self._stop.is_set() and (self.endless or self.committed < self.transactions):
                try:
                    done = self._transaction(connection, chance)
                except RETRIED as error:
                    connection.rollback()
                    with self._lock:
                        self.retried[type(error).__name__] += 1
                    continue
                with self._lock:
                    self.committed += done
                    self.rolled_back += not done
                if self.endless:
                    self._stop.wait(REST_SECONDS)

    def _transaction(self, connection: psycopg.Connection[Any], chance: random.Random) -> bool:
        connection.isolation_level = chance.choice(list(psycopg.IsolationLevel)[1:])
        marker, added, told = uuid4(), 0, list[tuple[UUID, UUID, int]]()
        total = chance.randint(1, self.events)
        early = chance.randint(0, total - 1)
        add = self._adder(connection, chance, marker, told)
        for _ in range(early):
            added = add(added)
        private = chance.random() < 0.003
        wanted = chance.sample(range(1, AGGREGATES + 1), chance.choice((1, 1, 1, 2)))
        for aggregate in [chance.randint(AGGREGATES + 1, 40)] if private else wanted:
            bumped = connection.execute(
                "UPDATE aggregates SET version = version + 1 WHERE id = %s RETURNING version", [aggregate]
            ).fetchone()
            assert bumped is not None
            connection.execute("INSERT INTO bumps VALUES (%s, %s, %s)", [marker, aggregate, bumped[0]])
        if private:
            self._stop.wait(chance.uniform(0.8, 2.0))  # left open for seconds, holding what nobody waits for
        elif chance.random() < 0.2:
            self._stop.wait(chance.uniform(0, self.slow))
        if chance.random() < 0.05:
            connection.execute("SET CONSTRAINTS ALL IMMEDIATE")
        for _ in range(total - early):
            added = add(added)
        for keep in (True, False):
            if chance.random() < 0.15:
                _tell(connection, told)
                added = self._savepoint(connection, add, added, told, keep=keep)
        _tell(connection, told)
        return self._end(connection, chance)

    def _savepoint(
        self,
        connection: psycopg.Connection[Any],
        add: Callable[[int], int],
        added: int,
        told: list[tuple[UUID, UUID, int]],
        *,
        keep: bool,
    ) -> int:
        with connection.transaction(force_rollback=not keep):
            after = add(added)
            _tell(connection, told)
        return after if keep else added

    def _end(self, connection: psycopg.Connection[Any], chance: random.Random) -> bool:
        rollback = chance.random() < 0.1
        if self.prepared and chance.random() < 0.04:
            name = str(uuid4())
            connection.execute(f"PREPARE TRANSACTION '{name}'".encode())
            connection.rollback()  # psycopg's view of it; the prepared one stays
            if chance.random() < 0.2:
                self._stop.wait(0.2)
            connection.autocommit = True
            connection.execute(f"{'ROLLBACK' if rollback else 'COMMIT'} PREPARED '{name}'".encode())
            connection.autocommit = False
        elif rollback:
            connection.rollback()
        else:
            connection.commit()
        return not rollback

    def _adder(
        self,
        connection: psycopg.Connection[Any],
        chance: random.Random,
        marker: UUID,
        told: list[tuple[UUID, UUID, int]],
    ) -> Callable[[int], int]:
        outbox = Outbox(self.schema)

        def add(added: int) -> int:
            message_id = uuid4()
            payload = json.dumps({"marker": str(marker), "n": added})
            way = chance.random()
            subject = f"{self.subject}.{chance.choice(('orders', 'stock', 'payments'))}"
            if way < 0.5:
                outbox.add(connection, subject, payload, headers={"kind": "api"}, message_id=message_id)
            elif way < 0.6:
                outbox.add_many(connection, [event(subject, payload, message_id=message_id)])
            elif way < 0.8:
                connection.execute(
                    f'INSERT INTO "{self.schema}".events (message_id, subject, payload) VALUES (%s, %s, %s)'.encode(),
                    [message_id, subject, payload.encode()],
                )
            else:
                connection.execute(
                    f'SELECT "{self.schema}".add(%s, %s::text, NULL, %s)'.encode(), [subject, payload, message_id]
                )
            told.append((message_id, marker, added))
            return added + 1

        return add


def _tell(connection: psycopg.Connection[Any], told: list[tuple[UUID, UUID, int]]) -> None:
    """Write to the ledger what was added, in the transaction or the savepoint that added it."""
    columns = [list(each) for each in zip(*told, strict=True)]
    if columns:
        connection.execute("INSERT INTO ledger SELECT * FROM unnest(%s::uuid[], %s::uuid[], %s::int[])", columns)
    told.clear()
