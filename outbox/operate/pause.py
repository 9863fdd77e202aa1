"""`outbox pause` and `outbox resume`: an operator's order to the leader, whoever that is. It survives every restart."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from psycopg.rows import class_row

from outbox import schema
from outbox.operate import queries
from outbox.postgres.queries import compose
from outbox.postgres.session import command_session


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause:
    """Since when and why the outbox is paused, both null if it is not; `changed` is false if it was so before."""

    paused_at: datetime | None
    paused_why: str | None
    changed: bool


def pause(url: str, name: str, why: str) -> Pause:
    """Have nothing more published; what is in flight is settled and marked. Idempotent: the first reason stays.

    Commits. The leader heeds it within about a second. Applications go on adding events.
    """
    return _order(url, name, queries.PAUSE, why=why)


def resume(url: str, name: str) -> Pause:
    """Have publishing go on where it stopped. Idempotent; commits."""
    return _order(url, name, queries.RESUME)


def _order(url: str, name: str, query: str, **given: str) -> Pause:
    with command_session(url) as connection:
        found = connection.cursor(row_factory=class_row(Pause)).execute(compose(query, name), given).fetchone()
        assert found is not None  # noqa: S101 - the table relay has one row, by its constraints
        connection.execute(compose(queries.WAKE, name), {"channel": schema.channel(name)})
    return found
