"""Prometheus metrics of one relay: a listener to what happens, and gauges of what the database said last.

Every series is there from the start, but those by stream, which appear with the stream. No label holds anything that
an application chooses.
"""

from __future__ import annotations

import math
import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from outbox.core import telemetry
from outbox.core.outcome import OUTCOMES
from outbox.core.transaction import DeadReason
from outbox.monitor.observer import Observation

LAG_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200)
COMMIT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
SIZE_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
SERVERS = ("postgres", "nats")


class Metrics:
    """All metrics of one relay in `registry`. `happened` is a listener; `observe` takes a look at the database in."""

    def __init__(self, schema: str, version: str, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._schema = schema
        self._in_flight: dict[str, int] = {}
        self._streams: set[str] = set()

        def counter(name: str, what: str, *labels: str) -> Counter:
            made = Counter(f"outbox_{name}", what, ("schema", *labels), registry=registry)
            return made if labels else made.labels(schema)

        def gauge(name: str, what: str, *labels: str) -> Gauge:
            made = Gauge(f"outbox_{name}", what, ("schema", *labels), registry=registry)
            return made if labels else made.labels(schema)

        def histogram(name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"outbox_{name}", what, ("schema",), buckets=buckets, registry=registry).labels(schema)

        self._transactions = counter("published_transactions", "Transactions marked sent by this relay.", "stream")
        self._events = counter("published_events", "Events of transactions marked sent by this relay.", "stream")
        self._batches = counter("batches", "Batches by what they came to.", "outcome")
        self._deaths = counter("dead_transactions", "Transactions that this relay has set aside.", "reason")
        self._doubts = counter("doubts", "Times that a stream had to be read back, because an outcome was not known.")
        self._purged = counter("purged_transactions", "Transactions deleted after the retention.")
        self._leaderships = counter("leaderships", "Times that this relay has taken the lead.")
        self._lost = counter("leaderships_lost", "Times that this relay has lost the lead.")
        self._failures = counter("connection_failures", "Times that a server could not be reached.", "server")
        self._commits = histogram(
            "batch_commit_duration_seconds", "From a batch's first byte to its ack.", COMMIT_BUCKETS
        )
        self._sizes = histogram("batch_messages", "Messages in a batch.", SIZE_BUCKETS)
        self._delivery = histogram(
            "delivery_lag_seconds",
            "From commit to mark by the database's clock; a sample of what was sent.",
            LAG_BUCKETS,
        )
        self._pending = gauge("pending_transactions", "Transactions that are committed and neither sent nor dead.")
        self._pending_events = gauge("pending_events", "Their events.")
        self._oldest = gauge("oldest_pending_age_seconds", "Age of the oldest pending transaction; 0 if there is none.")
        self._dead = gauge("dead_letters", "Transactions that are set aside and not discarded.")
        self._open = gauge("open_positions", "Positions that were passed and may still appear.")
        self._leads = gauge("leader", "1 while this relay leads.")
        self._present = gauge("leader_present", "1 while any relay leads, by its lock in the database.")
        self._connected = gauge("connected", "1 while this relay is connected.", "server")
        self._blocked = gauge("blocked", "1 while something holds the head of the outbox back.")
        self._stream_blocked = gauge("stream_blocked", "1 while something holds this stream back.", "stream")
        self._shared = gauge("stream_shared", "1 while others write to this stream too.", "stream")
        self._contended = gauge(
            "stream_contended", "1 while what others write to this stream makes most batches come too late.", "stream"
        )
        self._sequence = gauge(
            "stream_last_sequence", "Sequence of this stream up to which everything is known and marked.", "stream"
        )
        self._flying = gauge("batches_in_flight", "Batches that are sent and not yet acked.")
        self._paused = gauge("paused", "1 while an operator has paused the outbox.")
        self._strays = gauge("stray_events", "Events lately added that belong to no transaction, and are never sent.")
        self._drift = gauge("schema_drift", "1 while a part of the schema is missing or disabled.")
        self._failing = gauge("housekeeping_failing", "1 while what is old cannot be deleted, or not be looked for.")
        self._observed = gauge(
            "observed_timestamp_seconds", "When the database was looked at last, in seconds since 1970."
        )
        self._unsaid = counter("log_lines_dropped", "Lines of the log that nobody took: it never waits for who reads.")
        gauge("build_info", "The version of this relay.", "version").labels(schema, version).set(1)
        self._begin()

    def _begin(self) -> None:
        """Make every series be there before anything has happened."""
        for outcome in OUTCOMES:
            self._batches.labels(self._schema, outcome)
        for reason in DeadReason:
            self._deaths.labels(self._schema, reason.value)
        for server in SERVERS:
            self._failures.labels(self._schema, server)
            self._connected.labels(self._schema, server)

    def happened(self, happening: telemetry.Happening) -> None:  # noqa: C901, PLR0912 - one case for each happening
        """Count what happened; ignores what is not counted."""
        own = self._schema
        match happening:
            case telemetry.Marked(stream=stream, transactions=transactions, events=events):
                self._transactions.labels(own, stream).inc(transactions)
                self._events.labels(own, stream).inc(events)
            case telemetry.BatchSent(stream=stream, messages=messages):
                self._in_flight[stream] = self._in_flight.get(stream, 0) + 1
                self._sizes.observe(messages)
                self._fly()
            case telemetry.BatchEnded(stream=stream, outcome=outcome, seconds=seconds):
                self._in_flight[stream] = max(0, self._in_flight.get(stream, 0) - 1)
                self._batches.labels(own, outcome).inc()
                if outcome == "stored":
                    self._commits.observe(seconds)
                self._fly()
            case telemetry.InDoubt(stream=stream):
                self._in_flight[stream] = 0
                self._doubts.inc()
                self._fly()
            case telemetry.Died(verdict=verdict):
                self._deaths.labels(own, verdict.reason.value).inc()
            case telemetry.Purged(transactions=transactions):
                self._purged.inc(transactions)
            case telemetry.TookLead():
                self._leaderships.inc()
                self._leads.set(1)
            case telemetry.LostLead():
                self._lost.inc()
            case telemetry.LeadEnded():
                self._leads.set(0)
                self._connected.labels(own, "nats").set(0)
                self._in_flight.clear()
                self._fly()
            case telemetry.Connected(server=server):
                self._connected.labels(own, server).set(1)
            case telemetry.Unreachable(server=server):
                self._failures.labels(own, server).inc()
                self._connected.labels(own, server).set(0)
            case telemetry.Blocked(stream=stream):
                self._block(stream, 1)
            case telemetry.Unblocked(stream=stream):
                self._block(stream, 0)
            case telemetry.Paused():
                self._paused.set(1)
            case telemetry.Resumed():
                self._paused.set(0)
            case _:
                pass

    def line_dropped(self) -> None:
        """Count a line of the log; safe from any thread."""
        self._unsaid.inc()

    def observe(self, seen: Observation | None) -> None:
        """Take in what the database said. If it said nothing, what it said before is no more known: NaN."""
        own = self._schema
        if seen is None:
            for gauge in (self._pending, self._pending_events, self._oldest, self._dead, self._open, self._present):
                gauge.set(math.nan)
            return
        self._pending.set(seen.pending_transactions)
        self._pending_events.set(seen.pending_events)
        self._oldest.set(seen.oldest_pending_seconds or 0)
        self._dead.set(seen.dead_letters)
        self._open.set(seen.open_positions)
        self._present.set(seen.leader_present)
        self._strays.set(seen.stray_events)
        self._drift.set(seen.drift)
        self._failing.set(seen.housekeeping_failing)
        self._blocked.set(seen.blocked)
        self._paused.set(seen.paused)
        names = {each.name for each in seen.streams}
        for gone in self._streams - names:  # retired: it holds nothing back any more
            for metric in (self._stream_blocked, self._sequence, self._shared, self._contended):
                metric.remove(own, gone)
        self._streams = names
        for each in seen.streams:
            self._stream_blocked.labels(own, each.name).set(each.blocked)
            self._sequence.labels(own, each.name).set(each.last_sequence)
            self._shared.labels(own, each.name).set(each.shared)
            self._contended.labels(own, each.name).set(each.contended)
            self._transactions.labels(own, each.name)
            self._events.labels(own, each.name)
        for seconds in seen.lags:
            self._delivery.observe(seconds)
        self._observed.set(time.time())

    def _block(self, stream: str, value: int) -> None:
        if stream:
            self._stream_blocked.labels(self._schema, stream).set(value)
        else:
            self._blocked.set(value)

    def _fly(self) -> None:
        self._flying.set(sum(self._in_flight.values()))
