"""Control routes that reach every worker, under vLLM's and SGLang's names: an outcome of each in one answer.

What is asked of one engine only would leave the fleet in two states, so that none of these paths is relayed.
It guarantees:
- 200 means that every worker did it. Else it is 502, or the workers' own status where all refused alike, with
  what went wrong at which;
- beside the results stand the fields that all workers answered alike: whoever expects one engine reads them
  as one engine's;
- with `?all_or_nothing=1` (or X-Penstock-All-Or-Nothing: 1) what one refused is undone on the others, as
  `penstock.control` does.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, Final, Literal, TypeVar
from urllib.parse import parse_qs, parse_qsl, urlencode

import msgspec
import orjson

from penstock.control.control import Control, Outcomes
from penstock.control.dialect import KV_CACHE, WEIGHTS
from penstock.control.engine import Outcome
from penstock.control.steps import JSON, Call, Kind
from penstock.errors import ConfigError, ControlFailed, PenstockError, ResponseError
from penstock.wire.exchange import Exchange, Request

ALL_OR_NOTHING: Final = "all_or_nothing"
ALL_OR_NOTHING_HEADER: Final = "x-penstock-all-or-nothing"
_YES: Final = frozenset({"", "1", "true", "yes", "on"})
CUDA_GRAPH: Final = "cuda_graph"

T = TypeVar("T")

Work = Callable[[Control, Request, bool], Awaitable[Outcomes]]
"""Takes the request, and whether it is to be all or nothing."""


class _FromDisk(msgspec.Struct):
    model_path: str
    weight_version: str | int | None = None


class _Tags(msgspec.Struct):
    tags: list[str] | None = None


class _Mode(msgspec.Struct):
    mode: Literal["abort", "retract", "in_place"] = "abort"


class _Abort(msgspec.Struct):
    rid: str | list[str] = ""
    abort_all: bool = False
    request_ids: list[str] = []


class _Rpc(msgspec.Struct):
    method: str = ""
    kwargs: dict[str, Any] = {}


# -- what steers generation -----------------------------------------------------------------------


async def _pause(control: Control, request: Request, whole: bool) -> Outcomes:
    query = _query(request)
    mode: Any = query.get("mode", "abort")
    clear = query.get("clear_cache", "true").lower() != "false"
    return await control.pause(mode, clear_cache=clear, all_or_nothing=whole)


async def _pause_generation(control: Control, request: Request, whole: bool) -> Outcomes:
    mode = _read(request, _Mode).mode
    if mode == "abort":
        return await control.pause("abort", clear_cache=False, all_or_nothing=whole)
    return await control.pause("keep", clear_cache=mode == "retract", all_or_nothing=whole)


async def _resume(control: Control, request: Request, whole: bool) -> Outcomes:
    return await control.resume(all_or_nothing=whole)


async def _sleep(control: Control, request: Request, whole: bool) -> Outcomes:
    level = _query(request).get("level", "1")
    if not level.isdecimal():
        raise ConfigError(f"the sleep level must be 0, 1 or 2, not {level!r}")
    return await control.sleep(int(level), all_or_nothing=whole)


async def _release(control: Control, request: Request, whole: bool) -> Outcomes:
    tags = set(_read(request, _Tags).tags or (KV_CACHE, WEIGHTS)) - {CUDA_GRAPH}
    if tags not in ({KV_CACHE}, {KV_CACHE, WEIGHTS}):
        raise ConfigError("what can be released is 'kv_cache', or 'kv_cache' and 'weights'")
    return await control.sleep(1 if tags == {KV_CACHE} else 2, all_or_nothing=whole)


async def _wake_up(control: Control, request: Request, whole: bool) -> Outcomes:
    return await control.wake_up(parse_qs(request.query).get("tags", []), all_or_nothing=whole)


async def _take_back(control: Control, request: Request, whole: bool) -> Outcomes:
    given = _read(request, _Tags).tags or []
    tags = [tag for tag in given if tag != CUDA_GRAPH]
    if given and not tags:
        raise ConfigError("cuda_graph cannot be taken back without 'weights' or 'kv_cache'")
    return await control.wake_up(tags, all_or_nothing=whole)


async def _reset_cache(control: Control, request: Request, whole: bool) -> Outcomes:
    if rest := _rest(request):
        return await control.call("POST", f"{request.path}?{rest}", request.body, all_or_nothing=whole)
    return await control.reset_prefix_cache(all_or_nothing=whole)


async def _abort(control: Control, request: Request, whole: bool) -> Outcomes:
    """All of it by each engine's own route; some of it under the names as they came."""
    asked = _read(request, _Abort)
    if asked.request_ids or (asked.rid and not asked.abort_all):
        return await _as_it_stands(control, request, whole)
    return await control.abort(all_or_nothing=whole)


