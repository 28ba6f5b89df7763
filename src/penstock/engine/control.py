"""The routes that steer an engine: pause, sleep, caches and weights, under vLLM's names.

An answer of 200 means that it is done. What a client asked wrongly is a 400 and changes nothing. What takes
long – reading a checkpoint, taking in tensors, waiting for the step in which weights are put in place – is
done by one thread beside the loop, one thing after the other, while generation goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, cast, get_args
from urllib.parse import parse_qs

import msgspec
import orjson

from penstock.engine.async_engine import AsyncEngine, PauseMode
from penstock.engine.engine import LLMEngine
from penstock.engine.weight_update import SharedTensor, TensorInfo, WeightTransfer, read_checkpoint
from penstock.wire.openai_server import Handler, Reader, Refused, refusal
from penstock.wire.server import Exchange, Request

COMMIT_TIMEOUT: Final = 600.0
"""Seconds the step before an update may take."""

BINARY: Final = "application/octet-stream"
"""Content type of tensors."""

TRUE: Final = frozenset({"1", "true", "t", "yes", "y", "on"})
FALSE: Final = frozenset({"0", "false", "f", "no", "n", "off"})
"""What vLLM's query parameters read as booleans, in any case."""

RELOAD_ARGUMENTS: Final = ("weights_iterator", "weights_path", "is_checkpoint_format")
"""Of vLLM's `reload_weights`, in order."""

Result = TypeVar("Result")
Version = str | int


class Rpc(msgspec.Struct, kw_only=True):
    """/collective_rpc."""

    method: str
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    timeout: float | None = None


class NewVersion(msgspec.Struct, kw_only=True):
    """/update_weight_version."""

    new_version: Version


class InitTransfer(msgspec.Struct, kw_only=True):
    """/init_weight_transfer_engine."""

    class Info(msgspec.Struct):
        backend: str

    init_info: Info


class StartUpdate(msgspec.Struct, kw_only=True):
    """/start_weight_update; vLLM's has no body."""

    version: Version | None = None
    tensors: list[TensorInfo] | None = None
    base: str | None = None
    """What the weights in place have to be, under the name an earlier finish has given them."""


class SharedUpdate(msgspec.Struct, kw_only=True):
    """/update_weights of backend `shm`."""

    class Info(msgspec.Struct):
        name: str
        tensors: list[SharedTensor]

    update_info: Info


class UpdateInfo(msgspec.Struct, kw_only=True):
    """/update_weights of backend `disk`, or the question whether all has come, of any backend."""

    path: str | None = None
    checksum: str | None = None


class FileUpdate(msgspec.Struct, kw_only=True):
    """/update_weights with one of these."""

    update_info: UpdateInfo


class WeightChecker(msgspec.Struct, kw_only=True):
    """/weight_checker; of vLLM's actions there is this one."""

    action: Literal["checksum"]


class FinishUpdate(msgspec.Struct, kw_only=True):
    """/finish_weight_update."""

    weight_version: Version | None = None
    checksum: str | None = None
    content: str | None = None
    """A name for all of the weights as they are after it, which a later update may have as its base."""


_RPC: Final = Reader(Rpc)
_NEW_VERSION: Final = Reader(NewVersion)
_INIT: Final = Reader(InitTransfer)
_START: Final = Reader(StartUpdate)
_SHARED: Final = Reader(SharedUpdate)
_FILE: Final = Reader(FileUpdate)
_FINISH: Final = Reader(FinishUpdate)
_CHECKER: Final = Reader(WeightChecker)
_RANK: Final = "dp0:pp0:pcp0:tp0:"
"""Before each name in what /weight_checker answers: vLLM's name of the only rank."""


class Query:
    """The parameters of a request's query. The last of repeated ones counts, as in vLLM."""

    def __init__(self, request: Request) -> None:
        self._values = parse_qs(request.query, keep_blank_values=True)

    def all(self, name: str) -> list[str]:
        """Every value given."""
        return self._values.get(name, [])

    def flag(self, name: str, default: bool) -> bool:
        """Raises Refused unless it is one."""
        value = self._last(name, "true" if default else "false").lower()
        if value not in TRUE | FALSE:
            raise self._refused(name, "must be true or false")
        return value in TRUE

    def mode(self) -> PauseMode:
        """The pause mode, `abort` if none is given. Raises Refused."""
        mode = self._last("mode", "abort")
        if mode not in get_args(PauseMode):
            raise self._refused("mode", "must be 'abort', 'wait' or 'keep'")
        return cast(PauseMode, mode)

    def level(self) -> int:
        """The sleep level, 1 if none is given. Raises Refused."""
        level = self._last("level", "1").strip()
        if level not in ("0", "1", "2"):
            raise self._refused("level", "must be 0, 1 or 2")
        return int(level)

    def _last(self, name: str, default: str) -> str:
        return self.all(name)[-1] if name in self._values else default

    def _refused(self, name: str, rule: str) -> Refused:
        value = self.all(name)[-1]
        return Refused(f"{name} {rule}, not {value!r}.", param=f"query.{name}", type="Bad Request")


