"""The metrics that a relay exports, by the names that Prometheus stores, with their labels."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry

from outbox.monitor.metrics import Metrics


def of_histograms(names: list[str]) -> dict[str, frozenset[str]]:
    """The series of histograms."""
    of_buckets = {f"{name}_bucket": frozenset({"schema", "le"}) for name in names}
    return of_buckets | {f"{name}_{part}": frozenset({"schema"}) for name in names for part in ("sum", "count")}


def registered() -> dict[str, frozenset[str]]:
    """The names that the registry of a relay has."""
    registry = CollectorRegistry()
    Metrics("outbox", "0", registry)
    found: dict[str, frozenset[str]] = {}
    for each in set[Any](registry._collector_to_names):
        name, labels = each._name, frozenset({"schema", *each._labelnames})
        if each._type == "histogram":
            found |= of_histograms([name])
        else:
            found[f"{name}_total" if each._type == "counter" else name] = labels
    return found


EXPORTED = registered()
