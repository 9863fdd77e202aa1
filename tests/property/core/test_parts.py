"""The parts of transactions in the pure heart: leaders, retries and late pages against a model of the table.

What may happen comes in any order: a stream stores or refuses a part, or the leader dies with some of the parts planned
and others waiting; operators retry; a position is read again, though it is planned. No part is ever stored twice.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

from hypothesis import example, given, settings
from hypothesis import strategies as st

from outbox.core.parts import Part, PartRow, Parts, Progress, Settled, split
from outbox.core.plan import Planned
from outbox.core.transaction import DeadReason, Receipt, Transaction, Verdict
from outbox.event import NO_HEADERS, Event

STREAMS = ("A", "B", "C")


def transaction(position: int, subjects: list[str]) -> Transaction:
    return Transaction.of(
        position, [Event(f"{position}-{n}", each, b"", NO_HEADERS) for n, each in enumerate(subjects)]
    )


subjects = st.lists(st.sampled_from(STREAMS), min_size=2, max_size=6).filter(lambda each: len(set(each)) > 1)


@given(subjects)
def test_parts_are_a_partition_in_order(given: list[str]) -> None:
    """Every event is in one part, in the order of the transaction; parts are numbered as their streams come first."""
    whole = transaction(7, given)
    parts = split(whole, {each: each for each in given})
    assert [part.row.stream for part in parts] == list(dict.fromkeys(given))
    assert [part.row.part for part in parts] == list(range(1, len(parts) + 1))
    assert sorted(number for part in parts for number in part.row.numbers) == list(range(1, len(given) + 1))
    for part in parts:
        assert list(part.row.numbers) == sorted(part.row.numbers)
        assert set(part.subjects) == {part.row.stream}
        assert list(part.message_ids) == [f"7-{number - 1}" for number in part.row.numbers]
        assert part.row.others == set(given) - {part.row.stream}
        assert part.count == len(part.row.numbers)
    assert sum(part.size for part in parts) == whole.size


@dataclass
class Table:
    """The rows, and the plan of each stream, as the commits have left them; and what the streams have stored."""

    whole: dict[int, Transaction]
    rows: dict[int, dict[int, PartRow]] = field(default_factory=dict)
    sent: set[tuple[int, int]] = field(default_factory=set)
    dead: set[tuple[int, int]] = field(default_factory=set)
    plans: dict[str, list[int]] = field(default_factory=lambda: {each: [] for each in STREAMS})
    stored: Counter[tuple[int, int]] = field(default_factory=Counter)
    opened: set[int] = field(default_factory=set)  # positions that are open
    moves: set[tuple[int, int]] = field(default_factory=set)  # retried when nothing of their transaction was open
    homes: dict[str, str] = field(default_factory=lambda: {each: each for each in STREAMS})  # of the subjects

    def now(self, position: int) -> list[PartRow]:
        """The rows of a transaction, as PARTS_OF reads them."""
        closed = self.sent | self.dead
        return [
            replace(
                row,
                open=(position, part) not in closed,
                moves=(position, part) in self.moves,
                others=frozenset(other.stream for other in self.rows[position].values()) - {row.stream},
            )
            for part, row in sorted(self.rows.get(position, {}).items())
        ]

    def retry(self, position: int) -> None:
        rows = self.now(position)
        again = {(position, row.part) for row in rows} & self.dead
        self.dead -= again
        self.moves = self.moves - again | (set() if any(row.open for row in rows) else again)

    def write(self, settled: Settled) -> None:
        for row in settled.rows:
            before = self.rows.get(row.position, {}).get(row.part)
            assert before is None or list(before.numbers) == list(row.numbers)  # decided once
            self.rows.setdefault(row.position, {})[row.part] = row
            streams = [each.stream for each in self.rows[row.position].values()]
            assert len(set(streams)) == len(streams)  # one a stream
        for part, receipt in settled.receipts:
            assert (receipt.position, part) not in self.sent | self.dead
            self.sent.add((receipt.position, part))
        for verdict in settled.verdicts:
            assert (verdict.position, verdict.part) not in self.sent | self.dead
            self.dead.add((verdict.position, verdict.part))


class Leader:
    """One term: its lanes are lists of parts that wait or are planned."""

    def __init__(self, table: Table) -> None:
        self.table, self.parts = table, Parts()
        self.waiting: dict[str, list[Part]] = {each: [] for each in STREAMS}
        self.planned: dict[str, list[tuple[int, int]]] = {each: [] for each in STREAMS}
        for stream, plan in table.plans.items():
            entries = [Planned(position=position, count=0, last_message_id="") for position in plan]
            rows = {position: table.now(position) for position in plan}
            restored = self.parts.restore(entries, stream, rows)
            self.planned[stream] = [(each.position, each.part) for each in restored]
            loaded = self.parts.loaded([table.whole[position] for position in plan], stream)
            assert [(each.position, each.row.part) for each in loaded if isinstance(each, Part)] == self.planned[stream]

    def read(self, position: int) -> None:
        """A page shows this position: what is to be sent of it goes to its lanes."""
        whole, table = self.table.whole[position], self.table
        rows = table.now(position)
        if not rows and position in self.parts:
            return  # split, and nothing planned: it is not read twice in one term
        parts = self.parts.take(whole, rows) if rows else split(whole, table.homes)
        if not rows:
            if len(parts) == 1:
                return
            self.parts.join(parts)
        for part in parts:
            home = {table.homes[each] for each in part.subjects}
            moves = bool(rows) and part.row.moves
            if moves and (len(home) > 1 or self.parts.misplaced(part, min(home)) is not None):
                verdict = Verdict(position=position, reason=DeadReason.SPANS_STREAMS, detail="", part=part.row.part)
                self.commit([Progress("", (), [verdict], ())])
                continue
            if moves:
                self.parts.move(part, min(home))
            self.waiting[part.row.stream].append(part)

    def commit(self, progress: list[Progress]) -> None:
        receipts, verdicts, settled = self.parts.settle(progress)
        assert (receipts, verdicts) == ([], [])
        self.table.write(settled)
        self.parts.written(settled)
        for stream, planned in self.planned.items():
            self.table.plans[stream] = [position for position, _ in planned]

    def plan(self, stream: str) -> None:
        joined, self.waiting[stream] = self.waiting[stream], []
        self.planned[stream] += [(part.position, part.row.part) for part in joined]
        self.commit([Progress(stream, (), (), [part.position for part in joined])])

    def end(self, stream: str, *, stored: bool) -> None:
        """The first planned part is stored, or refused."""
        if not self.planned[stream]:
            return
        position, part = self.planned[stream].pop(0)
        receipts, verdicts = [], []
        if stored:
            self.table.stored[position, part] += 1
            receipts = [Receipt(position, stream, 1, 1)]
        else:
            verdicts = [Verdict(position=position, reason=DeadReason.INVALID_TTL, detail="refused")]
        self.commit([Progress(stream, receipts, verdicts, ())])


STEPS = st.tuples(
    st.sampled_from(["read", "read", "plan", "plan", "store", "store", "refuse", "die", "retry", "move"]),
    st.integers(0, 2),
    st.sampled_from(STREAMS),
)


# Both parts are dead and retried, and the subjects of both have moved to one stream.
GATHERED = list(
    zip(
        ("read", "plan", "plan", "refuse", "refuse", "die", "move", "move", "retry", "read", "plan"),
        (0, 0, 0, 0, 0, 0, 2, 2, 0, 0, 0),
        "AABABAABAAC",
        strict=True,
    )
)


@settings(max_examples=1000, deadline=None)
@example([["A", "B"]], GATHERED)
@given(st.lists(subjects, min_size=1, max_size=3), st.lists(STEPS, max_size=40))
def test_no_part_is_stored_twice_or_forgotten(given: list[list[str]], steps: list[tuple[str, int, str]]) -> None:
    table = Table(whole={n: transaction(n, each) for n, each in enumerate(given, start=1)})
    leader = Leader(table)
    unread = set(table.whole)
    for step, number, stream in steps:
        position = 1 + number % len(given)
        if step == "read":
            if position in unread or position in table.rows:
                leader.read(position)
                unread.discard(position)
        elif step == "plan":
            leader.plan(stream)
        elif step in ("store", "refuse"):
            leader.end(stream, stored=step == "store")
        elif step == "die":
            leader = Leader(table)
            unread = set(table.whole) - set(table.rows)
        elif step == "retry":
            table.retry(position)
        elif step == "move":
            table.homes[stream] = STREAMS[number]
    assert all(times == 1 for times in table.stored.values())
    assert table.sent == set(table.stored)
    # All subjects come home, everything is retried and read again: then each part is stored once.
    table.homes = {each: each for each in STREAMS}
    for _ in range(3):
        leader = Leader(table)
        for position in table.whole:
            table.retry(position)
            leader.read(position)
        for stream in STREAMS:
            leader.plan(stream)
            while leader.planned[stream]:
                leader.end(stream, stored=True)
    assert all(times == 1 for times in table.stored.values())
    for position, rows in table.rows.items():
        numbers = sorted(n for row in rows.values() for n in row.numbers)
        assert numbers == list(range(1, table.whole[position].count + 1))
        left = {part for part in rows if (position, part) not in table.sent}
        assert not left or any((position, part) in table.dead for part in left)
