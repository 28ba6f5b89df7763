"""Control routes that reach every worker: the paths of vLLM, answered with an outcome of each worker.

What is asked of one engine only would leave the fleet in two states, so that none of these paths is relayed.
The answer is 200 where all workers did it, else 502, with what went wrong at which.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final
from urllib.parse import parse_qs

import msgspec
import orjson

from penstock.control.control import Control, Outcomes
from penstock.errors import ConfigError, ControlFailed
from penstock.wire.exchange import Exchange, Request, error_body

Work = Callable[[Control, Request], Awaitable[Outcomes]]

REFUSED: Final = (
    "/init_weight_transfer_engine",
    "/start_weight_update",
    "/finish_weight_update",
    "/update_weights",
    "/update_weights_from_tensor",
    "/update_weights_from_distributed",
    "/init_weights_update_group",
)
"""Steps of weight updates that only mean something at one engine: they are the trainer's to send to each."""


class _FromDisk(msgspec.Struct):
    model_path: str


async def _pause(control: Control, request: Request) -> Outcomes:
    query = _query(request)
    mode: Any = query.get("mode", "keep")
    return await control.pause(mode, clear_cache=query.get("clear_cache", "true").lower() != "false")


async def _resume(control: Control, request: Request) -> Outcomes:
    return await control.resume()


async def _sleep(control: Control, request: Request) -> Outcomes:
    level = _query(request).get("level", "1")
    if not level.isdecimal():
        raise ConfigError(f"the sleep level must be 0, 1 or 2, not {level!r}")
    return await control.sleep(int(level))


async def _wake_up(control: Control, request: Request) -> Outcomes:
    return await control.wake_up(parse_qs(request.query).get("tags", []))


async def _abort(control: Control, request: Request) -> Outcomes:
    return await control.call("POST", "/abort_requests", request.body)


async def _collective_rpc(control: Control, request: Request) -> Outcomes:
    return await control.call("POST", "/collective_rpc", request.body)


async def _from_disk(control: Control, request: Request) -> Outcomes:
    path = msgspec.json.decode(request.body, type=_FromDisk).model_path
    return (await control.reload_weights(path)).outcomes


ROUTES: Final[Mapping[str, Work]] = {
    "/pause": _pause,
    "/resume": _resume,
    "/sleep": _sleep,
    "/wake_up": _wake_up,
    "/abort_requests": _abort,
    "/collective_rpc": _collective_rpc,
    "/update_weights_from_disk": _from_disk,
}
PATHS: Final = frozenset(path.encode() for path in (*ROUTES, *REFUSED))


def fan_out(control: Control) -> dict[str, Callable[[Exchange], Awaitable[None]]]:
    """Handlers by path."""

    def handler(work: Work) -> Callable[[Exchange], Awaitable[None]]:
        async def handle(exchange: Exchange) -> None:
            try:
                outcomes = await work(control, exchange.request)
            except ControlFailed as error:
                outcomes = dict(error.outcomes)
            failed = [name for name, outcome in outcomes.items() if not outcome.ok]
            results = {name: _shown(outcome) for name, outcome in outcomes.items()}
            answer = {"success": not failed, "failed": failed, "results": results}
            exchange.respond(502 if failed else 200, orjson.dumps(answer, default=str))

        return handle

    async def refuse(exchange: Exchange) -> None:
        message = f"{exchange.request.path} is for one engine: send it to each worker, not to the router"
        exchange.respond(501, error_body(501, message))

    return {path: handler(work) for path, work in ROUTES.items()} | dict.fromkeys(REFUSED, refuse)


def _shown(outcome: Any) -> dict[str, Any]:
    error = None if outcome.ok else str(outcome.error)
    return {"ok": outcome.ok, "value": outcome.value, "error": error, "seconds": round(outcome.seconds, 6)}


def _query(request: Request) -> dict[str, str]:
    return {name: values[-1] for name, values in parse_qs(request.query).items()}
