"""What a reply says, and that a refusal convicts nobody who may be in the stream."""

from __future__ import annotations

from collections import deque
from uuid import UUID

import pytest

from outbox.core.batch import Packing
from outbox.core.chain import Chain
from outbox.core.outcome import (
    DUPLICATE_ID,
    MEANINGS,
    REASONS,
    Duplicate,
    Meaning,
    Outcome,
    Rejected,
    Stored,
    Unknown,
    code_of,
    meaning,
    read_reply,
)
from outbox.core.transaction import DeadReason, Transaction, Verdict, reason_of
from outbox.errors import OutboxError, told
from outbox.event import Event


@pytest.mark.parametrize(
    ("data", "status", "outcome"),
    [
        (b'{"stream":"S","seq":3,"batch":"B","count":3}', None, Stored(stream="S", sequence=3, batch="B", count=3)),
        (b'{"stream":"S","seq":2,"duplicate":true}', None, Duplicate(sequence=2)),
        (
            b'{"error":{"code":400,"err_code":10071,"description":"wrong last sequence: 5"},"stream":"S","seq":0}',
            None,
            Rejected(code=10071, description="wrong last sequence: 5"),
        ),
        (b"", "429", Unknown(why="429")),
        (b"nonsense", None, Unknown(why="unreadable reply b'nonsense'")),
        (b"[]", None, Unknown(why="unreadable reply b'[]'")),
        (b'{"stream":"S"}', None, Unknown(why='unreadable reply b\'{"stream":"S"}\'')),
    ],
)
def test_read_reply(data: bytes, status: str | None, outcome: Outcome) -> None:
    assert read_reply(data, status) == outcome


def test_every_offence_has_a_reason_and_an_unknown_code_convicts_nobody() -> None:
    offences = {code for code, said in MEANINGS.items() if said is Meaning.OFFENCE}
    assert offences == REASONS.keys()
    assert meaning(Rejected(code=99999, description="new")) is Meaning.OPERATOR


def one(position: int) -> Transaction:
    event = Event(message_id=str(UUID(int=position)), subject="a", payload=b"", headers={})
    return Transaction.of(position, (event,))


def test_conviction_waits_for_the_look() -> None:
    chain = Chain(stream="S", created="x", packing=Packing(), base=0, in_doubt=None, planned=deque([one(1)]))
    ids = iter("abcdef")
    for _ in range(2):
        chain.launch(ids)
        chain.learn(Rejected(code=DUPLICATE_ID, description="duplicate"))
        assert chain.verdicts == []
        if chain._suspected is None:
            chain.settle(0, 0)
    assert [t.position for t in chain.plan] == [1]
    chain.settle(0, 0)
    assert [verdict.position for verdict in chain.verdicts] == [1]
    assert chain.plan == []


def test_what_an_unanswered_attempt_stored_is_not_convicted() -> None:
    chain = Chain(stream="S", created="x", packing=Packing(), base=0, in_doubt=None, planned=deque([one(1)]))
    ids = iter("abcdef")
    chain.launch(ids)
    chain.learn(Rejected(code=DUPLICATE_ID, description="duplicate"))
    chain.settle(0, 0)
    chain.launch(ids)
    chain.learn(Duplicate(sequence=1))
    chain.settle(1, 1)
    assert chain.verdicts == []
    assert [receipt.position for receipt in chain.receipts] == [1]


def test_what_is_written_down_is_read_back() -> None:
    assert code_of(str(Rejected(code=10077, description="maximum bytes exceeded"))) == 10077
    assert code_of("no answer within the time limit") is None
    for reason in DeadReason:
        assert reason_of(str(Verdict(position=1, reason=reason, detail="a: b"))) == reason
    error = OutboxError("what is wrong", remedy="what settles it")
    assert told(str(error)) == ("what is wrong", "what settles it")
    assert told(str(OutboxError("only words"))) == ("only words", "")
