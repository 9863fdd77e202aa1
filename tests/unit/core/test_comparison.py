"""The comparison of a stream with the outbox while both move: what is at work is no anomaly."""

from __future__ import annotations

from hashlib import sha256

import pytest

from outbox.core.comparison import Comparison, Row
from outbox.core.plan import Seen


def seen(position: int, number: int, count: int = 3, *, batch: str | None = "b") -> Seen:
    name = f"{position}-{number}"
    return Seen(outbox_id="me", message_id=name, position=position, number=number, count=count, batch_id=batch)


def row(position: int, first: int = 0, *, count: int = 3, dead: bool = False) -> Row:
    ids = [f"{position}-{number}" for number in range(1, count + 1)]
    stream = "S" if first else None
    return Row(position=position, message_ids=ids, stream=stream, first=first, last=first + count - 1, dead=dead)


PENDING, SENT = {1: row(1)}, {1: row(1, first=1)}
WHOLE = {1: seen(1, 1), 2: seen(1, 2), 3: seen(1, 3)}


def found(messages: dict[int, Seen], *, then: dict[int, Row], receipts: list[Row], last: int) -> list[str]:
    """Messages whose transactions were not marked when they were looked up; `then` is what the second look says."""
    comparison = Comparison(outbox_id="me", stream="S")
    comparison.take(messages, PENDING)
    comparison.recheck(then, 0, last)
    comparison.confirm(receipts, first=1, last=last, end=last)
    assert comparison.removed == 0
    return [anomaly.kind for anomaly in comparison.anomalies]


@pytest.mark.parametrize("then", [PENDING, SENT], ids=["pending", "marked"])
@pytest.mark.parametrize("receipts", [[], [row(1, first=1)]], ids=["no receipt", "receipt"])
def test_marks_may_come_at_any_moment(then: dict[int, Row], receipts: list[Row]) -> None:
    assert found(WHOLE, then=then, receipts=receipts, last=3) == []


def test_transaction_at_the_end_may_still_be_growing() -> None:
    part = {1: seen(1, 1), 2: seen(1, 2)}
    assert found(part, then=PENDING, receipts=[], last=2) == []
    assert found(part, then=PENDING, receipts=[], last=9) == ["split"]


def test_anomalies_of_what_is_pending() -> None:
    assert found({**WHOLE, 4: seen(1, 1)}, then=PENDING, receipts=[], last=9) == ["duplicated"]
    assert found(WHOLE, then={1: row(1, dead=True)}, receipts=[], last=9) == ["phantom"]
    assert found(WHOLE, then={1: row(1, first=5)}, receipts=[], last=9) == ["duplicated"]


def test_only_whole_pending_transactions_are_adopted() -> None:
    comparison = Comparison(outbox_id="new", stream="S", adopting=True, shared=True)
    rows = {1: row(1), 2: row(2), 3: row(3, dead=True)}
    comparison.take({**WHOLE, 4: seen(2, 1), 5: seen(2, 2), 6: seen(3, 1), 7: seen(3, 2), 8: seen(3, 3)}, rows)
    assert comparison.adoptable(rows) == [(1, 0, 1)]


def copy(position: int, number: int) -> Seen:
    return seen(position, number, batch=None)


def anomalies(comparison: Comparison) -> list[tuple[str, int | None, int | None, int | None, int | None]]:
    return [
        (each.kind, each.position, each.last_position, each.sequence, each.last_sequence)
        for each in comparison.anomalies
    ]


def test_copies_of_what_is_sent_are_foreign_and_a_second_attempt_is_not() -> None:
    comparison = Comparison(outbox_id="me", stream="S", shared=True)
    comparison.take({**WHOLE, 4: copy(1, 1), 5: copy(1, 3), 6: seen(1, 2), 7: copy(1, 2)}, SENT)
    comparison.recheck({}, 0, 7)
    comparison.confirm([row(1, first=1)], first=1, last=7, end=7)
    assert (comparison.foreign, anomalies(comparison)) == (3, [("duplicated", 1, 1, 6, 6)])


