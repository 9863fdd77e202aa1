"""Deleting what was sent: old transactions with their events and receipts, in pages, never one that is open or dead."""

from __future__ import annotations

from outbox import orders, queries
from outbox.session import command_session

PAGE = 1000


def purge(url: str, name: str, seconds: float) -> int:
    """Delete what was sent more than so many seconds ago; the number of transactions. Commits after each page."""
    purged = 0
    with command_session(url) as connection:
        connection.autocommit = True
        while True:
            given = {"seconds": seconds, "page": PAGE}
            ((gone,),) = connection.execute(queries.compose(orders.PURGE, name), given).fetchall()
            purged += int(gone)
            if gone < PAGE:
                return purged
