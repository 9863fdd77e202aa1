"""What a publish came to, read from JetStream's reply, and what each error code means for a transaction.

Pure. Expected answers are values. Codes and texts: nats-server's `server/errors.json` and ADR-50; which of them
convict is decided here, once, in a table that a reader can check row by row.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from enum import Enum

from outbox.core.transaction import DeadReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """The ack: the last message of the batch has this sequence in this stream. A plain publish is in no batch."""

    stream: str
    sequence: int
    batch: str | None = None
    count: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Duplicate:
    """A plain publish whose message id the stream has seen: nothing was stored, and that proves nothing."""

    sequence: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """JetStream refused it: nothing of the batch is stored, and will not be from this attempt; but see `CUT`."""

    code: int
    description: str

    @property
    def sequence(self) -> int | None:
        """The last sequence on the subject of the fence, where a wrong one was refused (10071); else None."""
        found = WRONG_SEQUENCE.fullmatch(self.description)
        return int(found[1]) if found and self.code == WRONG_LAST_SEQUENCE else None

    def __str__(self) -> str:
        return f"{self.description} ({self.code})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Unknown:
    """No answer, or one that does not tell: the batch may be stored, or may still be stored later."""

    why: str


Outcome = Stored | Duplicate | Rejected | Unknown
OUTCOMES = ("stored", "duplicate", "rejected", "unknown")


def word(outcome: Outcome) -> str:
    """The outcome as one of `OUTCOMES`."""
    return type(outcome).__name__.lower()


class Meaning(Enum):
    """What a rejection says."""

    CHAIN_BROKEN = "the stream is not where the relay expects it: read it back"
    WEATHER = "the stream cannot take it now: wait, as long as it takes"
    OPERATOR = "the stream's configuration is in the way: wait, and say so"
    OFFENCE = "refused alone, the transaction can never be stored"


# code -> meaning. A code that is not here is treated as OPERATOR and shown: an unknown refusal never convicts.
MEANINGS: dict[int, Meaning] = {
    10002: Meaning.WEATHER,  # resource limits exceeded for account
    10008: Meaning.WEATHER,  # JetStream system temporarily unavailable
    10009: Meaning.WEATHER,  # insufficient replicas, no leader
    10023: Meaning.WEATHER,  # insufficient resources
    10028: Meaning.WEATHER,  # insufficient memory storage
    10039: Meaning.OPERATOR,  # JetStream not enabled for account
    10047: Meaning.WEATHER,  # insufficient storage resources
    10052: Meaning.OPERATOR,  # the stream's configuration refuses it
    10054: Meaning.OFFENCE,  # message size exceeds maximum allowed
    10059: Meaning.OPERATOR,  # stream not found
    10060: Meaning.CHAIN_BROKEN,  # expected stream does not match: subjects have moved
    10071: Meaning.CHAIN_BROKEN,  # wrong last sequence
    10074: Meaning.WEATHER,  # replicas
    10076: Meaning.OPERATOR,  # JetStream not enabled
    10077: Meaning.WEATHER,  # maximum messages, bytes or messages per subject exceeded (discard: new)
    10097: Meaning.OFFENCE,  # header size exceeds maximum allowed of 64k
    10109: Meaning.OPERATOR,  # sealed stream
    10111: Meaning.OFFENCE,  # rollup not permitted
    10158: Meaning.WEATHER,  # duplicate message id is in process
    10164: Meaning.CHAIN_BROKEN,  # wrong last sequence (in process)
    10165: Meaning.OFFENCE,  # invalid per-message TTL
    10166: Meaning.OFFENCE,  # per-message TTL is disabled
    10167: Meaning.WEATHER,  # too many requests
    10174: Meaning.OPERATOR,  # atomic publish is disabled
    10176: Meaning.CHAIN_BROKEN,  # atomic publish batch is incomplete
    10199: Meaning.OFFENCE,  # atomic publish batch is too large
    10201: Meaning.OFFENCE,  # atomic publish batch contains duplicate message id
    10210: Meaning.WEATHER,  # atomic publish too many inflight
}

REASONS: dict[int, DeadReason] = {
    10054: DeadReason.MESSAGE_TOO_LARGE,
    10097: DeadReason.HEADERS_TOO_LARGE,
    10111: DeadReason.ROLLUP_NOT_PERMITTED,
    10165: DeadReason.INVALID_TTL,
    10166: DeadReason.TTL_NOT_PERMITTED,
    10199: DeadReason.TOO_MANY_EVENTS,
    10201: DeadReason.DUPLICATE_MESSAGE_ID,
}

# Storage that ends inside a commit on one replica: up to nats-server 2.12 a part is stored, and the commit is refused.
# So does a limit (10077) that the server sees only while it stores, message by message.
CUT = frozenset({10002, 10023, 10028, 10047})
ROOM = CUT | {10077}  # there may be room for less
MESSAGE_NOT_FOUND = 10037
MESSAGE_TOO_LARGE = 10054
STREAM_NOT_FOUND = 10059
OTHER_STREAM = 10060
IN_PROCESS = 10164
WRONG_LAST_SEQUENCE = 10071
WRONG_SEQUENCE = re.compile(r"wrong last sequence: (\d{1,18})")
STREAM_FULL = 10077
BATCHES_DISABLED = 10174
BATCH_INCOMPLETE = 10176
BATCH_TOO_LARGE = 10199
DUPLICATE_ID = 10201


def meaning(rejected: Rejected) -> Meaning:
    """What a rejection says; see the table."""
    return MEANINGS.get(rejected.code, Meaning.OPERATOR)


def code_of(words: str) -> int | None:
    """The code of a rejection that was written down as its `str`; None if this is something else."""
    found = re.search(r" \((\d{5})\)$", words)
    return int(found[1]) if found else None


def read_reply(data: bytes, status: str | None = None) -> Outcome:
    """The outcome that a reply tells; `status` is the inline status of the message's headers, such as 503."""
    if status is not None:
        why = "no responders: the subject is in no stream, or the stream has no leader" if status == "503" else status
        return Unknown(why=why)
    try:
        reply = json.loads(data)
        if error := reply.get("error"):
            return Rejected(code=int(error["err_code"]), description=str(error.get("description", "")))
        if reply.get("duplicate"):
            return Duplicate(sequence=int(reply["seq"]))
        return Stored(
            stream=str(reply["stream"]),
            sequence=int(reply["seq"]),
            batch=reply.get("batch"),
            count=int(reply.get("count", 1)),
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return Unknown(why=f"unreadable reply {data[:80]!r}")