# -- weights --------------------------------------------------------------------------------------


async def _from_disk(control: Control, request: Request, whole: bool) -> Outcomes:
    asked = _read(request, _FromDisk)
    version = asked.weight_version
    if version is not None and not str(version).isdecimal():
        raise ConfigError(f"weight_version must be a whole number from 0 on, not {version!r}")
    number = None if version is None else int(version)
    update = await control.reload_weights(asked.model_path, number, all_or_nothing=whole)
    return update.outcomes


async def _collective_rpc(control: Control, request: Request, whole: bool) -> Outcomes:
    """Any method; the one that replaces weights is an update, so that it is known who has which."""
    asked = _read(request, _Rpc)
    if asked.method != "reload_weights":
        return await _as_it_stands(control, request, whole)
    path = asked.kwargs.get("weights_path")
    if isinstance(path, str) and len(asked.kwargs) == 1:
        update = await control.reload_weights(path, pause=None, all_or_nothing=whole)
        return update.outcomes
    return await _step("commit", control, request, whole)


async def _step(kind: Kind, control: Control, request: Request, whole: bool) -> Outcomes:
    return await control.step(kind, call_of(request), all_or_nothing=whole)


def call_of(request: Request) -> Call:
    return Call(_target(request), request.body, request.headers.get("content-type", JSON))


# -- the rest -------------------------------------------------------------------------------------


async def _as_it_stands(control: Control, request: Request, whole: bool) -> Outcomes:
    return await control.call(request.method, _target(request), request.body, all_or_nothing=whole)


async def _versions(control: Control, request: Request, whole: bool) -> Outcomes:
    outcomes = await control.weight_versions()
    return {name: _with(one, "weight_version") for name, one in outcomes.items()}


async def _world_sizes(control: Control, request: Request, whole: bool) -> Outcomes:
    outcomes = await control.world_sizes()
    return {name: _with(one, "world_size") for name, one in outcomes.items()}


def _with(one: Outcome, field: str) -> Outcome:
    value = str(one.value) if field == "weight_version" and one.value is not None else one.value
    return msgspec.structs.replace(one, value={field: value}) if one.ok else one


POSTS: Final[Mapping[str, Work]] = {
    "/pause": _pause,
    "/pause_generation": _pause_generation,
    "/resume": _resume,
    "/continue_generation": _resume,
    "/sleep": _sleep,
    "/release_memory_occupation": _release,
    "/wake_up": _wake_up,
    "/resume_memory_occupation": _take_back,
    "/reset_prefix_cache": _reset_cache,
    "/flush_cache": _reset_cache,
    "/abort_requests": _abort,
    "/abort_request": _abort,
    "/collective_rpc": _collective_rpc,
    "/update_weights_from_disk": _from_disk,
    **{path: partial(_step, "join") for path in (
        "/init_weight_transfer_engine",
        "/shutdown_weight_transfer_engine",
        "/init_weights_update_group",
        "/destroy_weights_update_group",
    )},
    **{path: partial(_step, "begin") for path in (
        "/start_weight_update",
        "/start_draft_weight_update",
        "/begin_weight_update",
    )},
    "/update_weights": partial(_step, "transfer"),
    **{path: partial(_step, "place") for path in (
        "/update_weights_from_tensor",
        "/update_weights_from_distributed",
        "/update_weights_from_ipc",
    )},
    "/finish_weight_update": partial(_step, "commit"),
    "/end_weight_update": partial(_step, "commit"),
    "/update_weight_version": partial(_step, "label"),
    "/abort_weight_update": partial(_step, "abort"),
    **dict.fromkeys(
        (
            "/weight_checker",
            "/weights_checker",
            "/reset_mm_cache",
            "/reset_encoder_cache",
            "/start_profile",
            "/stop_profile",
            "/v1/load_lora_adapter",
            "/v1/unload_lora_adapter",
            "/load_lora_adapter",
            "/unload_lora_adapter",
        ),
        _as_it_stands,
    ),
}  # fmt: skip
GETS: Final[Mapping[str, Work]] = {
    "/is_paused": _as_it_stands,
    "/is_sleeping": _as_it_stands,
    "/get_world_size": _world_sizes,
    "/weight_info": _versions,
    "/get_weight_version": _versions,
}
INFO_GETS: Final[Mapping[str, Work]] = dict.fromkeys(
    ("/model_info", "/get_model_info", "/server_info", "/get_server_info"), _as_it_stands
)
"""What an engine tells any client of itself."""
STREAMED: Final[Mapping[bytes, Kind]] = {
    b"/update_weights": "transfer",
    b"/update_weights_from_tensor": "place",
    b"/update_weights_from_ipc": "place",
}
"""Steps whose bodies may be too large to be held: they pass through to all workers at once."""
PATHS: Final = frozenset(path.encode() for path in (*POSTS, *GETS))
INFO_PATHS: Final = frozenset(path.encode() for path in INFO_GETS)
EMPTYING: Final = frozenset(
    {"/reset_prefix_cache", "/flush_cache", "/sleep", "/release_memory_occupation", "/collective_rpc"}
    | {"/update_weights_from_disk", "/finish_weight_update", "/end_weight_update"}
)
"""After these the workers' prefix caches are empty."""

