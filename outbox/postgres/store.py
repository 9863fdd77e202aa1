"""The relay's only hand on Postgres: one session that holds the lock, reads pages, and commits what was decided.

Rows become domain values at this door. The session is the leadership: when it is lost, everything read through it is
dropped. Every statement is one round trip and commits by itself; none leaves a transaction open.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from typing import Any, Self

import psycopg
from psycopg.rows import TupleRow

from outbox import schema
from outbox.core import requirements
from outbox.core.parts import PartRow, Settled
from outbox.core.plan import Planned
from outbox.core.positions import HIGHEST, Holder, Range
from outbox.core.transaction import EVENT_OVERHEAD
from outbox.errors import Denied, Deposed, Halt, Misconfigured, Unsuited, Weather
from outbox.postgres import queries
from outbox.postgres.hindrances import usurped
from outbox.postgres.rows import (
    Decisions,
    Home,
    Lead,
    Page,
    StreamRow,
    Wishes,
    array,
    multirange,
    places,
    ranges,
    read_fences,
    read_page,
    read_parts,
    written_fences,
)
from outbox.postgres.session import SESSION, answered, open_session

MOVES = 50
DEATHS = 2  # leaders in a row that died before they had shown that they live


class Store:
    """One session on the outbox's database; `async with` closes it. Two tasks may use it: they take turns."""

    def __init__(self, connection: psycopg.AsyncConnection[TupleRow], name: str, *, replicas: bool) -> None:
        self._connection = connection
        self._schema = name
        self._replicas = replicas
        self._sql: dict[str, bytes] = {}
        self._turns = asyncio.Lock()
        self._whose: asyncio.Task[Any] | None = None
        self._warnings: list[str] = []
        self._listening = False
        self._places: dict[str, str | None] = {}  # of the row of `relay`, as "", and of those of `streams`
        self._slow = self._unhurried = False
        self._parted = 0  # the highest position that has parts: beyond it, and so mostly, nobody asks for any
        self.polls_only = False
        self.notified: Callable[[], None] = lambda: None
        connection.add_notice_handler(self._noticed)
        # Without a handler psycopg keeps every notification; and one that comes during a statement wakes nobody.
        connection.add_notify_handler(lambda _: self.notified())

    @classmethod
    async def connect(cls, url: str, name: str = schema.DEFAULT_SCHEMA, *, replicas: bool = False) -> Self:
        """Open a session; raises `Weather` if the server cannot be reached.

        With `replicas` a plan is not to be carried out before every standby, of which there must be one, has it.
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

    async def preflight(self, max_batch_messages: int) -> Home:
        """Where the database is, when all that the relay builds on is true; else `Misconfigured`.

        Raises `Unsuited` where the schema is of a version that this relay cannot work with.
        """
        ((role, hidden),) = await self._all(queries.ROW_SECURITY, schema=self._schema)
        _refuse(requirements.of_row_security(self._schema, role, hidden))
        (row,) = await self._all(queries.PREFLIGHT)
        number, cluster, max_prepared, standby, max_events, cache, comment, suits_from, database, timeline = row
        if standby:
            raise Weather("the database is in recovery: this server is a standby")
        _refuse(requirements.of_postgres(number))
        if problem := schema.installed(comment, suits_from).unsuitable(self._schema):
            raise Unsuited(problem.message, remedy=problem.remedy)
        if suits_from is None:
            raise self._empty()
        _refuse(
            requirements.of_outbox(
                self._schema,
                max_transaction_events=max_events,
                identity_cache=cache,
                max_batch_messages=max_batch_messages,
            )
        )
        if self._replicas and not (await self._all(queries.MAY_MONITOR))[0][0]:
            raise Misconfigured(
                "this role cannot see how far the standbys are, which --durability replicas waits for",
                remedy="GRANT pg_monitor TO the relay's role",
            )
        self.polls_only = max_prepared > 0  # NOTIFY makes PREPARE TRANSACTION fail, so the trigger never notifies
        return Home(cluster=int(cluster), database=int(database), timeline=int(timeline))

    async def try_lock(self) -> bool:
        """Try to get the leader's lock; never blocks. It is held until the session ends."""
        return await self._lock(queries.TRY_LOCK, schema.LEADER_LOCK)

    async def lead(self, leader: str, home: Home) -> Lead:
        """Begin a new epoch; call it under the lock. Raises `Halt` if this is not the database the outbox knows.

        `leader` names this process and no other one before or after it.
        """
        rows = await self._all(
            queries.LEAD, leader=leader, cluster=home.cluster, database=home.database, timeline=home.timeline
        )
        if not rows:
            raise Halt(
                "this is not the database that the outbox was in, or not its cluster: after a restore, a copy or a "
                "move, transaction ids and positions may be handed out again",
                remedy="make sure that only one copy of the database is in use, then run: outbox rebase",
            )
        outbox_id, epoch, cursor, lows, highs, moved, deaths, suspect, paused = rows[0]
        self._parted = (await self._all(queries.PARTED))[0][0]
        return Lead(
            epoch=epoch,
            outbox_id=outbox_id,
            cursor=cursor,
            open_positions=list(zip(lows, highs, strict=True)),
            home=home,
            moved=moved,
            careful=deaths >= DEATHS or suspect is not None,
            paused=paused,
        )

    async def reconcile(self) -> None:
        """Raise `Halt` where the counters contradict the rows: what is committed would be out of sight."""
        (row,) = await self._all(queries.COUNTERS)
        if problem := next(requirements.of_counters(requirements.Counters(*row)), None):
            raise Halt(problem.what, remedy=problem.remedy)

    async def alive(self, leader: str) -> None:
        """This process has led before and lives: what was counted as its death was none."""
        await self._all(queries.ALIVE, leader=leader)

    async def who_leads(self) -> tuple[str, str | None]:
        """Host and process id of the last relay that took the lead; and what is to be said if no relay has its lock."""
        keys = {"lock": schema.LEADER_LOCK, "key": schema.lock_key(self._schema) % (1 << 32)}
        ((leader, stranger),) = await self._all(queries.WHO_LEADS, **keys) or [(None, None)]
        return str(leader or "unknown"), usurped(stranger).line if stranger else None

    async def locked_by(self, words: str) -> str:
        """What is to be said of a lock that is waited for, with the server's words: who holds it, if that is seen."""
        who = (await self._all(queries.LOCKERS))[0][0] or "somebody"
        return f"{who} holds a lock that the relay needs: {words}"

    async def pending(self) -> bool:
        """True if any transaction is committed and neither sent nor dead."""
        return bool(await self._all(queries.ANY_PENDING))

    async def still_pending(self, position: int) -> bool:
        """False if somebody has settled this transaction by hand."""
        return bool(await self._all(queries.STILL_PENDING, position=position))

    async def first_dead(self) -> int | None:
        """The lowest position of a dead letter that nobody has discarded, or None."""
        rows = await self._all(queries.FIRST_DEAD)
        return int(rows[0][0]) if rows[0][0] is not None else None

    async def streams(self) -> list[StreamRow]:
        """Every stream that the outbox knows."""
        return [
            StreamRow(
                name=name,
                created=created,
                mode=mode,
                last_sequence=last,
                plan=places(plan),
                blocked=blocked,
                since=since or last,
                fences=read_fences(fences),
            )
            for name, created, mode, last, plan, blocked, since, fences in await self._all(queries.STREAMS)
        ]

    async def page(self, cursor: int, open_positions: Sequence[Range], *, messages: int, size: int) -> Page:
        """The next transactions, in one snapshot; `messages` and `size` (bytes) bound it, but for the first one."""
        rows = await self._fetched(
            queries.PAGE,
            cursor=cursor,
            lows=[low for low, _ in open_positions],
            highs=[high for _, high in open_positions],
            messages=messages,
            bytes=size,
        )
        return read_page(rows, self._schema)

    async def head(self, cursor: int, open_positions: Sequence[Range]) -> tuple[int, int] | None:
        """Position and attempts of the next pending transaction, without loading it."""
        lows, highs = [low for low, _ in open_positions], [high for _, high in open_positions]
        rows = await self._all(queries.HEAD, cursor=cursor, lows=lows, highs=highs)
        return (rows[0][0], rows[0][1]) if rows else None

    async def entries(self, positions: Sequence[int]) -> list[Planned]:
        """What a plan is judged by, in its order; raises `Halt` if a transaction is not there to be sent."""
        rows = await self._all(queries.ENTRIES, positions=list(positions))
        found = {row[0]: row for row in rows}
        if missing := [position for position in positions if position not in found]:
            raise self._not_pending(missing[0])
        ordered = (found[position] for position in positions)
        return [
            Planned(position=p, count=n, attempts=a, last_message_id=str(last or ""), size=EVENT_OVERHEAD * n + size)
            for p, n, a, last, size in ordered
        ]

    async def planned(self, positions: Sequence[int]) -> Page:
        """These transactions of a plan with all their events; raises `Halt` if one is not there to be sent."""
        page = read_page(await self._fetched(queries.PLANNED, positions=list(positions)), self._schema)
        known = {each.position for each in page.transactions} | {each.position for each in page.verdicts}
        if missing := set(positions) - known:
            raise self._not_pending(min(missing))
        return page

    async def parts(self, positions: Sequence[int]) -> dict[int, list[PartRow]]:
        """The parts that these transactions have, by position, as they are now; of those that have any."""
        asked = [position for position in positions if position <= self._parted] if self._parted else []
        return read_parts(await self._all(queries.PARTS_OF, positions=asked)) if asked else {}

    def _not_pending(self, position: int) -> Halt:
        return Halt(
            f"transaction {position} is in the plan, but it is gone or no longer pending",
            remedy=f"look at position {position} in {self._schema}.transactions: who changed it?",
        )

    async def holders(self) -> tuple[list[Holder], int]:
        """Who may own a missing position now, and, if any of them is prepared, the highest position drawn by then."""
        holders = [Holder(id=row[0], prepared=row[1]) for row in await self._all(queries.HOLDERS)]
        if not any(holder.prepared for holder in holders):
            return holders, HIGHEST
        # Not in the same statement: it might be read first, and one of them draw and prepare in between.
        return holders, (await self._all(queries.DRAWN))[0][0] or HIGHEST

    async def commit(self, epoch: int, decisions: Decisions) -> None:
        """Write the decisions in one durable commit; raises `Deposed` if another relay has taken the lead.

        Every transaction that is visible before it is flushed when it returns (and on the synchronous standbys).
        """
        if decisions.parts is None:
            written, wanted = await self._commit(epoch, decisions)
        else:
            written, wanted = await self._commit_parts(epoch, decisions, decisions.parts)
        if self._warnings:
            raise Weather(f"the commit is not known to be durable: {self._warnings.pop()}")
        if written == [0, 0, 0, 0]:
            await self.ping(epoch)
            if not wanted:
                raise Weather("the row of the relay moved again and again while it was to be written")
            raise Halt(
                f"transactions {min(wanted)} to {max(wanted)} were to be marked, but not all are pending",
                remedy=f"look at those positions in {self._schema}.transactions: somebody changed them by hand",
            )
        if written != [1, len(decisions.receipts), len(decisions.verdicts), len(decisions.streams)]:
            raise Halt(f"a commit wrote {written} rows", remedy="run: outbox status, and report this with its output")

    async def _commit(
        self, epoch: int, decisions: Decisions, query: str = queries.COMMIT, **more: Any
    ) -> tuple[list[int], list[int]]:
        """How many rows of each kind were written, and the positions that were to be settled."""
        receipts, verdicts, streams = sorted(decisions.receipts), decisions.verdicts, decisions.streams
        lanes = {row.name: number for number, row in enumerate(streams, start=1)}
        positions, names, _, lasts = zip(*receipts, strict=True) if receipts else ((), (), (), ())
        wanted = [*positions, *(verdict.position for verdict in verdicts)]
        sent = array(positions)
        rows = await self._at_its_place(
            query,
            lambda: {"place": self._places.get(""), "places": [self._places.get(row.name) for row in streams]},
            lambda found: bool(found[0][0]),
            epoch=epoch,
            cursor=decisions.cursor,
            open=multirange(decisions.open_positions),
            retried=multirange(decisions.retried),
            sound=decisions.sound,
            blocked=decisions.blocked,
            settling=array(wanted) if verdicts else sent,
            positions=sent,
            lanes=array(map(lanes.__getitem__, names)),
            lasts=array(lasts),
            dead=[verdict.position for verdict in verdicts],
            reasons=[str(verdict) for verdict in verdicts],
            names=[row.name for row in streams],
            modes=[row.mode for row in streams],
            bases=[row.last_sequence for row in streams],
            sinces=[row.since for row in streams],
            fences=[written_fences(row.fences) for row in streams],
            costs=[row.sharing for row in streams],
            plans=[ranges(row.plan) for row in streams],
            blocks=[row.blocked for row in streams],
            **more,
        )
        *written, place, names, places, _ = rows[0]
        self._places |= {"": place, **dict(zip(names or (), places or (), strict=True))}
        return written, wanted

    async def _commit_parts(self, epoch: int, decisions: Decisions, parts: Settled) -> tuple[list[int], list[int]]:
        """The same with parts, in a transaction: their rows first, and then the transactions that these settle.

        In a statement of its own, which sees a retry that came before; one that comes later waits for the relay's row.
        """
        sent = [receipt for _, receipt in parts.receipts]
        of = {row.name: [each for each in sent if each.stream == row.name] for row in decisions.streams}
        counted = {
            "parts": [len(each) for each in of.values()],
            "events": [sum(last - first + 1 for _, _, first, last in each) for each in of.values()],
        }
        settling: list[tuple[Any, ...]] = [
            (receipt.position, part, receipt.first_sequence, receipt.last_sequence, None)
            for part, receipt in parts.receipts
        ]
        settling += [(each.position, each.part, None, None, str(each)) for each in parts.verdicts]
        positions, numbers, firsts, lasts, reasons = map(list, zip(*settling, strict=True)) if settling else ([],) * 5
        async with self._transaction():
            written, wanted = await self._commit(epoch, decisions, queries.COMMIT_OF_PARTS, **counted)
            if not written[0]:
                return written, wanted
            (done,) = await self._all(
                queries.PARTS_SETTLED,
                positions=[row.position for row in parts.rows],
                parts=[row.part for row in parts.rows],
                streams=[row.stream for row in parts.rows],
                numbers=[array(row.numbers) for row in parts.rows],
                settling=positions,
                settled=numbers,
                firsts=firsts,
                lasts=lasts,
                reasons=reasons,
            )
            if done != (len(parts.rows), len(settling)):
                raise Halt(
                    f"parts of transactions {min(positions, default=0)} to {max(positions, default=0)} were to be "
                    "marked, but not all are open",
                    remedy=f"look at those positions in {self._schema}.parts: somebody changed them by hand",
                )
            await self._all(queries.WHOLE_SETTLED, positions=sorted(set(positions)))
        self._parted = max([self._parted, *(row.position for row in parts.rows)])
        return written, wanted

    @contextlib.asynccontextmanager
    async def _transaction(self) -> AsyncIterator[None]:
        """What is done within it is committed as one, and undone if it fails."""
        async with self.turn():
            await self._all("BEGIN")
            try:
                yield
            except Exception:
                self._places.clear()  # the rows are where they were
                if not self._connection.closed:
                    await self._all("ROLLBACK")
                raise
            await self._all("COMMIT")

    async def written(self) -> str | None:
        """Up to where the standbys must have the WAL before what is planned may be sent; None if they need not."""
        return str((await self._all(queries.WRITTEN))[0][0]) if self._replicas else None

    async def replicated(self, lsn: str) -> bool:
        """True if every standby that could take over has flushed it; there must be one."""
        return bool((await self._all(queries.REPLICATED, lsn=lsn))[0][0])

    async def add_stream(self, epoch: int, row: StreamRow) -> None:
        """Remember a stream at the first contact."""
        await self._all(
            queries.ADD_STREAM, epoch=epoch, name=row.name, created=row.created, mode=row.mode, last=row.last_sequence
        )
        self._places.clear()

    async def ping(self, epoch: int) -> Wishes:
        """Keep the session alive; what operators want. Raises `Deposed` if another relay leads, or a newer one must."""
        rows = await self._at_its_place(queries.PING, lambda: {"place": self._places.get("")}, bool)
        if not rows:
            raise self._empty()
        current, suits_from, paused, lows, highs = rows[0]
        if current != epoch:
            raise Deposed("another relay has taken the lead")
        if suits_from > schema.VERSION:
            raise Deposed(f"the schema was migrated, and suits no relay before version {suits_from} of it")
        return Wishes(retried=list(zip(lows, highs, strict=True)), paused=paused)

    def _empty(self) -> Denied:
        words = f"the table {self._schema}.relay is empty"
        return Denied(words, remedy="restore its row from a backup; outbox doctor tells more")

    async def resign(self, epoch: int, why: str | None = None) -> None:
        """Lay the lead down in an orderly way; `why` is left for `outbox status` until somebody leads again."""
        await self._all(queries.RESIGN, epoch=epoch, why=why)

    async def suspect(self, epoch: int, position: int | None) -> None:
        """Note which transaction is being worked on: if this process dies now, it is a suspect."""
        await self._all(queries.SUSPECT, epoch=epoch, position=position)

    async def arrived(self, epoch: int, home: Home) -> None:
        """Every stream was settled after a promotion or a restore: the database is at home in this timeline."""
        await self._all(queries.ARRIVED, epoch=epoch, timeline=home.timeline)

    async def blocks(self, epoch: int, why: str) -> None:
        """Note for the status what holds everything back, where nothing else can be written."""
        await self._all(queries.BLOCKS, epoch=epoch, why=why)

    async def housekeeping_fails(self, why: str) -> None:
        """Note for the status that housekeeping has no session of its own, and why."""
        await self._all(queries.FAILS, why=why)

    async def fall_asleep(self) -> bool:
        """Ask to be notified of the next commit; False while somebody is between sealing and commit: read on."""
        if self.polls_only:
            return False
        if not self._listening:
            await self._all(queries.LISTEN)
            self._listening = True
        return await self._lock(queries.TRY_LOCK, schema.AWAKE_LOCK)

    async def wake_up(self) -> None:
        """Stop being notified: commits are cheaper while the relay is busy."""
        await self._lock(queries.UNLOCK, schema.AWAKE_LOCK)

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """What is asked within it is answered in one go: no other task's statement comes in between."""
        async with self._turns:
            self._whose = asyncio.current_task()
            try:
                yield
            finally:
                self._whose = None

    @contextlib.contextmanager
    def watched(self, readable: Callable[[], None]) -> Iterator[None]:
        """Call `readable` when the server says something unasked: a notification, or that the session is over."""
        loop, file = asyncio.get_running_loop(), self._connection.fileno()
        loop.add_reader(file, readable)
        try:
            yield
        finally:
            loop.remove_reader(file)

    async def _at_its_place(
        self,
        query: str,
        places: Callable[[], dict[str, Any]],
        found: Callable[[list[TupleRow]], bool],
        **parameters: Any,
    ) -> list[TupleRow]:
        """The rows of a statement that knows rows by their place; again for as long as one of them has moved.

        Others may move them at any time: who pauses, retries, or takes the lead. What is not `found` though nothing has
        moved is as the statement says.
        """
        rows: list[TupleRow] = []
        failure: Weather | None = None
        for _ in range(MOVES):
            if self._places:
                try:
                    rows, failure = await self._all(query, **places(), **parameters), None
                except Weather as error:
                    if not isinstance(error.__cause__, psycopg.errors.DivisionByZero):
                        raise
                    failure = error  # one of several has moved: none of it was done
                if failure is None and found(rows):
                    break
            before, self._places = self._places, dict(await self._all(queries.PLACES))
            if before == self._places:
                break
        if failure is not None:
            raise Weather("a row of streams is gone, or moved again and again while it was to be written") from failure
        return rows

    async def _lock(self, query: str, purpose: int) -> bool:
        rows = await self._all(query, purpose=purpose, key=schema.lock_key(self._schema))
        return bool(rows[0][0])

    async def _all(self, query: str, **parameters: Any) -> list[TupleRow]:
        return await self._rows(self._text(query), parameters)

    async def _fetched(self, query: str, **parameters: Any) -> list[TupleRow]:
        """Events, whose number of bytes nobody knows beforehand: for as long as bytes flow, if there is need."""
        try:
            return await self._rows(self._text(query), parameters, unhurried=self._slow)
        except Weather as error:
            if self._slow or not isinstance(error.__cause__, psycopg.errors.QueryCanceled):
                raise
        self._slow = True  # or more bytes than the link carries within statement_timeout
        return await self._rows(self._text(query), parameters, unhurried=True)

    def _text(self, query: str) -> bytes:
        text = self._sql.get(query)
        if text is None:
            text = self._sql[query] = queries.compose(query, self._schema)
        return text

    async def _rows(self, text: bytes, parameters: dict[str, Any], *, unhurried: bool = False) -> list[TupleRow]:
        async with contextlib.nullcontext() if self._whose is asyncio.current_task() else self.turn():
            with _denied(), answered(self._connection):
                if unhurried is not self._unhurried:
                    # statement_timeout counts until the last byte is sent. Not in a pipeline: a process that is frozen
                    # before its end keeps the session, as no time-out of an idle one runs there.
                    limit = "0" if unhurried else SESSION["statement_timeout"]
                    await self._connection.execute(queries.HURRY, {"limit": limit})
                    self._unhurried = unhurried
                cursor = self._connection.cursor(binary=True)
                await cursor.execute(text, parameters)
                return await cursor.fetchall() if cursor.description else []

    def _noticed(self, diagnostic: psycopg.errors.Diagnostic) -> None:
        # A cancelled wait for a synchronous standby is only a warning: the commit is visible, not durable.
        if diagnostic.source_function == "SyncRepWaitForLSN":
            self._warnings.append(diagnostic.message_primary or "")


@contextlib.contextmanager
def _denied() -> Iterator[None]:
    """What a statement of the relay may not do, or does not find, may be there at another time."""
    try:
        yield
    except Misconfigured as error:
        raise Denied(error.message, remedy=error.remedy) from error.__cause__


def _refuse(problems: Iterable[requirements.Problem]) -> None:
    for problem in problems:
        raise Misconfigured(problem.what, remedy=problem.remedy)
