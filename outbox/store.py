"""The relay's only hand on Postgres: one session that holds the lock, reads pages, and commits what was decided.

Rows become domain values at this door. The session is the leadership: when it is lost, everything read through it is
dropped. Every method is one round trip and commits by itself; none leaves a transaction open.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self
from uuid import UUID

import psycopg
from psycopg.rows import TupleRow

from outbox import queries, schema
from outbox.errors import Deposed, Halt, Misconfigured, Weather
from outbox.event import Event
from outbox.positions import Holder, Range
from outbox.session import open_session, refuse_pooler, translated
from outbox.transaction import Receipt, Transaction, Verdict

OLDEST_POSTGRES = 140005
REPLICA_LOOKS, REPLICA_SECONDS = 500, 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Lead:
    """What a new leader finds: its epoch, the outbox's id, the cursor and the open positions."""

    epoch: int
    outbox_id: UUID
    cursor: int
    open_positions: list[Range]


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamRow:
    """What the outbox remembers of a stream. `last_sequence` is the last settled one; `plan` are positions."""

    name: str
    created: str
    mode: str
    last_sequence: int
    plan: list[int]
    blocked: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Transactions in commit order, and all positions that the page covers, settled ones included."""

    transactions: list[Transaction]
    positions: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decisions:
    """What one commit writes: how far was read, the receipts and verdicts, and the plan of each changed stream."""

    cursor: int
    open_positions: Sequence[Range]
    receipts: Sequence[Receipt]
    verdicts: Sequence[Verdict]
    streams: Sequence[StreamRow]
    blocked: str | None


class Store:
    """One session on the outbox's database; `async with` closes it. Not for concurrent use."""

    def __init__(self, connection: psycopg.AsyncConnection[TupleRow], name: str, *, replicas: bool) -> None:
        self._connection = connection
        self._schema = name
        self._replicas = replicas
        self._sql: dict[str, bytes] = {}
        self._warnings: list[str] = []
        self._listening = False
        self.polls_only = False
        self.notified: Callable[[], None] = lambda: None
        connection.add_notice_handler(self._noticed)
        # Without a handler psycopg keeps every notification; and one that comes during a statement wakes nobody.
        connection.add_notify_handler(lambda _: self.notified())

    @classmethod
    async def connect(cls, url: str, name: str = schema.DEFAULT_SCHEMA, *, replicas: bool = False) -> Self:
        """Open a session; raises `Weather` if the server cannot be reached.

        With `replicas` a commit of a plan waits until every streaming standby, of which there must be one, has it.
        """
        return cls(await open_session(url), name, replicas=replicas)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._connection.close()

    @property
    def version(self) -> str:
        """Version of the server, such as 18.1."""
        number = self._connection.info.server_version
        return f"{number // 10000}.{number % 10000}"

    async def preflight(self, max_batch_messages: int) -> int:
        """The cluster's system identifier, when all that the relay builds on is true; else `Misconfigured`."""
        with translated():
            await refuse_pooler(self._connection)
            number, cluster, max_prepared, standby, max_events, cache, comment = (await self._all("PREFLIGHT"))[0]
        if standby:
            raise Weather("the database is in recovery: this server is a standby")
        if number < OLDEST_POSTGRES:
            raise Misconfigured(f"PostgreSQL {self.version} is too old", remedy="upgrade to 14.5 or later")
        if cache != 1:
            raise Misconfigured(
                "an identity of the outbox has a cache, which breaks the commit order",
                remedy=f"ALTER TABLE {self._schema}.transactions ALTER COLUMN position SET CACHE 1; same for events.id",
            )
        schema.check_version(comment, self._schema)
        if max_events > max_batch_messages:
            raise Misconfigured(
                f"a transaction may add {max_events} events, and the relay's batch takes {max_batch_messages}",
                remedy=f"start the relay with --max-batch-messages {max_events}, and raise "
                f"jetstream.limits.batch.max_msgs of nats-server with it; or lower max_transaction_events "
                f"in {self._schema}.limits",
            )
        if self._replicas and not (await self._all("MAY_MONITOR"))[0][0]:
            raise Misconfigured(
                "this role cannot see how far the standbys are, which --durability replicas waits for",
                remedy="GRANT pg_monitor TO the relay's role",
            )
        self.polls_only = max_prepared > 0  # NOTIFY makes PREPARE TRANSACTION fail, so the trigger never notifies
        return int(cluster)

    async def try_lock(self) -> bool:
        """Try to get the leader's lock; never blocks. It is held until the session ends."""
        return await self._lock("pg_try_advisory_lock", schema.LEADER_LOCK)

    async def lead(self, leader: str, cluster: int) -> Lead:
        """Begin a new epoch; call it under the lock. Raises `Halt` if this is not the cluster the outbox knows."""
        rows = await self._all("LEAD", leader=leader, cluster=cluster)
        if not rows:
            raise Halt(
                "this is not the database cluster that the outbox was in: after a restore or a move, transaction ids "
                "and positions may be handed out again",
                remedy="make sure that only one copy of the database is in use, then run: outbox rebase",
            )
        outbox_id, epoch, cursor, lows, highs = rows[0]
        return Lead(epoch=epoch, outbox_id=outbox_id, cursor=cursor, open_positions=list(zip(lows, highs, strict=True)))

    async def who_leads(self) -> str:
        """Host and process id of the last relay that took the lead."""
        rows = await self._rows(queries.compose("SELECT leader FROM {schema}.relay", self._schema), {})
        return str(rows[0][0]) if rows and rows[0][0] else "unknown"

    async def pending(self) -> bool:
        """True if any transaction is committed and neither sent nor dead."""
        return bool(await self._all("ANY_PENDING"))

    async def still_pending(self, position: int) -> bool:
        """False if somebody has settled this transaction by hand."""
        return bool(await self._all("STILL_PENDING", position=position))

    async def first_dead(self) -> int | None:
        """The lowest position of a dead letter that nobody has discarded, or None."""
        rows = await self._all("FIRST_DEAD")
        return int(rows[0][0]) if rows else None

    async def streams(self) -> list[StreamRow]:
        """Every stream that the outbox knows."""
        names = ("name", "created", "mode", "last_sequence", "plan", "blocked")
        return [StreamRow(**dict(zip(names, row, strict=True))) for row in await self._all("STREAMS")]

    async def page(
        self, cursor: int, open_positions: Sequence[Range], *, transactions: int, messages: int, size: int
    ) -> Page:
        """The next transactions, in one snapshot; `messages` and `size` (bytes) bound it, but for the first one."""
        rows = await self._all(
            "PAGE",
            cursor=cursor,
            lows=[low for low, _ in open_positions],
            highs=[high for _, high in open_positions],
            transactions=transactions,
            messages=messages,
            bytes=size,
        )
        return _page(rows, self._schema)

    async def planned(self, positions: Sequence[int]) -> list[Transaction]:
        """The transactions of a plan, in the plan's order; raises `Halt` if one is not there to be sent."""
        page = _page(await self._all("PLANNED", positions=list(positions)), self._schema)
        found = {transaction.position: transaction for transaction in page.transactions}
        if missing := [position for position in positions if position not in found]:
            raise Halt(
                f"transaction {missing[0]} is in the plan, but it is gone or no longer pending",
                remedy=f"look at position {missing[0]} in {self._schema}.transactions: who changed it?",
            )
        return [found[position] for position in positions]

    async def holders(self) -> list[Holder]:
        """Who may own a missing position now."""
        return [Holder(id=row[0]) for row in await self._all("HOLDERS")]

    async def commit(self, epoch: int, decisions: Decisions) -> None:
        """Write the decisions in one durable commit; raises `Deposed` if another relay has taken the lead.

        Every transaction that is visible before it is flushed when it returns (and on the synchronous standbys).
        """
        receipts, verdicts, streams = decisions.receipts, decisions.verdicts, decisions.streams
        settling = [receipt.position for receipt in receipts] + [verdict.position for verdict in verdicts]
        rows = await self._all(
            "COMMIT",
            epoch=epoch,
            cursor=decisions.cursor,
            open=_multirange(decisions.open_positions),
            blocked=decisions.blocked,
            settling=settling,
            positions=[receipt.position for receipt in receipts],
            streams=[receipt.stream for receipt in receipts],
            firsts=[receipt.first_sequence for receipt in receipts],
            lasts=[receipt.last_sequence for receipt in receipts],
            dead=[verdict.position for verdict in verdicts],
            reasons=[str(verdict) for verdict in verdicts],
            names=[row.name for row in streams],
            modes=[row.mode for row in streams],
            bases=[row.last_sequence for row in streams],
            plans=["{" + ",".join(map(str, row.plan)) + "}" for row in streams],
            blocks=[row.blocked for row in streams],
        )
        if self._warnings:
            raise Weather(f"the commit is not known to be durable: {self._warnings.pop()}")
        if rows[0] == (0, 0, 0, 0):
            if await self.ping() != epoch:
                raise Deposed("another relay has taken the lead")
            raise Halt(
                f"transactions {min(settling)} to {max(settling)} were to be marked, but not all are pending",
                remedy=f"look at those positions in {self._schema}.transactions: somebody changed them by hand",
            )
        if rows[0] != (1, len(receipts), len(verdicts), len(streams)):
            raise Halt(f"a commit wrote {rows[0]} rows", remedy="run: outbox status, and report this with its output")

        if self._replicas and any(row.plan for row in streams):
            await self._replicated()

    async def _replicated(self) -> None:
        """Wait until every streaming standby has flushed what is committed now; raises `Weather` after some seconds."""
        lsn = (await self._all("WRITTEN"))[0][0]
        for _ in range(REPLICA_LOOKS):
            if (await self._all("REPLICATED", lsn=lsn))[0][0]:
                return
            await asyncio.sleep(REPLICA_SECONDS)
        raise Weather("no standby, or not every one, has confirmed what is to be published (--durability replicas)")

    async def add_stream(self, epoch: int, name: str, created: str, last: int) -> None:
        """Remember a stream at the first contact."""
        await self._all("ADD_STREAM", epoch=epoch, name=name, created=created, last=last)

    async def ping(self) -> int:
        """The current epoch; keeps the session alive."""
        return int((await self._all("PING"))[0][0])

    async def halted(self, epoch: int, why: str) -> None:
        """Leave word of why the relay halts, for `outbox status`; the next leader takes it away."""
        await self._all("HALTED", epoch=epoch, why=f"halted: {why}")

    async def strays(self) -> list[tuple[str, int]]:
        """Transaction ids with events that no row of transactions counts, and how many events each has."""
        return [(row[0], row[1]) for row in await self._all("STRAYS")]

    async def fall_asleep(self) -> bool:
        """Ask to be notified of the next commit; False while somebody is between sealing and commit: read on."""
        if self.polls_only:
            return False
        if not self._listening:
            with translated():
                await self._connection.execute(f'LISTEN "{schema.channel(self._schema)}"'.encode())
            self._listening = True
        return await self._lock("pg_try_advisory_lock", schema.AWAKE_LOCK)

    async def wake_up(self) -> None:
        """Stop being notified: commits are cheaper while the relay is busy."""
        await self._lock("pg_advisory_unlock", schema.AWAKE_LOCK)

    @contextlib.contextmanager
    def watched(self, readable: Callable[[], None]) -> Iterator[None]:
        """Call `readable` when the server says something unasked: a notification, or that the session is over."""
        loop, file = asyncio.get_running_loop(), self._connection.fileno()
        loop.add_reader(file, readable)
        try:
            yield
        finally:
            loop.remove_reader(file)

    async def _lock(self, function: str, purpose: int) -> bool:
        statement = f"SELECT {function}(%(purpose)s::int, %(key)s::int)".encode()
        rows = await self._rows(statement, {"purpose": purpose, "key": schema.lock_key(self._schema)})
        return bool(rows[0][0])

    async def _all(self, query: str, **parameters: Any) -> list[TupleRow]:
        text = self._sql.get(query)
        if text is None:
            text = self._sql[query] = queries.compose(getattr(queries, query), self._schema)
        return await self._rows(text, parameters)

    async def _rows(self, text: bytes, parameters: dict[str, Any]) -> list[TupleRow]:
        with translated():
            cursor = self._connection.cursor(binary=True)
            await cursor.execute(text, parameters)
            return await cursor.fetchall() if cursor.description else []

    def _noticed(self, diagnostic: psycopg.errors.Diagnostic) -> None:
        # A cancelled wait for a synchronous standby is only a warning: the commit is visible, not durable.
        if diagnostic.source_function == "SyncRepWaitForLSN":
            self._warnings.append(diagnostic.message_primary or "")


def _page(rows: Sequence[TupleRow], name: str) -> Page:
    transactions: list[Transaction] = []
    positions: list[int] = []
    events: list[Event] = []
    for index, (position, count, pending, message_id, subject, headers, payload) in enumerate(rows):
        if subject is not None:
            loaded = json.loads(headers) if headers else {}
            events.append(Event(message_id=message_id, subject=subject, payload=payload, headers=loaded))
        if index + 1 < len(rows) and rows[index + 1][0] == position:
            continue
        positions.append(position)
        if pending:
            if len(events) != count:
                raise Halt(
                    f"transaction {position} has {count} events, but {'only ' if len(events) < count else ''}"
                    f"{len(events)} are in {name}.events: it is never published in part",
                    remedy=f"find out who changed the table; to set the transaction aside, set dead_at and "
                    f"dead_reason of position {position} in {name}.transactions",
                )
            size = sum(len(event.payload) + 200 for event in events)
            transactions.append(Transaction(position=position, events=tuple(events), size=size))
        events = []
    return Page(transactions=transactions, positions=positions)


def _multirange(ranges: Sequence[Range]) -> str:
    return "{" + ",".join(f"[{low},{high}]" for low, high in ranges) + "}"
