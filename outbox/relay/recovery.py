"""Reading a stream back: how much of the plan is in it, and whether it still is the stream that the outbox knows.

The decision is `outbox.core.plan.judge`; this module looks, looks again while a commit is being applied, and halts
where going on could lose or double events. Called at every change of leader and after every doubt.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Collection, Sequence
from dataclasses import dataclass, replace

from outbox.core.fence import Attempt, Fence, Verge, attempt_at, covered, judge_attempt, removed
from outbox.core.plan import Finding, Look, Planned, Seen, judge, wanted
from outbox.errors import Halt, Unusable, Weather
from outbox.jetstream.client import JetStream
from outbox.jetstream.reader import pages
from outbox.jetstream.stream import StreamInfo, seen

# A commit is applied message by message, and a new stream leader may lag: look again before halting.
LOOKS = 100
LOOK_SECONDS = 0.05
MOST = 1000  # messages that one look reads: who writes quickly would keep it for ever
TAIL = 100  # messages at the end of a stream that a new leader looks at


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
class Head:
    """What is known of the head of a plan with fences, besides: its own, whether an attempt may be stored, still or
    late, and up to where none is. `told` is the last sequence that a refusal has told, `placed` where a message of ours
    is, and its subject.
    """

    fence: Fence | None
    open: bool
    since: int
    told: int | None
    placed: tuple[int, str] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSettlement:
    """The first `stored` transactions of the plan are in the stream, behind `base`; else the last message on the
    subject of the fence is at `sequence`, and `others` have written behind the fence. `rewritten` says that subjects
    are stored as others than they were sent.
    """

    stored: int
    base: int
    sequence: int
    others: bool
    rewritten: bool
    info: StreamInfo | None


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


async def settle_head(jetstream: JetStream, known: Remembered, head: Head, outbox_id: str) -> HeadSettlement:
    """Read what is behind the fence of the plan's head; raises as `settle` does."""
    rewritten = head.placed is not None and await _is_rewritten(jetstream, known.stream, *head.placed)
    looks, end = 0, 0
    while True:
        behind = await _behind(jetstream, known, head, outbox_id)
        attempt, sequence, rewritten = behind.attempt, behind.sequence, rewritten or behind.rewritten
        if attempt is None and behind.others and not (head.open or known.fresh or known.moved):
            # Others have written there, and that is all: the sooner the next attempt, the likelier it is in time.
            return HeadSettlement(
                stored=0, base=known.base, sequence=sequence, others=True, rewritten=rewritten, info=None
            )
        info = await _identified(jetstream, known)
        if info.last_sequence < known.base:
            raise _halt(known, Finding(look=Look.WENT_BACK, stored=0, at=info.last_sequence), info)
        if attempt is None:
            break
        seen = await jetstream.read(known.stream, covered(attempt, known.plan) or ())
        verge, stored = judge_attempt(
            outbox_id=outbox_id,
            attempt=attempt,
            plan=known.plan,
            settled=head.since,
            last=info.last_sequence,
            seen=seen,
        )
        if verge is Verge.STORED:
            await _nothing_unknown(jetstream, known, outbox_id, info)
            base = attempt.first - 1
            return HeadSettlement(
                stored=stored, base=base, sequence=sequence, others=False, rewritten=rewritten, info=info
            )
        looks = 0 if info.last_sequence != end else looks + 1  # a large batch is applied for as long as it moves
        if verge is Verge.IMPOSTOR or looks >= LOOKS:
            look = Look.IMPOSTOR if verge is Verge.IMPOSTOR else Look.APPLYING
            raise _halt(known, Finding(look=look, stored=0, at=attempt.first), info)
        end = info.last_sequence
        await asyncio.sleep(LOOK_SECONDS)
    await _nothing_gone(jetstream, known, head, info, sequence)
    await _nothing_unknown(jetstream, known, outbox_id, info)
    before = head.fence.sequence if head.fence is not None else 0
    told = head.told is not None and head.fence is not None and not head.open
    contradicted = told and sequence == before != head.told
    return HeadSettlement(
        stored=0,
        base=known.base,
        sequence=sequence,
        others=behind.others or sequence < before,
        rewritten=rewritten or contradicted,
        info=info,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Behind:
    """What is stored behind a fence: an attempt at the head; else the last sequence on the subject, and whether others
    have written there. `rewritten`: the subject is stored as another one, and that one was looked at.
    """

    attempt: Attempt | None = None
    sequence: int = 0
    others: bool = False
    rewritten: bool = False


async def _behind(jetstream: JetStream, known: Remembered, head: Head, outbox_id: str) -> _Behind:
    """Look behind the fence; and under another subject, where what was sent is stored as that."""
    if head.fence is None:
        return _Behind()
    subject, before = head.fence.subject, head.fence.sequence
    behind = await _read_behind(jetstream, known, subject, before, outbox_id)
    # What the server has told of the subject is on another one: that is what it stores and compares.
    for place in {told for told in (before, head.told) if told and told > behind.sequence and behind.attempt is None}:
        other = await jetstream.subject_at(known.stream, place)
        if other is not None and other != subject:
            behind = await _read_behind(jetstream, known, other, before, outbox_id)
            return replace(behind, rewritten=True)
    return behind


async def _read_behind(jetstream: JetStream, known: Remembered, subject: str, before: int, outbox_id: str) -> _Behind:
    """Every message on a subject behind a sequence, up to the first attempt at the head, or where it ends now."""
    place = before
    for _ in range(MOST):
        following = await jetstream.next_on(known.stream, subject, place + 1)
        if following is None:
            break
        place, message = following
        if (attempt := attempt_at(place, message, known.plan[0], outbox_id)) is not None:
            return _Behind(attempt=attempt, sequence=place)
    if place > before:
        return _Behind(sequence=place, others=True)
    end = await jetstream.last_on(known.stream, subject)
    return _Behind(sequence=min(end, before))  # what has come since is found by the next look


async def _is_rewritten(jetstream: JetStream, stream: str, place: int, subject: str) -> bool:
    """True if what was sent on this subject is stored on another one."""
    return await jetstream.subject_at(stream, place) not in (None, subject)


async def _nothing_gone(jetstream: JetStream, known: Remembered, head: Head, info: StreamInfo, sequence: int) -> None:
    """Raise `Halt` if what would tell whether the head is stored may be gone, or the stream has lost what it had."""
    if head.fence is None or not (head.open or sequence < head.fence.sequence):
        return
    whole = await _identified(jetstream, known, deleted=True)
    since = max(head.since, head.fence.sequence)
    if head.open and removed(whole.first_sequence, whole.deleted, since):
        raise _halt(known, Finding(look=Look.AMBIGUOUS, stored=0, at=since + 1), info)
    if sequence < head.fence.sequence and not removed(whole.first_sequence, whole.deleted, head.fence.sequence - 1):
        raise _halt(known, Finding(look=Look.WENT_BACK, stored=0, at=sequence), info)


async def _nothing_unknown(jetstream: JetStream, known: Remembered, outbox_id: str, info: StreamInfo) -> None:
    """Raise `Halt` if the stream holds what this outbox has sent, and its database knows nothing of.

    A new leader looks at the end of the stream; after a promotion or a restore, at all behind the last receipt.
    """
    if not (known.fresh or known.moved):
        return
    planned = {(entry.position, entry.part) for entry in known.plan}
    begin = known.base + 1 if known.moved else max(known.base + 1, info.last_sequence - TAIL + 1)
    async with contextlib.aclosing(_beyond(jetstream, info, begin)) as found:
        async for place, message in found:
            if message is None or not message.is_of(outbox_id) or (message.position, message.part or 0) in planned:
                continue
            raise Halt(
                f"stream {known.stream} knows more than the database: what is at {place} was sent after {known.base}, "
                "the last sequence that the database knows: it was promoted or restored, or is an older copy",
                remedy="make sure that only one copy of the database is in use, then run: outbox rebase",
            )


async def _look(jetstream: JetStream, known: Remembered, outbox_id: str) -> tuple[Finding, StreamInfo]:
    info = await _identified(jetstream, known)
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


async def _identified(jetstream: JetStream, known: Remembered, *, deleted: bool = False) -> StreamInfo:
    """The stream, if it is the one that the outbox knows, and suits."""
    info = await jetstream.stream(known.stream, deleted=deleted)
    if info is None:
        raise Weather(
            f"stream {known.stream} does not exist; if it is not to come back: outbox rebase --stream {known.stream} "
            "--retire"
        )
    if info.created != known.created:
        # With nothing on its way there nobody can lose or double anything while it waits, and the others go on.
        kind = Halt if known.plan or known.moved else Unusable
        raise kind(
            f"stream {known.stream} is not the one that the outbox knows: created {info.created}, known since "
            f"{known.created}; it was made again, restored, or promoted from a mirror, and may lack messages",
            remedy=f"compare: outbox verify --stream {known.stream}; then accept the stream as it is: "
            f"outbox rebase --stream {known.stream}",
        )
    return info.check()


async def _search(jetstream: JetStream, known: Remembered, outbox_id: str, finding: Finding, info: StreamInfo) -> None:
    """After a promotion or a restore of the database, what lies beyond its plan is read message by message.

    Raises `Halt` if there is a message of this outbox, or one is gone that could have been.
    """
    async with contextlib.aclosing(_beyond(jetstream, info, _end(known, finding) + 1)) as found:
        async for place, message in found:
            if message is None and known.shared:
                continue  # others write here: what is gone was most likely theirs
            ours = message is not None and (
                message.is_of(outbox_id) or (message.outbox_id is not None and not known.shared)
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
    async with contextlib.aclosing(_beyond(jetstream, info, _end(known, finding) + 1)) as found:
        async for place, message in found:
            if message is not None and message.is_of(outbox_id):
                return replace(finding, look=Look.IMPOSTOR, at=place)
            if message is not None:
                return replace(finding, look=Look.FOREIGN)
    return finding


def _end(known: Remembered, finding: Finding) -> int:
    """Where what is stored of the plan ends."""
    return known.base + sum(entry.count for entry in known.plan[: finding.stored])


async def _beyond(jetstream: JetStream, info: StreamInfo, at: int) -> AsyncGenerator[tuple[int, Seen | None], None]:
    """What the stream holds from the sequence `at` on, place by place; None where a message is gone."""
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