class Control:
    """Steers `engine`; of the `llm` behind it only what never changes is read."""

    def __init__(self, engine: AsyncEngine, llm: LLMEngine) -> None:
        self._engine = engine
        self._config = llm.config
        self._model_config = llm.model_config
        self._weights = llm.weights
        self._weights_path = llm.config.model
        """Where the weights in place were read last."""
        self._transfer = WeightTransfer(llm.weights)
        self._worker = ThreadPoolExecutor(1, "penstock-weights")
        """The one thread that reads checkpoints, and uses `_transfer` and `_weights_path`."""
        self.routes: Mapping[str, Mapping[str, Handler]] = {
            "/pause": {"POST": self._pause},
            "/resume": {"POST": self._resume},
            "/is_paused": {"GET": self._is_paused},
            "/sleep": {"POST": self._sleep},
            "/wake_up": {"POST": self._wake_up},
            "/is_sleeping": {"GET": self._is_sleeping},
            "/reset_prefix_cache": {"POST": self._reset_prefix_cache},
            "/get_world_size": {"GET": self._world_size},
            "/server_info": {"GET": self._server_info},
            "/collective_rpc": {"POST": self._collective_rpc},
            "/weight_info": {"GET": self._weight_info},
            "/weight_checker": {"POST": self._weight_checker},
            "/update_weight_version": {"POST": self._update_weight_version},
            "/init_weight_transfer_engine": {"POST": self._init_transfer},
            "/shutdown_weight_transfer_engine": {"POST": self._shutdown_transfer},
            "/start_weight_update": {"POST": self._start_update},
            "/update_weights": {"POST": self._update_weights},
            "/finish_weight_update": {"POST": self._finish_update},
            "/abort_weight_update": {"POST": self._abort_update},
        }

    # -- scheduling -------------------------------------------------------------------------------

    def _pause(self, exchange: Exchange) -> None:
        query = Query(exchange.request)
        paused = self._engine.pause(query.mode(), query.flag("clear_cache", True))
        reply_when(paused, exchange, lambda _: {"status": "paused"})

    def _resume(self, exchange: Exchange) -> None:
        reply_when(self._engine.resume(), exchange, lambda _: {"status": "resumed"})

    def _is_paused(self, exchange: Exchange) -> None:
        reply(exchange, {"is_paused": self._engine.paused})

    def _sleep(self, exchange: Exchange) -> None:
        query = Query(exchange.request)
        level = query.level()
        asleep = self._engine.sleep(level, query.mode())
        if level == 2:
            self._worker.submit(self._transfer.forget)
        reply_when(asleep, exchange, lambda _: {"status": "sleeping", "level": level})

    def _wake_up(self, exchange: Exchange) -> None:
        tags = Query(exchange.request).all("tags") or None
        reply_when(
            self._engine.wake_up(tags),
            exchange,
            lambda awake: {"status": "awake" if awake else "sleeping", "tags": tags},
        )

    def _is_sleeping(self, exchange: Exchange) -> None:
        """As in vLLM a pause counts as the lightest sleep."""
        reply(exchange, {"is_sleeping": self._engine.paused})

    def _reset_prefix_cache(self, exchange: Exchange) -> None:
        query = Query(exchange.request)
        query.flag("reset_external", False)  # there is no cache outside the engine
        reset = self._engine.reset_prefix_cache(query.flag("reset_running_requests", False))
        reply_when(reset, exchange, lambda success: {"success": success})

    # -- what it is -------------------------------------------------------------------------------

    def _world_size(self, exchange: Exchange) -> None:
        reply(exchange, {"world_size": 1})

    def _server_info(self, exchange: Exchange) -> None:
        as_json = Query(exchange.request).all("config_format")[-1:] == ["json"]
        config = asdict(self._config) if as_json else repr(self._config)
        reply(exchange, {"vllm_config": config, "vllm_env": {}, "system_env": {}})

    # -- weights ----------------------------------------------------------------------------------

    def _collective_rpc(self, exchange: Exchange) -> None:
        request = _RPC.read(exchange.request.body)
        if request.method != "reload_weights":
            raise Refused(f"Method {request.method!r} is not implemented; only reload_weights is.")
        path = reload_path(request)
        reply_when(self._worker.submit(self._reload, path), exchange, lambda _: {"results": [None]})

    def _reload(self, path: str | None) -> None:
        path = self._weights_path if path is None else path
        self._commit(read_checkpoint(self._weights, self._model_config, Path(path)), None)
        self._weights_path = path
        self._transfer.forget()

    def _weight_info(self, exchange: Exchange) -> None:
        reply(exchange, {"weight_version": str(self._engine.weight_version)})

    def _weight_checker(self, exchange: Exchange) -> None:
        _CHECKER.read(exchange.request.body)
        reply_when(
            self._engine.weight_digests(),
            exchange,
            lambda digests: {"checksums": {_RANK + name: digest for name, digest in digests.items()}},
        )

    def _update_weight_version(self, exchange: Exchange) -> None:
        version = version_number("new_version", _NEW_VERSION.read(exchange.request.body).new_version)
        reply_when(
            self._engine.set_weight_version(version),
            exchange,
            lambda new: {"success": True, "new_version": str(new)},
        )

    def _init_transfer(self, exchange: Exchange) -> None:
        info = _INIT.read(exchange.request.body).init_info
        self._message(exchange, partial(self._transfer.open, info.backend), "Weight transfer initialized")

    def _shutdown_transfer(self, exchange: Exchange) -> None:
        self._message(exchange, self._transfer.close, "Weight transfer shut down")

    def _start_update(self, exchange: Exchange) -> None:
        request = _START.read(exchange.request.body or b"{}")
        version = None if request.version is None else version_number("version", request.version)
        self._message(
            exchange,
            partial(self._transfer.start, version, request.tensors, request.base),
            "Weight update started",
        )

    def _update_weights(self, exchange: Exchange) -> None:
        request = exchange.request
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() == BINARY:
            work: Callable[[], object] = partial(self._transfer.receive, request.body)
        else:
            work = self._take(request.body)
        self._message(exchange, work, "Weights updated")

    def _take(self, body: bytes) -> Callable[[], object]:
        """What a part of an update that does not come in its own body asks for."""
        file = _FILE.read(body).update_info
        if file.checksum is not None:
            return partial(self._transfer.check, file.checksum)
        if file.path is not None:
            return partial(self._transfer.receive_file, Path(file.path))
        info = _SHARED.read(body).update_info
        return partial(self._transfer.receive_shared, info.name, info.tensors)

    def _finish_update(self, exchange: Exchange) -> None:
        request = _FINISH.read(exchange.request.body or b"{}")
        version = request.weight_version
        number = None if version is None else version_number("weight_version", version)
        finished = self._worker.submit(self._finish, number, request.checksum, request.content)
        reply_when(finished, exchange, lambda answer: {"message": "Weight update finished"} | answer)

    def _finish(self, version: int | None, checksum: str | None, content: str | None) -> dict[str, str]:
        transfer = self._transfer
        tensors, actual = transfer.finish(checksum)
        new = self._commit(tensors, transfer.version if version is None else version)
        transfer.finished(content)
        return {"weight_version": str(new), "checksum": actual}

    def _abort_update(self, exchange: Exchange) -> None:
        """Not vLLM's, which cannot. Aborting when nothing is under way is no error."""
        aborted = self._worker.submit(self._transfer.abort)
        reply_when(aborted, exchange, lambda _: {"message": "Weight update aborted"})

    def _commit(self, tensors: Mapping[str, Any], version: int | None) -> int:
        """On the worker: the version the tensors have in the engine."""
        return self._engine.replace_weights(tensors, version).result(COMMIT_TIMEOUT)

    def _message(self, exchange: Exchange, work: Callable[[], object], message: str) -> None:
        """Have the worker do something, and say so."""
        reply_when(self._worker.submit(work), exchange, lambda _: {"message": message})


