"""The metrics that a relay exports, by the names that Prometheus stores, with their labels."""

from __future__ import annotations

import importlib
from typing import Any

from prometheus_client import CollectorRegistry

COUNTERS = """
outbox_published_transactions_total stream
outbox_published_events_total stream
outbox_batches_total outcome
outbox_dead_transactions_total reason
outbox_doubts_total
outbox_purged_transactions_total
outbox_leaderships_total
outbox_leaderships_lost_total
outbox_connection_failures_total server
"""
HISTOGRAMS = "outbox_batch_commit_duration_seconds outbox_batch_messages outbox_delivery_lag_seconds"
GAUGES = """
outbox_pending_transactions
outbox_pending_events
outbox_oldest_pending_age_seconds
outbox_dead_letters
outbox_open_positions
outbox_leader
outbox_leader_present
outbox_connected server
outbox_blocked
outbox_stream_blocked stream
outbox_stream_last_sequence stream
outbox_batches_in_flight
outbox_paused
outbox_observed_timestamp_seconds
outbox_build_info version
"""


def listed() -> dict[str, frozenset[str]]:
    """The names that were agreed on."""
    lines = [line.split() for line in (COUNTERS + GAUGES).strip().splitlines() if line]
    return {name: frozenset({"schema", *labels}) for name, *labels in lines} | of_histograms(HISTOGRAMS.split())


def of_histograms(names: list[str]) -> dict[str, frozenset[str]]:
    """The series of histograms."""
    of_buckets = {f"{name}_bucket": frozenset({"schema", "le"}) for name in names}
    return of_buckets | {f"{name}_{part}": frozenset({"schema"}) for name in names for part in ("sum", "count")}


def registered() -> dict[str, frozenset[str]]:
    """The names that the registry of a relay has."""
    registry = CollectorRegistry()
    importlib.import_module("outbox.metrics").Metrics("outbox", "0", registry)
    found: dict[str, frozenset[str]] = {}
    for each in set[Any](registry._collector_to_names):
        name, labels = each._name, frozenset({"schema", *each._labelnames})
        if each._type == "histogram":
            found |= of_histograms([name])
        else:
            found[f"{name}_total" if each._type == "counter" else name] = labels
    return found


EXPORTED = listed()  # registered(), as soon as there is outbox.metrics; then `listed` goes
