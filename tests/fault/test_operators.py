"""Operators at work while relays die: replay, pause, resume and purge break no promise."""

from __future__ import annotations

import contextlib
from pathlib import Path

from outbox.operate import pause, purge, replay
from tests.support.bed import Broker, ProcessRelay, value, wait_until_sent
from tests.support.faults import more_sent
from tests.support.servers import Stream
from tests.support.workload import Writers, check


def test_replay_and_pause_while_relays_are_killed(
    database: str, environment: dict[str, str], broker: Broker, stream: Stream, workplace: Path
) -> None:
    """Fault: the leader is killed again and again. Promise: what was committed is in the stream whole, once and in
    order, and besides it every replay that was asked for, whole and once.
    """
    writers = Writers(database, stream.prefix, threads=4, seed=21, endless=True).start()
    asked = 0
    with contextlib.ExitStack() as ends:
        relays = [ends.enter_context(ProcessRelay(workplace, environment)) for _ in range(2)]
        for turn in range(4):
            more_sent(database, 40)
            first = 10 * turn + 1
            asked += replay.replay(database, "outbox", replay.Wanted(first=first, last=first + 30)).transactions
            relays[turn].kill()
            pause.pause(database, "outbox", f"turn {turn}")
            relays.append(ends.enter_context(ProcessRelay(workplace, environment)))
            relays[-1].wait_for("Connected")
            pause.resume(database, "outbox")
        writers.stop()
        wait_until_sent(database)
        assert [relay.stop() for relay in relays[-2:]] == [0, 0]
    report = check(database, broker.read(stream.name))
    assert report.anomalies == {}
    assert report.transactions == writers.committed
    assert report.replays == asked > 30


def test_purge_while_relays_are_killed(
    database: str, environment: dict[str, str], broker: Broker, stream: Stream, workplace: Path
) -> None:
    """Fault: the leader is killed while everything that is sent is deleted by hand. Promise: nothing that is not sent
    is ever deleted, and the stream is whole.
    """
    writers = Writers(database, stream.prefix, threads=4, seed=22, endless=True).start()
    purged = 0
    for _ in range(4):
        last = broker.last_sequence(stream.name)
        with ProcessRelay(workplace, environment):
            while broker.last_sequence(stream.name) < last + 60:
                purged += purge.purge(database, "outbox", 0)
    writers.stop()
    with ProcessRelay(workplace, environment) as relay:
        wait_until_sent(database)
        assert relay.stop() == 0
    stored = broker.read(stream.name)
    assert check(database, stored).anomalies == {}
    assert len(stored) == value(database, "SELECT count(*) FROM ledger")
    assert purged > 20
