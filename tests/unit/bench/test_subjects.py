"""The subjects of a benchmark: patterns with ranges, and whose turn it is."""

from __future__ import annotations

import pytest

from outbox.bench.subjects import expanded, turns


@pytest.mark.parametrize(
    ("pattern", "subjects"),
    [
        ("hot", ["hot"]),
        ("a.{8..10}", ["a.8", "a.9", "a.10"]),
        ("{0..1}.b.{2..3}", ["0.b.2", "0.b.3", "1.b.2", "1.b.3"]),
    ],
)
def test_range_stands_for_its_numbers(pattern: str, subjects: list[str]) -> None:
    assert expanded(pattern) == subjects


def test_last_pattern_is_for_the_rest_and_all_have_as_many_turns() -> None:
    assert turns([], 2, "p") == [["p.1"], ["p.2"]]
    assert turns(["hot", "q.{1..2}"], 3, "p") == [["p.hot", "p.hot"], ["p.q.1", "p.q.2"], ["p.q.1", "p.q.2"]]
    assert [len(each) for each in turns(["a.{1..2}", "b.{1..3}"], 2, "p")] == [6, 6]
