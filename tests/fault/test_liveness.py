"""Obstacles of strangers, one after the other, under load: publishing goes on after each, and nothing is amiss."""

from __future__ import annotations

import pytest

from tests import liveness


@pytest.mark.long
def test_publishing_goes_on_after_whatever_strangers_do() -> None:
    """Promise 7, as long as a test may take; `python -m tests.liveness` for ten minutes, and how long each wait was."""
    alive, report = liveness.run(60, seed=20)
    assert report.anomalies == {}
    assert len(alive.waits) >= 4
