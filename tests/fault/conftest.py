"""Which fault tests the quick run leaves out, besides those that are long: their siblings show the same.

Relays that are killed in a thread close nothing, as a killed process would not; their sockets are no finding.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.bed import rows
from tests.support.foreign import Company

SIBLINGS = (
    "test_killed_at[after-",
    "test_killed_at[in-recovery",
    "test_killed_at[at-takeover",
    "test_terminated_at[after-",
    "test_terminated_at[at-takeover",
    "test_terminated_at[before-first-message",
    "test_terminated_at[in-",
    "test_frozen_at[before-first",
    "test_frozen_at[in-",
    "test_frozen_leader_is_replaced_and_thawed_does_no_harm",
    "test_sigkill_twenty_times_under_load_with_a_standby",
    "test_acks_that_come_after_the_stream_was_read_back",
    "test_stalled_connection",
    "test_quorum_is_lost_by_freezing[20",
    "test_stream_removes_a_batch_before_it_is_known_as_stored[ttl",
    "test_stream_removes_a_batch_before_it_is_known_as_stored[age",
    "test_stream_restored_from_an_older_snapshot[under",
    "test_storage_ends_inside_a_commit[server",
    "test_storage_ends_inside_a_commit[account-alone",
    "test_dead_letter_at_the_head_of_a_backlog[_refused_by_the_stream]",
    "test_stalled_leader_is_replaced_and_does_no_harm_when_it_heals",
    "test_statement_time_outs_in_a_wait_for_a_lock[events]",
    "test_statement_time_outs_in_a_wait_for_a_lock[streams]",
    "test_statement_time_outs_in_a_wait_for_a_lock[transactions]",
    "test_killed_while_its_acks_are_held_back",
    "test_relay_follows_to_the_promoted_standby",
    "test_failover_that_loses_transactions_loses_none_that_is_published[synchronous]",
    "test_failover_that_lost_commits_halts[messages there]",
    "test_kills_that_are_nobodys_fault_convict_nobody[stream full]",
    "test_postgres_is_restarted_five_times_under_load[restart]",
    "test_constant_foreign_traffic_does_not_starve_or_split",
    "test_nothing_is_published_that_a_standby_does_not_have",
)
# Beside a foreign writer the quick run shows only these: the others are the same faults once more.
SHARED = (
    "test_killed_at[shared-before-ack-1]",
    "test_killed_around_a_batch[shared-mid-batch]",
    "test_lost_acks[shared]",
)


# What of them is beside a foreign writer in the long run; the rest is run by hand, as it takes half an hour.
SHARED_LONG = (
    "test_killed_at[shared-after-ack-1]",
    "test_killed_at[shared-in-the-mark-1]",
    "test_frozen_at[shared-mid-batch]",
    "test_batch_of_a_former_leader_arrives_late[shared-after]",
    "test_nats_server_is_killed_five_times_under_load[shared]",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.filterwarnings("ignore::ResourceWarning"))
        if "[shared" in item.nodeid and not item.nodeid.endswith(SHARED):
            item.add_marker(pytest.mark.long if item.nodeid.endswith(SHARED_LONG) else pytest.mark.by_hand)
        core = item.get_closest_marker("core") is not None
        if not core and item.nodeid.endswith("-3]"):  # of test_killed_at: the third time at each stop point
            item.add_marker(pytest.mark.by_hand)
        if not core and any(sibling in item.nodeid for sibling in SIBLINGS):
            item.add_marker(pytest.mark.long)


@pytest.fixture(params=[pytest.param(False, id=pytest.HIDDEN_PARAM), pytest.param(True, id="shared")])
def company(request: pytest.FixtureRequest, database: str, workplace: Path) -> Iterator[Company]:
    """Nobody else writes to the stream; and once more, beside a foreign writer, in mode `shared`."""
    made = Company(workplace, shared=request.param)
    try:
        yield made
        modes = dict(rows(database, "SELECT name, mode FROM outbox.streams"))
        assert {modes.get(name, "shared") for name in made.streams} <= {"shared"}
    finally:
        made.leaves()
