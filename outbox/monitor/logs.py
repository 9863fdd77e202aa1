"""The relay's log: what happens, as lines on standard error, for people or as JSON. No payloads, no secrets.

It never blocks: a thread writes what is not taken at once, and what nobody takes is dropped, counted and told. All else
that is written to standard error, by the interpreter or a library, becomes a line of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import io
import json
import logging
import os
import socket
import stat
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

from outbox.config import LogFormat
from outbox.core import telemetry
from outbox.monitor.repeats import Repeats, Said
from outbox.text import masked, printable

ROOM = 1 << 18  # bytes of lines that nobody has taken yet
LAST_SECONDS = 1.0  # so long at most the end waits for who reads
REFUSED_SECONDS = 0.1  # until a descriptor that somebody made non-blocking is tried again
STANDARD_ERROR = 2
LONGEST = 1 << 16  # characters of a line of somebody else's


class Writer:
    """Lines to a descriptor, and a thread for what is not taken at once: who gives one never waits for who reads.

    `missing` makes the line that tells how many were dropped before the next one.
    """

    def __init__(self, descriptor: int, missing: Callable[[int], str]) -> None:
        self.dropped: Callable[[], None] = lambda: None  # called for each line that is dropped
        self._descriptor, self._missing, self._at_once = descriptor, missing, _at_once(descriptor)
        self._lines: deque[tuple[int, bytes]] = deque()  # with how many were dropped before it
        self._size = self._gap = 0
        self._lost = 0  # that could not be written
        self._torn = False
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="outbox log", daemon=True).start()

    def write(self, line: str, *, last: bool = False) -> None:
        """Take a line, or drop it if there is no room; the last one is always taken."""
        data = line.encode(errors="backslashreplace") + b"\n"
        with self._changed:
            # So that the last lines before a kill are there; a thread could be too late for them.
            if not self._lines and not self._gap and not self._lost:
                with contextlib.suppress(OSError):
                    data = data[self._at_once(data) :]
            if not data:
                return
            # Once lines are dropped there must be room for many: one gap tells more than lines here and there.
            if not last and self._size + len(data) > (ROOM // 2 if self._gap else ROOM):
                self._gap += 1
                self.dropped()
                return
            self._lines.append((self._gap, data))
            self._size, self._gap = self._size + len(data), 0
            self._changed.notify_all()

    def flush(self, seconds: float) -> None:
        """Wait until all is written, at most so long."""
        with self._changed:
            self._changed.wait_for(lambda: not self._lines and not self._gap, seconds)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines or self._gap)
                gap, data = self._lines[0] if self._lines else (self._gap, b"")
            self._lost += gap
            if self._lost and self._put(self._missing(self._lost).encode() + b"\n"):
                self._lost = 0
            if data and not self._put(data):
                self._lost += 1
                self.dropped()
            with self._changed:
                if data:
                    self._lines.popleft()
                    self._size -= len(data)
                else:
                    self._gap -= gap
                self._changed.notify_all()

    def _put(self, data: bytes) -> bool:
        """Write it; False if that cannot be done: a full disk, a pipe without a reader."""
        rest = b"\n" + data if self._torn else data
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:
                time.sleep(REFUSED_SECONDS)
            except OSError:
                # The beginning of a line may be there: the next one does not go on with it.
                self._torn = self._torn or len(rest) < len(data)
                return False
        self._torn = False
        return True


def _at_once(descriptor: int) -> Callable[[bytes], int]:
    """What writes as much as is taken at once, and gives how much that was; raises `OSError` if nothing is."""
    kind = os.fstat(descriptor).st_mode
    if stat.S_ISSOCK(kind):
        same = socket.socket(fileno=os.dup(descriptor))
        return lambda data: same.send(data, socket.MSG_DONTWAIT)
    own = descriptor if stat.S_ISREG(kind) else _own(descriptor)
    return (lambda _: 0) if own is None else lambda data: os.write(own, data)


def _own(descriptor: int) -> int | None:
    """The same pipe or terminal once more, which does not block: that of others must stay as they expect it."""
    try:
        return os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:  # a socket, another system, or another user's
        return None


class Log:
    """What is said, and how: `tell` is a listener and safe from any thread. All of it `verbose`, else thinned."""

    def __init__(self, form: LogFormat, descriptor: int) -> None:
        self.verbose = False
        self._form = _json if form is LogFormat.JSON else _human
        self._repeats, self._lock = Repeats(), threading.RLock()
        self.writer = Writer(descriptor, lambda lines: self._form(Said(happening=telemetry.LinesDropped(lines=lines))))

    def tell(self, happening: telemetry.Happening) -> None:
        """Say it, unless it is said often enough."""
        with self._lock:
            if self.verbose:
                self._say([Said(happening=happening)])
                return
            self.calm()
            self._repeats, said = self._repeats.take(happening, time.monotonic())
            self._say(said)

    def calm(self) -> None:
        """Say what waited for a trouble to be over for good. To be called every second or so."""
        with self._lock:
            self._repeats, said = self._repeats.calm(time.monotonic())
            self._say(said)

    def last(self, words: telemetry.Failed) -> None:
        """Say why the process ends, however much is waiting to be taken."""
        self.writer.write(self._form(Said(happening=words)), last=True)

    def _say(self, said: list[Said]) -> None:
        for each in said:
            self.writer.write(self._form(each))


_log: Log | None = None  # the process has one standard error


@contextlib.contextmanager
def taken(form: LogFormat) -> Iterator[Log]:
    """The log on this process' standard error, which nobody else writes to from then on; within itself the same log.

    At its end it waits a moment for who reads. Standard error is not given back: what the interpreter says at its very
    end would be no line of the log.
    """
    global _log  # noqa: PLW0603 - as standard error is
    if _log is not None:
        yield _log
        return
    descriptor = os.dup(STANDARD_ERROR)
    # A crash, or systemd's SIGABRT after a watchdog, has no time for the log; its words are no JSON.
    if form is LogFormat.HUMAN or faulthandler.is_enabled():
        own = None if stat.S_ISREG(os.fstat(descriptor).st_mode) else _own(descriptor)
        faulthandler.enable(file=descriptor if own is None else own)
    _log = log = Log(form, descriptor)
    finish = _captured(log)
    _heard(log)
    try:
        yield log
    finally:
        finish()
        log.writer.flush(LAST_SECONDS)


def failure(error: BaseException, *, show: bool = True) -> telemetry.Failed:
    """The last words on an error that nobody expected, with its traceback if it is to be shown. No secrets."""
    place = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" in {place[0].name}, {place[0].filename}:{place[0].lineno}" if place else ""
    return telemetry.Failed(
        error=type(error).__name__,
        why=masked(" ".join(f"{type(error).__name__}: {error}".split())) + where,
        remedy="this is a defect: report it on the project's page with these words and the traceback, which "
        "OUTBOX_DEBUG=1 shows and a relay has in its log",
        traceback=masked("".join(traceback.format_exception(error))) if show else "",
    )


class _Printed(io.TextIOBase):
    """Standard error for what Python prints: each whole line is one of the log."""

    encoding = "utf-8"

    def __init__(self, take: Callable[[str], None]) -> None:
        self._take, self._rest = take, ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *whole, self._rest = (self._rest + text).split("\n")
        for line in whole:
            self._take(line)
        return len(text)


def _captured(log: Log) -> Callable[[], None]:
    """Make a line of the log of each line that anything writes to standard error; gives what ends that."""

    def take(line: str) -> None:
        if words := line.rstrip():
            log.tell(telemetry.Remark(source="stderr", kind=words, words=masked(words)))

    sys.stderr = _Printed(take)
    reading, writing = os.pipe()  # for C libraries
    os.dup2(writing, STANDARD_ERROR)
    os.close(writing)

    def read() -> None:
        with open(reading, encoding="utf-8", errors="backslashreplace") as lines:  # noqa: PTH123 - a descriptor
            for line in iter(lambda: lines.readline(LONGEST), ""):
                take(line)

    reader = threading.Thread(target=read, name="outbox stderr", daemon=True)
    reader.start()

    def finish() -> None:
        print(file=sys.stderr)  # what has no end yet
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, STANDARD_ERROR)
        os.close(nowhere)
        reader.join(LAST_SECONDS)

    return finish


class _Records(logging.Handler):
    """Takes what libraries log; theirs are `warning` and above."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        kind = telemetry.Remark if record.levelno < logging.ERROR else telemetry.Complaint
        error = record.exc_info[1] if record.exc_info else None
        self._log.tell(
            kind(
                source=record.name,
                kind=str(record.msg),
                words=masked(" ".join(record.getMessage().split())),
                traceback=masked("".join(traceback.format_exception(error))) if error else "",
            )
        )


