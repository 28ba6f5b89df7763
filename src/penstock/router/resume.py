"""A stream that survives its engine: what one has begun is continued by another, and the client sees one.

Asked for with `X-Penstock-Resume: 1`, or for all streams by `--resume-streams`. It guarantees:
- while nothing fails, the engine's events pass as they are, but for the fields asked for only to be able to
  go on (token ids, usage);
- what a second engine adds comes in events of the first one's form, under its id, and tokens are neither lost
  nor doubled (`penstock.continuation`);
- a stream that cannot be continued ends with an error event and without its end.

Streams of several choices, with logprobs, tools or a grammar are relayed as all others.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import orjson

from penstock.continuation import CHAT, TEXT, Request, may_continue
from penstock.errors import PenstockError, ResponseError
from penstock.fleet.endpoint import Endpoint
from penstock.router.dispatch import RouterAttempts
from penstock.router.refusals import Refused, refused_for
from penstock.router.relay import Relay
from penstock.router.statistics import StreamCounting
from penstock.router.upstream import EngineTransport
from penstock.sample import Delta
from penstock.stream import SampleStream
from penstock.wire.exchange import Exchange, error_body
from penstock.wire.openai_stream import Partial

if TYPE_CHECKING:
    from penstock.router.router import Router

ROUTES: Final = {b"/v1/chat/completions": CHAT, b"/v1/completions": TEXT}
_UNCONTINUED: Final = ("logprobs", "top_logprobs", "prompt_logprobs")
_NO: Final = (b"0", b"false")


def resumable(request: Relay, *, always: bool) -> Request | None:
    """The request as a continuation needs it; None: relay it as it is."""
    route = ROUTES.get(request.path)
    wanted = always if request.resume is None else request.resume.strip().lower() not in _NO
    if not wanted or route is None or request.method != b"POST" or request.encoded or not request.complete:
        return None
    try:
        fields = orjson.loads(b"".join(request.body))
    except orjson.JSONDecodeError:
        return None
    if not isinstance(fields, dict) or fields.get("stream") is not True or fields.get("n") not in (None, 1):
        return None
    if any(fields.get(name) not in (None, False) for name in _UNCONTINUED):
        return None
    prompt = fields.get("messages" if route == CHAT else "prompt")
    if not isinstance(prompt, str) and (not isinstance(prompt, list) or not prompt):
        return None
    if route == TEXT and not isinstance(prompt, str) and not isinstance(prompt[0], int):
        return None
    found = Request(route, fields)
    return found if may_continue(found) else None


class _Recorder(Partial):
    """Keeps the events as they came."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[bytes] = []
        self.received = 0
        """Bytes of events, of all engines."""

    def feed(self, data: bytes) -> Delta | None:
        delta = super().feed(data)
        self.received += len(data)
        self.events.append(data)
        return delta


class _Recorded(SampleStream):
    """A stream whose events can be had besides its deltas."""

    continued = False
    """What comes now comes from another engine than the beginning."""

    @property
    def recorder(self) -> _Recorder:
        assert isinstance(self._partial, _Recorder)
        return self._partial

    async def _next_request(self, endpoint: Endpoint) -> Request:
        request = await super()._next_request(endpoint)
        if not isinstance(self._partial, _Recorder):
            self._partial = _Recorder()
        self._partial.events.clear()
        self.continued = bool(self._partial.chunks)
        return request


