"""Deleting what was sent: old transactions with their events and receipts, in pages, never one that is open or dead."""

from __future__ import annotations

from typing import Any

from outbox.core.positions import HIGHEST
from outbox.errors import Locked
from outbox.postgres import queries
from outbox.postgres.heritage import OURS
from outbox.postgres.housekeeping import told
from outbox.postgres.session import step, stepping_session

PAGE = 1000
PATIENT = {**OURS, "lock_timeout": "1s"}


def purge(url: str, name: str, seconds: float) -> int:
    """Delete what was sent more than so many seconds ago; the number of transactions. Commits after each page.

    Rows of transactions that somebody holds locked are passed by. Raises `Locked` where somebody holds an event of one.
    """
    purged = after = 0
    page, more = PAGE, True
    with stepping_session(url) as connection:
        while more:
            given: dict[str, Any] = {"after": after, "upto": HIGHEST, "seconds": seconds, "most": page}
            try:
                with step(connection, PATIENT):
                    rows = connection.execute(queries.compose(queries.OLD, name), given).fetchall()
                    old = told(rows, after, page)
                    given["positions"] = old.positions
                    ((gone, _, _),) = connection.execute(queries.compose(queries.PURGE_BY_HAND, name), given).fetchall()
            except Locked:
                if page == 1:
                    raise
                page //= 2
                continue
            purged += int(gone)
            after, more = old.after, old.more
    return purged
