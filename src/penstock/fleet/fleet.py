"""A fleet: the endpoints requests go to, which may join, drain and leave while it is in use.

It guarantees:
- counts in flight are exact: a slot is taken by `Dispatch` and given back once, by `succeeded`, `failed` or
  `dropped`;
- what an outcome means for its endpoint (down, breaker, limit) takes effect before the slot is given back;
- `async with` owns every socket and the one task; a fleet pickles without them, as its endpoints' addresses
  and its settings, and belongs, while open, to one event loop;
- clock, randomness and transport are handed in: on another clock and another transport the same code runs.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from threading import get_ident
from types import TracebackType
from typing import Any, Final, Self, TypedDict

import msgspec

from penstock import __version__
from penstock.errors import ConfigError, EngineError, PenstockError
from penstock.fleet.dispatch import Dispatch
from penstock.fleet.endpoint import Endpoint
from penstock.fleet.health import Breaker
from penstock.fleet.monitor import Monitor, OnOutage
from penstock.fleet.policy import POLICIES
from penstock.fleet.retry import Budget, Decision, Retry
from penstock.fleet.transport import Pool, Transport, TransportFactory
from penstock.fleet.versions import Versions
from penstock.wire.address import Address
from penstock.wire.connection import Timeouts
from penstock.wire.limits import check_local_ports, check_open_files
from penstock.wire.tls import TLS

DRAIN_TICK: Final = 0.05
"""Seconds between two looks at an endpoint that drains."""
STALL: Final = 60.0
"""Seconds an engine may say that it works without making a token before it is asked for one."""


class FleetOptions(TypedDict, total=False):
    """How a fleet treats its endpoints; `Fleet` documents each."""

    api_key: str | None
    max_in_flight: int | None
    adaptive: bool
    policy: str
    retry: Retry
    breaker: Breaker
    timeouts: Timeouts
    stall: float | None
    tls: TLS | None
    source_addresses: Sequence[str]
    on_outage: OnOutage | None
    transport: TransportFactory | None
    clock: Callable[[], float]
    random: Callable[[], float]


def _chance() -> float:
    """Pickles by its name: `random.random` would take along its state, and every copy draw the same."""
    return random.random()


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The options with their defaults."""

    api_key: str | None = None
    max_in_flight: int | None = None
    adaptive: bool = False
    policy: str = "least_in_flight"
    retry: Retry = Retry()
    breaker: Breaker = Breaker()
    timeouts: Timeouts = Timeouts()
    stall: float | None = STALL
    tls: TLS | None = None
    source_addresses: Sequence[str] = ()
    on_outage: OnOutage | None = None
    transport: TransportFactory | None = None
    clock: Callable[[], float] = time.monotonic
    random: Callable[[], float] = _chance

    def check(self) -> None:
        """Raises ConfigError for values that cannot work."""
        if self.max_in_flight is not None and self.max_in_flight < 1:
            raise ConfigError(f"max_in_flight must be at least 1, not {self.max_in_flight}")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ConfigError("the API key holds characters that cannot be sent in a header")
        if self.policy not in POLICIES:
            raise ConfigError(f"there is no policy {self.policy!r}; choose one of {', '.join(POLICIES)}")


class FleetStatistics(msgspec.Struct, frozen=True):
    """Counts of a fleet at one moment."""

    in_flight: dict[str, int]
    """Requests in flight per endpoint."""
    limits: dict[str, int | None]
    """Requests in flight there may be per endpoint, None: no limit."""
    states: dict[str, str]
    """`up`, `down`, `open` or `half_open` per endpoint."""
    waiting: int
    """Requests that wait for a slot."""
    connections: int
    retries: int
    """Failed attempts that were followed by another."""
    resent: int
    """Requests resent because a reused connection had died; they count as one attempt."""


