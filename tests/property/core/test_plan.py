"""Reading a stream back: each look, and the message that tells it. Pure, so every row of the judgement is here."""

from __future__ import annotations

import pytest

from outbox.core.plan import Look, Planned, Seen, judge, wanted

PLAN = [Planned(position=p, count=c, last_message_id=f"m{p}") for p, c in ((1, 2), (2, 1), (3, 3))]  # ends 12, 13, 16
ALL = {1, 2, 3}
FOREIGN = Seen(outbox_id=None, message_id="x", position=None, number=None)
OTHER = Seen(outbox_id="other", message_id="m1", position=1, number=2, fence=10)
MARKER = Seen(outbox_id=None, message_id=None, position=None, number=None, marker=True)
COPY = Seen(outbox_id="me", message_id="m9", position=9, number=1)  # neither batch nor fence


def ours(position: int, number: int, message_id: str | None = None) -> Seen:
    return Seen(
        outbox_id="me", message_id=message_id or f"m{position}", position=position, number=number, batch_id="me-1"
    )


GOOD = {12: ours(1, 2), 13: ours(2, 1), 16: ours(3, 3)}


@pytest.mark.parametrize(
    ("last", "seen", "look", "stored"),
    [
        (10, {}, Look.SETTLED, 0),
        (12, GOOD, Look.SETTLED, 1),
        (13, GOOD, Look.SETTLED, 2),
        (16, GOOD, Look.SETTLED, 3),
        (16, {}, Look.SETTLED, 3),  # gone by limits, rollup or a work queue: arithmetic
        (16, {16: ours(3, 3)}, Look.SETTLED, 3),
        (9, {}, Look.WENT_BACK, 0),
        (11, {11: ours(1, 1)}, Look.APPLYING, 0),
        (15, {**GOOD, 14: ours(3, 1, "a"), 15: ours(3, 2, "b")}, Look.APPLYING, 2),
        (11, {11: FOREIGN}, Look.FOREIGN, 0),
        (11, {11: COPY}, Look.FOREIGN, 0),
        (11, {11: MARKER}, Look.SETTLED, 0),
        (13, {12: GOOD[12], 13: MARKER}, Look.SETTLED, 1),
        (14, {12: GOOD[12], 13: MARKER, 14: FOREIGN}, Look.FOREIGN, 1),
        (17, {**GOOD, 17: COPY}, Look.FOREIGN, 3),
        (12, {11: OTHER, 12: OTHER}, Look.FOREIGN, 0),
        (14, {12: GOOD[12], 13: FOREIGN, 14: FOREIGN}, Look.FOREIGN, 1),
        (17, {**GOOD, 17: FOREIGN}, Look.FOREIGN, 3),
        (17, {12: GOOD[12], 13: GOOD[13], 14: ours(3, 1, "a"), 16: FOREIGN, 17: FOREIGN}, Look.APPLYING, 2),  # a part
        (17, {**GOOD, 17: ours(9, 1)}, Look.IMPOSTOR, 3),
        (12, {11: ours(7, 1), 12: ours(7, 2)}, Look.IMPOSTOR, 0),
        (13, {12: FOREIGN, 13: ours(2, 1)}, Look.IMPOSTOR, 0),  # a later one in its place, an earlier one not
        (13, {13: FOREIGN}, Look.AMBIGUOUS, 0),
    ],
)
def test_look(last: int, seen: dict[int, Seen], look: Look, stored: int) -> None:
    finding = judge(outbox_id="me", shared=False, unanswered=ALL, base=10, plan=PLAN, last=last, seen=seen)
    assert finding.look is look
    if look in (Look.SETTLED, Look.FOREIGN):
        assert finding.stored == stored


@pytest.mark.parametrize("shared", [True, False])
def test_gone_after_a_refusal_in_so_many_words_was_not_ours(shared: bool) -> None:
    finding = judge(outbox_id="me", shared=shared, unanswered=(), base=10, plan=PLAN, last=12, seen={})
    assert (finding.look, finding.stored) == (Look.FOREIGN, 0)


def test_gone_in_a_shared_stream_without_an_answer_is_ambiguous() -> None:
    finding = judge(outbox_id="me", shared=True, unanswered=ALL, base=10, plan=PLAN, last=12, seen={})
    assert finding.look is Look.AMBIGUOUS


def test_replay_of_a_planned_transaction_is_not_that_transaction() -> None:
    """It has a position and message ids of its own."""
    replay = Seen(outbox_id="me", message_id="other", position=9, number=2, replayed=True, fence=10)
    finding = judge(outbox_id="me", shared=False, unanswered=ALL, base=10, plan=PLAN, last=12, seen={12: replay})
    assert (finding.look, finding.stored) == (Look.IMPOSTOR, 0)


def test_wanted_are_the_ends_what_follows_and_the_tail() -> None:
    assert wanted(10, PLAN, 10) == []
    assert wanted(10, PLAN, 11) == [11]
    assert wanted(10, PLAN, 15) == [11, 12, 13, 14, 15]
    assert wanted(10, PLAN, 20) == [11, 12, 13, 14, 16, 17, 20]


def test_what_is_gone_is_ours_only_as_far_as_it_was_tried() -> None:
    """The first two may be stored, the third was never sent: whoever took its place was somebody else."""
    finding = judge(outbox_id="me", shared=False, unanswered={1, 2}, base=10, plan=PLAN, last=16, seen={})
    assert (finding.look, finding.stored) == (Look.FOREIGN, 2)


@pytest.mark.parametrize(
    ("shared", "last", "seen", "look"),
    [
        (False, 20, {}, Look.AHEAD),
        (False, 20, GOOD, Look.AHEAD),
        (False, 16, {}, Look.SETTLED),  # all of the plan, and nothing behind it
        (True, 20, GOOD, Look.FOREIGN),
        (False, 20, {17: FOREIGN}, Look.FOREIGN),
        (False, 20, {20: FOREIGN}, Look.FOREIGN),
        (False, 20, {17: ours(9, 1)}, Look.IMPOSTOR),
        (False, 9, {}, Look.WENT_BACK),
    ],
)
def test_new_leader_takes_what_is_gone_behind_the_plan_for_nobodys(
    last: int, seen: dict[int, Seen], look: Look, *, shared: bool
) -> None:
    """The database may be older than the stream. A leader that has looked before knows that it was somebody else."""
    for fresh in (True, False):
        finding = judge(
            outbox_id="me", shared=shared, fresh=fresh, unanswered=ALL, base=10, plan=PLAN, last=last, seen=seen
        )
        assert finding.look is (Look.FOREIGN if look is Look.AHEAD and not fresh else look)
