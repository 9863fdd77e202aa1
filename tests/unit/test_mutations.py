"""The mutation run breaks lines that are there: a line that was rewritten takes its guard's proof along."""

from __future__ import annotations

import pytest

from tests.mutations import MUTATIONS, ROOT, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda each: each.test)
def test_line_is_there_once(mutation: Mutation) -> None:
    assert (ROOT / "outbox" / mutation.file).read_text().count(mutation.line) == 1
