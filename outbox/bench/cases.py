"""The cases: what is measured of each kind, and with which sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from outbox.bench import beside, drain, flat, load, rest, verify
from outbox.bench.figures import Figures, Kind, Say
from outbox.bench.site import Site

Measured = tuple[dict[str, Any], Callable[[], Figures]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The sizes that were asked for."""

    events: list[int]
    payload: int
    total: int
    seconds: float
    subjects: list[str]
    outboxes: int
    foreign: float
    foreign_subjects: list[str]
    say: Say


RATE = 10.0  # transactions a second of each outbox, where several share a stream


def _drain(there: Site, wanted: Sizes) -> Iterator[Measured]:
    for events in wanted.events:
        given: dict[str, Any] = {"events": events, "payload": wanted.payload}
        sizes: dict[str, Any] = {**given, "transactions": wanted.total // events, "subjects": wanted.subjects}
        if wanted.subjects:
            given["subjects"] = " ".join(wanted.subjects)
        if wanted.foreign:
            given |= {"foreign": f"{wanted.foreign:g}", "onto": " ".join(wanted.foreign_subjects)}
            other: dict[str, Any] = {
                "rate": wanted.foreign,
                "subjects": wanted.foreign_subjects,
                "seconds": wanted.seconds,
            }
            yield given, partial(beside.foreign, there, backlog=beside.Backlog(**sizes), **other)
        elif wanted.outboxes > 1:
            given["outboxes"] = wanted.outboxes
            many: dict[str, Any] = {"outboxes": wanted.outboxes, "seconds": wanted.seconds}
            yield given, partial(beside.together, there, backlog=beside.Backlog(**sizes), **many)
        else:
            yield given, partial(drain.with_ceilings, there, **sizes)


def _sustained(there: Site, wanted: Sizes) -> Iterator[Measured]:
    given: dict[str, Any] = {"events": 3, "payload": wanted.payload, "share": 0.5, "seconds": wanted.seconds}
    yield given, partial(load.sustained, there, say=wanted.say, **given)


def _latency(there: Site, wanted: Sizes) -> Iterator[Measured]:
    if wanted.outboxes > 1:
        many: dict[str, Any] = {"outboxes": wanted.outboxes, "events": 3, "rate": RATE}
        sizes: dict[str, Any] = {"payload": wanted.payload, "seconds": wanted.seconds, "subjects": wanted.subjects}
        yield many, partial(load.latency_together, there, **many, **sizes)
        return
    for events, share in ((1, 0.0), (3, 0.0), (3, 0.25), (3, 0.5)):
        given: dict[str, Any] = {"events": events, "payload": wanted.payload, "share": share, "seconds": wanted.seconds}
        yield given, partial(load.latency, there, **given)


def _writer(there: Site, wanted: Sizes) -> Iterator[Measured]:
    for clients in (1, 4, 16):
        given = {"clients": clients, "events": 3, "payload": wanted.payload}
        yield given, partial(load.writer, there, seconds=min(wanted.seconds, 10), **given)


def _verify(there: Site, wanted: Sizes) -> Iterator[Measured]:
    for read_by in verify.RETENTION:
        given: dict[str, Any] = {"read_by": read_by, "events": 3, "payload": wanted.payload}
        yield given, partial(verify.verify, there, transactions=wanted.total // 3, **given)


def _flat(there: Site, wanted: Sizes) -> Iterator[Measured]:
    batch, say = wanted.total // 3, wanted.say
    yield {"pending": 1_000_000}, partial(flat.pending, there, transactions=batch, backlog=1_000_000, say=say)
    yield {"sent": 10_000_000}, partial(flat.sent, there, transactions=batch, rows=10_000_000, say=say)
    yield {"snapshot over": 300_000}, partial(flat.snapshot, there, transactions=100_000, times=3, say=say)
    yield {"statistics": "four states"}, partial(flat.statistics, there, transactions=batch)


def _memory(there: Site, wanted: Sizes) -> Iterator[Measured]:
    for transactions, payload in ((1_000_000, wanted.payload), (400, 900_000)):
        given = {"transactions": transactions, "events": 1, "payload": payload}
        yield given, partial(rest.memory, there, seconds=wanted.seconds, **given)


def _idle(there: Site, wanted: Sizes) -> Iterator[Measured]:
    yield {}, partial(rest.idle, there, seconds=wanted.seconds)


CASES = {
    Kind.DRAIN: _drain,
    Kind.SUSTAINED: _sustained,
    Kind.LATENCY: _latency,
    Kind.WRITER: _writer,
    Kind.VERIFY: _verify,
    Kind.FLAT: _flat,
    Kind.MEMORY: _memory,
    Kind.IDLE: _idle,
}
