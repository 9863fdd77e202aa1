"""One trace from a request through the relay to a consumer, with real servers and an exporter in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import psycopg
import pytest
import sqlalchemy as sa
from fastapi import FastAPI
from fastapi.testclient import TestClient
from opentelemetry import trace
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.propagate import extract
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sqlalchemy.orm import Session

from outbox import Outbox, event
from outbox.config import Settings
from outbox.tracing import Batches
from tests.support.bed import Broker, ThreadRelay, rows, value, wait_until_sent
from tests.support.servers import Stream


@pytest.fixture(scope="module")
def exported() -> Iterator[tuple[TracerProvider, InMemorySpanExporter]]:
    provider, exporter = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    yield provider, exporter
    provider.shutdown()


@pytest.fixture
def spans(exported: tuple[TracerProvider, InMemorySpanExporter]) -> InMemorySpanExporter:
    exported[1].clear()
    return exported[1]


def shop(url: str, subject: str) -> FastAPI:
    app, outbox = FastAPI(), Outbox(traces=True)
    engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"), poolclass=sa.NullPool)

    @app.post("/orders")
    def order() -> dict[str, str]:
        with Session(engine) as session, session.begin():
            outbox.add(session, f"{subject}.created", {"order": 1}, headers={"tenant": "acme"})
            outbox.add(session, f"{subject}.paid", {"order": 1})
        return {}

    return app


def test_request_relay_and_consumer_are_one_trace(
    settings: Settings,
    broker: Broker,
    stream: Stream,
    exported: tuple[TracerProvider, InMemorySpanExporter],
    spans: InMemorySpanExporter,
) -> None:
    app = shop(settings.database_url, stream.prefix)
    FastAPIInstrumentor.instrument_app(app, tracer_provider=exported[0])
    with TestClient(app) as client:
        assert client.post("/orders").status_code == 200
    traced = settings.model_copy(update={"traces": True})
    with ThreadRelay(traced, listener=Batches(exported[0]).happened):
        wait_until_sent(settings.database_url)
    for message in broker.read(stream.name):
        context = extract(message.headers)
        with trace.get_tracer("consumer").start_as_current_span(
            "process", context=context, kind=trace.SpanKind.CONSUMER
        ):
            pass
    found = {span.name: span for span in spans.get_finished_spans()}
    creates = [span for span in spans.get_finished_spans() if span.name == "create"]
    processes = [span for span in spans.get_finished_spans() if span.name == "process"]
    request, send = found["POST /orders"], found[f"send {stream.name}"]
    assert len(creates) == len(processes) == 2
    assert {trace_of(span) for span in (request, send, *creates, *processes)} == {trace_of(request)}
    assert {parent_of(span) for span in creates} == {id_of(request)}
    assert [parent_of(span) for span in processes] == [id_of(span) for span in creates]
    assert [link.context.span_id for link in send.links] == [id_of(span) for span in creates]
    assert dict(send.attributes or {}) == {
        "messaging.system": "nats",
        "messaging.operation.name": "send",
        "messaging.operation.type": "send",
        "messaging.destination.name": stream.name,
        "messaging.batch.message_count": 2,
        "outbox.batch.transaction_count": 1,
    }
    assert (creates[0].attributes or {})["messaging.destination.name"] == f"{stream.prefix}.created"
    assert (send.start_time or 0) < (send.end_time or 0)
    assert broker.read(stream.name)[0].headers["tenant"] == "acme"


def test_batch_of_several_traces_is_linked_to_each(
    settings: Settings,
    stream: Stream,
    exported: tuple[TracerProvider, InMemorySpanExporter],
    spans: InMemorySpanExporter,
) -> None:
    outbox = Outbox(traces=True)
    with psycopg.connect(settings.database_url) as connection:
        for _ in range(3):
            outbox.add(connection, f"{stream.prefix}.x", b"")  # each in a trace of its own
    rows(
        settings.database_url,
        "SELECT outbox.add(%s, 'without', '{\"traceparent\": \"nonsense\"}')",
        f"{stream.prefix}.x",
    )
    traced = settings.model_copy(update={"traces": True})
    with ThreadRelay(traced, listener=Batches(exported[0]).happened):
        wait_until_sent(settings.database_url)
    (send,) = [span for span in spans.get_finished_spans() if span.name.startswith("send")]
    creates = [span for span in spans.get_finished_spans() if span.name == "create"]
    assert [link.context.span_id for link in send.links] == [id_of(span) for span in creates]
    assert send.parent is None
    assert trace_of(send) not in {trace_of(span) for span in creates}


def test_failed_batch_has_an_error(
    settings: Settings,
    broker: Broker,
    stream: Stream,
    exported: tuple[TracerProvider, InMemorySpanExporter],
    spans: InMemorySpanExporter,
) -> None:
    rows(settings.database_url, "SELECT outbox.add(%s, 'x')", f"{stream.prefix}.x")
    batches = Batches(exported[0])
    with ThreadRelay(settings, listener=batches.happened):
        wait_until_sent(settings.database_url)
        broker.publish(f"{stream.prefix}.foreign")
        rows(settings.database_url, "SELECT outbox.add(%s, 'x')", f"{stream.prefix}.x")
        wait_until_sent(settings.database_url)
    ended = [span for span in spans.get_finished_spans() if span.name.startswith("send")]
    assert [(span.attributes or {}).get("error.type") for span in ended] == [None, "rejected", None]
    assert not ended[1].status.is_ok


async def test_a_context_that_is_given_is_kept_and_async_traces_too(database: str, spans: InMemorySpanExporter) -> None:
    given = f"00-{'1' * 32}-{'2' * 16}-01"
    outbox = Outbox(traces=True)
    async with await psycopg.AsyncConnection.connect(database) as connection:
        await outbox.add_async(connection, "a.b", b"", headers={"traceparent": given})
        await outbox.add_many_async(connection, [event("a.b", b""), event("a.b", b"")])
        await connection.commit()
    headers = [
        each for (each,) in await asyncio.to_thread(rows, database, "SELECT headers FROM outbox.events ORDER BY id")
    ]
    assert headers[0] == {"traceparent": given}
    assert len({each["traceparent"] for each in headers}) == 3
    assert len(spans.get_finished_spans()) == 2


def test_without_traces_no_header_is_added(database: str) -> None:
    with psycopg.connect(database) as connection:
        Outbox().add(connection, "a.b", b"")
    assert value(database, "SELECT headers FROM outbox.events") is None


def trace_of(span: ReadableSpan) -> int:
    context = span.get_span_context()
    return context.trace_id if context else 0


def id_of(span: ReadableSpan) -> int:
    context = span.get_span_context()
    return context.span_id if context else 0


def parent_of(span: ReadableSpan) -> int | None:
    return span.parent.span_id if span.parent else None
