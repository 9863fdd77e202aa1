"""A minute of the soak of shared streams: two outboxes, a foreign writer, faults of everything. Promises 1 to 3, 5."""

from __future__ import annotations

import pytest

from tests import soak


@pytest.mark.long
def test_two_outboxes_and_a_foreign_writer_under_random_faults() -> None:
    """Fault: whatever comes. Promise: of each outbox nothing missing, doubled, split or disordered; nobody halts."""
    soak.main(minutes=1, seed=1, shared=True, copies=True)
