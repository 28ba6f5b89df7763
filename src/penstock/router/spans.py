"""OpenTelemetry spans of relayed requests: one of the request, under it one of each attempt.

It guarantees:
- a request's trace is the one its client's `traceparent` names, else a new one; each attempt takes its own
  span's `traceparent` to the engine, which may add to it;
- every span that is begun is ended once, whatever becomes of the request;
- nothing of a body, a query or a key is in a span.

Names and attributes are those of OpenTelemetry's semantic conventions for HTTP and generative AI; what these
do not have begins with `penstock.`. Needs the extra `otel`.
"""

from __future__ import annotations

import os
from typing import Final

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from penstock import __version__
from penstock.continuation import Request
from penstock.errors import PenstockError
from penstock.fleet.endpoint import Endpoint
from penstock.router.dispatch import RouterAttempts
from penstock.router.inlet import Inlet
from penstock.router.relay import Relay
from penstock.router.requests import RequestHead
from penstock.router.resume import ResumedStream
from penstock.router.router import Router
from penstock.router.upstream import EngineConnection, EngineTransport
from penstock.wire.exchange import Exchange
from penstock.wire.server import HttpServer

CLIENT_GONE: Final = 499
"""Status by which a request is accounted whose client went away."""
OPERATIONS: Final = {
    b"/v1/chat/completions": "chat",
    b"/v1/completions": "text_completion",
    b"/v1/embeddings": "embeddings",
}
"""`gen_ai.operation.name` by path; a span is named after these paths alone, so that names stay few."""

_CONTEXT_FIELDS: Final = frozenset({b"traceparent", b"tracestate"})
_PROPAGATOR: Final = TraceContextTextMapPropagator()


def provider(endpoint: str | None) -> TracerProvider:
    """What keeps and sends spans; a thread of its own does. Sampling is as OTEL_TRACES_SAMPLER says."""
    named = "OTEL_SERVICE_NAME" in os.environ or "service.name=" in os.environ.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    )
    own = {} if named else {"service.name": "penstock-router"}
    resource = Resource.create({**own, "service.version": __version__})
    made = TracerProvider(resource=resource, shutdown_on_exit=False)
    made.add_span_processor(BatchSpanProcessor(exporter(endpoint)))
    return made


def exporter(endpoint: str | None) -> SpanExporter:
    """To a collector's base URL, as OTEL_EXPORTER_OTLP_ENDPOINT has it; None: the environment says where."""
    return OTLPSpanExporter(None if endpoint is None else endpoint.rstrip("/") + "/v1/traces")


class Tracer:
    """Makes what a router needs to trace its requests."""

    def __init__(self, provider: TracerProvider) -> None:
        self._tracer = provider.get_tracer("penstock.router", __version__)

    def inlet(self, server: HttpServer, router: Router) -> Inlet:
        """A client's connection."""
        return TracedInlet(server, router, self)

    def resumed(self, router: Router, relay: Relay, request: Request, exchange: Exchange) -> ResumedStream:
        """A stream that is to survive its engine."""
        return TracedStream(router, relay, request, exchange, self.trace(relay))

    def trace(self, relay: Relay) -> Trace:
        """Of a request that begins."""
        return Trace(self, relay)

    def begin(self, name: str, kind: SpanKind, context: Context) -> Span:
        return self._tracer.start_span(name, context, kind, record_exception=False)


