"""The comparison of a stream with the outbox while both move: what is at work is no anomaly."""

from __future__ import annotations

import pytest

from outbox.core.comparison import Comparison, Row
from outbox.core.plan import Seen


def seen(position: int, number: int, count: int = 3) -> Seen:
    return Seen(outbox_id="me", message_id=f"{position}-{number}", position=position, number=number, count=count)


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