@pytest.mark.parametrize(("follows", "kinds"), [(3, ["duplicated"]), (2, [])])
def test_lone_event_is_known_by_the_sequence_that_it_expected(follows: int, kinds: list[str]) -> None:
    """It has no batch; what it expected of the stream fits at one place only."""
    comparison = Comparison(outbox_id="me", stream="S", shared=True)
    again = Seen(outbox_id="me", message_id="1-1", position=1, number=1, count=1, follows=follows)
    comparison.take({4: again}, {1: row(1, first=1, count=1)})
    assert [each.kind for each in comparison.anomalies] == kinds


@pytest.mark.parametrize("copies", [{4: copy(1, 1)}, {4: copy(1, 1), 5: copy(1, 2), 6: copy(1, 3)}])
def test_copies_of_what_is_not_marked_yet_hide_nothing(copies: dict[int, Seen]) -> None:
    comparison = Comparison(outbox_id="me", stream="S", shared=True)
    comparison.take({**WHOLE, **copies}, PENDING)
    assert comparison.adoptable(PENDING) == [(1, 0, 1)]
    comparison.recheck(PENDING, 0, 9)
    assert (comparison.anomalies, comparison.foreign) == ([], len(copies))


def test_what_a_mirror_has_is_adopted_though_nobody_fenced_it() -> None:
    comparison = Comparison(outbox_id="me", stream="S", shared=True, adopting=True)
    comparison.take({1: seen(1, 1), 2: copy(1, 2), 3: copy(1, 3)}, PENDING)
    assert comparison.adoptable(PENDING) == [(1, 0, 1)]


def test_message_at_the_place_of_the_receipt_that_is_not_it_is_no_copy() -> None:
    comparison = Comparison(outbox_id="me", stream="S", shared=True)
    comparison.take({1: copy(1, 1), 2: copy(1, 3), 3: copy(1, 3)}, SENT)
    comparison.recheck({}, 0, 3)
    comparison.confirm([row(1, first=1)], first=1, last=3, end=3)
    assert [each.kind for each in comparison.anomalies] == ["duplicated", "split"]


def test_payload_tells_and_the_subject_does_not() -> None:
    comparison = Comparison(outbox_id="me", stream="S", shared=True)
    sent = SENT[1]._replace(digests=[sha256(each).digest() for each in (b"a", b"b", b"c")])
    comparison.take(WHOLE, {1: sent}, {1: b"a", 2: b"x", 3: b"c"})
    assert anomalies(comparison) == [("phantom", 1, 1, 2, 2)]


def test_servers_markers_are_foreign_and_no_anomaly() -> None:
    comparison = Comparison(outbox_id="me", stream="S")
    marker = Seen(outbox_id=None, message_id=None, position=None, number=None, marker=True)
    comparison.take({1: marker}, {})
    assert (comparison.foreign, comparison.anomalies) == (1, [])


def test_ranges_end_where_something_else_is() -> None:
    comparison = Comparison(outbox_id="me", stream="S")
    foreign = Seen(outbox_id=None, message_id=None, position=None, number=None)
    strange = {place: seen(place + 10, 1) for place in (4, 5, 6, 8)}
    comparison.take({1: foreign, 2: foreign, **strange, 9: foreign}, {})
    assert comparison.phantoms == 4
    comparison.recheck({}, 14, 9)
    assert (comparison.unknown, comparison.phantoms) == (1, 3)
    assert anomalies(comparison) == [
        ("foreign", None, None, 1, 2),
        ("foreign", None, None, 9, 9),
        ("phantom", 15, 16, 5, 6),
        ("phantom", 18, 18, 8, 8),
    ]


def test_missing_transactions_are_one_range_of_positions_and_places() -> None:
    comparison = Comparison(outbox_id="me", stream="S")
    receipts = [row(position, first=3 * position) for position in (1, 2, 4, 5)]
    comparison.confirm(receipts, first=1, last=0, end=0)
    comparison.unreconciled([], [1, 2, 3, 7])
    assert anomalies(comparison) == [
        ("missing", 1, 2, 3, 8),
        ("missing", 4, 5, 12, 17),
        ("stranded", 1, 3, None, None),
        ("stranded", 7, 7, None, None),
    ]
    assert comparison.anomalies[0].what == "their receipts say so, and none of their messages are there"
