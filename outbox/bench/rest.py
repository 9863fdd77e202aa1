"""What the relay costs when there is nothing to do, and how much memory it takes when there is very much."""

from __future__ import annotations

import time

from outbox.bench.figures import Figures
from outbox.bench.site import SCHEMA, RelayProcess, Site

STATEMENTS = "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()"


def idle(site: Site, *, seconds: float) -> Figures:
    """An idle relay: its CPU, its transactions in Postgres (one statement each), and the first event after a rest."""
    with RelayProcess(site) as relay:
        relay.wait_until_ready()
        time.sleep(3)
        cpu, statements = relay.cpu_seconds, _statements(site)
        time.sleep(seconds)
        cpu, statements = relay.cpu_seconds - cpu, _statements(site) - statements
    return {"relay_cpu_percent": 100 * cpu / seconds, "statements_per_second": statements / seconds}


def _statements(site: Site) -> int:
    time.sleep(1.5)  # a backend reports what it did within a second
    return int(site.value(STATEMENTS))


def memory(site: Site, *, transactions: int, events: int, payload: int, seconds: float) -> Figures:
    """The relay's peak with this backlog, after so many seconds of sending or when all is sent."""
    site.load(transactions, events, payload)
    with RelayProcess(site) as relay:
        began = relay.wait_until_ready()
        while time.time() - began < seconds and site.value(f"SELECT EXISTS (SELECT FROM {SCHEMA}.pending)"):  # noqa: S608
            time.sleep(0.2)
        peak = relay.peak_megabytes
    return {"relay_peak_megabytes": peak}
