"""The plan, and what a look at the stream says about it: how much of it is stored.

Pure. The plan is the order and the place of everything that may be in flight: whole transactions that follow the
sequence `base`. In a stream with one writer "stored" is arithmetic: what ends at or below the stream's last sequence.
The messages are the cross-check; they may be gone by limits, rollup or a work queue, but what is there must fit.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import takewhile
from typing import NamedTuple


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A transaction's entry in the plan, with the message id of its last event. Its events are not loaded.

    `attempts` is how many relays have died of it, as far as is known; `size` is bytes in memory once it is loaded.
    """

    position: int
    count: int
    last_message_id: str
    attempts: int = 0
    size: int = 0
    part: int = 0  # which of its transaction's parts it is; 0 where that is in one stream


class Seen(NamedTuple):
    """The headers of a stored message that tell whose it is; None where it has no such header. `position` is its own,
    also where it is a replay of another one.

    `batch_id`, `fence` and `follows` are of the attempt that stored it: its atomic batch, the last sequence that it
    expected on its own subject, and the one that it expected of the stream. A `marker` is nats-server's own message.
    """

    outbox_id: str | None
    message_id: str | None
    position: int | None
    number: int | None
    count: int | None = None  # type: ignore[assignment]  # nobody counts in the tuple
    replayed: bool = False
    batch_id: str | None = None
    fence: int | None = None
    follows: int | None = None
    marker: bool = False
    sourced: bool = False  # it comes from another stream
    part: int | None = None

    def is_of(self, outbox_id: str) -> bool:
        """True if this outbox has sent it to this stream.

        Who copies it copies neither its batch nor its fence: nats-server would obey them again.
        """
        batched = self.batch_id is not None and self.batch_id.startswith(f"{outbox_id[:8]}-")
        return self.outbox_id == outbox_id and (batched or self.fence is not None or self.follows is not None)


class Look(Enum):
    """What a look at the stream came to."""

    SETTLED = "the stream stands at the end of a planned transaction, but for what nats-server itself wrote behind it"
    FOREIGN = "somebody else wrote to the stream"
    AHEAD = "the stream went on behind the plan, and nothing that it holds there tells who wrote"
    APPLYING = "the stream ends inside a transaction: a commit is being applied, or a part of it was lost"
    WENT_BACK = "the stream ends before the last receipt"
    IMPOSTOR = "a message of this outbox is where it cannot be"
    AMBIGUOUS = "the messages that would tell are gone"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """`stored` transactions of the plan are in the stream; `at` is the sequence that `look` speaks of."""

    look: Look
    stored: int
    at: int


def ends(base: int, plan: Sequence[Planned]) -> list[int]:
    """The sequence of each planned transaction's last message."""
    result = []
    for entry in plan:
        base += entry.count
        result.append(base)
    return result


def wanted(base: int, plan: Sequence[Planned], last: int) -> list[int]:
    """The sequences to read before `judge`: where transactions end, what follows them, and the stream's tail."""
    places = [end for end in ends(base, plan) if end <= last]
    return sorted({place for place in (*places, *(end + 1 for end in (base, *places)), last) if base < place <= last})


def judge(
    *,
    outbox_id: str,
    shared: bool,
    fresh: bool = False,
    unanswered: Collection[int],
    base: int,
    plan: Sequence[Planned],
    last: int,
    seen: Mapping[int, Seen | None],
) -> Finding:
    """How much of the plan is stored in a stream that ends at `last`; `seen` are the messages at `wanted`, or None.

    `unanswered` are the positions that an attempt without an answer may have stored: a message that is gone counts as
    ours only there. Of the others every attempt was refused in so many words, or there was none. `fresh` says that this
    leader has not looked before: its database may be older than the stream, so that what is gone may be its own.
    """
    if last < base:
        return Finding(look=Look.WENT_BACK, stored=0, at=last)
    places = [end for end in ends(base, plan) if end <= last]
    confirmed, contradicted = 0, None
    for index, (entry, place) in enumerate(zip(plan, places, strict=False)):
        message = seen.get(place)
        if message is None:
            continue
        if is_end_of(message, entry, outbox_id):
            confirmed = index + 1
        elif contradicted is None:
            contradicted = index
    if contradicted is not None and contradicted < confirmed:
        return Finding(look=Look.IMPOSTOR, stored=0, at=places[contradicted])
    possible = places[confirmed : len(places) if contradicted is None else contradicted]
    tried = takewhile(lambda entry: entry.position in unanswered, plan[confirmed:])
    gone = [place for place, _ in zip(possible, tried, strict=False)]
    if gone and (shared or contradicted is not None):
        return Finding(look=Look.AMBIGUOUS, stored=confirmed, at=gone[0])
    stored = confirmed + len(gone)
    end = places[stored - 1] if stored else base
    if last == end:
        return Finding(look=Look.SETTLED, stored=stored, at=end)
    unknown = Look.AHEAD if fresh and not shared and not (seen.get(end + 1) or seen.get(last)) else Look.FOREIGN
    return _beyond(outbox_id, plan, stored, end, last, seen, unknown)


def _beyond(
    outbox_id: str,
    plan: Sequence[Planned],
    stored: int,
    end: int,
    last: int,
    seen: Mapping[int, Seen | None],
    unknown: Look,
) -> Finding:
    """What lies between the end of the last stored transaction and the end of the stream; `unknown` if not ours."""
    beyond = seen.get(end + 1), seen.get(last)
    if all(message is not None and message.marker for message in beyond):
        return Finding(look=Look.SETTLED, stored=stored, at=end)
    next_planned = (plan[stored].position, plan[stored].part) if stored < len(plan) else None
    for place in (end + 1, last):
        message = seen.get(place)
        if message is None or not message.is_of(outbox_id):
            continue
        planned = {(entry.position, entry.part) for entry in plan[stored:]}
        which = message.position, message.part or 0
        fits = which == next_planned if place == end + 1 else which in planned
        return Finding(look=Look.APPLYING if fits else Look.IMPOSTOR, stored=stored, at=place)
    return Finding(look=unknown, stored=stored, at=last)


def is_end_of(message: Seen, entry: Planned, outbox_id: str) -> bool:
    """True if the message is the last one of that transaction."""
    return (
        message.outbox_id == outbox_id
        and message.position == entry.position
        and message.number == entry.count
        and message.message_id == entry.last_message_id
    )