def reply(exchange: Exchange, answer: Mapping[str, Any]) -> None:
    """Answer 200."""
    exchange.respond(200, orjson.dumps(answer))


def reply_when(
    future: Future[Result], exchange: Exchange, answer: Callable[[Result], Mapping[str, Any]]
) -> None:
    """Answer, on this loop, when a thread is done: 200, or an error in OpenAI's form."""

    def done(waited: asyncio.Future[Result]) -> None:
        error = waited.exception()
        if error is None:
            reply(exchange, answer(waited.result()))
        else:
            assert isinstance(error, Exception)
            exchange.respond(*refusal(error))

    asyncio.wrap_future(future).add_done_callback(done)


def version_number(name: str, version: Version) -> int:
    """A weight version as a number. Raises Refused: ages of tokens are differences of versions."""
    try:
        number = int(version)
    except ValueError:
        number = -1
    if number < 0:
        raise Refused(f"{name} must be a whole number from 0 on, not {version!r}.", param=f"body.{name}")
    return number


def reload_path(request: Rpc) -> str | None:
    """The folder that a call of `reload_weights` names, None for the last one. Raises Refused."""
    if len(request.args) > len(RELOAD_ARGUMENTS):
        raise Refused(f"reload_weights takes at most {len(RELOAD_ARGUMENTS)} arguments.")
    given = dict(zip(RELOAD_ARGUMENTS, request.args, strict=False))
    for name, value in request.kwargs.items():
        if name not in RELOAD_ARGUMENTS or name in given:
            raise Refused(f"reload_weights got an unexpected argument {name!r}.")
        given[name] = value
    if given.get("weights_iterator") is not None:
        raise Refused("reload_weights reads weights from a folder: name it as weights_path.")
    if given.get("is_checkpoint_format", True) is not True:
        raise Refused("reload_weights reads weights in checkpoint format only.")
    path = given.get("weights_path")
    if path is not None and not isinstance(path, str):
        raise Refused(f"weights_path must be the path of a folder, not {path!r}.")
    return path
