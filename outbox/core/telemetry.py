"""What happened, as values: the one seam for logs, metrics, traces and tests. Listeners are plain functions.

Pure. Each value says itself how much it matters and what it is in words, so that a new one is told in one place. A
listener must not block; what it raises is the caller's fault and ends the relay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from outbox.core.transaction import Verdict


class Level(StrEnum):
    """How much it matters to who reads a log; debug is what happens all the time."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class Happening:
    """What all have: a level, and, as `str`, one line for people."""

    level: ClassVar[Level] = Level.INFO


@dataclass(frozen=True, slots=True, kw_only=True)
class StandingBy(Happening):
    """Another relay leads; this one waits for the lock."""

    leader: str

    def __str__(self) -> str:
        return f"standing by: {self.leader} leads"


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting(Happening):
    """Something in the database keeps this relay from leading: the schema, a grant, a lock. It stands by until that is
    settled.
    """

    level: ClassVar[Level] = Level.WARNING
    why: str

    def __str__(self) -> str:
        return f"standing by: {self.why}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TookLead(Happening):
    """This relay leads from now on, under a new epoch."""

    epoch: int

    def __str__(self) -> str:
        return f"leading, epoch {self.epoch}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Careful(Happening):
    """Relays before this one died: it handles one transaction at a time, to find out whether they died of one."""

    level: ClassVar[Level] = Level.WARNING

    def __str__(self) -> str:
        return "relays before this one died: one transaction at a time"


@dataclass(frozen=True, slots=True, kw_only=True)
class LostLead(Happening):
    """The session or the epoch is gone: nothing of what was in memory counts any more."""

    level: ClassVar[Level] = Level.WARNING
    why: str

    def __str__(self) -> str:
        return f"lost the lead: {self.why}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LeadEnded(Happening):
    """This relay does not lead any more, in whatever way its term ended."""

    def __str__(self) -> str:
        return "leads no more"


