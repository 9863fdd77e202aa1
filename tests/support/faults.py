"""What several fault tests do: add events, wait for progress, break a batch at a named place, read receipts."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import nats.errors
import pytest

from outbox.jetstream.client import JetStream
from tests.support.bed import Broker, rows, until, value
from tests.support.workload import Writers, check


def add(url: str, subject: str, events: int = 1, *, size: int = 0) -> None:
    """One transaction; payloads are the numbers 1 to `events`, padded to `size` bytes."""
    payload = "rpad(n::text, greatest(%s, length(n::text)))"
    rows(url, f"SELECT outbox.add(%s, {payload}) FROM generate_series(1, %s) AS n", subject, size, events)


@contextlib.contextmanager
def stream_of(broker: Broker, name: str, **config: Any) -> Iterator[str]:
    """A stream of this configuration with the subjects `name.>`, gone at the end."""
    broker.create_stream(name, f"{name}.>", **config)
    try:
        yield name
    finally:
        broker.api(f"STREAM.DELETE.{name}")


def sent(url: str) -> int:
    """How many transactions are marked sent."""
    return int(value(url, "SELECT count(*) FROM outbox.transactions WHERE sent_at IS NOT NULL"))


def more_sent(url: str, number: int = 30, *, patience: float = 25) -> None:
    """Wait until so many more transactions are marked than now."""
    before = sent(url)
    until(lambda: sent(url) >= before + number, patience=patience, what=f"{number} more than {before} sent")


def unsent_ids(url: str) -> list[str]:
    """The message ids of everything that is not marked, in commit order."""
    statement = (
        "SELECT message_id::text FROM outbox.events JOIN outbox.transactions USING (txid) WHERE sent_at IS NULL "
        "ORDER BY position, id"
    )
    return [each for (each,) in rows(url, statement)]


def assert_receipts_tile(url: str, stream: str, last: int, foreign: Collection[int] = ()) -> None:
    """Each sequence of the stream is foreign or belongs to exactly one receipt: nothing doubled, nothing lost, though

    it be gone.
    """
    statement = (
        "SELECT first_sequence, last_sequence, event_count FROM outbox.transactions WHERE stream = %s "
        "ORDER BY first_sequence"
    )
    numbers = (number for number in range(1, last + 1) if number not in foreign)
    for first, high, count in rows(url, statement, stream):
        assert high == first + count - 1
        assert list(itertools.islice(numbers, count)) == list(range(first, high + 1))
    assert list(numbers) == []


def assert_ended_well(writers: Writers, broker: Broker, stream: str) -> None:
    """The stream is exactly what the writers committed, and each of their transactions is marked with its place."""
    stored = broker.read(stream)
    report = check(writers.url, stored)
    assert report.anomalies == {}
    assert report.transactions == writers.committed
    foreign = {each.sequence for each in stored if each.foreign}
    assert_receipts_tile(writers.url, stream, len(stored), foreign)


class Breaks:
    """Strikes inside a batch that a relay of this process sends, or behind its last message, whenever it is asked to.

    At `before-ack` the whole batch is at the server, and no ack of it or later is read until the strike is over.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, point: str, strike: Callable[[], None]) -> None:
        self._asked, self._done, self._strike = threading.Event(), threading.Event(), strike
        send = JetStream._send
        broken = {"mid-batch": self._mid_batch, "before-ack": self._before_ack}[point]

        async def armed(jetstream: JetStream, token: str, batch: Any, outbox_id: str) -> None:
            if self._asked.is_set() and batch.count > 1 and token in jetstream._awaited:
                await broken(lambda: send(jetstream, token, batch, outbox_id), jetstream, batch.count // 2)
            else:
                await send(jetstream, token, batch, outbox_id)

        monkeypatch.setattr(JetStream, "_send", armed)

    def now(self) -> None:
        """Strike at the next batch, and return when it was done."""
        self._done.clear()
        self._asked.set()
        assert self._done.wait(25), "no batch came by"

    def _act(self) -> None:
        self._asked.clear()
        self._strike()
        self._done.set()

    async def _mid_batch(self, send: Callable[[], Any], jetstream: JetStream, half: int) -> None:
        write = jetstream._write

        async def halved(pieces: Sequence[bytes]) -> None:
            await write(pieces[: 3 * half])
            with contextlib.suppress(nats.errors.Error):
                await jetstream._nc.flush()
            self._act()
            await write(pieces[3 * half :])

        jetstream._write = halved  # type: ignore[method-assign]
        try:
            await send()
        finally:
            del jetstream._write

    async def _before_ack(self, send: Callable[[], Any], jetstream: JetStream, _: int) -> None:
        await send()
        jetstream._tell = lambda *_: None  # type: ignore[method-assign]
        with contextlib.suppress(nats.errors.Error):
            await jetstream._nc.flush()
        self._act()
        del jetstream._tell
