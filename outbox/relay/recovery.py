"""Reading a stream back: how much of the plan is in it, and whether it still is the stream that the outbox knows.

The decision is `outbox.core.plan.judge`; this module looks, looks again while a commit is being applied, and halts
where going on could lose or double events. Called at every change of leader and after every doubt.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Collection, Sequence
from dataclasses import dataclass, replace

from outbox.core.plan import Finding, Look, Planned, Seen, judge, wanted
from outbox.errors import Halt, Weather
from outbox.jetstream.client import JetStream
from outbox.jetstream.reader import pages
from outbox.jetstream.stream import StreamInfo, seen

# A commit is applied message by message, and a new stream leader may lag: look again before halting.
LOOKS = 100
LOOK_SECONDS = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Remembered:
    """What the outbox remembers of the stream, and the plan that is to be settled."""

    stream: str
    created: str
    shared: bool
    fresh: bool  # this leader has not looked at it before
    unanswered: Collection[int]
    moved: bool
    base: int
    plan: Sequence[Planned]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settlement:
    """The first `stored` transactions of the plan are in the stream, which ends at `last`."""

    stored: int
    last: int
    foreign: bool
    info: StreamInfo


async def settle(jetstream: JetStream, known: Remembered, outbox_id: str) -> Settlement:
    """Read the stream back until it tells; raises `Weather` if it cannot be read, `Halt` if it contradicts the plan."""
    finding, info = await _look(jetstream, known, outbox_id)
    looks = 0
    while looks < LOOKS:
        if finding.look in (Look.SETTLED, Look.IMPOSTOR) or (finding.look is Look.FOREIGN and known.shared):
            break
        await asyncio.sleep(LOOK_SECONDS)
        before, end = finding, info.last_sequence
        finding, info = await _look(jetstream, known, outbox_id)
        moves = finding.look is Look.APPLYING and info.last_sequence != end
        looks = 0 if moves else looks + 1  # a large batch is applied for as long as it moves
        # In a stream that nobody else should write to, a strange message is looked at twice.
        if finding.look is before.look in (Look.FOREIGN, Look.AHEAD) and finding.stored == before.stored:
            break
    if known.moved and finding.look in (Look.SETTLED, Look.FOREIGN, Look.AHEAD):
        await _search(jetstream, known, outbox_id, finding, info)
    if finding.look is Look.AHEAD:
        finding = await _first_left(jetstream, known, outbox_id, finding, info)
    if finding.look in (Look.SETTLED, Look.FOREIGN):
        foreign = finding.look is Look.FOREIGN
        return Settlement(stored=finding.stored, last=info.last_sequence, foreign=foreign, info=info)
    raise _halt(known, finding, info)


async def _look(jetstream: JetStream, known: Remembered, outbox_id: str) -> tuple[Finding, StreamInfo]:
    info = await jetstream.stream(known.stream)
    if info is None:
        raise Weather(
            f"stream {known.stream} does not exist; if it is not to come back: outbox rebase --stream {known.stream} "
            "--retire"
        )
    if info.created != known.created:
        raise Halt(
            f"stream {known.stream} is not the one that the outbox knows: created {info.created}, known since "
            f"{known.created}; it was made again, restored, or promoted from a mirror, and may lack messages",
            remedy=f"compare: outbox verify --stream {known.stream}; then accept the stream as it is: "
            f"outbox rebase --stream {known.stream}",
        )
    info.check()
    places = wanted(known.base, known.plan, info.last_sequence)
    seen = await jetstream.read(known.stream, places)
    finding = judge(
        outbox_id=outbox_id,
        shared=known.shared,
        fresh=known.fresh,
        unanswered=known.unanswered,
        base=known.base,
        plan=known.plan,
        last=info.last_sequence,
        seen=seen,
    )
    return finding, info


async def _search(jetstream: JetStream, known: Remembered, outbox_id: str, finding: Finding, info: StreamInfo) -> None:
    """After a promotion or a restore of the database, what lies beyond its plan is read message by message.

    Raises `Halt` if there is a message of this outbox, or one is gone that could have been.
    """
    async with contextlib.aclosing(_beyond(jetstream, known, finding, info)) as found:
        async for place, message in found:
            if message is None and known.shared:
                continue  # others write here: what is gone was most likely theirs
            ours = message is not None and (
                message.outbox_id == outbox_id or (message.outbox_id is not None and not known.shared)
            )
            if message is None or ours:
                raise Halt(
                    f"the database was promoted or restored, and stream {known.stream} knows more than it: what is at "
                    f"{place} was sent after {known.base}, the last sequence that the database knows",
                    remedy="make sure that only one copy of the database is in use, then run: outbox rebase",
                )


async def _first_left(
    jetstream: JetStream, known: Remembered, outbox_id: str, finding: Finding, info: StreamInfo
) -> Finding:
    """Judge by the first message that is left of what lies beyond the plan, if any is."""
    async with contextlib.aclosing(_beyond(jetstream, known, finding, info)) as found:
        async for place, message in found:
            if message is not None and message.outbox_id == outbox_id:
                return replace(finding, look=Look.IMPOSTOR, at=place)
            if message is not None:
                return replace(finding, look=Look.FOREIGN)
    return finding


async def _beyond(
    jetstream: JetStream, known: Remembered, finding: Finding, info: StreamInfo
) -> AsyncGenerator[tuple[int, Seen | None], None]:
    """What the stream holds behind what is stored of the plan, place by place; None where a message is gone."""
    at = known.base + sum(entry.count for entry in known.plan[: finding.stored]) + 1
    if at < info.first_sequence:
        yield info.first_sequence - 1, None
    at = max(at, info.first_sequence)
    async with contextlib.aclosing(pages(jetstream, info, at, info.last_sequence)) as read:
        async for messages, end in read:
            whose = {each.sequence: seen(each) for each in messages}
            for place in range(at, end + 1):
                yield place, whose.get(place)
            at = end + 1


def _halt(known: Remembered, finding: Finding, info: StreamInfo) -> Halt:
    if finding.look is Look.AHEAD:
        return Halt(
            f"stream {known.stream} ends at {info.last_sequence}, beyond what the database knows of ({known.base}), "
            "and what was there is gone: the database is an older copy, or somebody else has written to the stream",
            remedy="make sure that only one copy of the database is in use, then run: outbox rebase",
        )
    found = {
        Look.WENT_BACK: f"it ends at {info.last_sequence}, before the last receipt at {known.base}",
        Look.APPLYING: f"it ends inside a transaction at {info.last_sequence}: the server lost a part of the batch",
        Look.IMPOSTOR: f"at {finding.at} it holds a message of this outbox that cannot be there",
        Look.AMBIGUOUS: f"the messages at {finding.at} that would tell whether a batch was stored are gone",
    }[finding.look]
    return Halt(
        f"stream {known.stream} contradicts the outbox: {found}",
        remedy=f"compare: nats stream get {known.stream} {finding.at}; then accept the stream as it is, which sends "
        f"again what is not known to be stored: outbox rebase --stream {known.stream}",
    )
