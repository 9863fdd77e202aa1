"""The relay as a process: signals, listeners, the log, health and metrics over HTTP, and the supervisor's watchdog."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from importlib import metadata

from prometheus_client import GC_COLLECTOR, PLATFORM_COLLECTOR, PROCESS_COLLECTOR, CollectorRegistry

from outbox.config import Settings
from outbox.core import telemetry
from outbox.monitor import logs
from outbox.monitor.http import Health, serving
from outbox.monitor.metrics import Metrics
from outbox.monitor.observer import observe_for_ever
from outbox.monitor.systemd import Supervisor
from outbox.relay.relay import Relay

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
IGNORED_SIGNALS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
CALM_SECONDS = 1.0  # between two looks for a trouble that is over
OBJECTS_BETWEEN_COLLECTIONS = 200_000
SERVES = (telemetry.TookLead, telemetry.StandingBy, telemetry.Waiting)


def run(settings: Settings, *, drain: bool, create: tuple[str, list[str]] | None, verbose: bool) -> bool:
    """Run a relay until it is stopped, or with `drain` until nothing is pending; False if it was stopped before that.

    Raises what ends it.
    """
    # What is read is freed by reference counts; looking for cycles in it took a quarter of the time.
    gc.freeze()
    gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS)
    # What anything prints is a line of the log, for standard output, too, may be a pipe that nobody reads.
    with logs.taken(settings.log) as log, contextlib.redirect_stdout(sys.stderr):
        log.verbose = verbose
        return _in_a_loop(_run(settings, log, drain=drain, create=create))


def _in_a_loop(work: Coroutine[None, None, bool]) -> bool:
    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    return uvloop.run(work)


async def _run(settings: Settings, log: logs.Log, *, drain: bool, create: tuple[str, list[str]] | None) -> bool:
    async with contextlib.AsyncExitStack() as stack:
        supervisor = Supervisor()
        listeners: list[telemetry.Listener] = [log.tell, supervisor.happened]
        beside: list[Callable[[], Coroutine[None, None, None]]] = [supervisor.watch, lambda: _calm(log)]
        if settings.traces:
            from outbox import tracing

            listeners.append(stack.enter_context(tracing.exporting()))
        if settings.listen:
            health, metrics = Health(), _metrics(settings.schema)
            listeners += [health.happened, metrics.happened]
            log.writer.dropped = metrics.line_dropped
            stack.enter_context(serving(settings.listen, metrics.registry, health))
            serves = asyncio.Event()
            listeners.append(lambda each: serves.set() if isinstance(each, SERVES) else None)
            beside.append(lambda: _observe(serves, settings, metrics))
        relay = Relay(settings, tell=_all(listeners), create_stream=create)
        stack.enter_context(_signalled(relay, log))
        for work in beside:
            task = asyncio.ensure_future(work())
            task.add_done_callback(lambda ended: None if ended.cancelled() or not ended.exception() else relay.stop())
            stack.push_async_callback(_end, task)
        return await relay.run(drain=drain)


async def _calm(log: logs.Log) -> None:
    while True:
        await asyncio.sleep(CALM_SECONDS)
        log.calm()


async def _observe(serves: asyncio.Event, settings: Settings, metrics: Metrics) -> None:
    """Look at the database once the relay has: before that it may still find that it must not serve at all."""
    await serves.wait()
    await observe_for_ever(settings, metrics.observe)


def _metrics(schema: str) -> Metrics:
    registry = CollectorRegistry()
    for collector in (PROCESS_COLLECTOR, PLATFORM_COLLECTOR, GC_COLLECTOR):
        registry.register(collector)
    return Metrics(schema, metadata.version("outbox-relay"), registry)


def _all(listeners: Sequence[telemetry.Listener]) -> telemetry.Listener:
    def tell(happening: telemetry.Happening) -> None:
        for listener in listeners:
            listener(happening)

    return tell


async def _end(task: asyncio.Future[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


@contextlib.contextmanager
def _signalled(relay: Relay, log: logs.Log) -> Iterator[None]:
    """Signals stop the relay, or are told and ignored; none kills it in the middle of something."""
    loop = asyncio.get_running_loop()

    def ignored(number: int) -> None:
        log.tell(telemetry.Ignored(signal=signal.Signals(number).name))

    # Not the loop's own handlers: its end brings the default back, and a second signal would kill us on the way out.
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(relay.stop))
    for number in IGNORED_SIGNALS:
        signal.signal(number, lambda given, _: loop.call_soon_threadsafe(ignored, given))
    try:
        yield
    finally:
        for number in (*STOP_SIGNALS, *IGNORED_SIGNALS):
            signal.signal(number, signal.SIG_IGN)
