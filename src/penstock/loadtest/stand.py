"""What a load test runs against: engines and a router, brought up, asked what they did, taken down.

Guarantees as `penstock.servers`: inside the block all that was asked for answers; after it no process of it
is left. What was given as a URL is used as it is, and neither started nor stopped.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Final

import msgspec

from penstock.errors import ConfigError, ConnectFailed, EngineError, PenstockError, ResponseError
from penstock.fleet.load import parse_load
from penstock.loadtest.account import Record
from penstock.scripted.chaos import Chaos
from penstock.servers.endpoint import EndpointServer
from penstock.servers.engines import server_of
from penstock.servers.launched import LaunchedServer, LifeCycle
from penstock.servers.process import Process
from penstock.servers.server import Server
from penstock.servers.spec import ServerSpec, flags
from penstock.wire.openai import UNREADABLE, response_error

ROUTER_LIMIT: Final = 30.0
"""Seconds in which the router has to say that it is ready."""
ROUTER_GRACE: Final = 5.0
"""Seconds between SIGTERM and SIGKILL of the router."""
ROUTER_READY: Final = re.compile(rb"penstock router ready on (http://\S+)")
SETTLE: Final = 2.0
"""Seconds that engines have to notice that nobody waits for a request any longer."""
ACCOUNT_LIMIT: Final = 10.0
"""Seconds in which all engines have to say what became of the requests; else there is no account."""
SETTLE_TICK: Final = 0.1
"""Seconds between two looks at whether they have."""
SCRIPTED: Final = "scripted"

_COUNTER: Final = re.compile(
    r"^(?:vllm:request_success|sglang:num_requests|(vllm:generation_tokens|sglang:generation_tokens))"
    r"_total(?:\{[^\n]*\})? (\S+)$",
    re.MULTILINE,
)


class _Requests(msgspec.Struct):
    requests: list[Record]


class _Counts(msgspec.Struct):
    in_flight: int = 0
    forgotten: int = 0


_decode_requests: Final = msgspec.json.Decoder(_Requests).decode
_decode_counts: Final = msgspec.json.Decoder(_Counts).decode


class ScriptedServer(LaunchedServer):
    """The scripted engine in a process of its own; `extra_args` of the spec are its flags."""

    kind = SCRIPTED
    ready_line = "penstock engine ready on "

    async def _command(self, spec: ServerSpec, environment: Mapping[str, str]) -> list[str]:
        taken = {"served-model-name": "name", "host": "host", "port": "port"}
        return [
            *(sys.executable, "-m", "penstock", "engine", "--scripted", "--served-model-name", spec.name),
            *("--host", spec.host, "--port", str(spec.port)),
            *flags(spec.extra_args, taken=taken, negative=None),
        ]


@dataclass(frozen=True, kw_only=True)
class StandSpec:
    """What to bring up. Raises ConfigError."""

    urls: Sequence[str] = ()
    """Engines that run already; else `spec` is started."""
    spec: ServerSpec | None = None
    engines: int = 1
    """How many to start."""
    router: bool = False
    """Whether a router is needed."""
    router_url: str | None = None
    """One that runs already, in front of the engines."""
    router_args: Sequence[str] = ()
    """Further words for `penstock route`."""
    chaos: str = ""
    """What goes wrong at the engines: a spec of the scripted engine, the only one that can."""
    model: str | None = None
    """What the servers at `urls` call the model; None: they offer only one."""
    api_key: str | None = None

    def __post_init__(self) -> None:
        if bool(self.urls) == (self.spec is not None):
            raise ConfigError("a load test needs engines: base URLs, or an engine to start")
        if self.engines < 1:
            raise ConfigError(f"there must be at least one engine, not {self.engines}")
        if self.chaos and (self.spec is None or self.spec.engine != SCRIPTED):
            raise ConfigError("only scripted engines that are started here have chaos")
        if self.router_url is not None and self.router_args:
            raise ConfigError("a router that runs already takes no further arguments")


@dataclass
class Stand:
    """What runs. `pids`: the first processes of the parts that are ours, by the part's name."""

    servers: list[Server]
    model: str
    router_url: str | None = None
    pids: dict[str, list[int]] = field(default_factory=dict)

    @property
    def urls(self) -> list[str]:
        return [server.base_url for server in self.servers]

    async def served(self) -> list[tuple[int, int] | None]:
        """Requests finished and tokens made since its start, by each engine's metrics; None: it has none."""
        return list(await asyncio.gather(*map(_served, self.servers)))

    async def held(self) -> int | None:
        """Requests that run or wait at the engines now, by their metrics. Raises PenstockError while one does
        not answer. None: one of them has no metrics that tell."""
        try:
            pages = await asyncio.gather(*(server.metrics() for server in self.servers))
        except ResponseError:
            return None
        loads = [parse_load(page.encode()) for page in pages]
        if None in loads:
            return None
        return round(sum(load.running + load.waiting for load in loads if load is not None))

    async def records(self) -> tuple[list[Record], int] | None:
        """What the engines have seen of each request, and how many they have forgotten, once nothing is in
        flight there or SETTLE seconds have passed. None: they keep no account."""
        loop = asyncio.get_running_loop()
        end = loop.time() + SETTLE
        try:
            async with asyncio.timeout(ACCOUNT_LIMIT):
                while True:
                    counts = [_decode_counts(body) for body in await self._ask("/scripted/counts")]
                    if not any(one.in_flight for one in counts) or loop.time() >= end:
                        break
                    await asyncio.sleep(SETTLE_TICK)
                seen = [_decode_requests(body) for body in await self._ask("/scripted/requests")]
        except (PenstockError, TimeoutError, *UNREADABLE):
            return None
        records = [record for each in seen for record in each.requests]
        return records, sum(one.forgotten for one in counts)

    async def _ask(self, path: str) -> list[bytes]:
        """The answers of all engines."""
        return list(await asyncio.gather(*(_asked(server, path) for server in self.servers)))