class Fleet:
    """The endpoints at `urls`: each `http(s)://host:port`, with or without `/v1`, `host:port`, or
    `unix:///path`.

    api_key: sent as a bearer token. max_in_flight: requests in flight per endpoint, None: no limit; more
    wait, lowest priority number first, then first come, first served. adaptive: find each endpoint's limit,
    below max_in_flight, from its metrics or its throughput. policy: a name in
    `penstock.fleet.policy.POLICIES`. retry, breaker, timeouts: see these. stall: seconds an engine may report
    work and no token until it is put to the test, None: never. tls: for https. source_addresses: local
    addresses to connect from, in turn. on_outage: told while no endpoint is up, see
    `penstock.fleet.monitor.OnOutage`; it must pickle where the fleet is to be pickled. transport, clock,
    random: what a simulation replaces. Raises ConfigError when a URL or a setting cannot be used.
    """

    loop: asyncio.AbstractEventLoop
    """The one it is open in."""

    def __init__(self, urls: str | Sequence[str] = (), **options: Any) -> None:
        self.settings = Settings(**options)
        self.settings.check()
        given = [urls] if isinstance(urls, str) else urls
        self.addresses = dict.fromkeys(Address.parse(url) for url in given)
        """Of the endpoints in use; drained ones are not among them."""
        self.retry = self.settings.retry
        self.clock = self.settings.clock
        self.random = self.settings.random
        self._reset()

    def _reset(self) -> None:
        self.dispatch = Dispatch(policy=POLICIES[self.settings.policy], random=self.random)
        self.budget = Budget(self.retry.budget)
        self.retries = 0
        self.closed = True
        self._thread = 0
        self.prefix = f"{secrets.token_hex(4)}-"
        """Of the ids of its requests; their number follows."""
        self.serials = count()
        self.versions: Versions[Endpoint] = Versions()
        """Changed by the control plane, which calls `show_versions` then."""
        self.on_behind: Callable[[], None] = _nobody
        """Told when an endpoint has to be brought to the policy version."""
        self.on_returned: Callable[[Endpoint], None] = _nobody
        """Told when an endpoint that got no requests is back."""
        self._leaving: set[Endpoint] = set()
        self._monitor: Monitor | None = None
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"in_flight={self.dispatch.in_flight}"
        return f"<Fleet {', '.join(map(str, self.addresses))} {state}>"

    def __getstate__(self) -> dict[str, Any]:
        return {"addresses": self.addresses, "settings": self.settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.addresses = state["addresses"]
        self.settings = state["settings"]
        self.retry = self.settings.retry
        self.clock = self.settings.clock
        self.random = self.settings.random
        self._reset()

    # -- life -------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        """Raises ConfigError when the machine's limits do not allow `max_in_flight`."""
        if not self.closed:
            raise ConfigError("the fleet is already open")
        self._check_machine()
        self._reset()
        self.loop = asyncio.get_running_loop()
        self._thread = get_ident()
        self._ssl = self.settings.tls.context() if self.settings.tls is not None else None
        self.closed = False
        for address in self.addresses:
            self._join(address)
        self._monitor = Monitor(self)
        self._task = self.loop.create_task(self._monitor.run(), name="penstock fleet monitor")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._task is not None
        self.closed = True
        self._task.cancel()
        await asyncio.wait([self._task])
        self.dispatch.refuse_all(ConfigError("the client was closed while the request waited for a slot"))
        for endpoint in [*self.dispatch.endpoints, *self._leaving]:
            await endpoint.transport.close()

    def check_open(self) -> None:
        """Raises ConfigError unless the fleet is open, in this event loop."""
        if self.closed:
            raise ConfigError("the client is not open: use it inside `async with`")
        # get_running_loop costs a system call (getpid): it is asked only when the cheap signs are against us.
        if (get_ident() != self._thread or not self.loop.is_running()) and (
            self.loop is not asyncio.get_running_loop()
        ):
            raise ConfigError("the client is open in another event loop: open one of its own in each")

    def _check_machine(self) -> None:
        limit = self.settings.max_in_flight
        if limit is not None and self.settings.transport is None:
            check_open_files(limit)
            check_local_ports(limit, sources=max(1, len(self.settings.source_addresses)))

    # -- endpoints --------------------------------------------------------------------------------

    @property
    def endpoints(self) -> list[Endpoint]:
        """Those in use; while it is closed, none."""
        return list(self.dispatch.endpoints)

    def add(self, url: str) -> None:
        """An endpoint joins. One that is there already stays as it is."""
        address = Address.parse(url)
        if address not in self.addresses:
            self.addresses[address] = None
            if not self.closed:
                self._join(address)

    async def drain(self, url: str, timeout: float | None = None) -> bool:
        """An endpoint gets no more requests, and leaves when what it has in flight is done.

        After `timeout` seconds the rest is cut off, and tried again elsewhere. Whether nothing was cut off.
        Raises ConfigError when there is no such endpoint.
        """
        endpoint = self._leave(url)
        if endpoint is None:
            return True
        try:
            async with asyncio.timeout(timeout):
                while endpoint.in_flight:  # noqa: ASYNC110 -- an event would cost every request
                    await asyncio.sleep(DRAIN_TICK)
        except TimeoutError:
            return False
        finally:
            await self._part(endpoint)
        return True

    async def remove(self, url: str) -> None:
        """An endpoint leaves at once; its requests in flight are tried again elsewhere. Raises
        ConfigError."""
        endpoint = self._leave(url)
        if endpoint is not None:
            await self._part(endpoint)

    def _leave(self, url: str) -> Endpoint | None:
        address = Address.parse(url)
        if address not in self.addresses:
            raise ConfigError(f"{address} is not in the fleet")
        del self.addresses[address]
        for endpoint in self.dispatch.endpoints:
            if endpoint.address == address:
                self.dispatch.remove(endpoint)
                self.versions.leave(endpoint)
                self._leaving.add(endpoint)
                return endpoint
        return None

    async def _part(self, endpoint: Endpoint) -> None:
        self._leaving.discard(endpoint)
        await endpoint.transport.close()

    def connect(self, address: Address, timeouts: Timeouts) -> Transport:
        """Connections to an address that nobody else uses, for whoever calls this to close."""
        settings = self.settings
        make = settings.transport or partial(
            Pool, timeouts=timeouts, ssl_context=self._ssl, source_addresses=settings.source_addresses
        )
        return make(address)

    def _join(self, address: Address) -> None:
        endpoint = self._endpoint(address)
        self.versions.join(endpoint)
        self._show_version(endpoint)
        self.dispatch.add(endpoint)

    def _endpoint(self, address: Address) -> Endpoint:
        settings = self.settings
        return Endpoint(
            address,
            self.connect(address, settings.timeouts),
            limit=settings.max_in_flight,
            adaptive=settings.adaptive,
            breaker=settings.breaker,
        )

    # -- policy versions ---------------------------------------------------------------------------

    @property
    def policy_version(self) -> int:
        """The number of the last weight update the fleet has committed since it was opened."""
        return self.versions.fleet

    def show_versions(self) -> None:
        """`versions` has changed: endpoints with the fleet's weights get requests, the others none."""
        for endpoint in self.endpoints:
            self._show_version(endpoint)
        for endpoint in self.endpoints:
            self.dispatch.refresh(endpoint)

    def returned(self, endpoint: Endpoint) -> None:
        """It was down, or its breaker open, and is back: its process may be a new one, with old weights."""
        self.on_returned(endpoint)
        self.versions.returned(endpoint)
        self._show_version(endpoint)

    def _show_version(self, endpoint: Endpoint) -> None:
        versions = self.versions
        endpoint.policy_version = versions.version(endpoint)
        endpoint.current = versions.admits(endpoint)
        if not versions.behind(endpoint):
            endpoint.behind = None
            return
        if endpoint.behind is None:
            endpoint.behind_since = self.clock()
        has = "unknown" if endpoint.policy_version is None else str(endpoint.policy_version)
        endpoint.behind = EngineError(
            f"the weights of {endpoint.name} are of version {has}, the fleet's of {versions.fleet}"
        )
        self.on_behind()

    # -- outcomes ---------------------------------------------------------------------------------

    def succeeded(self, endpoint: Endpoint, tokens: int, seconds: float, trial: int) -> None:
        """A request brought its result, of so many tokens in so many seconds; the slot is given back."""
        if trial or endpoint.health.outcomes:
            endpoint.health.succeeded(trial)
        if endpoint.limiter is not None:
            endpoint.limiter.finished(tokens, seconds)
        budget = self.budget
        if budget.owed:
            budget.earn()
        self.dispatch.give_back(endpoint)

    def failed(self, endpoint: Endpoint, error: PenstockError, decision: Decision, trial: int) -> None:
        """A request failed. What that means for the endpoint takes effect, then the slot is given back."""
        now, health = self.clock(), endpoint.health
        if decision.refused:
            health.refuse(error, now)
        elif decision.blamed:
            health.failed(error, now, trial=trial, may_open=self._may_eject())
        elif decision.retry:
            health.dropped(trial)
        else:
            health.succeeded(trial)
        if decision.overloaded and endpoint.limiter is not None:
            endpoint.limiter.overloaded(now)
            endpoint.limit = endpoint.limiter.current
        self.dispatch.refresh(endpoint)
        self.dispatch.give_back(endpoint)
        if self._monitor is not None and (decision.refused or decision.blamed or decision.suspect):
            self._monitor.notice(endpoint, decision)

    def dropped(self, endpoint: Endpoint, trial: int) -> None:
        """Nobody wants the result any longer; the slot is given back."""
        endpoint.health.dropped(trial)
        self.dispatch.give_back(endpoint)

    def _may_eject(self) -> bool:
        """Whether one endpoint more may be left out: never more than half the fleet."""
        out = sum(not (endpoint.up and endpoint.current) for endpoint in self.dispatch.endpoints)
        return 2 * (out + 1) <= len(self.dispatch.endpoints)

    def lost(self, endpoint: Endpoint, request_id: str) -> None:
        """The connection of a request was lost: the engine is told to stop working on it, where it can be."""
        if self._monitor is not None:
            self._monitor.abort(endpoint, request_id)

    # -- requests ---------------------------------------------------------------------------------

    def head(
        self, endpoint: Endpoint, method: str, path: str, content_type: str = "application/json"
    ) -> bytes:
        """Request line and headers of a request, up to what differs from one to the next."""
        token = self.settings.api_key
        bearer = f"authorization: Bearer {token}\r\n" if token is not None else ""
        kind = f"content-type: {content_type}\r\n" if method == "POST" else ""
        return (
            f"{method} {path} HTTP/1.1\r\nhost: {endpoint.address.authority}\r\n"
            f"user-agent: penstock/{__version__}\r\n{bearer}{kind}"
        ).encode("ascii")

    def statistics(self) -> FleetStatistics:
        endpoints = self.dispatch.endpoints
        pools = [endpoint.transport.statistics() for endpoint in endpoints]
        return FleetStatistics(
            in_flight={endpoint.name: endpoint.in_flight for endpoint in endpoints},
            limits={endpoint.name: endpoint.shown_limit for endpoint in endpoints},
            states={endpoint.name: endpoint.health.state.name.lower() for endpoint in endpoints},
            waiting=self.dispatch.waiting,
            connections=sum(pool.connections for pool in pools),
            retries=self.retries,
            resent=sum(pool.resent for pool in pools),
        )


def _nobody(endpoint: Endpoint | None = None) -> None:
    """Nobody brings endpoints to the policy version."""
