"""One process of a router of several: what it tells the parent, and hears from it.

It guarantees:
- workers, limits and settings that are changed here are told to the parent, and through it to all, before the
  change is answered;
- a worker that leaves has left only when nothing of it is in flight in any process;
- one process looks at the workers' health and models and moves adaptive limits; the others go by what it
  sees. A worker that several find down is probed by one of them;
- when the parent is gone, the process ends at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import socket
import sys
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from penstock.errors import ConfigError, ConnectFailed, PenstockError
from penstock.fleet.endpoint import UNLIMITED, Endpoint
from penstock.fleet.fleet import Settings
from penstock.fleet.health import State
from penstock.fleet.transport import Transport
from penstock.router.args import RouterArgs
from penstock.router.counts import AWAY, BEHIND, DOWN, KINDS, SATURATED, Counts
from penstock.router.ledger import TOTAL, Lend, Share
from penstock.router.link import (
    Barrier,
    Configure,
    Drain,
    Failed,
    Forget,
    Join,
    Lead,
    Leave,
    Left,
    Limit,
    Link,
    Message,
    Passed,
    Ready,
    Seen,
)
from penstock.router.shared import NUMBERLESS, SharedDispatch, SharedEndpoint, SharedLimit
from penstock.router.totals import shown, told
from penstock.wire.address import Address
from penstock.wire.exchange import Exchange, Request, error_body
from penstock.wire.loop import Stop, run
from penstock.wire.server import Handler

if TYPE_CHECKING:
    from penstock.router.router import Router

TICK: Final = 0.02
"""Seconds between two looks at what the others do, beside those when a worker is chosen."""
RETELL: Final = 5
"""Ticks after which requests that wait are told of again."""
POSTPONED: Final = 0.1
"""Seconds by which a probe is put off while another process probes."""
ENDING: Final = 5.0
"""Seconds to end in when the parent is gone."""
SUMMED: Final = frozenset({"/metrics", "/workers", "/get_loads", "/v1/loads", "/dashboard/data"})
"""What shows the sum over all processes; with /workers/URL."""
CHANGING: Final = frozenset({"/workers", "/add_worker", "/remove_worker", "/config"})
"""What is answered when all processes have heard of it; with /workers/URL."""

logger = logging.getLogger(__name__)


class Sharing:
    """What a process shares with the others."""

    def __init__(self, row: int, counts: Counts) -> None:
        self.row = row
        self.first = row == 0
        """The addresses besides the main one are served by this process."""
        self.counts = counts
        self.leads = False
        self.in_flight_elsewhere = 0
        """While something is shown: requests that clients of the others wait for."""
        self.in_flight: Callable[[], int] = lambda: 0
        """Those of this process."""
        self.drain: Callable[[], None] = lambda: None
        self.link: Link
        self.router: Router
        self._heard = False
        """What happens now was heard, and need not be told."""
        self._asked = False
        self._parting: set[SharedEndpoint] = set()
        self._postponed: set[Endpoint] = set()
        self._barriers: dict[int, asyncio.Future[list[dict[str, Any]]]] = {}
        self._number = 0
        self._models: dict[int, list[dict[str, Any]]] = {}
        """As told last, by worker."""
        self._early: list[Message] = []
        self._ticks = 0

    # -- parts of the router ----------------------------------------------------------------------

    def dispatch(self, **options: Any) -> SharedDispatch:
        return SharedDispatch(self.counts, ask=self._ask, agree=self._agree, **options)

    def endpoint(self, address: Address, transport: Transport, settings: Settings) -> SharedEndpoint:
        return SharedEndpoint(
            self.counts,
            address,
            transport,
            limit=settings.max_in_flight,
            adaptive=settings.adaptive,
            breaker=settings.breaker,
        )

    def start(self, router: Router) -> None:
        """The router is open."""
        self.router = router
        early, self._early = self._early, []
        for message in early:
            self.hear(message)
        router.spawn(self._run())

    @property
    def _dispatch(self) -> SharedDispatch:
        dispatch = self.router.fleet.dispatch
        assert isinstance(dispatch, SharedDispatch)
        return dispatch

    # -- what happens here ------------------------------------------------------------------------

    def joined(self, url: str) -> None:
        self._tell(Join(url))

    def leaves(self, url: str, timeout: float | None) -> None:
        self._tell(Leave(url, timeout))

    def parted(self, endpoint: Endpoint) -> None:
        """It has left, and its connections are closed."""
        assert isinstance(endpoint, SharedEndpoint)
        self._parting.add(endpoint)

    def forgot(self) -> None:
        self._tell(Forget())

    def reconfigured(self, before: RouterArgs, now: RouterArgs) -> None:
        was = before.shown()
        changes = {name: value for name, value in now.shown().items() if value != was[name]}
        self._tell(Configure(changes))

    def seen(
        self, endpoint: Endpoint, *, models: list[dict[str, Any]] | None = None, error: str | None = None
    ) -> None:
        assert isinstance(endpoint, SharedEndpoint)
        if endpoint.worker == NUMBERLESS:
            return
        if models is None or models != self._models.get(endpoint.worker):
            self._tell(Seen(endpoint.worker, models, error))
        if models is not None:
            self._models[endpoint.worker] = models

    def _agree(self, endpoint: SharedEndpoint | None, limit: int) -> None:
        worker = TOTAL if endpoint is None else endpoint.worker
        if endpoint is None or worker != NUMBERLESS:
            self._tell(Limit(worker, None if limit == UNLIMITED else limit))

    def _tell(self, message: Message) -> None:
        if not self._heard:
            self.link.say(message)

    def _ask(self) -> None:
        if not self._asked:
            self._asked = True
            self.router.fleet.loop.call_soon(self._claim)

    def _claim(self) -> None:
        self._asked = False
        for claim in self._dispatch.claims():
            self.link.say(claim)

    # -- what is heard ----------------------------------------------------------------------------

    def hear(self, message: Message | None) -> None:
        if message is None or isinstance(message, Drain):
            self.drain()
            if message is None:
                self.drain()
                asyncio.get_running_loop().call_later(ENDING, os._exit, 1)
            return
        if not hasattr(self, "router"):
            self._early.append(message)
            return
        self._heard = True
        try:
            self._hear(message)
        except PenstockError as error:
            logger.warning("%s", error)
        finally:
            self._heard = False

    def _hear(self, message: Message) -> None:
        match message:
            case Lend() | Share():
                self._dispatch.hear(message)
            case Join():
                self._join(message)
            case Leave():
                if Address.parse(message.url) in self.router.fleet.addresses:
                    self.router.spawn(self.router.fleet.drained(message.url, message.timeout))
            case Limit():
                self._limit(message)
            case Forget():
                self.router.forget_prefixes()
            case Configure():
                self.router.reconfigure(replace(self.router.args, **message.changes))
            case Seen():
                self._see(message)
            case Lead():
                self._lead()
            case Barrier():
                said = [told(self.router, self.in_flight())] if message.statistics else []
                self.link.say(Passed(message.number, said))
            case Passed():
                future = self._barriers.pop(message.number, None)
                if future is not None and not future.done():
                    future.set_result(message.statistics)
            case _:
                raise AssertionError(message)

    def _join(self, join: Join) -> None:
        fleet, address = self.router.fleet, Address.parse(join.url)
        fleet.add(join.url)
        endpoint = next(end for end in fleet.endpoints if end.address == address)
        assert isinstance(endpoint, SharedEndpoint)
        if endpoint.worker == NUMBERLESS:
            endpoint.worker = join.worker
            for kind in range(KINDS):
                self.counts.rows[kind][join.worker] = 0
            self._dispatch.workers[join.worker] = endpoint
            self._agreed(endpoint, join.limit)
            if self.leads:
                self._steer(endpoint)
                self.router.look()

    def _limit(self, message: Limit) -> None:
        if message.worker == TOTAL:
            self._dispatch.agree_cap(message.limit)
        elif (endpoint := self._dispatch.workers.get(message.worker)) is not None:
            self._agreed(endpoint, message.limit)

    def _agreed(self, endpoint: SharedEndpoint, limit: int | None) -> None:
        endpoint.limit = endpoint.agreed = UNLIMITED if limit is None else limit
        if endpoint.limiter is not None:
            endpoint.limiter.current = endpoint.limit

    def _see(self, seen: Seen) -> None:
        endpoint = self._dispatch.workers.get(seen.worker)
        if endpoint is None:
            return
        if seen.models is not None:
            self.router.serves(endpoint, seen.models)
        if seen.error is not None and endpoint.health.state is State.UP:
            endpoint.health.refuse(ConnectFailed(seen.error), self.router.fleet.clock())
            self._dispatch.refresh(endpoint)

    def _lead(self) -> None:
        self.leads = True
        for endpoint in self._dispatch.workers.values():
            self._steer(endpoint)
        self.router.look()

    def _steer(self, endpoint: SharedEndpoint) -> None:
        """Its adaptive limit is moved here from now on, beginning where it is."""
        if endpoint.limiter is not None:
            limiter = SharedLimit(endpoint, endpoint.limiter.ceiling, start=endpoint.limit)
            limiter.leads = True
            endpoint.limiter = limiter

    # -- time -------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            self._tick()

    def _tick(self) -> None:
        dispatch, now = self._dispatch, self.router.fleet.clock()
        dispatch.look()
        for endpoint in list(dispatch.workers.values()):
            self._compare(endpoint, now)
        for endpoint in [endpoint for endpoint in self._parting if not endpoint.own]:
            self._parting.discard(endpoint)
            if dispatch.workers.pop(endpoint.worker, None) is not None:
                self._models.pop(endpoint.worker, None)
                self.link.say(Left(endpoint.worker))
        self._ticks += 1
        if self._ticks % RETELL == 0:
            dispatch.retell()

    def _compare(self, endpoint: SharedEndpoint, now: float) -> None:
        """What this process thinks of a worker, beside what the others do."""
        counts, worker, health = self.counts, endpoint.worker, endpoint.health
        down = health.state is State.DOWN
        counts.rows[AWAY][worker] = DOWN if down else 0 if endpoint.current else BEHIND
        if endpoint.saturated and not self.leads:
            counts.rows[SATURATED][worker] += 1
            endpoint.saturated = False
        away = [counts.get(row, AWAY, worker) for row in range(counts.processes) if row != self.row]
        barred = BEHIND in away
        if barred != endpoint.barred:
            endpoint.barred = barred
            self._dispatch.refresh(endpoint)
        if down and DOWN in away[: self.row]:  # the first who finds it down probes it
            self._postponed.add(endpoint)
            health.next_probe = now + POSTPONED
        elif endpoint in self._postponed:
            self._postponed.discard(endpoint)
            health.next_probe = now

    # -- what is shown ----------------------------------------------------------------------------

    def handler(self, handle: Handler) -> Handler:
        """`handle`, for all processes."""

        def shared(exchange: Exchange) -> None:
            path, method = exchange.request.path, exchange.request.method
            one = path.startswith("/workers/")
            if method in ("GET", "HEAD"):
                if one or path in SUMMED:
                    self.router.spawn(self._answered(exchange, self._show(exchange, handle)))
                    return
            elif one or path in CHANGING:
                self.router.spawn(self._answered(exchange, self._change(exchange, handle)))
                return
            handle(exchange)

        return shared

    async def _answered(self, exchange: Exchange, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception:
            logger.exception("handler failed on %s", exchange.request.path)
            if not exchange.started:
                exchange.respond(500, error_body(500, "internal server error"))

    async def _show(self, exchange: Exchange, handle: Handler) -> None:
        others = await self._barrier(statistics=True)
        self._dispatch.look()
        with shown(self.router, others) as self.in_flight_elsewhere:
            handle(exchange)
        self.in_flight_elsewhere = 0

    async def _change(self, exchange: Exchange, handle: Handler) -> None:
        held = _Held(exchange.request)
        handle(held)
        answer = await held.answer
        await self._barrier(statistics=False)
        exchange.respond(*answer)

    async def _barrier(self, *, statistics: bool) -> list[dict[str, Any]]:
        """Waits until all have heard what was told; what they have counted."""
        self._number += 1
        future: asyncio.Future[list[dict[str, Any]]] = asyncio.get_running_loop().create_future()
        self._barriers[self._number] = future
        self.link.say(Barrier(self._number, statistics))
        return await future


class _Held(Exchange):
    """Takes the answer and keeps it."""

    __slots__ = ("answer",)

    def __init__(self, request: Request) -> None:
        super().__init__(_Nowhere(), request)
        self.answer: asyncio.Future[tuple[Any, ...]] = asyncio.get_running_loop().create_future()

    def respond(
        self,
        status: int,
        body: bytes,
        content_type: str = "application/json",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.answer.set_result((status, body, content_type, headers))
        self._connection = None  # it has begun


class _Nowhere:
    """In place of the client's connection."""

    retiring = False

    def write(self, data: bytes) -> None:
        raise AssertionError("a change is answered in one piece")

    async def drained(self) -> None:
        pass

    def exchange_ended(self, close: bool) -> None:
        pass

    def exchange_broken(self) -> None:
        pass


def main(link: int, table: int) -> None:
    """The entry of a process the parent has started: settings come on standard input."""
    row, args, level = pickle.load(sys.stdin.buffer)
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    sys.exit(run(_serve(row, args, socket.socket(fileno=link), table)))


async def _serve(row: int, args: RouterArgs, end: socket.socket, table: int) -> int:
    from penstock.router.server import ending, serving

    stop = Stop()
    sharing = Sharing(row, Counts(table, args.processes, row))
    sharing.drain = stop.wish
    sharing.link = await Link.over(end, sharing.hear)
    try:
        async with serving(args, sharing) as server:
            sharing.link.say(Ready())
            await ending(server, stop)
    except ConfigError as error:
        sharing.link.say(Failed(str(error)))
        await asyncio.sleep(ENDING)  # the parent ends it when it has heard
        return 2
    finally:
        sharing.link.close()
    return 0
