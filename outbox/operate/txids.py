"""Moving the transaction ids of restored rows out of the way of the ids that their new cluster hands out.

A row's id must move if a transaction of this cluster may still get it, or if another row has it: two transactions would
become one. Each gets an id that its own position names, in the highest quarter of xid8, where no cluster ever gets; so
no two are ever given the same, whatever was moved before. Done in pages while writers go on: a row and its events move
in one commit, so it may end anywhere and begin again.
"""

from __future__ import annotations

from collections.abc import Callable

import psycopg
from psycopg.rows import TupleRow

from outbox.errors import Halt
from outbox.operate import queries
from outbox.postgres.queries import compose
from outbox.postgres.session import command_session

PAGE = 2000
SETTINGS = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout")


def unhurried(connection: psycopg.Connection[TupleRow], *, local: bool) -> None:
    """No time limits, which a role or a database may have, for this session or (`local`) this transaction."""
    for name in SETTINGS:
        connection.execute("SELECT set_config(%s, '0', %s)", [name, local])


def move(url: str, name: str, progress: Callable[[int, int], None]) -> int:
    """Move what has to be moved, in commits of its own; how many transactions. `progress` gets done and total.

    Idempotent. No relay may lead meanwhile. Raises `Halt` where it cannot be told which events are whose.
    """
    with command_session(url) as connection:
        connection.autocommit = True
        unhurried(connection, local=False)
        for setting in queries.BY_INDEX:
            connection.execute(setting.encode())
        moved = _separate(connection, name)
        ((total, after),) = connection.execute(compose(queries.TO_MOVE, name)).fetchall()
        while total:
            ((count, last),) = connection.execute(
                compose(queries.MOVE, name), {"after": after, "page": PAGE}
            ).fetchall()
            if last is None:
                break
            moved, after = moved + count, last
            progress(min(moved, total), total)
        connection.execute(compose(queries.MOVE_STRAYS, name))
        return moved + _separate(connection, name)


def _separate(connection: psycopg.Connection[TupleRow], name: str) -> int:
    """Give transactions that share an id each its own, with its events: those of one began at the same time."""
    moved = 0
    for (txid,) in connection.execute(compose(queries.SHARED_TXIDS, name)).fetchall():
        rows = connection.execute(compose(queries.SHARERS, name), {"txid": txid}).fetchall()
        groups = connection.execute(compose(queries.EVENTS_BY_TIME, name), {"txid": txid}).fetchall()
        times = [time for group, row in zip(groups, rows, strict=False) for time in (group[0], row[2])]
        if [row[1] for row in rows] != [group[1] for group in groups] or times != sorted(times):
            raise _tangled(name, txid, [row[0] for row in rows])
        with connection.transaction():
            for (position, _, _), (began, _) in zip(rows, groups, strict=True):
                given = {"position": position, "txid": txid, "began": began}
                connection.execute(compose(queries.MOVE_ONE, name), given)
        moved += len(rows)
    return moved


def _tangled(name: str, txid: str, positions: list[int]) -> Halt:
    places = ", ".join(map(str, positions))
    return Halt(
        f"transactions {places} have the same id {txid}, and it cannot be told which events are whose",
        remedy=f"look at the rows of that txid in {name}.events, by id and created_at; give each position a txid of "
        f"its own there and in {name}.transactions: {queries.MOVED_TXIDS} + position; then run it again",
    )