class ResumedStream:
    """One such stream, from the exchange with its client."""

    def __init__(self, router: Router, relay: Relay, request: Request, exchange: Exchange) -> None:
        self._router = router
        self._relay = relay
        self._request = request
        self._exchange = exchange
        given = request.fields.get("stream_options")
        options: dict[str, Any] = given if isinstance(given, dict) else {}
        self._wants_usage = bool(options.get("include_usage"))
        self._wants_all_usage = self._wants_usage and bool(options.get("continuous_usage_stats"))
        self._wants_ids = bool(request.fields.get("return_token_ids"))
        self._template: dict[str, Any] = {}
        self._resumed = False
        self._status = 200
        self._sent = 0
        """Bytes of events."""
        self._counting = StreamCounting(router.clock)

    async def run(self) -> None:
        """To its end, whatever that is."""
        exchange, router = self._exchange, self._router
        task = asyncio.current_task()
        assert task is not None
        exchange.on_disconnect = partial(_cancel, task)
        router.statistics.requests += 1
        arrived = router.clock()
        try:
            attempts = router.attempts(self._relay, bounded=True)
            self._relay.attempts = attempts
            await self._pass_on(attempts)
        except Refused as refusal:
            self._refuse(refusal.status, error_body(refusal.status, str(refusal)), refusal.retry_after)
        except PenstockError as error:
            self._fail(error)
        except asyncio.CancelledError:
            router.statistics.cancelled += 1
            self._status = 499
            raise
        finally:
            if router.access_log is not None:
                router.access_log(self._relay, self._status, self._sent, arrived)

    async def _pass_on(self, attempts: RouterAttempts) -> None:
        exchange = self._exchange

        def head(endpoint: Endpoint, route: str) -> bytes:
            return self._head(endpoint, route, attempts)

        async with _Recorded(self._router.fleet, attempts, self._request, head, resume=True) as stream:
            async for delta in stream:
                self._counting.arrived(stream.recorder.received)
                if stream.continued:
                    self._continue(stream, delta)
                else:
                    self._forward(stream.recorder)
                await exchange.drain()
            self._counting.ended()
            if not stream.continued:
                self._forward(stream.recorder)
            elif self._wants_usage:
                usage = stream.sample.usage
                total = usage.prompt_tokens + usage.completion_tokens
                shown = {
                    "prompt_tokens": usage.prompt_tokens,
                    "completion_tokens": usage.completion_tokens,
                    "total_tokens": total,
                }
                self._send({**self._template, "choices": [], "usage": shown})
            self._begin()
            exchange.send(b"data: [DONE]\n\n")
            exchange.end()

    def _head(self, endpoint: Endpoint, route: str, attempts: RouterAttempts) -> bytes:
        transport = endpoint.transport
        assert isinstance(transport, EngineTransport)
        self._relay.worker = endpoint
        self._counting.begin(transport.counts)
        path = (endpoint.address.api + route).encode("ascii")
        id = attempts.request_id.encode("latin-1")
        fields = b"".join(self._relay.fields) + self._router.own_fields
        return b"POST %s%s%sx-request-id: %s\r\n" % (path, transport.host_line, fields, id)

    # -- to the client ----------------------------------------------------------------------------

    def _begin(self) -> None:
        if not self._exchange.started:
            self._relay.headed_at = self._router.clock()
            id = self._relay.id.decode("latin-1")
            self._exchange.start(200, "text/event-stream; charset=utf-8", {"x-request-id": id})

    def _send(self, event: dict[str, Any]) -> None:
        self._begin()
        data = b"data: %s\n\n" % orjson.dumps(event)
        self._sent += len(data)
        self._exchange.send(data)

    def _forward(self, recorder: _Recorder) -> None:
        """Events of the first engine, without what only the router asked for."""
        for data in recorder.events:
            event = orjson.loads(data)
            choices = event.get("choices") or []
            if not self._wants_usage:
                event.pop("usage", None)
                if not choices:
                    continue
            elif choices and not self._wants_all_usage and "usage" in event:
                event["usage"] = None
            if not self._wants_ids:
                event.pop("prompt_token_ids", None)
                for choice in choices:
                    choice.pop("token_ids", None)
                    choice.pop("prompt_token_ids", None)
            self._template = {**event, "choices": [], "usage": None}
            if not self._wants_usage:
                del self._template["usage"]
            self._send(event)
        recorder.events.clear()

    def _continue(self, stream: _Recorded, delta: Delta) -> None:
        """What another engine adds, in the form of the first one's events."""
        recorder = stream.recorder
        if not self._resumed:
            self._resumed = True
            self._router.statistics.resumed += 1
        choice: dict[str, Any] = {"index": 0}
        if self._request.route == CHAT:
            text = {"content": delta.text} if delta.text or not delta.reasoning else {}
            choice["delta"] = {**text, **({"reasoning": delta.reasoning} if delta.reasoning else {})}
        else:
            choice["text"] = delta.text
        choice["logprobs"] = None
        choice["finish_reason"] = recorder.finish_reason
        if recorder.finished:
            choice["stop_reason"] = recorder.stop_reason
        if self._wants_ids:
            choice["token_ids"] = delta.token_ids
        self._send({**self._template, "choices": [choice]})

    def _fail(self, error: PenstockError) -> None:
        exchange = self._exchange
        self._counting.failed()
        if not exchange.started and not isinstance(error, ResponseError):
            self._router.statistics.given_up += 1
        if exchange.started:
            if not exchange.disconnected:
                self._router.statistics.broken += 1
                self._status = 502
                exchange.send(b"event: error\ndata: %s\n\n" % error_body(502, str(error), "engine_lost"))
                exchange.break_off()
        elif isinstance(error, ResponseError):
            retry_after = None if error.retry_after is None else int(error.retry_after)
            self._refuse(error.status, error_body(error.status, error.message, error.type), retry_after)
        else:
            refused = refused_for(error)
            self._refuse(refused.status, error_body(refused.status, str(refused)), refused.retry_after)

    def _refuse(self, status: int, body: bytes, retry_after: int | None) -> None:
        self._status = status
        if not self._exchange.started:
            headers = {"x-request-id": self._relay.id.decode("latin-1")}
            if retry_after is not None:
                headers["retry-after"] = str(retry_after)
            self._exchange.respond(status, body, headers=headers)


def _cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()
