"""What happened, as values: the one seam for logs, metrics, traces and tests. Listeners are plain functions.

Pure. A listener must not block; what it raises is the caller's fault and ends the relay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import assert_never

from outbox.core.transaction import Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class StandingBy:
    """Another relay leads; this one waits for the lock."""

    leader: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TookLead:
    """This relay leads from now on, under a new epoch."""

    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Careful:
    """Relays before this one died: it handles one transaction at a time, to find out whether they died of one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LostLead:
    """The session or the epoch is gone: nothing of what was in memory counts any more."""

    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LeadEnded:
    """This relay does not lead any more, in whatever way its term ended."""


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
class BatchEnded:
    """A batch came to its outcome (stored, duplicate, rejected, unknown), `seconds` after it was sent.

    `contexts` are the W3C trace contexts that its events carry, where the relay was asked to look for them.
    """

    stream: str
    outcome: str
    transactions: int
    messages: int
    seconds: float
    contexts: Sequence[str] = ()


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
    """Transactions of one stream are marked sent, with their receipts."""

    stream: str
    transactions: int
    events: int
    last_position: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Purged:
    """Transactions that were sent longer ago than the retention are deleted."""

    transactions: int


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
class Strayed:
    """Events that no row of transactions counts: they are never sent. Somebody overwrote the triggers' settings."""

    txid: str
    events: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Unblocked:
    """What held transactions back does so no more; `stream` as in `Blocked`."""

    stream: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Paused:
    """An operator has paused the outbox: what is in flight is settled, and nothing more is sent."""

    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """The outbox is not paused any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slept:
    """Nothing to do: the relay sleeps until a commit wakes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped:
    """The relay has ended in an orderly way."""


Happening = (
    StandingBy
    | TookLead
    | Careful
    | LostLead
    | LeadEnded
    | Unreachable
    | Connected
    | PageRead
    | BatchSent
    | BatchEnded
    | InDoubt
    | Settled
    | Shared
    | Marked
    | Purged
    | Died
    | Blocked
    | Strayed
    | Unblocked
    | Paused
    | Resumed
    | Slept
    | Stopped
)
Listener = Callable[[Happening], None]


def silent(_: Happening) -> None:
    """The listener that does nothing."""


def sentence(happening: Happening) -> str:  # noqa: PLR0911, PLR0912, C901 - one line for each happening
    """What happened, as one line for people."""
    match happening:
        case StandingBy(leader=leader):
            return f"standing by: {leader} leads"
        case TookLead(epoch=epoch):
            return f"leading, epoch {epoch}"
        case Careful():
            return "relays before this one died: one transaction at a time"
        case LostLead(why=why):
            return f"lost the lead: {why}"
        case LeadEnded():
            return "leads no more"
        case Unreachable(server=server, why=why, delay=delay):
            return f"{server} cannot be reached, next try in {delay:.1f} s: {why}"
        case Connected(server=server, version=version):
            return f"connected to {server} {version}"
        case PageRead(transactions=transactions, events=events):
            return f"read {transactions} transactions, {events} events"
        case BatchSent(stream=stream, base=base, transactions=transactions, messages=messages):
            return f"{stream}: sent {transactions} transactions, {messages} messages after sequence {base}"
        case BatchEnded(stream=stream, outcome=outcome, messages=messages, seconds=seconds):
            return f"{stream}: {messages} messages {outcome} after {1000 * seconds:.1f} ms"
        case InDoubt(stream=stream, why=why):
            return f"{stream}: in doubt, reading the stream back: {why}"
        case Settled(stream=stream, last_sequence=last, stored=stored, remaining=remaining):
            return f"{stream}: settled at sequence {last}, {stored} planned transactions stored, {remaining} to send"
        case Shared(stream=stream, sequence=sequence):
            return f"{stream}: has other writers (at {sequence}): one batch in flight from now on"
        case Marked(stream=stream, transactions=transactions, last_position=position):
            return f"{stream}: marked {transactions} transactions, to position {position}"
        case Purged(transactions=transactions):
            return f"deleted {transactions} old transactions"
        case Died(verdict=verdict):
            return f"transaction {verdict.position} is a dead letter: {verdict}"
        case Blocked(stream=stream, why=why):
            return f"{stream or 'outbox'}: blocked: {why}"
        case Strayed(txid=txid, events=events):
            return f"{events} events of txid {txid} belong to no transaction and are never sent: outbox doctor"
        case Unblocked(stream=stream):
            return f"{stream or 'outbox'}: not blocked any more"
        case Paused(why=why):
            return f"paused: {why}"
        case Resumed():
            return "resumed"
        case Slept():
            return "asleep until a commit"
        case Stopped():
            return "stopped"
        case _:
            assert_never(happening)
