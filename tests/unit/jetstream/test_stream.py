"""What a stored message tells of itself: whose it is, and whether the attempt that stored it was a relay's."""

from __future__ import annotations

import pytest

from outbox.core.plan import Seen
from outbox.jetstream.stream import Message, seen

OURS = {
    "Nats-Msg-Id": "m",
    "Outbox-Id": "me",
    "Outbox-Transaction": "5",
    "Outbox-Transaction-Count": "3",
    "Outbox-Transaction-Sequence": "1",
}


def told(headers: dict[str, str]) -> Seen:
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return seen(Message(9, b"a", f"NATS/1.0\r\n{lines}\r\n".encode(), b"", b"1"))


@pytest.mark.parametrize(
    ("more", "batch_id", "fence", "follows"),
    [
        ({}, None, None, None),
        ({"Nats-Expected-Stream": "S", "Nats-Expected-Last-Sequence": "8"}, None, None, 8),
        ({"Nats-Batch-Id": "t-3", "Nats-Batch-Sequence": "2"}, "t-3", None, None),
        ({"Nats-Expected-Last-Subject-Sequence": "7"}, None, 7, None),
        (
            {"Nats-Expected-Last-Subject-Sequence": "7", "Nats-Expected-Last-Subject-Sequence-Subject": "b"},
            None,
            None,
            None,
        ),
    ],
)
@pytest.mark.parametrize("order", [1, -1])
def test_attempt(
    order: int, more: dict[str, str], batch_id: str | None, fence: int | None, follows: int | None
) -> None:
    message = told(dict([*more.items(), *OURS.items()][::order]))
    assert (message.batch_id, message.fence, message.follows) == (batch_id, fence, follows)
    assert (message.outbox_id, message.message_id, message.position, message.number) == ("me", "m", 5, 1)
    assert (message.count, message.replayed, message.marker) == (3, False, False)


def test_what_a_stream_has_from_another_one_was_not_fenced_there() -> None:
    message = told({"Nats-Expected-Last-Sequence": "8", **OURS, "Nats-Batch-Id": "b", "Nats-Stream-Source": "S 9"})
    assert (message.batch_id, message.fence, message.follows) == (None, None, None)


def test_replay_and_marker() -> None:
    replay = {"Outbox-Replay": "5", "Outbox-Replay-Position": "9"}
    message = told({name: text for name, text in OURS.items() if name != "Outbox-Transaction"} | replay)
    assert (message.position, message.replayed) == (9, True)
    assert told({"Nats-Marker-Reason": "MaxAge"}).marker


def test_times_are_read_as_either_way_of_reading_tells_them() -> None:
    stamps = (b"1796059207234201412", b"2026-11-30T17:20:07.234201412Z")
    assert len({Message(1, b"a", b"", b"", stamp).stored_at for stamp in stamps}) == 1
