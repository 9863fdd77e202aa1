"""`outbox doctor`: a look at both ends and at the outbox itself, a line each, with the remedy for what is wrong.

Changes nothing (the schema is compared with a copy that is rolled back), and goes on where it can: a server that
cannot be reached is a line, not the end.
"""

from __future__ import annotations

import contextlib

import psycopg
from psycopg.rows import TupleRow

from outbox.config import Settings
from outbox.doctor import database, queries, streams
from outbox.doctor.check import Check, Checks, Colour
from outbox.doctor.streams import Facts
from outbox.errors import OutboxError, told
from outbox.jetstream.client import connected
from outbox.operate import status
from outbox.operate.queries import PENDING_SUBJECTS
from outbox.operate.status import Status
from outbox.postgres.queries import compose
from outbox.postgres.rows import StreamRow
from outbox.postgres.session import LOOK, step, stepping_session
from outbox.text import counted

CHECKS = Checks("outbox")
OLD_SECONDS = 60.0
SUBJECTS = 500  # are asked for, at most
# Without these there is nothing to say of the outbox.
UNREADABLE = ("schema", "privileges", "row security", "relay", "limits")
NOTHING = Facts(outbox_ids=(), streams={}, subjects=(), max_event_bytes=0)


async def examine(settings: Settings) -> list[Check]:
    """Every check, in the order in which they are worth reading: Postgres, the outbox, NATS."""
    checks: list[Check] = []
    known = NOTHING
    try:
        with stepping_session(settings.database_url, reads=True) as connection:
            async for check in database.examine(connection, settings):
                checks.append(check)  # noqa: PERF401 - what was found before an error counts
            if any(each.name in UNREADABLE and each.colour is Colour.RED for each in checks):
                checks.append(CHECKS.yellow("outbox", "not looked at, nor its streams", "mend what is red above first"))
            else:
                with step(connection, LOOK):
                    known = _known(connection, settings.schema)
                    checks += _outbox(status.read(connection, settings.schema))
    except OutboxError as error:
        remedy = error.remedy or "start Postgres, or correct OUTBOX_DATABASE_URL: outbox config shows what is used"
        name = "tables" if checks else "connection"
        checks.append(Checks("database").red(name, error.message, remedy))
    async with contextlib.AsyncExitStack() as stack:
        try:
            jetstream = await stack.enter_async_context(connected(settings))
        except OutboxError as error:
            remedy = error.remedy or "start nats-server, or correct OUTBOX_NATS_URL: outbox config shows what is used"
            return [*checks, Checks("stream").red("connection", error.message, remedy)]
        return checks + [check async for check in streams.examine(jetstream, known)]


def _known(connection: psycopg.Connection[TupleRow], name: str) -> Facts:
    def rows(query: str) -> list[TupleRow]:
        return connection.execute(compose(query, name)).fetchall()

    ((ids,),) = rows(queries.OUTBOX_IDS)
    ((size, _),) = rows(queries.LIMITS)
    pending = rows(PENDING_SUBJECTS)
    return Facts(
        outbox_ids=[str(each) for each in ids],
        streams={
            name: StreamRow(
                name=name, created=created, mode=mode, last_sequence=last, plan=[], blocked=blocked, sharing=sharing
            )
            for name, created, mode, last, blocked, sharing in rows(queries.STREAMS)
        },
        subjects=[row[0] for row in rows(queries.RECENT_SUBJECTS)] + [[row[0]] for row in pending[:SUBJECTS]],
        max_event_bytes=size,
    )


def _outbox(found: Status) -> list[Check]:
    """What is the matter with the outbox itself."""
    checks = [
        CHECKS.green("leader", f"{found.leader} leads")
        if found.leader
        else CHECKS.yellow("leader", "no relay leads: nothing is sent", "outbox relay")
    ]
    if found.paused_at:
        words = f"paused since {found.paused_at:%F %T}: {found.paused_why}"
        checks.append(CHECKS.yellow("paused", words, "outbox resume"))
    checks += [_blocked(name, why, led=found.leader is not None) for name, why in _blocks(found)]
    if found.dead_transactions:
        newest = f"; the newest, {found.dead[0].position}: {found.dead[0].reason}" if found.dead else ""
        remedy = "outbox dead list; then outbox dead retry, or outbox dead discard"
        checks.append(CHECKS.yellow("dead letters", counted(found.dead_transactions, "transaction") + newest, remedy))
    waited = found.oldest_pending_seconds or 0
    if waited > OLD_SECONDS:
        words = f"transaction {found.oldest_pending_position} waits for {waited:,.0f} s"
        checks.append(
            CHECKS.yellow("lag", words, "mend what is red above and below; outbox status --watch shows rates")
        )
    else:
        checks.append(CHECKS.green("lag", f"pending: {counted(found.pending_transactions, 'transaction')}"))
    return checks


def _blocks(found: Status) -> list[tuple[str, str]]:
    streams = [(each.name, each.blocked) for each in found.streams if each.blocked]
    return ([("the outbox", found.blocked)] if found.blocked else []) + streams


def _blocked(name: str, why: str, *, led: bool) -> Check:
    words, remedy = told(why)
    if not led:  # what the last relay said may be mended by now: the next one will find out
        return CHECKS.yellow(
            "blocked",
            f"{name}, when a relay led last: {words}",
            f"{remedy or 'see above and below'}; then: outbox relay",
        )
    remedy = remedy or "the lines under stream say what settles it; outbox status shows when it goes on"
    return CHECKS.red("blocked", f"{name}: {words}", remedy)
