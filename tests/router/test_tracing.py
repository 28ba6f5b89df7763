"""OpenTelemetry spans: of what happened, in the client's trace, passed on to the engine; and none unasked."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from penstock.errors import ConfigError
from penstock.router import RouterArgs, spans, tracing
from penstock.router.inlet import Inlet
from penstock.router.server import RouterServer
from penstock.router.tracing import asked_for
from tests.router.front import Peer, engine, scenario, serves, sse
from tests.router.test_resume import ASKED, BODY, DONE, event, stream
from tests.scripted import Call, answer, http, refuse, reset, run, stall, until

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
CONTEXT = f"traceparent: 00-{TRACE}-{PARENT}-01\r\ntracestate: a=1\r\n".encode()
ENDPOINT = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """Keeps the spans in place of sending them; they are there once the router has ended."""
    exporter = InMemorySpanExporter()
    monkeypatch.setattr(spans, "exporter", lambda endpoint: exporter)
    yield exporter


def _tree(exporter: InMemorySpanExporter) -> list[tuple[ReadableSpan, list[ReadableSpan]]]:
    """Each request with its attempts, as they began; every other span would be left over."""
    finished = sorted(exporter.get_finished_spans(), key=lambda span: span.start_time or 0)
    requests = [span for span in finished if span.kind is SpanKind.SERVER]
    tree = []
    for request in requests:
        assert request.context is not None
        mine = [s for s in finished if s.parent and s.parent.span_id == request.context.span_id]
        assert all(span.kind is SpanKind.CLIENT for span in mine)
        tree.append((request, mine))
    assert sum(1 + len(mine) for _, mine in tree) == len(finished)
    return tree


def _of(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def test_a_request_and_its_attempts_are_spans_of_the_clients_trace(kept: InMemorySpanExporter) -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        status, headers, said = await peer.ask(path="/v1/chat/completions?key=secret", fields=CONTEXT)
        assert status == 200
        sizes.append(len(said))
        ids.append(headers["x-request-id"])
        assert (await peer.get("/metrics"))[0] == 200  # the router's own routes are not traced

    sizes, ids = list[int](), list[str]()
    one = engine(refuse(500), answer())
    scenario(body, one, otlp_endpoint=ENDPOINT)
    ((request, attempts),) = _tree(kept)
    assert request.name == "POST /v1/chat/completions" and request.status.status_code is StatusCode.UNSET
    assert request.context and f"{request.context.trace_id:032x}" == TRACE
    assert request.parent and f"{request.parent.span_id:016x}" == PARENT
    assert _of(request) == {
        "http.request.method": "POST",
        "url.path": "/v1/chat/completions",
        "gen_ai.operation.name": "chat",
        "server.address": "router",
        "http.response.status_code": 200,
        "http.request.body.size": 2,
        "penstock.request_id": ids[0],
        "penstock.worker": one.url,
        "penstock.attempts": 2,
        "penstock.queue_seconds": pytest.approx(0.1, abs=0.1),
    }
    first, second = attempts
    assert _of(first) == {
        "http.request.method": "POST",
        "penstock.worker": one.url,
        "penstock.request_id": ids[0],
        "server.address": "127.0.0.1",
        "server.port": one.port,
        "http.response.status_code": 500,
        "error.type": "500",
        "penstock.outcome": "retried",
    }
    assert first.status.status_code is StatusCode.ERROR
    assert _of(second)["http.request.resend_count"] == 1
    assert _of(second)["penstock.outcome"] == "relayed" and "error.type" not in _of(second)
    assert [event.name for event in second.events] == ["first byte"]
    assert first.end_time is not None and second.start_time is not None
    waited = _of(request)["penstock.queue_seconds"] - 0.005
    assert (second.start_time - first.end_time) / 1e9 >= waited, "the backoff is no part of an attempt"
    for call, attempt in zip(one.calls, attempts, strict=True):
        assert attempt.context is not None
        assert call.headers["traceparent"] == f"00-{TRACE}-{attempt.context.span_id:016x}-01"
        assert call.headers["tracestate"] == "a=1"
    assert dict(request.resource.attributes)["service.name"] == "penstock-router"
    assert "secret" not in repr([_of(span) for span in (request, *attempts)])


def test_requests_that_go_wrong_end_their_spans_too(kept: InMemorySpanExporter) -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        leaver = await Peer.to(server)
        leaver.post()
        await one.arrived(1)
        leaver.close()
        await until(lambda: server.router.statistics.cancelled)
        broken = await Peer.to(server)
        broken.post()
        assert b"engine_lost" in await broken.rest()
        assert (await peer.ask())[0] == 502  # reset
        await one.kill()
        assert (await peer.ask(path="/tokenize"))[0] == 503
        broken.close()

    one = engine(stall(), sse(b"data: 1\n\n", then=_close), reset())
    scenario(body, one, otlp_endpoint=ENDPOINT, retry_max_retries=0, queue_timeout_secs=0.2)
    gone, broken, lost, down = _tree(kept)
    ended = [
        (_of(request).get("error.type"), _of(request).get("http.response.status_code"))
        for request, _ in (gone, broken, lost, down)
    ]
    assert ended == [
        ("client_gone", None),
        ("ConnectionLost", 200),
        ("ConnectionLost", 502),
        ("ConnectFailed", 503),
    ]
    outcomes = [
        [_of(attempt)["penstock.outcome"] for attempt in attempts]
        for _, attempts in (gone, broken, lost, down)
    ]
    assert outcomes == [["client gone"], ["failed"], ["failed"], ["failed"]]
    assert down[0].name == "POST"


async def _close(call: Call) -> None:
    call.close()


def test_the_model_is_told_where_the_router_looks_for_it(kept: InMemorySpanExporter) -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        await until(lambda: server.router._several_models)
        assert (await peer.ask(b'{"model":"b"}'))[0] == 200

    one, two = engine(), engine()
    one.side["/v1/models"], two.side["/v1/models"] = serves("a"), serves("b")
    scenario(body, one, two, otlp_endpoint=ENDPOINT)
    ((request, _),) = _tree(kept)
    assert _of(request)["gen_ai.request.model"] == "b" and _of(request)["penstock.worker"] == two.url


def test_a_stream_that_is_continued_has_a_span_of_each_engine(kept: InMemorySpanExporter) -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        found, whole = await stream(peer, BODY, ASKED + CONTEXT)
        assert whole and found[-1] == "DONE"

    one = engine(sse(event("one"), then=_close), sse(event("two", finish="stop"), DONE))
    scenario(body, one, otlp_endpoint=ENDPOINT)
    ((request, attempts),) = _tree(kept)
    assert _of(request)["gen_ai.operation.name"] == "chat"
    assert _of(request)["http.response.status_code"] == 200
    assert [_of(attempt)["penstock.outcome"] for attempt in attempts] == ["retried", "relayed"]
    assert [call.headers["traceparent"].split("-")[1] for call in one.calls] == [TRACE] * 2


def test_unasked_nothing_is_traced_and_the_clients_context_passes() -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        await peer.ask(fields=CONTEXT)
        assert one.calls[0].headers["traceparent"] == f"00-{TRACE}-{PARENT}-01"
        async with tracing.tracing(server.router) as inlet:
            assert inlet is Inlet

    one = engine()
    scenario(body, one)
    code = (
        "import sys, penstock.router.server; print([n for n in sys.modules if n.startswith('opentelemetry')])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert printed.stdout.strip() == "[]"


def test_a_collector_gets_the_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        await peer.ask()

    async def main() -> None:
        async with engine(default=_accept) as collector:
            await asyncio.to_thread(_traced, collector.url)
            calls.extend(collector.calls)

    def _traced(url: str) -> None:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        scenario(body, engine())

    async def _accept(call: Call) -> None:
        await call.write(http(200, b""))

    calls = list[Call]()
    run(main())
    (call,) = calls
    assert call.path == "/v1/traces" and call.headers["content-type"] == "application/x-protobuf"
    (resource,) = ExportTraceServiceRequest.FromString(call.body).resource_spans
    names = [span.name for scope in resource.scope_spans for span in scope.spans]
    assert sorted(names) == ["POST", "POST /v1/chat/completions"]


@pytest.mark.parametrize(
    ("endpoint", "environment", "name"),
    [
        (None, {}, None),
        ("http://a", {}, "--otlp-endpoint"),
        ("http://a", {"OTEL_SDK_DISABLED": "True"}, None),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a"}, "OTEL_EXPORTER_OTLP_ENDPOINT"),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, None),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a", "OTEL_TRACES_EXPORTER": "none"}, None),
        (None, {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, None),
    ],
)
def test_who_asks_for_traces(endpoint: str | None, environment: dict[str, str], name: str | None) -> None:
    assert asked_for(endpoint, environment) == name


def test_what_cannot_be_done_is_said() -> None:
    with pytest.raises(ConfigError, match="OTEL_EXPORTER_OTLP_PROTOCOL is grpc"):
        asked_for("http://a", {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})
    with pytest.raises(ConfigError, match="otlp-endpoint must be an http or https URL"):
        RouterArgs(worker_urls=("a:1",), otlp_endpoint="collector:4317").check()


def test_without_the_extra_it_ends_with_one_sentence() -> None:
    code = (
        "import sys; sys.modules['opentelemetry'] = None; from penstock.cli import main; "
        "sys.argv[1:] = 'route --worker-urls 127.0.0.1:1 --port 0 --prometheus-port None "
        "--otlp-endpoint http://127.0.0.1:9'.split(); sys.exit(main())"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == (
        "penstock: --otlp-endpoint asks for traces, which need OpenTelemetry: pip install 'penstock[otel]', "
        "or set OTEL_SDK_DISABLED=true\n"
    )
