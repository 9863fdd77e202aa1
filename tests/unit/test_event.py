"""Which filter takes which subject."""

from __future__ import annotations

import pytest

from outbox.event import matches


@pytest.mark.parametrize(
    ("subject", "pattern", "fits"),
    [
        ("a", "a", True),
        ("a.b", "a", False),
        ("a", "a.b", False),
        ("a.b", "a.*", True),
        ("a.b.c", "a.*", False),
        ("a.b.c", "a.*.c", True),
        ("a.b.c", "a.>", True),
        ("a", "a.>", False),
        ("a", ">", True),
        ("ab", "a>", False),
    ],
)
def test_matches(subject: str, pattern: str, fits: bool) -> None:
    assert matches(subject, pattern) is fits
