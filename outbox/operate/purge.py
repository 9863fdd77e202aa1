"""Deleting what was sent: old transactions with their events and receipts, in pages, never one that is open or dead."""

from __future__ import annotations

from outbox.postgres import queries
from outbox.postgres.session import step, stepping_session

PAGE = 1000


def purge(url: str, name: str, seconds: float) -> int:
    """Delete what was sent more than so many seconds ago; the number of transactions. Commits after each page."""
    purged = after = 0
    with stepping_session(url) as connection:
        while True:
            given = {"after": after, "seconds": seconds, "page": PAGE}
            with step(connection):
                ((gone, after, more),) = connection.execute(queries.compose(queries.PURGE, name), given).fetchall()
            purged += int(gone)
            if not more:
                return purged
