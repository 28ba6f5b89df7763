"""The router: a fleet of workers, and what is asked of a request before it meets one of them.

It guarantees:
- one `Fleet` decides which worker, whether now, and whether again: the router adds no policy of its own
  beside it;
- the body of a request is looked into only when the policy, several models or the queue ask for it;
- every task is owned here and ended by `close`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from functools import lru_cache, partial
from hmac import compare_digest
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

import msgspec
import orjson

from penstock.continuation import Request as Continued
from penstock.errors import PenstockError, PhaseTimeout
from penstock.fleet.endpoint import UNLIMITED, Endpoint
from penstock.fleet.fleet import Fleet
from penstock.fleet.health import State
from penstock.fleet.monitor import ask, health
from penstock.fleet.policy import POLICIES, Policy, session_key
from penstock.fleet.retry import Decision
from penstock.router import fan_out
from penstock.router.args import RouterArgs
from penstock.router.dispatch import RouterAttempts, RouterDispatch, serves
from penstock.router.heads import KnownHeads
from penstock.router.peek import NOTHING, Peek, blocks_of, peek
from penstock.router.refusals import Refused
from penstock.router.relay import Relay
from penstock.router.requests import RequestHead
from penstock.router.resume import ResumedStream, resumable
from penstock.router.statistics import RouterStatistics
from penstock.router.upstream import EngineTransport
from penstock.wire.address import Address
from penstock.wire.connection import Timeouts
from penstock.wire.exchange import Exchange

if TYPE_CHECKING:
    from penstock.router.inlet import Inlet
    from penstock.router.process import Sharing

OPEN_PATHS: Final = frozenset(
    {b"/health", b"/health_generate", b"/liveness", b"/readiness", b"/metrics", b"/dashboard"}
)
"""Answered by the router, and without a key: the dashboard's page shows nothing by itself."""
ADMIN_PATHS: Final = fan_out.PATHS | {
    b"/workers",
    b"/add_worker",
    b"/remove_worker",
    b"/list_workers",
    b"/get_loads",
    b"/v1/loads",
    b"/config",
    b"/dashboard/data",
}
MODELS: Final = b"/v1/models"
_OWN: Final = OPEN_PATHS | ADMIN_PATHS | fan_out.INFO_PATHS | {MODELS, b"/finish_session"}
MAX_DEADLINE: Final = 7 * 86400.0
"""Seconds; an X-Request-Timeout above is taken for this."""

logger = logging.getLogger(__name__)

AccessLog = Callable[[Relay, int, int, float], None]
"""Takes a relay that has ended, its status, the bytes of the response's body and the clock at its arrival."""


MakeResumed = Callable[["Router", Relay, Continued, Exchange], ResumedStream]
"""Takes over a stream that is to survive its engine."""


class RouterFleet(Fleet):
    """A fleet whose endpoints are relayed to. sharing: with other processes."""

    dispatch: RouterDispatch

    def __init__(self, args: RouterArgs, sharing: Sharing | None = None) -> None:
        self._args = args
        self._sharing = sharing
        tls = args.worker_tls
        self._worker_ssl = None if tls is None else tls.context()
        super().__init__(
            args.worker_urls if sharing is None else (),  # the parent says which there are
            api_key=args.worker_api_key or args.api_key,
            max_in_flight=args.worker_max_in_flight,
            adaptive=args.adaptive,
            retry=args.retry,
            breaker=args.breaker,
            transport=self._transports(args),
        )

    def _transports(self, args: RouterArgs) -> Callable[[Address], EngineTransport]:
        return partial(EngineTransport, timeouts=_timeouts(args), ssl_context=self._worker_ssl)

    def reconfigure(self, args: RouterArgs) -> None:
        """Other settings from now on; a new worker_max_in_flight is the limit of every worker."""
        limit, before = args.worker_max_in_flight, self._args.worker_max_in_flight
        self._args = args
        self.retry = args.retry
        self.settings = msgspec.structs.replace(
            self.settings, max_in_flight=limit, retry=args.retry, transport=self._transports(args)
        )
        for endpoint in self.endpoints:
            assert isinstance(endpoint.transport, EngineTransport)
            endpoint.transport.relay.timeouts = _timeouts(args)
            if limit != before:
                endpoint.limit = UNLIMITED if limit is None else limit
        self.dispatch.reconfigure(
            policy=_policy(args),
            cap=args.max_concurrent_requests,
            prefix_aware=args.policy == "prefix_aware",
        )
        for endpoint in self.endpoints:
            self.dispatch.refresh(endpoint)

    def _reset(self) -> None:
        super()._reset()
        args = self._args
        self.dispatch = (RouterDispatch if self._sharing is None else self._sharing.dispatch)(
            policy=_policy(args),
            random=self.random,
            cap=args.max_concurrent_requests,
            prefix_aware=args.policy == "prefix_aware",
            clock=self.clock,
        )

    def _endpoint(self, address: Address) -> Endpoint:
        if self._sharing is None:
            return super()._endpoint(address)
        return self._sharing.endpoint(address, self.connect(address, Timeouts()), self.settings)

    def add(self, url: str) -> None:
        known = Address.parse(url) in self.addresses
        super().add(url)
        if self._sharing is not None and not known:
            self._sharing.joined(url)

    async def drain(self, url: str, timeout: float | None = None) -> bool:
        self._leaves(url, timeout)
        return await self.drained(url, timeout)

    async def drained(self, url: str, timeout: float | None) -> bool:
        """`drain`, in this process alone."""
        return await super().drain(url, timeout)

    async def remove(self, url: str) -> None:
        self._leaves(url, 0.0)
        await super().remove(url)

    def _leaves(self, url: str, timeout: float | None) -> None:
        address = Address.parse(url)
        if self._sharing is not None and address in self.addresses:
            self._sharing.leaves(str(address), timeout)

    async def _part(self, endpoint: Endpoint) -> None:
        await super()._part(endpoint)
        if self._sharing is not None:
            self._sharing.parted(endpoint)

    def failed(self, endpoint: Endpoint, error: PenstockError, decision: Decision, trial: int) -> None:
        was = endpoint.health.state
        super().failed(endpoint, error, decision, trial)
        if endpoint.health.state is State.OPEN and was is not State.OPEN:
            assert isinstance(endpoint.transport, EngineTransport)
            endpoint.transport.counts.openings += 1


