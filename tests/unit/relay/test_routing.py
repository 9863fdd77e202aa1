"""What is remembered of subjects is bounded, without forgetting what is needed."""

from __future__ import annotations

from uuid import uuid4

import pytest

from outbox.core.transaction import Transaction
from outbox.event import Event
from outbox.jetstream.stream import StreamInfo
from outbox.relay.routing import Routes


def test_more_subjects_than_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outbox.relay.routing.REMEMBERED_SUBJECTS", 3)
    routes = Routes()
    info = StreamInfo(
        name="S",
        created="x",
        first_sequence=1,
        last_sequence=0,
        subjects=("a.>",),
        problem=None,
        max_message_bytes=None,
    )
    routes._infos["S"] = info
    subjects = [f"a.{number}" for number in range(10)]
    events = tuple(Event(message_id=str(uuid4()), subject=s, payload=b"", headers={}) for s in subjects)
    transaction = Transaction.of(1, events)
    assert routes.streams(transaction) == dict.fromkeys(subjects, "S")
    assert len(routes._streams) <= 3
