"""Break each guard once, and see the test that is there for it fail.

`python -m tests.mutations` copies the project, changes one line, runs one test, and says whether it noticed. Exit code
1 if a test still passes with its guard broken, or if a line is not there any more.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
console = Console()


@dataclass(frozen=True)
class Mutation:
    """In `file` of the package, `line` becomes `broken`, and `test` must fail."""

    file: str
    line: str
    broken: str
    test: str

    @property
    def path(self) -> str:
        """Where the test is, from the project's root."""
        return f"tests/{self.test}" if "/" in self.test else f"tests/fault/{self.test}"


QUARRELS = "test_thousands_of_quarrels"
MUTATIONS = [
    # A batch of a former leader fits nowhere but where it was planned.
    Mutation(
        "core/batch.py",
        'return 1, f"Nats-Expected-Last-Sequence: {batch.base}\\r\\n"',
        'return 1, ""',
        "test_acks.py::test_batch_of_a_former_leader_arrives_late[after]",
    ),
    # What may be in flight is written down before it is sent.
    Mutation(
        "relay/lanes.py",
        "plan=list(map(POSITION, chain.plan)),",
        "plan=[],",
        "test_stop_points.py::test_killed_at[before-first-message-1]",
    ),
    # After a doubt the plan is settled as it is: what is stored is not sent again, what is not is not forgotten.
    Mutation(
        "core/chain.py",
        "self._stored([self.planned.popleft() for _ in range(stored)], self.base)",
        "pass",
        "test_acks.py::test_lost_acks",
    ),
    Mutation(
        "core/chain.py",
        "self.planned = deque(self.plan)",
        "pass",
        "test_nats_dies.py::test_killed_around_a_batch[before-ack]",
    ),
    # Messages that are gone count as ours only after an attempt without an answer, and then they do.
    Mutation(
        "core/chain.py",
        "self._unanswered_by(self.in_flight)",
        "pass",
        "test_streams_forget.py::test_stream_removes_a_batch_before_it_is_known_as_stored[ttl-same relay]",
    ),
    Mutation(
        "core/plan.py",
        "stored = confirmed + len(gone)",
        "stored = confirmed",
        "test_streams_forget.py::test_work_queue_is_worked_off_before_the_batch_is_known_as_stored[0-next relay]",
    ),
    # A stream that went back, was made again, or keeps a part of a batch is a halt.
    Mutation(
        "core/plan.py",
        "if last < base:",
        "if last < 0:",
        "test_streams_forget.py::test_stream_restored_from_an_older_snapshot[before the relay]",
    ),
    Mutation(
        "relay/recovery.py",
        "if info.created != known.created:",
        "if not info.created:",
        "test_streams_forget.py::test_recreated_under_load",
    ),
    Mutation(
        "relay/recovery.py",
        "    if finding.look in (Look.SETTLED, Look.FOREIGN):\n        foreign",
        "    if finding.look in (Look.SETTLED, Look.FOREIGN, Look.APPLYING):\n        foreign",
        "test_streams_refuse.py::test_storage_ends_inside_a_commit",
    ),
    # A lost connection sends nothing any more; a reply is taken for its own batch.
    Mutation(
        "jetstream/connect.py",
        "allow_reconnect=False,",
        "allow_reconnect=True,",
        "test_acks.py::test_connection_is_cut_around_a_batch[mid-batch]",
    ),
    Mutation(
        "jetstream/client.py",
        'token = message.subject.rpartition(".")[2]',
        'token = next(iter(self._awaited), "")',
        "test_acks.py::test_acks_in_the_opposite_order",
    ),
    # What the account takes is told late; a server that hangs up is met with a back-off; time begins with the arrival.
    Mutation(
        "jetstream/wire.py",
        'self._max_payload = info.get("max_payload", self._max_payload)',
        "pass",
        "test_way_to_nats.py::test_account_takes_less_than_its_server_says",
    ),
    Mutation(
        "relay/connection.py",
        "self._connecting.fail(now)",
        "pass",
        "test_way_to_nats.py::test_server_hangs_up_over_what_it_is_sent[short]",
    ),
    Mutation(
        "jetstream/client.py",
        "max(self.begun, self._nc.moved) if self._arrived is None else self._arrived",
        "self.begun",
        "test_way_to_nats.py::test_large_transaction_over_a_slow_link[small]",
    ),
    # A frozen leader loses its session; a silent server is given up; a read-only one is weather.
    Mutation(
        "postgres/session.py",
        '"idle_session_timeout": "5s",',
        '"idle_session_timeout": "0",',
        "test_stop_points.py::test_frozen_at[before-ack]",
    ),
    Mutation(
        "postgres/session.py",
        "same.shutdown(socket.SHUT_RDWR)",
        "pass",
        "test_postgres_silent.py::test_relay_gives_up_on_a_server_that_never_answers[down]",
    ),
    Mutation(
        "postgres/session.py",
        "left = ANSWER_SECONDS - _silent_for(connection)",
        "left = 0.0",
        "test_postgres_silent.py::test_page_takes_longer_than_any_time_out[12]",
    ),
    Mutation(
        "postgres/store.py",
        "if unhurried is not self._unhurried:",
        "if unhurried is None:",
        "test_postgres_silent.py::test_page_takes_longer_than_any_time_out[12]",
    ),
    Mutation(
        "postgres/denials.py",
        '"25006": (Weather,',
        '"25006": (Halt,',
        "test_postgres_fails.py::test_read_only_for_a_while",
    ),
    # No phantom: a plan is sent only when its commit has reached the standbys, in this term or in the next.
    Mutation(
        "core/chain.py",
        "if fences is None or each.position in fences.heads}\n        self._replan()",
        "if fences is None or each.position in fences.heads}",
        "test_failover.py::test_failover_that_loses_transactions_loses_none_that_is_published[asynchronous]",
    ),
    Mutation(
        "postgres/store.py",
        "if self._warnings:",
        "if not self._warnings and False:",
        "test_failover.py::test_failover_that_loses_transactions_loses_none_that_is_published[synchronous]",
    ),
    # A database with another past halts the relay, and a rebase sends nothing twice.
    Mutation(
        "relay/recovery.py",
        "if known.moved and finding.look in (Look.SETTLED, Look.FOREIGN, Look.AHEAD):",
        "if False:",
        "test_restores.py::test_failover_that_lost_commits_halts[messages removed]",
    ),
    Mutation(
        "core/plan.py",
        "unknown = Look.AHEAD if fresh and not shared",
        "unknown = Look.AHEAD if False",
        "test_restores.py::test_older_physical_copy_halts_where_a_work_queue_was_worked_off[all consumed]",
    ),
    # Counters that were put back halt the relay, and a rebase sends what is behind the cursor.
    Mutation(
        "core/requirements.py",
        "if found.drawn < found.reached:",
        "if False:",
        "test_counters.py::test_counters_that_contradict_the_rows_are_loud_and_a_rebase_settles_it[restart]",
    ),
    Mutation(
        "operate/queries.py",
        "open_positions = open_positions + %(behind)s::int8multirange",
        "open_positions = open_positions",
        "test_counters.py::test_counter_that_has_caught_up_hides_nothing",
    ),
    # Restored transaction ids are nobody else's.
    Mutation(
        "operate/queries.py",
        "(13835058055282163712 + position)::text::xid8 AS moved",
        "(9223372036854775808 + txid::text::numeric)::text::xid8 AS moved",
        "test_counters.py::test_second_rebase_gives_no_transaction_the_id_of_another",
    ),
    Mutation(
        "postgres/queries.py",
        " AND coalesce(database_oid, %(database)s) = %(database)s",
        "",
        "test_restores.py::test_copy_within_the_cluster_halts",
    ),
    Mutation(
        "relay/routing.py",
        "if tail is not None and unsourced and tail.outbox_id",
        "if tail is None and unsourced",
        "test_restores.py::test_stream_that_the_database_does_not_know_yet_holds_its_messages",
    ),
    Mutation(
        "operate/rebase.py",
        "connection.execute(compose(queries.ADOPT, name), places)",
        "places.clear()",
        "test_restores.py::test_older_physical_copy_halts_and_rebase_sends_nothing_twice",
    ),
    # Rows are hostile until they are checked.
    Mutation(
        "relay/routing.py",
        "if (offence := self._spoiled.get(head.position) or invalid(head)) is None:",
        "if (offence := None) is None:",
        "test_data.py::test_rows_written_around_the_triggers_are_set_aside",
    ),
    Mutation(
        "event.py",
        'and "\\n" not in value and "\\r" not in value',
        'and "\\n" not in value',
        "test_data.py::test_rows_written_around_the_triggers_are_set_aside",
    ),
    # A transaction that kills relays is found, and nobody is blamed for an outage; a retry is taken up.
    Mutation(
        "relay/caution.py",
        "if attempts < ATTEMPTS:",
        "if attempts >= 0:",
        "test_dead_letters.py::test_transaction_that_kills_the_relay_is_set_aside[poisoned-send]",
    ),
    Mutation(
        "relay/caution.py",
        "            await self._note(None)",
        "            pass",
        "test_dead_letters.py::test_kills_that_are_nobodys_fault_convict_nobody",
    ),
    Mutation(
        "relay/reader.py",
        "self._positions.reopen(ranges)",
        "pass",
        "test_dead_letters.py::test_retry_without_a_relay_is_taken_up_by_the_next_one",
    ),
    # What is not whole is set aside, locks of strangers are waited for, housekeeping passes by what is locked.
    Mutation(
        "postgres/rows.py",
        "if found != count:",
        "if found < 0:",
        "test_data.py::test_transaction_with_a_wrong_count_is_set_aside[an event is gone]",
    ),
    Mutation(
        "relay/leader.py",
        "except Locked as error:\n            await self._locked_out(error)",
        "except ZeroDivisionError as error:\n            await self._locked_out(Locked(str(error)))",
        "test_told.py::test_the_reason_is_named_within_seconds[somebody locks what is to be marked]",
    ),
    Mutation(
        "relay/housekeeping.py",
        "if len(positions) > 1:\n                return None",
        "if True:\n                return None",
        "test_housekeeping.py::test_what_strangers_lock_stops_nothing_but_its_own_purge[an event]",
    ),
    Mutation(
        "postgres/queries.py",
        "(SELECT count(*) FROM events) <= (SELECT coalesce(sum(event_count), 0) FROM going)\n            AND EXISTS",
        "EXISTS",
        "test_housekeeping.py::test_a_purge_never_takes_events_of_another_transaction",
    ),
    # What ends connections is found and set aside.
    Mutation(
        "core/chain.py",
        "self._hang_ups += 1",
        "pass",
        "test_way_to_nats.py::test_offender_over_which_connections_end_is_found_among_many[without a word]",
    ),
    # The split is decided once; a part may be planned here while another one is open there; one a stream, at most; a
    # verdict is on its part alone; and a transaction is settled when nothing of it is open.
    Mutation(
        "relay/leader.py",
        "transactions += self._parts.take(each, parts[each.position])",
        "transactions.append(each)",
        "test_parts.py::test_the_split_is_decided_once",
    ),
    Mutation(
        "core/parts.py",
        "if row.open and row.part not in self._held.get(row.position, {})",
        "if row.open",
        "test_parts.py::test_a_planned_and_open_position_is_sent_once_in_each",
    ),
    Mutation(
        "core/parts.py",
        "if stream not in part.row.others | moved:",
        "if stream:",
        "test_parts.py::test_a_stream_holds_one_part_at_most",
    ),
    Mutation(
        "core/parts.py",
        "condemned.append(on_part(verdict, row))",
        "verdicts.append(verdict)",
        "test_parts.py::test_verdict_on_one_part_while_the_other_is_in_flight[True]",
    ),
    Mutation(
        "postgres/queries.py",
        "AND s.open = 0",
        "",
        "test_parts.py::test_verdict_on_one_part_while_the_other_is_in_flight[True]",
    ),
    Mutation(
        "relay/leader.py",
        "for each in had if each.position not in self._parts)",
        "for each in had)",
        "test_parts.py::test_verdict_on_one_part_while_the_other_is_in_flight[True]",
    ),
    # A new leader learns of parts when the commit of the one before is over.
    Mutation(
        "postgres/store.py",
        "self._parted = (await self._all(queries.PARTED))[0][0]",
        "self._parted = 0",
        "test_parts.py::test_a_planned_and_open_position_is_sent_once_in_each",
    ),
    # Only who could take over is a standby.
    Mutation(
        "postgres/queries.py",
        "AND r.replay_lsn IS NOT NULL",
        "",
        "test_standby.py::test_who_only_receives_is_no_standby",
    ),
    # Where others write too: each rule of a fence by subject.
    *(
        Mutation(file, line, broken, f"property/core/test_fences.py::{test}")
        for file, line, broken, test in (
            # While an attempt is open, a refusal says nothing.
            (
                "core/chain.py",
                "if fences is None or head.position in self.unanswered or batch.fence is None:",
                "if fences is None or batch.fence is None:",
                QUARRELS,
            ),
            # A former leader may have tried the heads of its plan, and may know as much as this look has found.
            ("core/chain.py", "if fences is None or each.position in fences.heads}", "if fences is None}", QUARRELS),
            ("core/chain.py", "if others and head not in self.fences.former:", "if others:", QUARRELS),
            # Others behind the fence void the attempts that knew of nothing there.
            ("core/chain.py", "self.unanswered.discard(head)", "pass", QUARRELS),
            # What is gone may have been ours.
            (
                "core/fence.py",
                "return first > since + 1 or any(place > since for place in deleted)",
                "return False",
                QUARRELS,
            ),
            # The kind of fence changes only when no attempt with the other one can fit.
            (
                "core/chain.py",
                "if self.shared and self.fencible and last > reach:",
                "if self.shared and self.fencible:",
                QUARRELS,
            ),
            (
                "core/chain.py",
                "if not (self.in_doubt or self.in_flight or self.unanswered):",
                "if not self.in_doubt:",
                QUARRELS,
            ),
            # A copy is nobody's attempt; what an attempt has stored is told by its batch.
            (
                "core/fence.py",
                "ours = message.is_of(outbox_id) and which",
                "ours = message.outbox_id == outbox_id and which",
                QUARRELS,
            ),
            (
                "core/fence.py",
                "return [end for end in ends if end <= attempt.last] if attempt.last in ends else None",
                "return ends[:1]",
                QUARRELS,
            ),
            # No verdict while an attempt may still be stored.
            (
                "core/chain.py",
                "if not self.open or suspected.reason in FOR_ALL:",
                "if True:",
                "test_verdict_waits_while_an_attempt_is_open",
            ),
            # What was found is used only by who leads still.
            ("core/fence.py", "self.unconfirmed = True", "self.unconfirmed = False", QUARRELS),
            # An ack is of this very batch.
            (
                "core/chain.py",
                "(stored.batch, stored.count) == of_batch and beyond",
                "beyond",
                "test_ack_is_of_this_very_batch",
            ),
        )
    ),
]