def _policy(args: RouterArgs) -> Policy[Any]:
    """That of requests without a session or blocks of a prompt."""
    return POLICIES.get(args.policy, POLICIES["least_in_flight"])


def _timeouts(args: RouterArgs) -> Timeouts:
    return Timeouts(first_byte=args.request_timeout_secs, idle=args.request_timeout_secs)


class Router:
    """Relays requests to the workers; `async with` opens it. sharing: with other processes."""

    def __init__(self, args: RouterArgs, sharing: Sharing | None = None) -> None:
        args.check()
        self.args = args
        self._sharing = sharing
        self.fleet = RouterFleet(args, sharing)
        self.statistics = RouterStatistics()
        self.access_log: AccessLog | None = None
        self.make_resumed: MakeResumed = ResumedStream
        self.clock: Callable[[], float] = self.fleet.clock
        self.draining = False
        """It is about to end and wants no new requests."""
        self.own_fields = b""
        """Header fields added to each request."""
        self.heads: KnownHeads[RequestHead] = KnownHeads()
        self.forwards_authorization = args.worker_api_key is None
        if args.worker_api_key is not None:
            self.own_fields = b"authorization: Bearer %s\r\n" % args.worker_api_key.encode("ascii")
        self._client_key = _bearer(args.api_key)
        self._admin_key = _bearer(args.admin_api_key or args.api_key)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._several_models = False
        self._models: dict[Endpoint, list[dict[str, Any]]] = {}
        self._failures: dict[Endpoint, int] = {}
        self._by_session = args.policy == "session"
        self._by_prefix = args.policy == "prefix_aware"
        self.resumes = args.resume_streams
        self._looks = False
        """Each request's body is looked into."""
        self.broadcast: Callable[[Inlet, Relay], Relay | None] = lambda inlet, request: None
        """What sends a large body to all workers; None: this request is none of that kind."""

    async def __aenter__(self) -> Router:
        await self.fleet.__aenter__()
        self.prefix = self.fleet.prefix
        self._choose_looks()
        if self._sharing is not None:
            self._sharing.start(self)
        self.spawn(self._keep())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks))
        await self.fleet.__aexit__(kind, error, trace)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Runs it in a task that ends with the router."""
        task = self.fleet.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def reconfigure(self, args: RouterArgs) -> None:
        """Other settings from now on; `penstock.router.config` says which may differ."""
        if self._sharing is not None:
            self._sharing.reconfigured(self.args, args)
        self.args = args
        self._by_session = args.policy == "session"
        self._by_prefix = args.policy == "prefix_aware"
        self.resumes = args.resume_streams
        self.fleet.reconfigure(args)
        self._choose_looks()

    def forget_prefixes(self) -> None:
        """The workers' prefix caches are empty."""
        index = self.fleet.dispatch.index
        if index is not None:
            index.clear()
            if self._sharing is not None:
                self._sharing.forgot()

    # -- requests ---------------------------------------------------------------------------------

    def answers(self, path: bytes) -> bool:
        """Whether the router answers this path itself."""
        return path in _OWN or path.startswith(b"/workers/")

    def admits(self, request: Relay) -> bool:
        """Whether a request needs no key or brings one; how long that takes tells nothing about the key."""
        key = self._client_key
        if key is self._admin_key is None:
            return True
        path = request.path
        if path in ADMIN_PATHS or path.startswith(b"/workers/"):
            key = self._admin_key
        if key is None or path in OPEN_PATHS:
            return True
        return compare_digest(request.authorization or b"", key)

    def admits_admin(self, authorization: str) -> bool:
        """The same for the value of an Authorization header sent to the admin address."""
        key = self._admin_key
        return key is None or compare_digest(authorization.encode("latin-1"), key)

    def attempts(self, request: Relay, *, bounded: bool = False) -> RouterAttempts:
        """The attempts at a request. Raises Refused, and ConfigError once the router is closed.

        bounded: `begin` itself keeps to the bounds of the queue.
        """
        make = partial(_BoundedAttempts, self) if bounded else RouterAttempts
        fleet = self.fleet
        fleet.check_open()
        name = None if request.request_id is None else request.request_id.decode("latin-1")
        deadline = None if request.timeout is None else self._deadline(request.timeout)
        if not self._looks:
            return make(fleet, name=name, deadline=deadline)
        named = request.session
        if named and self._by_session and not self._several_models and not bounded:
            # All it takes is in the head; `check_queue` looks for the priority if there is to be a queue.
            return RouterAttempts(fleet, name=name, deadline=deadline, session=_session(named))
        seen = self._peek(request)
        session = blocks = None
        if self._by_session or self._by_prefix:
            if named is not None:
                session = _session(named) if named else None  # an empty one is none
            elif seen.session:
                session = session_key(seen.session)
        if self._by_prefix and session is None:
            blocks = blocks_of(seen)
        model = self._model(request, seen) if self._several_models else None
        return make(
            fleet, name=name, session=session, deadline=deadline, model=model, blocks=blocks,
            priority=seen.priority,
        )  # fmt: skip

    def _peek(self, request: Relay) -> Peek:
        if request.encoded or not request.body:
            return NOTHING
        body = request.body[0] if len(request.body) == 1 else b"".join(request.body)
        return peek(body, complete=request.complete)

    def _model(self, request: Relay, seen: Peek) -> str | None:
        model = seen.model
        if model is None and request.path.startswith(MODELS + b"/"):
            model = request.path[len(MODELS) + 1 :].decode("latin-1")
        if model is not None and not any(serves(endpoint, model) for endpoint in self.fleet.endpoints):
            raise Refused(404, f"no worker serves the model {model!r}")
        return model

    def _deadline(self, timeout: bytes) -> float | None:
        try:
            seconds = float(timeout)
        except ValueError:
            return None
        return self.fleet.clock() + min(seconds, MAX_DEADLINE) if seconds > 0 else None

    def check_queue(self, attempts: RouterAttempts, request: Relay | None) -> None:
        """A request has to wait. Raises Refused when the queue is full."""
        if self.fleet.dispatch.waiting >= self.args.queue_size:
            self.statistics.queue_full += 1
            raise Refused(429, f"{self.args.queue_size} requests wait already", retry_after=1)
        if request is not None:
            attempts.priority = self._peek(request).priority

    def resumed(self, request: Relay) -> Callable[[Exchange], None] | None:
        """What takes over a stream that is to survive its engine; None: it is relayed as any other."""
        found = resumable(request, always=self.resumes)
        if found is None:
            return None

        def begin(exchange: Exchange) -> None:
            self.spawn(self.make_resumed(self, request, found, exchange).run())

        return begin

    async def slot(self, attempts: RouterAttempts, since: float) -> Endpoint:
        """A slot, waited for no longer than the queue and the request allow. Raises Refused, FleetDown."""
        clock, bound = self.clock, self.args.queue_timeout_secs
        began = clock()
        left = attempts.time_left()
        first = attempts.number == 1
        limit = bound if left is None else min(bound, left)
        try:
            async with asyncio.timeout(max(0.0, began - since + limit) if first else limit):
                endpoint = await RouterAttempts.begin(attempts)
        except TimeoutError as error:
            if isinstance(error, PhaseTimeout):
                raise
            self.statistics.queue_timeouts += 1
            if any(endpoint.up for endpoint in self.fleet.endpoints):
                raise Refused(429, f"no slot became free in {limit:.3g} s", retry_after=1) from None
            errors = (endpoint.health.error for endpoint in self.fleet.endpoints)
            why = next((f": {error}" for error in errors if error is not None), "")
            raise Refused(503, f"no worker was up for {limit:.3g} s{why}", retry_after=1) from None
        finally:
            attempts.queued += clock() - began
        self.statistics.queued.observe(clock() - began)
        return endpoint

    # -- workers ----------------------------------------------------------------------------------

    def add(self, url: str) -> None:
        """A worker joins. Raises ConfigError."""
        self.fleet.add(url)
        self.look()

    def look(self) -> None:
        """Looks at the workers now."""
        if self._sharing is None or self._sharing.leads:
            self.spawn(self._look_at_all())

    async def leave(self, url: str, timeout: float | None) -> bool:
        """A worker drains and leaves; whether nothing of it was cut off. Raises ConfigError."""
        return await self.fleet.drain(url, timeout)

    def model_list(self) -> bytes:
        """The models of all workers, each once, as `GET /v1/models` gives them."""
        cards: dict[str, dict[str, Any]] = {}
        for endpoint in self.fleet.endpoints:
            for card in self._models.get(endpoint, ()):
                cards.setdefault(str(card.get("id")), card)
        return orjson.dumps({"object": "list", "data": list(cards.values())})

    async def _keep(self) -> None:
        """Looks at each worker's health and models, for ever."""
        while True:
            if self._sharing is None or self._sharing.leads:
                await self._look_at_all()
            await asyncio.sleep(self.args.health_check_interval_secs)

    async def _look_at_all(self) -> None:
        endpoints = self.fleet.endpoints
        await asyncio.gather(*(self._look(endpoint) for endpoint in endpoints), return_exceptions=True)
        for known in (self._models, self._failures):
            for endpoint in [endpoint for endpoint in known if endpoint.draining]:
                known.pop(endpoint)
        self._choose_looks()

    async def _look(self, endpoint: Endpoint) -> None:
        """Asks one worker how it is and what it serves. Enough failures in a row take it out."""
        fleet = self.fleet
        try:
            await health(fleet, endpoint)
        except PenstockError as error:
            failures = self._failures[endpoint] = self._failures.get(endpoint, 0) + 1
            if failures >= self.args.health_failure_threshold and endpoint.health.state is State.UP:
                endpoint.health.refuse(error, fleet.clock())
                fleet.dispatch.refresh(endpoint)
                if self._sharing is not None:
                    self._sharing.seen(endpoint, error=str(error))
            return
        self._failures[endpoint] = 0
        try:
            response = await ask(fleet, endpoint, endpoint.address.api + "/models")
            if response.status != 200:
                return
            cards = msgspec.json.decode(response.body, type=_Models).data
        except (PenstockError, msgspec.DecodeError):
            return
        if self._sharing is not None:
            self._sharing.seen(endpoint, models=cards)
        self.serves(endpoint, cards)

    def serves(self, endpoint: Endpoint, cards: list[dict[str, Any]]) -> None:
        """What a worker serves."""
        assert isinstance(endpoint.transport, EngineTransport)
        names = frozenset(str(card.get("id")) for card in cards)
        self._models[endpoint] = cards
        if endpoint.transport.models != names:
            endpoint.transport.models = names
            self.fleet.dispatch.refresh(endpoint)
            self._choose_looks()

    def _choose_looks(self) -> None:
        """Bodies are looked into where that decides something."""
        sets = {
            endpoint.transport.models
            for endpoint in self.fleet.endpoints
            if isinstance(endpoint.transport, EngineTransport)
        }
        self._several_models = len(sets) > 1
        self._looks = self._by_session or self._by_prefix or self._several_models


class _BoundedAttempts(RouterAttempts):
    """Attempts that wait as long as a router lets them."""

    __slots__ = ("_began", "_router")

    def __init__(self, router: Router, fleet: Fleet, **options: Any) -> None:
        super().__init__(fleet, **options)
        self._router = router
        self._began = router.clock()

    async def begin(self) -> Endpoint:
        if self.number == 1:
            self._router.check_queue(self, None)
        return await self._router.slot(self, self._began)


class _Models(msgspec.Struct):
    data: list[dict[str, Any]]


@lru_cache(maxsize=1 << 16)
def _session(header: bytes) -> int:
    """The key of the session that X-Session-ID names."""
    return session_key(header.decode("latin-1"))


def _bearer(key: str | None) -> bytes | None:
    return None if key is None else b"Bearer " + key.encode("ascii")
