"""Moving the transaction ids of restored rows out of the way of the ids that their new cluster hands out.

A row's id must move if a transaction of this cluster may still get it, or if another row has it: two transactions would
become one. Each gets an id that its own position names, in the highest quarter of xid8, where no cluster ever gets; so
no two are ever given the same, whatever was moved before. Done in pages while writers go on: a row and its events move
in one commit, so it may end anywhere and begin again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import LiteralString

import psycopg
from psycopg.rows import TupleRow

from outbox.errors import Halt
from outbox.operate import queries
from outbox.postgres.queries import compose
from outbox.postgres.session import step, stepping_session

PAGE = 2000


def move(url: str, name: str, progress: Callable[[int, int], None]) -> int:
    """Move what has to be moved, in commits of its own; how many transactions. `progress` gets done and total.

    Idempotent. No relay may lead meanwhile. Raises `Halt` where it cannot be told which events are whose.
    """
    with stepping_session(url) as connection:
        moved = _separate(connection, name)
        ((total, after),) = _rows(connection, name, queries.TO_MOVE)
        last = after if total else None
        while last is not None:
            after = last
            ((count, last),) = _rows(connection, name, queries.MOVE, after=after, page=PAGE)
            moved += count
            if last is not None:
                progress(min(moved, total), total)
        _rows(connection, name, queries.MOVE_STRAYS)
        return moved + _separate(connection, name)


def _separate(connection: psycopg.Connection[TupleRow], name: str) -> int:
    """Give transactions that share an id each its own, with its events: those of one began at the same time."""
    moved = 0
    for (txid,) in _rows(connection, name, queries.SHARED_TXIDS):
        rows = _rows(connection, name, queries.SHARERS, txid=txid)
        groups = _rows(connection, name, queries.EVENTS_BY_TIME, txid=txid)
        times = [time for group, row in zip(groups, rows, strict=False) for time in (group[0], row[2])]
        if [row[1] for row in rows] != [group[1] for group in groups] or times != sorted(times):
            raise _tangled(name, txid, [row[0] for row in rows])
        with step(connection):
            for (position, _, _), (began, _) in zip(rows, groups, strict=True):
                _rows(connection, name, queries.MOVE_ONE, position=position, txid=txid, began=began)
        moved += len(rows)
    return moved


def _rows(connection: psycopg.Connection[TupleRow], name: str, query: LiteralString, **given: object) -> list[TupleRow]:
    """A statement in a transaction of its own, whose settings leave nothing behind: there may be a pooler."""
    with step(connection):
        connection.execute(queries.BY_INDEX)
        cursor = connection.execute(compose(query, name), given)
        return cursor.fetchall() if cursor.description else []


def _tangled(name: str, txid: str, positions: list[int]) -> Halt:
    places = ", ".join(map(str, positions))
    return Halt(
        f"transactions {places} have the same id {txid}, and it cannot be told which events are whose",
        remedy=f"look at the rows of that txid in {name}.events, by id and created_at; give each position a txid of "
        f"its own there and in {name}.transactions: {queries.MOVED_TXIDS} + position; then run it again",
    )