class Trace:
    """The spans of one request. Takes the client's trace context out of the fields that pass."""

    def __init__(self, tracer: Tracer, relay: Relay) -> None:
        self._tracer = tracer
        self._relay = relay
        self._fields: list[bytes] = []
        self._attempt: Span | None = None
        self._error: str | None = None
        given: dict[str, str] = {}
        fields = relay.fields
        for at in range(0, len(fields), 4):
            name = fields[at].lower()
            if name in _CONTEXT_FIELDS:
                given[name.decode("ascii")] = fields[at + 2].decode("latin-1")
            else:
                self._fields += fields[at : at + 4]
        method = self._method = relay.method.decode("ascii")
        path = relay.path.decode("latin-1")
        operation = OPERATIONS.get(relay.path)
        title = f"{method} {path}" if operation is not None else method
        span = self._span = tracer.begin(title, SpanKind.SERVER, _PROPAGATOR.extract(given, Context()))
        self._context = set_span_in_context(span, Context())
        if span.is_recording():
            span.set_attribute("http.request.method", method)
            span.set_attribute("url.path", path)
            if operation is not None:
                span.set_attribute("gen_ai.operation.name", operation)
            if relay.host is not None:
                _set_address(span, relay.host.decode("latin-1"))

    def attempt(self, endpoint: Endpoint, attempts: RouterAttempts) -> list[bytes]:
        """An attempt begins; the fields to send with it."""
        self.attempt_ended("retried")
        span = self._attempt = self._tracer.begin(self._method, SpanKind.CLIENT, self._context)
        number = attempts.number
        if span.is_recording():
            span.set_attribute("http.request.method", self._method)
            span.set_attribute("penstock.worker", endpoint.name)
            span.set_attribute("penstock.request_id", attempts.request_id)
            _set_address(span, endpoint.address.authority)
            if number > 1:
                span.set_attribute("http.request.resend_count", number - 1)
        context: dict[str, str] = {}
        _PROPAGATOR.inject(context, set_span_in_context(span, Context()))
        fields = list(self._fields)
        for name, value in context.items():
            fields += (name.encode("ascii"), b": ", value.encode("latin-1"), b"\r\n")
        return fields

    def headed(self, status: int) -> None:
        """The head of the attempt's response has come."""
        span = self._attempt
        if span is not None:
            span.add_event("first byte")
            span.set_attribute("http.response.status_code", status)
            self._error = str(status) if status >= 400 else None

    def failed(self, error: PenstockError) -> None:
        """The attempt ends with an error."""
        self._error = type(error).__name__

    def attempt_ended(self, outcome: str) -> None:
        """The attempt is over, if there is one under way; `outcome`: what became of its response."""
        span, self._attempt = self._attempt, None
        if span is None:
            return
        span.set_attribute("penstock.outcome", outcome)
        if self._error is not None:
            span.set_attribute("error.type", self._error)
            span.set_status(StatusCode.ERROR)
        span.end()

    def ended(self, status: int, *, begun: bool) -> None:
        """The request is over. `status`: as it is accounted; `begun`: the client got some of a response."""
        span, relay, attempts = self._span, self._relay, self._relay.attempts
        gone, sent = status == CLIENT_GONE, begun and relay.status or status
        failed = status >= 500 and self._error != str(status)
        self.attempt_ended("client gone" if gone else "failed" if failed else "relayed")
        if span.is_recording():
            if begun or not gone:
                span.set_attribute("http.response.status_code", sent)
            if gone:
                span.set_attribute("error.type", "client_gone")
            elif status >= 500:
                span.set_attribute("error.type", self._error or str(status))
                span.set_status(StatusCode.ERROR)
            span.set_attribute("penstock.request_id", relay.id.decode("latin-1"))
            span.set_attribute("http.request.body.size", relay.size)
            if attempts is not None and attempts.queued:
                span.set_attribute("penstock.queue_seconds", attempts.queued)
            if relay.worker is not None:
                span.set_attribute("penstock.worker", relay.worker.name)
            if attempts is not None:
                span.set_attribute("penstock.attempts", attempts.number)
                if attempts.model is not None:
                    span.set_attribute("gen_ai.request.model", attempts.model)
        span.end()


class TracedInlet(Inlet):
    """A client's connection whose requests are traced."""

    __slots__ = ("tracer",)

    def __init__(self, server: HttpServer, router: Router, tracer: Tracer) -> None:
        super().__init__(server, router)
        self.tracer = tracer

    def _new_relay(self, head: RequestHead, length: int | None, id: bytes | None) -> Relay:
        return TracedRelay(self, head, length, id)


class TracedRelay(Relay):
    """A relay that tells its trace what happens to it."""

    __slots__ = ("_trace", "_tracer")

    def __init__(
        self, inlet: TracedInlet, head: RequestHead, length: int | None, request_id: bytes | None
    ) -> None:
        super().__init__(inlet, head, length, request_id)
        self._tracer = inlet.tracer
        self._trace: Trace | None = None

    def start(self) -> None:
        self._trace = self._tracer.trace(self)
        super().start()

    def _send(self, transport: EngineTransport, connection: EngineConnection) -> None:
        trace, attempts = self._trace, self.attempts
        assert trace is not None and attempts is not None and attempts.endpoint is not None
        self.fields = trace.attempt(attempts.endpoint, attempts)
        super()._send(transport, connection)

    def headed(self, connection: EngineConnection) -> None:
        assert self._trace is not None
        self._trace.headed(connection.status)
        super().headed(connection)

    def unreached(self, endpoint: Endpoint, error: PenstockError) -> None:
        assert self._trace is not None and self.attempts is not None
        self._trace.attempt(endpoint, self.attempts)
        self._trace.failed(error)

    def ended(self) -> None:
        assert self._trace is not None
        super().ended()
        self._trace.attempt_ended("retried")  # unless the request is over with it

    def failed(self, error: PenstockError) -> None:
        assert self._trace is not None
        self._trace.failed(error)
        super().failed(error)
        self._trace.attempt_ended("retried")

    def _account(self, status: int) -> None:
        if self._trace is not None:
            self._trace.ended(status, begun=self.begun)
        super()._account(status)


class TracedStream(ResumedStream):
    """The same for a stream that survives its engine: what it is continued by is an attempt too."""

    def __init__(
        self, router: Router, relay: Relay, request: Request, exchange: Exchange, trace: Trace
    ) -> None:
        super().__init__(router, relay, request, exchange)
        self._trace = trace

    async def run(self) -> None:
        try:
            await super().run()
        finally:
            self._trace.ended(self._status, begun=self._exchange.started)

    def _head(self, endpoint: Endpoint, route: str, attempts: RouterAttempts) -> bytes:
        self._relay.fields = self._trace.attempt(endpoint, attempts)
        return super()._head(endpoint, route, attempts)


def _set_address(span: Span, authority: str) -> None:
    """`server.address` and `server.port` from host and port as a Host field has them."""
    host, colon, port = authority.rpartition(":")
    if colon and port.isdecimal():
        span.set_attribute("server.address", host)
        span.set_attribute("server.port", int(port))
    else:
        span.set_attribute("server.address", authority)