def _heard(log: Log) -> None:
    """Have the log hear what libraries log, what the interpreter warns of, and errors that nobody takes."""
    logging.getLogger().addHandler(_Records(log))
    logging.captureWarnings(capture=True)
    ours = logging.getLogger("outbox")
    sys.unraisablehook = lambda raised: ours.error(
        raised.err_msg or "error that nobody takes", exc_info=raised.exc_value
    )
    threading.excepthook = lambda raised: ours.error("a thread has ended", exc_info=raised.exc_value)


def _human(said: Said) -> str:
    happening = said.happening
    more = "".join(f"\n{line}" for line in getattr(happening, "traceback", "").splitlines())
    if isinstance(happening, telemetry.Failed):
        return printable(f"{more}\n{said}".lstrip("\n"))
    if isinstance(happening, telemetry.Remark) and happening.source == "stderr":
        return printable(happening.words)
    return f"{datetime.now().astimezone():%H:%M:%S.%f} [{os.getpid()}] {printable(f'{said}{more}')}"


def _json(said: Said) -> str:
    happening = said.happening
    fields = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "level": happening.level,
        "pid": os.getpid(),
        "event": type(happening).__name__,
        "message": str(said),
        **dataclasses.asdict(happening),
        **({"times": said.times, "after": round(said.seconds, 3)} if said.times else {}),
    }
    return json.dumps(fields, default=str)