@asynccontextmanager
async def standing(spec: StandSpec, life: LifeCycle | None = None) -> AsyncIterator[Stand]:
    """Brings up what the spec says. Raises ConfigError, EngineError."""
    async with AsyncExitStack() as stack:
        servers: list[Server] = []
        if spec.spec is None:
            servers += [EndpointServer(url, name=spec.model, api_key=spec.api_key) for url in spec.urls]
        else:
            servers += [launched(own_spec(spec, spec.spec, number), life) for number in range(spec.engines)]
        for server in servers:
            await stack.enter_async_context(server)
        names = {server.name for server in servers}
        if len(names) > 1:
            raise ConfigError(f"the engines serve different models: {', '.join(sorted(names))}")
        stand = Stand(servers, names.pop(), spec.router_url)
        pids = [server.pid for server in servers if isinstance(server, LaunchedServer)]
        if pids:
            stand.pids["engine"] = [pid for pid in pids if pid is not None]
        if spec.router and spec.router_url is None:
            router = await stack.enter_async_context(_router(stand.urls, spec.router_args))
            stand.router_url, stand.pids["router"] = router[0], [router[1]]
        yield stand


def launched(spec: ServerSpec, life: LifeCycle | None = None) -> LaunchedServer:
    """A server that is as the spec says, the scripted engine among the kinds there are."""
    return ScriptedServer(spec, life) if spec.engine == SCRIPTED else server_of(spec, life)


def own_spec(stand: StandSpec, spec: ServerSpec, number: int) -> ServerSpec:
    """The spec of one engine: they are not killed all at the same time."""
    if not stand.chaos:
        return spec
    parts = stand.chaos.split(",")
    kill = Chaos.parse(stand.chaos).kill
    if kill is not None and kill.first is None and stand.engines > 1:
        first = kill.every * (number + 1) / stand.engines
        parts = [f"{part}:first={first:g}s" if part.startswith("kill:") else part for part in parts]
    return replace(spec, extra_args={**spec.extra_args, "chaos": ",".join(parts)})


@asynccontextmanager
async def _router(urls: Sequence[str], arguments: Sequence[str]) -> AsyncIterator[tuple[str, int]]:
    """The URL and the process of a router that listens. Raises EngineError with what it printed."""
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    printed = bytearray()

    def hear(data: bytes) -> None:
        printed.extend(data)
        match = ROUTER_READY.search(printed)
        if not ready.done():
            if match is not None:
                ready.set_result(match[1].decode())
            elif not data:
                ready.set_exception(EngineError(f"the router has ended: {printed.decode(errors='replace')}"))

    command = [sys.executable, "-m", "penstock", "route", "--worker-urls", *urls, "--port", "0"]
    command += ["--prometheus-port", "None", *arguments]
    process = await Process.start(command, environment=os.environ, on_output=hear)
    try:
        async with asyncio.timeout(ROUTER_LIMIT):
            url = await ready
        yield url, process.pid
    except TimeoutError:
        raise EngineError(f"the router was not ready within {ROUTER_LIMIT:g} s") from None
    finally:
        ready.cancel()
        await process.stop(ROUTER_GRACE)


async def _served(server: Server) -> tuple[int, int] | None:
    try:
        page = await server.metrics()
    except PenstockError:
        return None
    requests = tokens = 0.0
    found = False
    for tokens_name, value in _COUNTER.findall(page):
        found = True
        if tokens_name:
            tokens += float(value)
        else:
            requests += float(value)
    return (round(requests), round(tokens)) if found else None


async def _asked(server: Server, path: str) -> bytes:
    """The body of an answer 200, waited for until something listens. Raises ResponseError for any other, and
    TransportError."""
    while True:
        try:
            response = await server.make_request("GET", path)
        except ConnectFailed:  # it may have been killed, and comes back
            await asyncio.sleep(SETTLE_TICK)
        else:
            if response.status != 200:
                raise response_error(response)
            return response.body