def tried(mutation: Mutation, copy: Path) -> str:
    """What came of it: noticed, or what is wrong."""
    file = copy / "outbox" / mutation.file
    sound = file.read_text()
    if sound.count(mutation.line) != 1:
        return f"the line is there {sound.count(mutation.line)} times"
    file.write_text(sound.replace(mutation.line, mutation.broken))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-m", "", mutation.path]
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    file.write_text(sound)
    return {0: "NOT NOTICED", 1: "noticed"}.get(done.returncode, f"pytest ended with {done.returncode}")


def main() -> int:
    copy = Path(tempfile.mkdtemp(prefix="outbox-mutations-")) / "project"
    left_out = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, copy, ignore=left_out)
    table = Table("file", "guard", "test", "")
    chosen = [each for each in MUTATIONS if all(word in f"{each.file} {each.test}" for word in sys.argv[1:])]
    results = []
    for mutation in chosen:
        results.append(tried(mutation, copy))
        console.print(f"{mutation.file}: {mutation.test}: {results[-1]}", markup=False)
        table.add_row(mutation.file, mutation.line.strip().splitlines()[0], mutation.test, results[-1])
    console.print(table)
    shutil.rmtree(copy.parent)
    return int(any(result != "noticed" for result in results))


if __name__ == "__main__":
    sys.exit(main())
