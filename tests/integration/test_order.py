"""Order and atomicity, randomised: promises 1 and 3."""

from __future__ import annotations

import pytest

from outbox.config import Settings
from outbox.core import requirements
from outbox.core.positions import Positions
from outbox.embedded import Nats
from tests.support.bed import Broker, ThreadRelay, rows, wait_until_sent
from tests.support.servers import Stream
from tests.support.workload import Report, Writers, check

pytestmark = pytest.mark.core


def run(url: str, nats: Nats, stream: Stream, *, transactions: int, seed: int, drain_first: bool = False) -> Report:
    settings = Settings(database_url=url, nats_url=nats.url)
    with ThreadRelay(settings):
        writers = Writers(url, stream.prefix, transactions=transactions, seed=seed, prepared=True).start()
        writers.join()
        wait_until_sent(url)
    return check(url, Broker(nats.url).read(stream.name))


def test_random_transactions_are_whole_and_in_commit_order(two_phase_database: str, nats: Nats, stream: Stream) -> None:
    report = run(two_phase_database, nats, stream, transactions=3000, seed=7)
    assert report.anomalies == {}
    assert report.transactions >= 3000


def test_check_sees_positions_taken_at_insert(two_phase_database: str, nats: Nats, stream: Stream) -> None:
    # The same trigger, not deferred: the position is drawn at the first insert, before the locks are taken.
    rows(two_phase_database, "DROP TRIGGER seal ON outbox.events")
    rows(
        two_phase_database,
        "CREATE TRIGGER seal AFTER INSERT ON outbox.events FOR EACH ROW EXECUTE FUNCTION outbox.seal()",
    )
    # Re-sealing would draw a later position: keep the first, as a relay does that numbers at insert.
    body: str = rows(two_phase_database, "SELECT pg_get_functiondef('outbox.seal'::regproc)")[0][0]
    rows(two_phase_database, body.replace("SET position = DEFAULT, ", "SET "))
    report = run(two_phase_database, nats, stream, transactions=1500, seed=7)
    assert report.disordered


def test_check_sees_gaps_forgotten_on_a_timeout(
    two_phase_database: str, nats: Nats, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Positions.read

    def impatient(self: Positions, positions: list[int], through: int | None = None) -> None:
        honest(self, positions, through)
        self._cohorts = []

    monkeypatch.setattr(Positions, "read", impatient)
    monkeypatch.setattr(requirements, "of_counters", lambda _: iter(()))  # the relay itself would see it, and halt
    report = run(two_phase_database, nats, stream, transactions=3000, seed=7)
    assert report.missing
