"""One engine of a fleet as the control plane speaks to it: its kind, and requests bounded in time.

Requests go over connections of their own: what the data plane does to its silent connections, and how long it
waits for a first byte, is no matter here. Nothing is sent twice: a control call that got no answer may have
been obeyed, and whoever made it decides.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import Any, Final, TypeVar

import msgspec
import orjson

from penstock.control.dialect import VLLM, Ask, Dialect, SGLang
from penstock.errors import (
    EngineError,
    MalformedResponse,
    PenstockError,
    PhaseTimeout,
    RequestRejected,
    ResponseError,
)
from penstock.fleet.endpoint import Endpoint
from penstock.fleet.fleet import Fleet
from penstock.fleet.transport import Transport
from penstock.wire.connection import Response, Timeouts
from penstock.wire.openai import response_error

T = TypeVar("T")

TIMEOUTS: Final = Timeouts(connect=5.0, first_byte=None, idle=None)
"""Of the connections; every call has a bound of its own."""
NOT_FOUND: Final = frozenset({404, 405})
BINARY: Final = "application/octet-stream"


class Outcome(msgspec.Struct, frozen=True):
    """What became of a control call at one engine."""

    value: Any = None
    """What it answered: JSON as Python objects, other content as text; of several requests, the last."""
    error: PenstockError | None = None
    """Why it did not succeed."""
    seconds: float = 0.0
    """It took."""
    phase: str | None = None
    """Of a weight update: where it failed."""

    @property
    def ok(self) -> bool:
        return self.error is None


class Engine:
    """The control plane's end of one endpoint.

    timeout: seconds each request may take. update_timeout: in place of it where weights are on their way.
    """

    def __init__(self, fleet: Fleet, endpoint: Endpoint, timeout: float, update_timeout: float) -> None:
        self._fleet = fleet
        self.endpoint = endpoint
        self.name = endpoint.name
        self.timeout = timeout
        self.update_timeout = update_timeout
        self.sleep_level: int | None = None
        """That of the sleep it was put in here."""
        self.has_version = True
        """As far as is known it can say which version its weights are of."""
        self._dialect: Dialect | None = None
        # A simulated transport is the engine itself: another one would be another engine.
        self._own = fleet.settings.transport is None
        self._transport: Transport = (
            fleet.connect(endpoint.address, TIMEOUTS) if self._own else endpoint.transport
        )

    def __repr__(self) -> str:
        return f"<Engine {self.name} {self._dialect.name if self._dialect else 'of unknown kind'}>"

    async def close(self) -> None:
        if self._own:
            await self._transport.close()

    def forget(self) -> None:
        """It was away: what was known of its process may be wrong."""
        self._dialect = None
        self.sleep_level = None
        self.has_version = True

    async def dialect(self) -> Dialect:
        """What it speaks. Asked once: only SGLang has no /version and says what model it has.

        Raises TransportError or ResponseError when it cannot be asked.
        """
        if self._dialect is None:
            self._dialect = SGLang() if await self._is_sglang() else VLLM()
        return self._dialect

    async def _is_sglang(self) -> bool:
        if await self._has("/version"):
            return False
        # The second is the name before 0.5.6.
        return await self._has("/model_info") or await self._has("/get_model_info")

    async def _has(self, path: str) -> bool:
        response = await self.request(Ask(path, method="GET"))
        if response.status >= 500:
            raise response_error(response)
        return response.status not in NOT_FOUND

    async def ask(self, *asks: Ask, timeout: float | None = None) -> Any:
        """Sends requests one after the other, as long as they succeed; the last one's answer.

        Raises TransportError, ResponseError, or EngineError when it answers 200 and `success: false`.
        """
        value: Any = None
        for one in asks:
            value = answer_of(self.name, one.path, await self.request(one, timeout=timeout))
        return value

    async def send(self, path: str, content: bytes, content_type: str = BINARY) -> Any:
        """A POST that belongs to a weight update. Raises as `ask`."""
        head = self.head(path, content_type)
        response = await self._bounded(self._transport.request(head, content), path, self.update_timeout)
        return answer_of(self.name, path, response)

    def head(self, path: str, content_type: str) -> bytes:
        """Of a POST, up to what says how long its body is."""
        return self._fleet.head(self.endpoint, "POST", self.endpoint.address.root + path, content_type)

    async def request(self, ask: Ask, *, body: bytes | None = None, timeout: float | None = None) -> Response:
        """One request; the answer, of whatever status. Raises TransportError."""
        head = self._fleet.head(self.endpoint, ask.method, self.endpoint.address.root + ask.path)
        work = self._transport.request(head, ask.body if body is None else body)
        return await self._bounded(work, ask.path, self.timeout if timeout is None else timeout)

    async def _bounded(self, work: Awaitable[T], path: str, timeout: float) -> T:
        scope = asyncio.timeout(timeout)
        try:
            async with scope:
                return await work
        except TimeoutError as error:
            if not scope.expired():
                raise
            raise PhaseTimeout(
                f"{self.name} did not answer {path} within {timeout:g} s", "first_byte"
            ) from error

    async def weight_version(self) -> int | None:
        """The number it gives its weights, None when that is no number. Raises as `ask`."""
        answer = await self.ask(*(await self.dialect()).weight_version())
        label = answer.get("weight_version") if isinstance(answer, dict) else None
        try:
            return int(label)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            return None

    async def world_size(self) -> int:
        """Ranks it has in a group with the trainer. Raises as `ask`, MalformedResponse."""
        dialect = await self.dialect()
        answer = await self.ask(*dialect.world_size())
        size = answer.get(dialect.world_size_field) if isinstance(answer, dict) else None
        if not isinstance(size, int) or size < 1:
            raise MalformedResponse(f"{self.name} does not say how many ranks it has")
        return size


def answer_of(name: str, path: str, response: Response) -> Any:
    """What a response holds. Raises ResponseError, MalformedResponse or EngineError."""
    if response.status != 200:
        raise response_error(response)
    if not response.body:
        return None
    try:
        value = orjson.loads(response.body)
    except orjson.JSONDecodeError:
        if (response.header(b"content-type") or b"").startswith(b"application/json"):
            raise MalformedResponse(f"{name} answered {path} with JSON that is none") from None
        return response.body.decode("utf-8", "replace")
    if isinstance(value, dict) and value.get("success") is False:
        raise EngineError(
            f"{name} says that {path} did not succeed: {value.get('message', 'no reason given')}"
        )
    return value


async def outcome(work: Awaitable[Any]) -> Outcome:
    """What comes of it; typed errors are data."""
    started = time.perf_counter()
    try:
        value = await work
    except PenstockError as error:
        return Outcome(error=error, seconds=time.perf_counter() - started)
    return Outcome(value, seconds=time.perf_counter() - started)


def lacks_route(error: PenstockError) -> bool:
    """The engine has no such route."""
    return isinstance(error, ResponseError) and error.status in NOT_FOUND


def refused(error: BaseException) -> bool:
    """The engine has understood, and done nothing."""
    return isinstance(error, RequestRejected)
