"""What both servers must be: each requirement by the fact that breaks it."""

from __future__ import annotations

from typing import Any

import pytest

from outbox.core import requirements

SOUND: dict[str, Any] = {"name": "S", "allow_atomic": True}


@pytest.mark.parametrize(
    ("change", "what", "remedy"),
    [
        ({"mirror": {"name": "T"}}, "mirror", "the stream that it mirrors"),
        ({"persist_mode": "async"}, "persist_mode", "re-create stream S"),
        ({"allow_atomic": False}, "allow_atomic", "nats stream edit S --allow-batch"),
        ({"no_ack": True}, "no_ack", "nats stream edit S --ack"),
    ],
)
def test_stream(change: dict[str, Any], what: str, remedy: str) -> None:
    (problem,) = requirements.of_stream({**SOUND, **change})
    assert what in problem.what
    assert remedy in problem.remedy


def test_each_problem_of_a_stream_is_named() -> None:
    assert list(requirements.of_stream(SOUND)) == []
    assert len(list(requirements.of_stream({"name": "S", "mirror": {"name": "T"}, "no_ack": True}))) == 3


@pytest.mark.parametrize(("number", "count"), [(140004, 1), (140005, 0), (180006, 0)])
def test_postgres(number: int, count: int) -> None:
    assert len(list(requirements.of_postgres(number))) == count


@pytest.mark.parametrize(("version", "count"), [((2, 11, 9), 1), ((2, 12, 0), 1), ((2, 12, 1), 0), ((3, 0, 0), 0)])
def test_nats(version: tuple[int, int, int], count: int) -> None:
    assert len(list(requirements.of_nats(version))) == count


@pytest.mark.parametrize(
    ("events", "cache", "words"),
    [(1000, 1, []), (None, 1, ["is empty"]), (1001, 1, ["may add 1001"]), (None, 2, ["is empty", "has a cache"])],
)
def test_outbox(events: int | None, cache: int, words: list[str]) -> None:
    found = requirements.of_outbox("o", max_transaction_events=events, identity_cache=cache, max_batch_messages=1000)
    assert [word in problem.what for word, problem in zip(words, found, strict=True)] == [True] * len(words)
