"""Which stream takes which subject, as JetStream told; remembered until a connection or a chain fails.

Matching a subject to a filter is pure; asking is the only IO. A remembered answer can be out of date: the fence on
each batch names the stream that is expected, so a wrong one is refused, never misplaced.
"""

from __future__ import annotations

from collections.abc import Collection

from outbox.core.plan import Seen
from outbox.core.transaction import Transaction
from outbox.errors import Weather
from outbox.jetstream.client import JetStream
from outbox.jetstream.stream import StreamInfo

REMEMBERED_SUBJECTS = 10_000


def matches(subject: str, pattern: str) -> bool:
    """True if a subject fits a filter such as `orders.*.placed` or `orders.>`."""
    tokens, parts = subject.split("."), pattern.split(".")
    for index, part in enumerate(parts):
        if part == ">":
            return len(tokens) > index
        if index >= len(tokens) or part not in ("*", tokens[index]):
            return False
    return len(tokens) == len(parts)


class Routes:
    """What is known of subjects and streams."""

    def __init__(self) -> None:
        self._infos: dict[str, StreamInfo] = {}
        self._tails: dict[str, Seen | None] = {}
        self._streams: dict[str, str] = {}

    def clear(self) -> None:
        """Forget everything: ask again."""
        self._infos.clear()
        self._tails.clear()
        self._streams.clear()

    def info(self, stream: str) -> tuple[StreamInfo, Seen | None]:
        """What was learnt of a stream when it was asked for last, and its last message, if it has one."""
        return self._infos[stream], self._tails.get(stream)

    def streams(self, transaction: Transaction) -> dict[str, str | None]:
        """The stream of each of its subjects; None where it is not known."""
        return {each: self._streams.get(each) or self._find(each) for each in transaction.subjects}

    def only_stream(self, transaction: Transaction) -> str | None:
        """The stream of all its subjects, which were asked for before; else None."""
        if transaction.count == 1:
            return self._streams.get(transaction.subjects[0])
        names = set(map(self._streams.get, transaction.subjects))
        return names.pop() if len(names) == 1 else None

    async def ask(self, jetstream: JetStream, subjects: Collection[str]) -> dict[str, str | None]:
        """Ask JetStream for the streams of these subjects; None where it says that there is none."""
        answers: dict[str, str | None] = {}
        for subject in subjects:
            answers[subject] = name = (
                self._streams.get(subject) or self._find(subject) or await jetstream.stream_of(subject)
            )
            if name is not None and name not in self._infos:
                info = await jetstream.stream(name)
                if info is None:
                    raise Weather(f"stream {name} has just gone")
                end = info.last_sequence
                self._tails[name] = (await jetstream.look(name, [end]))[end] if end else None
                self._infos[name] = info.check()
            if name is not None:
                self._remember(subject, name)
        return answers

    def _find(self, subject: str) -> str | None:
        for name, info in self._infos.items():
            if any(matches(subject, pattern) for pattern in info.subjects):
                self._remember(subject, name)
                return name
        return None

    def _remember(self, subject: str, stream: str) -> None:
        if len(self._streams) >= REMEMBERED_SUBJECTS:
            del self._streams[next(iter(self._streams))]
        self._streams[subject] = stream
