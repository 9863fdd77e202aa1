"""Housekeeping's hand on Postgres: what is old and goes, events that nobody counts, parts of the schema that are gone.

On a connection of its own, beside the leader's. Each statement is a transaction that waits for no lock for more than a
moment. Only the housekeeping writes the table `housekeeping`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg.rows import TupleRow

from outbox.core import requirements
from outbox.errors import Weather
from outbox.postgres import queries
from outbox.postgres.session import answered, hang_up

LOCK_TIMEOUT = "SET LOCAL lock_timeout = '200ms'"


@dataclass(frozen=True, slots=True, kw_only=True)
class Old:
    """Old sent transactions beyond a position, and how many events each has.

    `after` is where to look on, and `more` says that it pays to do so at once. `passed` says that some are between them
    that may become old while those behind are gone: pending ones, and those that were retried late.
    """

    positions: list[int]
    events: list[int]
    after: int
    more: bool
    passed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What status and metrics show: events that belong to no transaction, what of the schema is gone, what fails."""

    stray_events: int = 0
    drift: str | None = None
    failing: str | None = None


def told(rows: Sequence[TupleRow], after: int, most: int) -> Old:
    """What the rows of OLD say, which were asked for beyond `after`, and so many at most."""
    kept = next((position for position, _, age in rows if age == "young"), None)
    going = [(position, events) for position, events, age in rows if age == "old"]
    return Old(
        positions=[position for position, _ in going],
        events=[events for _, events in going],
        after=kept - 1 if kept is not None else (rows[-1][0] if rows else after),
        more=len(rows) == most and kept is None,
        passed=any(age == "passed" for _, _, age in rows),
    )


class Housekeeping:
    """Raises what the relay's session raises: `Locked` and the other weather, or `Misconfigured`."""

    def __init__(self, connection: psycopg.AsyncConnection[TupleRow], name: str) -> None:
        self._connection, self._schema = connection, name
        self._place: str | None = None  # of the one row of `housekeeping`

    @property
    def closed(self) -> bool:
        """True when the session is lost."""
        return self._connection.closed

    def abandon(self) -> None:
        """End the session at once: what is waited for fails. To cancel a statement would take a server that answers."""
        hang_up(self._connection)

    async def old(self, after: int, seconds: float, most: int) -> Old:
        """What was sent more than so many seconds ago, beyond a position: at most so many transactions."""
        return told(await self._all(queries.OLD, after=after, upto=None, seconds=seconds, most=most), after, most)

    async def purge(self, positions: Sequence[int], seconds: float) -> int:
        """Delete these transactions with their events, as far as they are old and nobody holds their rows; how many."""
        place, self._place = self._place, None  # if this fails, it is looked for
        given = {"positions": list(positions), "seconds": seconds}
        try:
            rows = await self._all(queries.PURGE, **given, place=place)
        except Weather as error:
            if place is None or not isinstance(error.__cause__, psycopg.errors.DivisionByZero):
                raise
            rows = await self._all(queries.PURGE, **given, place=None)  # somebody has moved that row
        self._place = rows[0][1]
        return int(rows[0][0])

    async def strays(self) -> list[tuple[str, int]]:
        """Transaction ids with events that no row of transactions counts, and how many events each has."""
        return [(row[0], row[1]) for row in await self._all(queries.STRAYS)]

    async def drift(self) -> list[str]:
        """What of the schema is missing or switched off."""
        return [row[0] for row in await self._all(queries.PARTS, schema=self._schema)]

    async def unreconciled(self) -> requirements.Problem | None:
        """Where the counters contradict the rows: what is committed would be out of sight."""
        (row,) = await self._all(queries.COUNTERS)
        return next(requirements.of_counters(requirements.Counters(*row)), None)

    async def note(self, found: Findings) -> None:
        """Write down what was found."""
        given = {"strays": found.stray_events, "drift": found.drift, "failing": found.failing}
        noted = await self._all(queries.NOTE, **given)
        self._place = noted[0][0] if noted else None  # without its row the doctor tells

    async def _all(self, query: str, **parameters: Any) -> list[TupleRow]:
        with answered(self._connection):
            async with self._connection.transaction():
                await self._connection.execute(LOCK_TIMEOUT)
                return await (
                    await self._connection.execute(queries.compose(query, self._schema), parameters)
                ).fetchall()
