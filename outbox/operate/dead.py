"""Dead letters: list them, retry or discard them.

A retried transaction is pending again at its old position, which the leader looks at again; it comes late, and its
place in the order is lost. A discarded one stays in the table and is never sent. Both are recorded with their time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from psycopg.rows import class_row

from outbox.core.transaction import reason_of
from outbox.event import matches
from outbox.operate import queries
from outbox.postgres.queries import compose
from outbox.postgres.session import command_session


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """A transaction that was set aside whole, or of which a part was. `subjects` are those of its events, each once.

    `sent_to` are the streams that have their parts of it: a retry sends what is missing.
    """

    position: int
    event_count: int
    subjects: list[str]
    sealed_at: datetime
    dead_at: datetime
    reason: str
    discarded_at: datetime | None
    retried_at: datetime | None
    sent_to: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which dead letters: those that fit everything that is given. `subject` may have wildcards; times are of death."""

    positions: Sequence[int] = ()
    reason: str | None = None
    subject: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    discarded: bool = False  # those that were discarded, too

    def holds(self, letter: DeadLetter) -> bool:
        """True if this dead letter is meant."""
        return (
            (not self.positions or letter.position in self.positions)
            and (self.reason is None or reason_of(letter.reason) == self.reason)
            and (self.subject is None or any(matches(subject, self.subject) for subject in letter.subjects))
            and (self.since is None or letter.dead_at >= self.since)
            and (self.until is None or letter.dead_at < self.until)
            and (self.discarded or letter.discarded_at is None)
        )


def dead_letters(url: str, name: str, selection: Selection) -> list[DeadLetter]:
    """The dead letters that are meant, by position. Reads only."""
    with command_session(url, reads=True) as connection:
        letters = connection.cursor(row_factory=class_row(DeadLetter)).execute(compose(queries.DEAD_LETTERS, name))
        return [letter for letter in letters if selection.holds(letter)]


def retry(url: str, name: str, positions: Sequence[int]) -> list[int]:
    """Make dead letters pending again; returns the positions of those that were dead and not discarded. Commits.

    The leader takes them up within about a second; without one, the next leader does.
    """
    return _change(url, name, queries.RETRY, positions)


def discard(url: str, name: str, positions: Sequence[int]) -> list[int]:
    """Declare that dead letters are never to be sent; returns the positions of those it took. Commits.

    What is pending of them for other streams is sent all the same.
    """
    return _change(url, name, queries.DISCARD, positions)


def _change(url: str, name: str, query: str, positions: Sequence[int]) -> list[int]:
    with command_session(url) as connection:
        connection.execute(compose(queries.MY_TURN, name))
        rows = connection.execute(compose(query, name), {"positions": list(positions)}).fetchall()
    return sorted(position for (position,) in rows)
