"""Deleting what was sent: old transactions with their events and receipts, in pages, never one that is open or dead."""

from __future__ import annotations

import asyncio

from outbox.errors import Locked
from outbox.postgres.housekeeping import Housekeeping
from outbox.postgres.session import observer_session

PAGE = 1000


def purge(url: str, name: str, seconds: float) -> int:
    """Delete what was sent more than so many seconds ago; the number of transactions. Commits after each page.

    Rows that somebody holds locked are passed by. Raises `Locked` where somebody holds an event of one.
    """
    return asyncio.run(_purge(url, name, seconds))


async def _purge(url: str, name: str, seconds: float) -> int:
    purged = after = 0
    page, more = PAGE, True
    async with observer_session(url) as connection:
        session = Housekeeping(connection, name)
        while more:
            old = await session.old(after, seconds, page)
            try:
                purged += await session.purge(old.positions, seconds)
            except Locked:
                if page == 1:
                    raise
                page //= 2
                continue
            after, more = old.after, old.more
    return purged