REMEMBERED: Final = frozenset(
    path for path, work in POSTS.items() if work not in (_reset_cache, _abort, _as_it_stands)
)
"""After these it has to be known what was asked of the workers, for whoever comes back: of several processes
only one can be asked."""

_TOGETHER: Final[Mapping[str, Callable[[list[Any]], Any]]] = {
    "is_paused": all,
    "is_sleeping": all,
    "world_size": sum,
}
"""How fields that answer for the whole fleet are made of those of the workers."""


def fan_out(control: Control) -> dict[str, tuple[str, Callable[[Exchange], Awaitable[None]]]]:
    """Method and handler by path."""

    def handler(work: Work) -> Callable[[Exchange], Awaitable[None]]:
        async def handle(exchange: Exchange) -> None:
            whole = all_or_nothing(exchange.request)
            message = None
            try:
                outcomes = await work(control, exchange.request, whole)
            except ControlFailed as error:
                outcomes, message = dict(error.outcomes), str(error)
            exchange.respond(*answer(outcomes, message))

        return handle

    by_method = (("POST", POSTS), ("GET", GETS), ("GET", INFO_GETS))
    return {path: (method, handler(work)) for method, table in by_method for path, work in table.items()}


def answer(outcomes: Outcomes, message: str | None = None) -> tuple[int, bytes]:
    """Status and body of the response. `message`: why it counts as failed."""
    failed = [name for name, one in outcomes.items() if not one.ok]
    results = {name: _shown(one) for name, one in outcomes.items()}
    status = 503 if not outcomes else _status_of(outcomes, failed) if failed or message else 200
    said = {**_alike(outcomes), "success": status == 200, "failed": failed, "results": results}
    if status != 200:
        text = (
            message or "; ".join(f"{name}: {outcomes[name].error}" for name in failed) or "there is no worker"
        )
        said["error"] = {"message": text, "type": "control_failed", "param": None, "code": status}
    return status, orjson.dumps(said, default=str)


def _status_of(outcomes: Outcomes, failed: list[str]) -> int:
    """That of the workers, where all have refused alike and so nothing has changed; else 502."""
    found = {_status(outcomes[name].error) for name in failed}
    status = found.pop() if len(found) == 1 and len(failed) == len(outcomes) else None
    return status if status is not None and 400 <= status < 500 else 502


def _alike(outcomes: Outcomes) -> dict[str, Any]:
    """The fields that all workers answered alike, or that are made of those of all."""
    values = [one.value for one in outcomes.values()]
    if not values or not all(isinstance(value, dict) for value in values):
        return {}
    first, *others = values
    said = {field: value for field, value in first.items() if all(o.get(field) == value for o in others)}
    for field, together in _TOGETHER.items():
        if all(field in value for value in values):
            said[field] = together([value[field] for value in values])
    return said


def _shown(one: Outcome) -> dict[str, Any]:
    return {
        "ok": one.ok,
        "status": 200 if one.ok else _status(one.error),
        "value": one.value,
        "error": None if one.error is None else str(one.error),
        "seconds": round(one.seconds, 6),
    }


def _status(error: PenstockError | None) -> int | None:
    return error.status if isinstance(error, ResponseError) else None


# -- requests -------------------------------------------------------------------------------------


def all_or_nothing(request: Request) -> bool:
    given = _query(request).get(ALL_OR_NOTHING, request.headers.get(ALL_OR_NOTHING_HEADER, "0"))
    return given.strip().lower() in _YES


def _query(request: Request) -> dict[str, str]:
    return {name: values[-1] for name, values in parse_qs(request.query, keep_blank_values=True).items()}


def _rest(request: Request) -> str:
    """The query as the workers get it."""
    if ALL_OR_NOTHING not in request.query:
        return request.query
    pairs = parse_qsl(request.query, keep_blank_values=True)
    return urlencode([pair for pair in pairs if pair[0] != ALL_OR_NOTHING])


def _target(request: Request) -> str:
    rest = _rest(request)
    return f"{request.path}?{rest}" if rest else request.path


def _read(request: Request, kind: type[T]) -> T:
    """The body; none is one without fields. Raises DecodeError."""
    return msgspec.json.decode(request.body or b"{}", type=kind)
