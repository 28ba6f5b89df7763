"""What the router answers itself: its health, its workers, the models of all, its metrics.

GET    /workers                 all of them, the counts and the settings
POST   /workers                 {"url": …}: joins
GET    /workers/URL             one (the URL as it is, or percent-encoded)
PATCH  /workers/URL             {"max_in_flight": …}: another limit; null: none
DELETE /workers/URL             drains and leaves; ?timeout=SECONDS: then the rest is cut off
POST   /add_worker?url= /remove_worker?url=     GET /list_workers /get_loads     POST /flush_cache
GET    /health /liveness /readiness /metrics /v1/models
POST   /pause /resume /sleep /wake_up …: to every worker, see `penstock.router.fan_out`
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final
from urllib.parse import parse_qs, unquote

import msgspec
import orjson

from penstock.control.control import Control
from penstock.errors import ConfigError, PenstockError
from penstock.fleet.endpoint import UNLIMITED, Endpoint
from penstock.fleet.monitor import ask
from penstock.router.fan_out import fan_out
from penstock.router.metrics import CONTENT_TYPE, exposition
from penstock.router.router import ADMIN_PATHS, Router
from penstock.router.upstream import EngineTransport
from penstock.wire.exchange import Exchange, error_body

FLUSHES: Final = ("/flush_cache", "/reset_prefix_cache")
"""The engines' routes that empty their prefix caches: SGLang's and vLLM's."""
NOT_FOUND: Final = 404

FanOut = Callable[[Exchange], Awaitable[None]]
"""Sends what it is given to every worker, and answers."""


class _Joining(msgspec.Struct):
    url: str


class _Change(msgspec.Struct):
    max_in_flight: int | None


