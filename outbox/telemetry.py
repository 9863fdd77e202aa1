"""What happened, as values: the one seam for logs, metrics, traces and tests. Listeners are plain functions.

Pure. A listener must not block; what it raises is the caller's fault and ends the relay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from outbox.transaction import Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class StandingBy:
    """Another relay leads; this one waits for the lock."""

    leader: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TookLead:
    """This relay leads from now on, under a new epoch."""

    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LostLead:
    """The session or the epoch is gone: nothing of what was in memory counts any more."""

    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Unreachable:
    """A server cannot be reached; the relay tries again after `delay` seconds, for ever."""

    server: str
    why: str
    delay: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Connected:
    """A connection to one of the two servers stands."""

    server: str
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PageRead:
    """Transactions were read and wait to be planned."""

    transactions: int
    events: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSent:
    """A batch is in flight."""

    stream: str
    base: int
    transactions: int
    messages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class InDoubt:
    """A batch failed or nobody answered: nothing more is sent until the stream was read back."""

    stream: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """The stream was read back: so many planned transactions are in it, so many go out again."""

    stream: str
    last_sequence: int
    stored: int
    remaining: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """The stream has other writers: from now on one batch is in flight at a time."""

    stream: str
    sequence: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Marked:
    """Transactions are marked sent, with their receipts."""

    transactions: int
    last_position: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Died:
    """A transaction was set aside, whole, with its reason."""

    verdict: Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocked:
    """Something holds transactions back; `stream` is empty when it is the head of the outbox."""

    stream: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Slept:
    """Nothing to do: the relay sleeps until a commit wakes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped:
    """The relay has ended in an orderly way."""


Happening = (
    StandingBy
    | TookLead
    | LostLead
    | Unreachable
    | Connected
    | PageRead
    | BatchSent
    | InDoubt
    | Settled
    | Shared
    | Marked
    | Died
    | Blocked
    | Slept
    | Stopped
)
Listener = Callable[[Happening], None]


def silent(_: Happening) -> None:
    """The listener that does nothing."""
