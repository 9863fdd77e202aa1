"""How a command begins and ends, whatever it is: its standard streams, its last words, its exit code; no traceback.

A relay's last words go to its log, in the log's form, and so does whatever is said of how it was called.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from outbox import sources
from outbox.config import LogFormat
from outbox.core.telemetry import Failed
from outbox.errors import Misconfigured, OutboxError
from outbox.monitor import logs
from outbox.text import printable

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

FAILED, USAGE, NOT_DRAINED = 1, 2, 3
INTERRUPTED = 128 + signal.SIGINT  # as a shell has it
CLOSED = 141  # 128 + SIGPIPE: as other tools, which die of it
YES = ("1", "true", "yes", "on")


def run(app: Callable[[], object]) -> int:
    """Run the command that was typed, and give its exit code."""
    # Within another program, as in tests, the streams and the hooks of the process are that program's.
    if sys.stdout is sys.__stdout__:
        _own_process()
    # nats-py's TLS makes the loop say so whenever a server hangs up; it means nothing.
    logging.getLogger("asyncio").addFilter(lambda record: "eof_received" not in str(record.msg))
    if sys.argv[1:2] == ["relay"]:
        # From the start: loading the relay takes a moment, and then it tells them.
        for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
        with logs.taken(_log_format()) as log:
            code, last = _ended(app, traceback=True)
            for each in last:
                log.last(each)
        return code
    code, last = _ended(app, traceback=_debugging())
    for each in last:
        print(printable(f"{each.traceback}{each}"), file=sys.stderr)
    return code


def _ended(app: Callable[[], object], *, traceback: bool) -> tuple[int, list[Failed]]:
    """Run it: the exit code, and the last words; a `traceback` only of an error that nobody expected."""
    try:
        for word in sys.argv[1:]:
            _check(word)
        try:
            app()
        finally:
            sys.stdout.flush()
    except SystemExit as end:
        return (end.code if isinstance(end.code, int) else FAILED if end.code else 0), []
    except sources.WrongSettings as error:
        return USAGE, [Failed(error=type(error).__name__, why=mistake) for mistake in error.mistakes]
    except OutboxError as error:
        return FAILED, [Failed(error=type(error).__name__, why=error.message, remedy=error.remedy)]
    except KeyboardInterrupt:
        return INTERRUPTED, []
    except Exception as error:  # noqa: BLE001 - a defect is told in one line, and where to report it
        return FAILED, [logs.failure(error, show=traceback)]
    return 0, []


def _check(word: str) -> None:
    if not sources.is_text(word):
        raise sources.WrongSettings([f"{word} is not UTF-8 text"])


def _log_format() -> LogFormat:
    """As the relay's log is to be."""
    words = [part for word in sys.argv[1:] for part in word.split("=", 1)]
    given = dict(itertools.pairwise(words)).get("--log")
    if given not in tuple(LogFormat):  # none, or a mistake, which is told as the other settings say
        given = _early("log")
    return LogFormat.JSON if given == LogFormat.JSON else LogFormat.HUMAN


def _debugging() -> bool:
    return _early("debug").lower() in YES


def _early(name: str) -> str:
    """A setting before the settings are read, though they may be wrong: no mistake is told here."""
    return str(sources.find((name,), os.environ, sources.FILE).values.get(name, ""))


# --- the process


class _Standard(io.RawIOBase):
    """Standard output or error, of which each failure is told once: what comes after it goes nowhere."""

    def __init__(self, descriptor: int, *, silent: bool) -> None:
        self._descriptor, self._silent, self._over = descriptor, silent, False

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, data: Buffer) -> int:
        whole = len(memoryview(data))
        try:
            return whole if self._over else os.write(self._descriptor, data)
        except OSError as error:
            self._over = True
            if self._silent:
                return whole
            if isinstance(error, BrokenPipeError):
                raise SystemExit(CLOSED) from None
            raise Misconfigured(
                f"standard output cannot be written: {error.strerror}", remedy="make room, or write it elsewhere"
            ) from error


def _own_process() -> None:
    """Make the process' streams safe to write to, and have nothing that nobody catches be shown as a traceback."""
    _open_standard()
    sys.stdin, sys.stdout, sys.stderr = sys.__stdin__ or open(0, closefd=False), _safe(1), _safe(2)  # noqa: SIM115
    logging.lastResort = _Short(logging.WARNING)
    if not _debugging():
        sys.unraisablehook = lambda _: None
        threading.excepthook = lambda _: None


def _open_standard() -> None:
    """Open what is closed of the first three descriptors: else a socket gets the number, and is written to as a log."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest that is free


def _safe(descriptor: int) -> io.TextIOWrapper:
    """Text on a descriptor, in the encoding that Python has chosen; characters that it lacks are escaped."""
    given = sys.__stdout__ if descriptor == 1 else sys.__stderr__
    raw = _Standard(descriptor, silent=descriptor == logs.STANDARD_ERROR)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=given.encoding if given else "utf-8",
        errors="backslashreplace",
        line_buffering=descriptor == logs.STANDARD_ERROR or raw.isatty(),
    )


class _Short(logging.Handler):
    """What a library logs, as one line on standard error; a relay has its log for that."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(Exception):
            print(printable(f"outbox: {record.name}: {record.getMessage()}"), file=sys.stderr)
