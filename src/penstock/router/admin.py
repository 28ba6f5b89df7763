"""What the router answers itself: its health, its workers, the models of all, its metrics.

GET    /workers                 all of them, the counts and the settings
POST   /workers                 {"url": …}: joins
GET    /workers/URL             one (the URL as it is, or percent-encoded)
PATCH  /workers, /config        {"policy": …, …}: other settings, see `penstock.router.config`; GET shows them
PATCH  /workers/URL             {"max_in_flight": …}: another limit; null: none
DELETE /workers/URL             drains and leaves; ?timeout=SECONDS: then the rest is cut off
POST   /add_worker?url= /remove_worker?url=     GET /list_workers /get_loads /v1/loads
GET    /health /health_generate /liveness /readiness /metrics /v1/models
GET    /dashboard               the page, and /dashboard/data its numbers
POST   /finish_session          SkyRL's word at the end of a trajectory: nothing is kept of a session
POST   /pause /resume /sleep /update_weights …: to every worker, see `penstock.router.fan_out`
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final
from urllib.parse import parse_qs

import msgspec
import orjson

from penstock.control.control import Control
from penstock.errors import ConfigError, PenstockError
from penstock.fleet.endpoint import UNLIMITED, Endpoint
from penstock.router import dashboard
from penstock.router.broadcast import Broadcast
from penstock.router.config import changed
from penstock.router.fan_out import EMPTYING, REMEMBERED, STREAMED, fan_out
from penstock.router.inlet import Inlet
from penstock.router.metrics import CONTENT_TYPE, exposition
from penstock.router.relay import Relay
from penstock.router.router import ADMIN_PATHS, Router
from penstock.router.snapshot import snapshot
from penstock.router.upstream import EngineTransport
from penstock.wire.exchange import Exchange, error_body

NOT_FOUND: Final = 404


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
        self._fanned_out = fan_out(control)
        own_address = router.args.admin_port is not None
        self._scattered = router.args.processes > 1 and not own_address
        """Requests of one client meet now this process, now that."""
        if not (own_address or self._scattered):
            router.broadcast = partial(_broadcast, control)

    def handle(self, exchange: Exchange) -> None:
        path = exchange.request.path
        administers = (
            path.encode("utf-8", "replace") in ADMIN_PATHS
            or path.startswith("/workers/")
            or path == dashboard.PAGE
        )
        if administers and not self._shared:
            _refuse(exchange, NOT_FOUND, "the admin routes are served on their own address")
            return
        if path in self._fanned_out:
            method, work = self._fanned_out[path]
            if exchange.request.method != method:
                _refuse(exchange, 405, f"{path} takes {method}")
                return
            if path in REMEMBERED and self._scattered:
                _refuse(exchange, 501, f"with several processes {path} is served on --admin-port only")
                return
            if path in EMPTYING:
                self._router.forget_prefixes()
            self._router.spawn(self._guarded(work(exchange), exchange))
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
            case dashboard.PAGE if reads:
                dashboard.show_page(exchange)
            case dashboard.DATA if reads:
                dashboard.show_data(exchange, snapshot(self._router, self._in_flight()))
            case "/v1/models" if reads:
                exchange.respond(200, self._router.model_list())
            case "/workers" if reads:
                _reply(exchange, self._overview())
            case "/config" if reads:
                _reply(exchange, self._router.args.shown())
            case "/workers" | "/config" if request.method == "PATCH":
                self._router.reconfigure(changed(self._router.args, request.body))
                _reply(exchange, self._router.args.shown())
            case "/workers" if request.method == "POST":
                self._join(exchange, msgspec.json.decode(request.body, type=_Joining).url)
            case "/health_generate" if reads:
                self._health(exchange, ready=False)
            case "/add_worker" if request.method == "POST":
                self._join(exchange, _query(exchange, "url"))
            case "/remove_worker" if request.method == "POST":
                self._leave(exchange, _query(exchange, "url"))
            case "/finish_session" if request.method == "POST":
                _reply(exchange, {"success": True})
            case "/list_workers" if reads:
                _reply(exchange, {"urls": [endpoint.name for endpoint in self._router.fleet.endpoints]})
            case "/get_loads" | "/v1/loads" if reads:
                _reply(exchange, {"workers": [_load(end) for end in self._router.fleet.endpoints]})
            case _ if path.startswith("/workers/"):
                self._worker(exchange, path.removeprefix("/workers/"))
            case _ if not self._router.answers(path.encode("utf-8", "replace")):
                _refuse(exchange, NOT_FOUND, "requests are not relayed on this address")
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

    async def _guarded(self, work: Awaitable[None], exchange: Exchange) -> None:
        try:
            await work
        except (ConfigError, msgspec.DecodeError) as error:
            if not exchange.started:
                _refuse(exchange, 400, str(error))
        except PenstockError as error:
            if not exchange.started:
                _refuse(exchange, 502, str(error))


def _broadcast(control: Control, inlet: Inlet, request: Relay) -> Relay | None:
    """What sends a body that is too large to be held to all workers; None: this path takes none."""
    kind = STREAMED.get(request.path)
    return None if kind is None or request.method != b"POST" else Broadcast(inlet, request, control, kind)


def _load(endpoint: Endpoint) -> dict[str, Any]:
    return {"worker": endpoint.name, "load": endpoint.in_flight, "max_in_flight": endpoint.shown_limit}


def _query(exchange: Exchange, name: str) -> str:
    values = parse_qs(exchange.request.query).get(name)
    if not values:
        raise ConfigError(f"the query must hold {name}=…")
    return values[-1]


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
