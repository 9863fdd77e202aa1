"""The relay as a process: signals, listeners, health and metrics over HTTP, and the supervisor's watchdog."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
from collections.abc import Callable, Coroutine, Iterator, Sequence
from importlib import metadata

from prometheus_client import GC_COLLECTOR, PLATFORM_COLLECTOR, PROCESS_COLLECTOR, CollectorRegistry

from outbox.config import Settings
from outbox.core import telemetry
from outbox.monitor.http import Health, serving
from outbox.monitor.logs import logger
from outbox.monitor.metrics import Metrics
from outbox.monitor.observer import observe_for_ever
from outbox.monitor.systemd import Supervisor
from outbox.relay.relay import Relay

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
OBJECTS_BETWEEN_COLLECTIONS = 200_000
SERVES = (telemetry.TookLead, telemetry.StandingBy, telemetry.Waiting)


def run(settings: Settings, *, drain: bool, create: tuple[str, list[str]] | None, verbose: bool) -> None:
    """Run a relay until SIGTERM or SIGINT, or with `drain` until nothing is pending. Raises what ends it."""
    # What is read is freed by reference counts; looking for cycles in it took a quarter of the time.
    gc.freeze()
    gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS)
    _in_a_loop(_run(settings, drain=drain, create=create, verbose=verbose))


def _in_a_loop(work: Coroutine[None, None, None]) -> None:
    try:
        import uvloop
    except ImportError:
        asyncio.run(work)
    else:
        uvloop.run(work)


async def _run(settings: Settings, *, drain: bool, create: tuple[str, list[str]] | None, verbose: bool) -> None:
    async with contextlib.AsyncExitStack() as stack:
        supervisor = Supervisor()
        listeners = [logger(settings.log, verbose=verbose), supervisor.happened]
        beside: list[Callable[[], Coroutine[None, None, None]]] = [supervisor.watch]
        if settings.traces:
            from outbox import tracing

            listeners.append(stack.enter_context(tracing.exporting()))
        if settings.listen:
            health, metrics = Health(), _metrics(settings.schema)
            listeners += [health.happened, metrics.happened]
            stack.enter_context(serving(settings.listen, metrics.registry, health))
            serves = asyncio.Event()
            listeners.append(lambda each: serves.set() if isinstance(each, SERVES) else None)
            beside.append(lambda: _observe(serves, settings, metrics))
        relay = Relay(settings, tell=_all(listeners), create_stream=create)
        stack.enter_context(_signalled(relay))
        for work in beside:
            task = asyncio.ensure_future(work())
            task.add_done_callback(lambda ended: None if ended.cancelled() or not ended.exception() else relay.stop())
            stack.push_async_callback(_end, task)
        await relay.run(drain=drain)


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
def _signalled(relay: Relay) -> Iterator[None]:
    """SIGTERM and SIGINT stop the relay."""
    loop = asyncio.get_running_loop()
    # Not the loop's own handlers: its end brings the default back, and a second signal would kill us on the way out.
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(relay.stop))
    try:
        yield
    finally:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
