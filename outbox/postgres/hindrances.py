"""What keeps relays from leading: how it is said, and how a relay leaves it in the database for `outbox status`.

Knows no relay's session: these are of commands, or of a moment.
"""

from __future__ import annotations

from outbox import schema
from outbox.errors import Weather
from outbox.postgres import queries
from outbox.postgres.session import command_session

END_SESSION = "end its session: pg_terminate_backend; or its transaction, if it is prepared: ROLLBACK PREPARED"


def usurped(holder: str) -> Weather:
    """What is to be said where somebody who is no relay holds the leader's lock."""
    return Weather(f"{holder} holds the lock of the leader, so that no relay can lead", remedy=END_SESSION)


def leave_word(url: str, name: str, why: str) -> None:
    """Leave for `outbox status` what keeps a relay from leading, unless another one leads; whoever leads clears it.

    Commits. In a session of its own, of plain statements: behind a pooler it works too. May raise any of our errors.
    """
    keys = {"lock": schema.LEADER_LOCK, "key": schema.lock_key(name) % (1 << 32)}
    with command_session(url) as connection:
        connection.execute(queries.compose(queries.LEAVE_WORD, name), {**keys, "why": why})
