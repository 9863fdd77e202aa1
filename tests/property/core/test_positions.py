"""Promise: no position is skipped, whatever commits when. A model of Postgres against the cursor and its gaps."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from outbox.core.positions import Holder, Positions, merged, outside, without

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["begin", "commit", "abort", "prepare", "read", "observe", "restart"]),
        st.integers(0, 9),
        st.integers(1, 4),
    ),
    max_size=80,
)


@settings(max_examples=500, deadline=None)
@given(STEPS)
def test_every_committed_position_is_read_once_and_no_gap_is_forgotten_early(
    steps: list[tuple[str, int, int]],
) -> None:
    """Transactions draw positions, hold their lock, and end in any order; the reader looks whenever it likes."""
    drawn = 0
    running: dict[int, str] = {}  # position -> virtual transaction id
    visible: set[int] = set()
    read: list[int] = []
    positions = Positions()
    for what, pick, limit in steps:
        mine = sorted(running)[pick % len(running)] if running else None
        match what:
            case "begin":
                drawn += 1
                running[drawn] = f"3/{drawn}"
            case "commit" if mine is not None:
                del running[mine]
                visible.add(mine)
            case "abort" if mine is not None:
                del running[mine]
            case "prepare" if mine is not None:
                running[mine] = f"-1/{mine}"
            case "observe":
                positions.observe(Holder(id=each) for each in running.values())
            case "read":
                gaps = [p for low, high in positions.open for p in range(low, high + 1)]
                page = sorted(p for p in visible - set(read) if p > positions.cursor or p in gaps)[:limit]
                positions.read(page, page[-1] if page else None)
                read += page
            case "restart":
                positions = Positions.restored(positions.cursor, positions.open)
    for position in running:
        visible.add(position)
    running.clear()
    while True:  # everything has committed: whatever was not read must still be within reach
        gaps = [p for low, high in positions.open for p in range(low, high + 1)]
        page = sorted(p for p in visible - set(read) if p > positions.cursor or p in gaps)
        if not page:
            break
        positions.read(page, page[-1])
        read += page
    assert sorted(read) == sorted(visible)
    assert len(read) == len(set(read))


def test_gap_is_forgotten_when_its_owner_has_ended() -> None:
    positions = Positions()
    positions.read([1, 3], 3)
    assert positions.open == [(2, 2)]
    positions.observe([Holder(id="3/1")])
    positions.read([], None)
    assert positions.open == [(2, 2)]
    positions.observe([Holder(id="3/2")])
    positions.read([], None)
    assert positions.open == []


def test_gap_outlives_an_owner_that_prepares() -> None:
    positions = Positions()
    positions.read([2], 2)
    positions.observe([Holder(id="3/1")])
    positions.observe([Holder(id="-1/700")])
    positions.read([], None)
    assert positions.open == [(1, 1)]
    positions.observe([])
    positions.read([1], 1)
    assert positions.open == []


def test_proven_gap_is_kept_while_a_cut_page_does_not_cover_it() -> None:
    positions = Positions()
    positions.read([1, 5], 5)
    positions.observe([])
    positions.read([2], 2)  # cut: 3 may be visible all the same
    assert positions.open == [(3, 4)]
    positions.read([], None)
    assert positions.open == []


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 5)), max_size=10), st.sets(st.integers(1, 60)))
def test_ranges_are_sets(pieces: list[tuple[int, int]], positions: set[int]) -> None:
    ranges = [(low, low + more) for low, more in pieces]
    wanted = {p for low, high in ranges for p in range(low, high + 1)}
    assert {p for low, high in merged(ranges) for p in range(low, high + 1)} == wanted
    left = {p for low, high in without(merged(ranges), sorted(positions)) for p in range(low, high + 1)}
    assert left == wanted - positions


RANGES = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 6)), max_size=8).map(
    lambda drawn: merged((low, low + length) for low, length in drawn)
)


@given(RANGES, RANGES)
def test_outside_is_the_difference(ranges: list[tuple[int, int]], others: list[tuple[int, int]]) -> None:
    def places(of: list[tuple[int, int]]) -> set[int]:
        return {place for low, high in of for place in range(low, high + 1)}

    found = outside(ranges, others)
    assert places(found) == places(ranges) - places(others)
    assert found == sorted(found)