class Admin:
    """The handler of the router's own paths. `in_flight`: of the listening server. `shared`: the admin routes
    are served on this address; else they do not exist here."""

    def __init__(
        self, router: Router, control: Control, in_flight: Callable[[], int], *, shared: bool = True
    ) -> None:
        self._router = router
        self._in_flight = in_flight
        self._shared = shared
        self.fanned_out: dict[str, FanOut] = {
            "/flush_cache": self._flush,
            "/reset_prefix_cache": self._flush,
            **fan_out(control),
        }

    def handle(self, exchange: Exchange) -> None:
        path = exchange.request.path
        administers = path.encode("utf-8", "replace") in ADMIN_PATHS or path.startswith("/workers/")
        if administers and not self._shared:
            _refuse(exchange, NOT_FOUND, "the admin routes are served on their own address")
            return
        work = self.fanned_out.get(path)
        if work is not None:
            if exchange.request.method == "POST":
                self._router.spawn(self._guarded(work(exchange), exchange))
            else:
                _refuse(exchange, 405, f"{path} takes POST")
            return
        try:
            self._answer(exchange, path)
        except ConfigError as error:
            _refuse(exchange, 400, str(error))
        except msgspec.DecodeError as error:
            _refuse(exchange, 400, f"the body is not what it should be: {error}")

    # -- routes -----------------------------------------------------------------------------------

    def _answer(self, exchange: Exchange, path: str) -> None:
        request = exchange.request
        reads = request.method in ("GET", "HEAD")
        match path:
            case "/liveness":
                exchange.respond(200, b"")
            case "/health" | "/readiness":
                self._health(exchange, ready=path == "/readiness")
            case "/metrics":
                exchange.respond(200, exposition(self._router, self._in_flight()), CONTENT_TYPE)
            case "/v1/models" if reads:
                exchange.respond(200, self._router.model_list())
            case "/workers" if reads:
                _reply(exchange, self._overview())
            case "/workers" if request.method == "POST":
                self._join(exchange, msgspec.json.decode(request.body, type=_Joining).url)
            case "/add_worker" if request.method == "POST":
                self._join(exchange, _query(exchange, "url"))
            case "/remove_worker" if request.method == "POST":
                self._leave(exchange, _query(exchange, "url"))
            case "/list_workers" if reads:
                _reply(exchange, {"urls": [endpoint.name for endpoint in self._router.fleet.endpoints]})
            case "/get_loads" if reads:
                _reply(exchange, {"workers": [_load(end) for end in self._router.fleet.endpoints]})
            case _ if path.startswith("/workers/"):
                self._worker(exchange, path.removeprefix("/workers/"))
            case _:
                _refuse(exchange, 405, f"{path} does not take {request.method}")

    def _health(self, exchange: Exchange, *, ready: bool) -> None:
        up = sum(endpoint.up for endpoint in self._router.fleet.endpoints)
        well = up > 0 and not (ready and self._router.draining)
        _reply(exchange, {"status": "ok" if well else "unavailable", "workers_up": up}, 200 if well else 503)

    def _overview(self) -> dict[str, Any]:
        router = self._router
        dispatch = router.fleet.dispatch
        return {
            "workers": [self._shown(endpoint) for endpoint in router.fleet.endpoints],
            "total": len(router.fleet.endpoints),
            "in_flight": dispatch.in_flight,
            "waiting": dispatch.waiting,
            "config": router.args.shown(),
        }

    def _shown(self, endpoint: Endpoint) -> dict[str, Any]:
        transport = endpoint.transport
        assert isinstance(transport, EngineTransport)
        return {
            "id": endpoint.name,
            "url": endpoint.name,
            "is_healthy": endpoint.up,
            "state": endpoint.health.state.name.lower(),
            "error": None if endpoint.health.error is None else str(endpoint.health.error),
            "models": None if transport.models is None else sorted(transport.models),
            "in_flight": endpoint.in_flight,
            "max_in_flight": endpoint.shown_limit,
            "connections": transport.statistics().connections,
            "responses": sum(transport.counts.responses),
            "transport_errors": transport.counts.transport_errors,
            "draining": endpoint.draining,
        }

    def _worker(self, exchange: Exchange, url: str) -> None:
        endpoint = self._find(url)
        match exchange.request.method:
            case _ if endpoint is None:
                _refuse(exchange, NOT_FOUND, f"there is no worker {url}")
            case "GET" | "HEAD":
                _reply(exchange, self._shown(endpoint))
            case "DELETE":
                self._leave(exchange, url)
            case "PATCH" | "PUT":
                limit = msgspec.json.decode(exchange.request.body, type=_Change).max_in_flight
                if limit is not None and limit < 1:
                    raise ConfigError(f"max_in_flight must be at least 1, not {limit}")
                if endpoint.limiter is not None:
                    raise ConfigError("the limit of this worker is adaptive: it finds its own")
                endpoint.limit = UNLIMITED if limit is None else limit
                self._router.fleet.dispatch.refresh(endpoint)
                _reply(exchange, self._shown(endpoint))
            case method:
                _refuse(exchange, 405, f"a worker does not take {method}")

    def _find(self, url: str) -> Endpoint | None:
        endpoints = {endpoint.name: endpoint for endpoint in self._router.fleet.endpoints}
        found = endpoints.get(url) or endpoints.get(url.rstrip("/"))
        return found or endpoints.get(f"http://{url}")

    def _join(self, exchange: Exchange, url: str) -> None:
        self._router.add(url)
        endpoint = self._find(url)
        shown = {"url": url} if endpoint is None else self._shown(endpoint)
        _reply(exchange, {"success": True, "message": f"{url} joins", **shown}, 202)

    def _leave(self, exchange: Exchange, url: str) -> None:
        endpoint = self._find(url)
        if endpoint is None:
            _refuse(exchange, NOT_FOUND, f"there is no worker {url}")
            return
        timeout = _seconds(exchange)
        self._router.spawn(self._router.leave(endpoint.name, timeout))
        _reply(exchange, {"success": True, "message": f"{endpoint.name} drains and leaves"}, 202)

    # -- to every worker --------------------------------------------------------------------------

    async def _flush(self, exchange: Exchange) -> None:
        index = self._router.fleet.dispatch.index
        if index is not None:
            index.clear()
        endpoints = self._router.fleet.endpoints
        said = await asyncio.gather(*map(self._flush_one, endpoints))
        outcome = {endpoint.name: error for endpoint, error in zip(endpoints, said, strict=True)}
        failed = {name: error for name, error in outcome.items() if error is not None}
        _reply(
            exchange, {"success": not failed, "failed": failed, "total": len(outcome)}, 502 if failed else 200
        )

    async def _flush_one(self, endpoint: Endpoint) -> str | None:
        """What went wrong, None if nothing did."""
        status = NOT_FOUND
        for path in FLUSHES:
            try:
                response = await ask(self._router.fleet, endpoint, endpoint.address.root + path, b"")
            except PenstockError as error:
                return str(error)
            status = response.status
            if status != NOT_FOUND:
                break
        return None if status < 300 else f"it answered {status}"

    async def _guarded(self, work: Awaitable[None], exchange: Exchange) -> None:
        try:
            await work
        except (ConfigError, msgspec.DecodeError) as error:
            if not exchange.started:
                _refuse(exchange, 400, str(error))
        except PenstockError as error:
            if not exchange.started:
                _refuse(exchange, 502, str(error))


def _load(endpoint: Endpoint) -> dict[str, Any]:
    return {"worker": endpoint.name, "load": endpoint.in_flight, "max_in_flight": endpoint.shown_limit}


def _query(exchange: Exchange, name: str) -> str:
    values = parse_qs(exchange.request.query).get(name)
    if not values:
        raise ConfigError(f"the query must hold {name}=…")
    return unquote(values[-1])


def _seconds(exchange: Exchange) -> float | None:
    text = parse_qs(exchange.request.query).get("timeout")
    if not text:
        return None
    try:
        seconds = float(text[-1])
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise ConfigError(f"timeout must be a number of seconds, not {text[-1]!r}")
    return seconds


def _reply(exchange: Exchange, answer: dict[str, Any], status: int = 200) -> None:
    exchange.respond(status, orjson.dumps(answer))


def _refuse(exchange: Exchange, status: int, message: str) -> None:
    exchange.respond(status, error_body(status, message))