@dataclass(frozen=True, slots=True, kw_only=True)
class Unreachable(Happening):
    """A server cannot be reached, or does not do as it must; the relay tries again after `delay` seconds, for ever."""

    level: ClassVar[Level] = Level.WARNING
    server: str
    why: str
    delay: float

    def __str__(self) -> str:
        return f"{self.server} cannot be used, next try in {self.delay:.1f} s: {self.why}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Connected(Happening):
    """A connection to one of the two servers stands."""

    server: str
    version: str

    def __str__(self) -> str:
        return f"connected to {self.server} {self.version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PageRead(Happening):
    """Transactions were read and wait to be planned."""

    level: ClassVar[Level] = Level.DEBUG
    transactions: int
    events: int

    def __str__(self) -> str:
        return f"read {self.transactions} transactions, {self.events} events"


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSent(Happening):
    """A batch is in flight."""

    level: ClassVar[Level] = Level.DEBUG
    stream: str
    base: int
    transactions: int
    messages: int

    def __str__(self) -> str:
        return (
            f"{self.stream}: sent {self.transactions} transactions, {self.messages} messages after sequence {self.base}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchEnded(Happening):
    """A batch came to its outcome (stored, duplicate, rejected, unknown), `seconds` after it was sent.

    `contexts` are the W3C trace contexts that its events carry, where the relay was asked to look for them.
    """

    level: ClassVar[Level] = Level.DEBUG
    stream: str
    outcome: str
    transactions: int
    messages: int
    seconds: float
    contexts: Sequence[str] = ()

    def __str__(self) -> str:
        return f"{self.stream}: {self.messages} messages {self.outcome} after {1000 * self.seconds:.1f} ms"


@dataclass(frozen=True, slots=True, kw_only=True)
class InDoubt(Happening):
    """A batch failed or nobody answered: nothing more is sent until the stream was read back."""

    level: ClassVar[Level] = Level.WARNING
    stream: str
    why: str

    def __str__(self) -> str:
        return f"{self.stream}: it is not clear what was stored, reading the stream back: {self.why}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled(Happening):
    """The stream was read back: so many planned transactions are in it, so many go out again."""

    stream: str
    last_sequence: int
    stored: int
    remaining: int

    def __str__(self) -> str:
        return (
            f"{self.stream}: read back, it ends at sequence {self.last_sequence}: {self.stored} planned transactions "
            f"are stored, {self.remaining} are to be sent"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared(Happening):
    """The stream has other writers: from now on one batch is in flight at a time."""

    level: ClassVar[Level] = Level.WARNING
    stream: str
    sequence: int

    def __str__(self) -> str:
        return f"{self.stream}: has other writers (at {self.sequence}): one batch in flight from now on"


@dataclass(frozen=True, slots=True, kw_only=True)
class Marked(Happening):
    """Transactions of one stream are marked sent, with their receipts."""

    level: ClassVar[Level] = Level.DEBUG
    stream: str
    transactions: int
    events: int
    last_position: int

    def __str__(self) -> str:
        return f"{self.stream}: marked {self.transactions} transactions, to position {self.last_position}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Purged(Happening):
    """Transactions that were sent longer ago than the retention are deleted."""

    level: ClassVar[Level] = Level.DEBUG
    transactions: int

    def __str__(self) -> str:
        return f"deleted {self.transactions} old transactions"


@dataclass(frozen=True, slots=True, kw_only=True)
class Died(Happening):
    """A transaction was set aside, whole, with its reason."""

    level: ClassVar[Level] = Level.ERROR
    verdict: Verdict

    def __str__(self) -> str:
        return f"transaction {self.verdict.position} is a dead letter: {self.verdict}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocked(Happening):
    """Something holds transactions back; `stream` is empty when it is the head of the outbox."""

    level: ClassVar[Level] = Level.ERROR
    stream: str
    why: str

    def __str__(self) -> str:
        return f"{self.stream or 'outbox'}: blocked: {self.why}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Strayed(Happening):
    """Events that no row of transactions counts: they are never sent. Somebody overwrote the triggers' settings."""

    level: ClassVar[Level] = Level.ERROR
    txid: str
    events: int

    def __str__(self) -> str:
        return f"{self.events} events of txid {self.txid} belong to no transaction and are never sent: outbox doctor"


@dataclass(frozen=True, slots=True, kw_only=True)
class Drifted(Happening):
    """Parts of the schema are missing or switched off, or are there again where `what` is empty."""

    level: ClassVar[Level] = Level.ERROR
    what: str

    def __str__(self) -> str:
        if not self.what:
            return "the schema is whole again"
        return f"the schema has drifted, and events may never be sent: missing or disabled: {self.what}: outbox doctor"


@dataclass(frozen=True, slots=True, kw_only=True)
class HousekeepingFailed(Happening):
    """Old transactions could not be deleted, or strays and drift not be looked for; it is tried again, for ever."""

    level: ClassVar[Level] = Level.WARNING
    why: str

    def __str__(self) -> str:
        return f"housekeeping fails, publishing goes on: {self.why}"


@dataclass(frozen=True, slots=True, kw_only=True)
class HousekeepingWorks(Happening):
    """Housekeeping works, for the first time in a term or again."""

    level: ClassVar[Level] = Level.DEBUG

    def __str__(self) -> str:
        return "housekeeping works"


@dataclass(frozen=True, slots=True, kw_only=True)
class Unblocked(Happening):
    """What held transactions back does so no more; `stream` as in `Blocked`."""

    stream: str

    def __str__(self) -> str:
        return f"{self.stream or 'outbox'}: not blocked any more"


@dataclass(frozen=True, slots=True, kw_only=True)
class Paused(Happening):
    """An operator has paused the outbox: what is in flight is settled, and nothing more is sent."""

    level: ClassVar[Level] = Level.WARNING
    why: str

    def __str__(self) -> str:
        return f"paused: {self.why}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed(Happening):
    """The outbox is not paused any more."""

    def __str__(self) -> str:
        return "resumed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Slept(Happening):
    """Nothing to do: the relay sleeps until a commit wakes it."""

    level: ClassVar[Level] = Level.DEBUG

    def __str__(self) -> str:
        return "asleep until a commit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ignored(Happening):
    """A signal that has nothing to do here."""

    signal: str

    def __str__(self) -> str:
        return f"{self.signal} is ignored: files are read at each new connection, settings at the start"


@dataclass(frozen=True, slots=True, kw_only=True)
class Remark(Happening):
    """A library or the interpreter has something to say; `kind` is what is the same each time that it says so."""

    level: ClassVar[Level] = Level.WARNING
    source: str
    kind: str
    words: str
    traceback: str = ""

    def __str__(self) -> str:
        return f"{self.source}: {self.words}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Complaint(Remark):
    """What it calls an error."""

    level: ClassVar[Level] = Level.ERROR


@dataclass(frozen=True, slots=True, kw_only=True)
class LinesDropped(Happening):
    """Nobody has taken so many lines of the log, which would have stood here."""

    level: ClassVar[Level] = Level.WARNING
    lines: int

    def __str__(self) -> str:
        return f"the log could not be written: lines that are missing here: {self.lines}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed(Happening):
    """The last words: why the process ends; `error` is the error's class."""

    level: ClassVar[Level] = Level.ERROR
    error: str
    why: str
    remedy: str = ""
    traceback: str = ""

    def __str__(self) -> str:
        return f"outbox: {self.why}\n  remedy: {self.remedy}" if self.remedy else f"outbox: {self.why}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped(Happening):
    """The relay has ended in an orderly way."""

    def __str__(self) -> str:
        return "stopped"


Listener = Callable[[Happening], None]


def silent(_: Happening) -> None:
    """The listener that does nothing."""
