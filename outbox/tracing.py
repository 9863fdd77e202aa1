"""OpenTelemetry: a span for each event where it is added, and one for each batch, with links to those of its events.

Loaded only where tracing is on. Names and attributes are those of the semantic conventions for messaging (status:
development); the context travels as W3C trace context in the message's headers, so a consumer goes on with the trace of
the transaction that added the event.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Sequence
from importlib import metadata

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, SpanKind, StatusCode, TracerProvider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from outbox.core import telemetry
from outbox.errors import Misconfigured
from outbox.event import Event

W3C = TraceContextTextMapPropagator()
MOST_LINKS = 128  # what SDKs keep by default
LAST_SECONDS = 2.0  # for the last spans, when the relay ends: a collector that is away is tried for longer


def created(event: Event) -> Event:
    """The event with the trace context of a span `create` in the caller's trace; as it is if it has a context."""
    if "traceparent" in event.headers:
        return event
    attributes: dict[str, str | int] = {
        "messaging.system": "nats",
        "messaging.operation.name": "create",
        "messaging.operation.type": "create",
        "messaging.destination.name": event.subject,
        "messaging.message.id": event.message_id,
        "messaging.message.body.size": len(event.payload),
    }
    tracer = trace.get_tracer("outbox")
    with tracer.start_as_current_span("create", kind=SpanKind.PRODUCER, attributes=attributes):
        headers = dict(event.headers)
        W3C.inject(headers)
    return event._replace(headers=headers)


class Batches:
    """`happened` is a listener: a span `send` for each batch that came to its outcome."""

    def __init__(self, provider: TracerProvider) -> None:
        self._tracer = provider.get_tracer("outbox")

    def happened(self, happening: telemetry.Happening) -> None:
        """Record a batch that ended now; ignores all else."""
        if not isinstance(happening, telemetry.BatchEnded):
            return
        ended = time.time_ns()
        links = _links(happening.contexts)
        traces = {link.context.trace_id for link in links}
        span = self._tracer.start_span(
            f"send {happening.stream}",
            # One trace alone goes on here; a batch of several has its own, and is linked to each.
            context=_as_parent(links[0]) if len(traces) == 1 else Context(),
            kind=SpanKind.CLIENT,
            links=links,
            start_time=ended - int(happening.seconds * 1e9),
            attributes={
                "messaging.system": "nats",
                "messaging.operation.name": "send",
                "messaging.operation.type": "send",
                "messaging.destination.name": happening.stream,
                "messaging.batch.message_count": happening.messages,
                "outbox.batch.transaction_count": happening.transactions,
                **({} if happening.outcome == "stored" else {"error.type": happening.outcome}),
            },
        )
        if happening.outcome != "stored":
            span.set_status(StatusCode.ERROR, happening.outcome)
        span.end(ended)


def _links(contexts: Sequence[str]) -> list[Link]:
    spans = (trace.get_current_span(W3C.extract({"traceparent": each}, Context())) for each in contexts)
    return [Link(span.get_span_context()) for span in spans if span.get_span_context().is_valid][:MOST_LINKS]


def _as_parent(link: Link) -> Context:
    return trace.set_span_in_context(trace.NonRecordingSpan(link.context), Context())


@contextlib.contextmanager
def exporting() -> Iterator[telemetry.Listener]:
    """The relay's listener, which exports as OpenTelemetry's variables say (OTEL_EXPORTER_OTLP_ENDPOINT and others).

    A provider that is set already (by `opentelemetry-instrument`) is used. The end takes two seconds at most. Raises
    `Misconfigured` without the extra.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk import trace as sdk
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise Misconfigured(
            f"traces need a package that is not installed: {error.name}", remedy="pip install 'outbox-relay[traces]'"
        ) from error
    provider = trace.get_tracer_provider()
    if not isinstance(provider, sdk.TracerProvider):
        name = os.environ.get("OTEL_SERVICE_NAME", "outbox-relay")
        resource = Resource.create({"service.name": name, "service.version": metadata.version("outbox-relay")})
        provider = sdk.TracerProvider(resource=resource, shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    try:
        yield Batches(provider).happened
    finally:
        # A shutdown tries a collector that is away again and again; what is left of it when we go is lost.
        last = threading.Thread(target=provider.shutdown, name="outbox traces", daemon=True)
        last.start()
        last.join(LAST_SECONDS)
