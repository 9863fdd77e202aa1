"""Which fault tests the quick run leaves out, besides those that are long: their siblings show the same."""

from __future__ import annotations

import pytest

SIBLINGS = (
    "-3]",  # of test_killed_at: the third time at each stop point
    "test_frozen_at[before-first-message]",
    "test_frozen_at[in-the-mark]",
    "test_frozen_leader_is_replaced_and_thawed_does_no_harm",
    "test_stream_removes_a_batch_before_it_is_known_as_stored[ttl-same relay]",
    "test_stream_removes_a_batch_before_it_is_known_as_stored[age",
    "test_duplicate_window_ends_before_the_outage",
    "test_stream_restored_from_an_older_snapshot[under the relay]",
    "test_storage_ends_inside_a_commit[server",
    "test_stalled_connection[up]",
    "test_dead_letter_at_the_head_of_a_backlog[_refused_by_the_stream]",
    "test_stalled_leader_is_replaced_and_does_no_harm_when_it_heals[up",
    "test_statement_time_outs_in_a_wait_for_a_lock[events]",
    "test_statement_time_outs_in_a_wait_for_a_lock[streams]",
    "test_killed_while_its_acks_are_held_back",
    "test_relay_follows_to_the_promoted_standby[hosts]",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        core = item.get_closest_marker("core") is not None
        if not core and any(sibling in item.nodeid for sibling in SIBLINGS):
            item.add_marker(pytest.mark.long)
