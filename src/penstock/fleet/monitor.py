"""Looking after the endpoints of a fleet: is one that was down back, does one still generate, how full is it.

`Monitor.run` is one task, owned by the fleet. At most POLL seconds apart it looks at every endpoint:
- one that is down is probed, with growing intervals, until it answers;
- one whose requests fail is asked how it is, and is down if it cannot say that it is well;
- an open breaker whose time is over becomes half open;
- one with requests in flight has its /metrics read: they steer an adaptive limit, and show an engine that has
  stopped generating (see `penstock.fleet.progress`), which is put to the test of one token before it is down;
  one that answers no question at all for as long is down too, and what stands still on it is lost;
- an engine is told of requests whose connection was lost, where it has a route for that.
While no endpoint is up, requests wait in the dispatch queue and `on_outage` is told; once that has lasted
`Retry.outage` seconds all of them end with FleetDown, which says what was waited for.

What it asks costs no slot, is bounded in time, and runs beside it: a probe that hangs holds up nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final

import orjson

from penstock.errors import (
    FleetDown,
    PenstockError,
    PhaseTimeout,
    ResponseError,
    TransportError,
)
from penstock.fleet.endpoint import Endpoint
from penstock.fleet.health import State
from penstock.fleet.limit import POLL
from penstock.fleet.load import EngineLoad, parse_load
from penstock.fleet.progress import LOST_AFTER, Progress, Verdict
from penstock.fleet.retry import UNAVAILABLE, Decision
from penstock.wire.connection import Response
from penstock.wire.openai import model_names, response_error

if TYPE_CHECKING:
    from penstock.fleet.fleet import Fleet

MIN_WAIT: Final = 0.02
"""Seconds between two looks at least."""
SLOW_POLL: Final = 5.0
"""Seconds between two readings of the metrics of an endpoint whose limit they do not steer."""
ASK_TIMEOUT: Final = 10.0
"""Seconds a question that generates nothing (health, metrics, model list) may take."""
TEST_TIMEOUT: Final = 30.0
"""Seconds an engine under suspicion has to generate one token."""
MAX_MISSES: Final = 5
"""Answers without metrics after which an endpoint is taken to have none."""
SUSPECT_PAUSE: Final = 1.0
"""Seconds between two questions to an endpoint whose requests fail."""
SGLANG: Final = b"\nsglang:"
"""What SGLang's metrics begin with."""
MAX_ABORTS: Final = 32
"""Requests aborted at a time, where each has to be named in a request of its own."""
NOT_FOUND: Final = 404
OK: Final = 200

logger = logging.getLogger(__name__)

OnOutage = Callable[[float, PenstockError | None], None]
"""Told while no endpoint is up: for how many seconds, and why; told once with None when one is up again.
Without it both are logged."""


class Watch:
    """What the monitor knows of one endpoint."""

    __slots__ = (
        "aborting",
        "asked_at",
        "asking",
        "can_abort",
        "misses",
        "next_hail",
        "next_poll",
        "orphans",
        "polling",
        "progress",
        "silent_since",
        "suspected",
        "testing",
    )

    def __init__(self, stall: float | None, next_poll: float) -> None:
        self.progress = Progress(stall)
        self.misses = 0
        """Answers in a row that were not the metrics of an engine known here."""
        self.next_poll = next_poll
        self.next_hail = next_poll
        """When an endpoint without metrics is to be asked for a sign of life."""
        self.silent_since: float | None = None
        """Since when no question has been answered; None: the last one was."""
        self.polling = False
        self.suspected = False
        self.asked_at = float("-inf")
        self.asking = False
        self.testing = False
        """It is only up again once it has generated a token."""
        self.orphans: list[str] = []
        """Ids of requests it may still be working on for nobody."""
        self.aborting = False
        self.can_abort = True


class Monitor:
    """Looks after the endpoints of `fleet`."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._clock = fleet.clock
        self._watches: dict[Endpoint, Watch] = {}
        self._woken = asyncio.Event()
        self._told = False
        self._empty_since: float | None = None

    def notice(self, endpoint: Endpoint, decision: Decision) -> None:
        """A request of this endpoint failed."""
        if decision.suspect:
            self._watch(endpoint).suspected = True
        self._woken.set()

    def abort(self, endpoint: Endpoint, request_id: str) -> None:
        """The endpoint may be working on a request nobody waits for."""
        watch = self._watch(endpoint)
        if watch.can_abort:
            watch.orphans.append(request_id)
            self._woken.set()

    async def run(self) -> None:
        """Runs until cancelled."""
        async with asyncio.TaskGroup() as group:

            def start(work: Coroutine[Any, Any, None]) -> None:
                group.create_task(_logged(work))

            while True:
                self._woken.clear()
                now = self._clock()
                waits = [self._look(endpoint, now, start) for endpoint in self._fleet.endpoints]
                wait = min([POLL, self._judge(now), *waits])
                self._watches = {end: watch for end, watch in self._watches.items() if not end.draining}
                try:
                    async with asyncio.timeout(max(wait, MIN_WAIT)):
                        await self._woken.wait()
                except TimeoutError:
                    pass
                rest = now + MIN_WAIT - self._clock()
                if rest > 0:  # woken early, as by each of a thousand requests that fail together
                    await asyncio.sleep(rest)

    # -- decisions --------------------------------------------------------------------------------

    def _look(
        self, endpoint: Endpoint, now: float, start: Callable[[Coroutine[Any, Any, None]], None]
    ) -> float:
        """Starts what is due for one endpoint. Seconds until more is."""
        watch, health = self._watch(endpoint), endpoint.health
        wait = POLL
        if health.half_open(now):
            self._fleet.returned(endpoint)
            self._fleet.dispatch.refresh(endpoint)
        elif health.state is State.OPEN:
            wait = health.until - now
        elif health.state is State.DOWN:
            wait = health.next_probe - now
            if wait <= 0 and not watch.asking:
                watch.asking = True
                start(self._probe(endpoint, watch))
        elif watch.suspected and not watch.asking and now >= watch.asked_at + SUSPECT_PAUSE:
            watch.suspected, watch.asking, watch.asked_at = False, True, now
            start(self._ask_suspect(endpoint, watch))
        if endpoint.in_flight and health.state is State.UP and not watch.polling and now >= watch.next_poll:
            watch.next_poll = now + (POLL if endpoint.steered else SLOW_POLL)
            if watch.misses < MAX_MISSES:
                watch.polling = True
                start(self._poll(endpoint, watch))
            else:
                self._tick(endpoint, None)
                if now >= watch.next_hail:
                    watch.next_hail, watch.polling = now + SLOW_POLL, True
                    start(self._hail(endpoint, watch))
        if not endpoint.in_flight or health.state is not State.UP:
            watch.progress.rest()
        if watch.orphans and not watch.aborting:
            watch.aborting = True
            start(self._abort(endpoint, watch))
        return wait if wait > 0 else POLL

    def _judge(self, now: float) -> float:
        """Tells of an outage, and gives up on one that lasts. Seconds until it is to be judged again."""
        endpoints = self._fleet.endpoints
        if endpoints:
            self._empty_since = None
        elif self._empty_since is None:
            self._empty_since = now
        since = max(map(_out_since, endpoints)) if endpoints else self._empty_since
        assert since is not None
        if any(not _is_out(endpoint) for endpoint in endpoints):
            if self._told:
                self._tell(0.0, None)
            return POLL
        last = endpoints[-1] if endpoints else None
        error = FleetDown("the fleet has no endpoint") if last is None else last.health.error or last.behind
        self._tell(now - since, error)
        bound = self._fleet.retry.outage
        if bound is None:
            return POLL
        if now - since >= bound:
            self._fleet.dispatch.refuse_all(FleetDown(self._message(now - since, endpoints, error)))
            return POLL
        return since + bound - now

    def _message(self, seconds: float, endpoints: list[Endpoint], error: PenstockError | None) -> str:
        if not endpoints:
            return f"waited {seconds:.0f} s for an endpoint to join the fleet, which has none"
        who = endpoints[0].name if len(endpoints) == 1 else f"any of {len(endpoints)} endpoints"
        return f"waited {seconds:.0f} s for {who} to accept connections; the last error: {error}"

    def _tell(self, seconds: float, error: PenstockError | None) -> None:
        told, self._told = self._told, error is not None
        on_outage = self._fleet.settings.on_outage
        if on_outage is not None:
            try:
                on_outage(seconds, error)
            except Exception:
                logger.exception("on_outage failed")
        elif error is None:
            logger.warning("an endpoint accepts connections again")
        elif not told:
            logger.warning("no endpoint accepts connections, requests wait: %s", error)

    def _tick(self, endpoint: Endpoint, load: EngineLoad | None) -> None:
        """Moves an adaptive limit."""
        limiter = endpoint.limiter
        if limiter is None:
            return
        dispatch = self._fleet.dispatch
        saturated = endpoint.saturated or (dispatch.waiting > 0 and endpoint.in_flight >= endpoint.limit)
        endpoint.saturated = False
        limiter.tick(self._clock(), endpoint.in_flight, saturated, load)
        if endpoint.limit != limiter.current:
            endpoint.limit = limiter.current
            dispatch.refresh(endpoint)

    def _watch(self, endpoint: Endpoint) -> Watch:
        watch = self._watches.get(endpoint)
        if watch is None:
            wait = POLL if endpoint.limiter is None else 0.0
            watch = self._watches[endpoint] = Watch(self._fleet.settings.stall, self._clock() + wait)
        return watch

    # -- questions --------------------------------------------------------------------------------

    async def _probe(self, endpoint: Endpoint, watch: Watch) -> None:
        """Asks an endpoint that is down whether it is back."""
        try:
            await (self._generate(endpoint) if watch.testing else health(self._fleet, endpoint))
        except PenstockError as error:
            endpoint.health.fail_probe(error, self._clock())
            if watch.silent_since is not None and self._fleet.settings.stall is not None:
                endpoint.transport.drop_silent(self._fleet.settings.stall)
        else:
            watch.testing = False
            watch.silent_since = None
            self._fleet.returned(endpoint)
            endpoint.health.accept()
            self._fleet.dispatch.refresh(endpoint)
        finally:
            watch.asking = False
            self._woken.set()

    async def _ask_suspect(self, endpoint: Endpoint, watch: Watch) -> None:
        """Asks an endpoint whose requests fail how it is. Slowness is no answer, nor is an error of the
        route."""
        try:
            await health(self._fleet, endpoint)
        except PhaseTimeout:
            pass
        except PenstockError as error:
            if not isinstance(error, ResponseError) or error.status == UNAVAILABLE:
                self._down(endpoint, error)
        finally:
            watch.asking = False

    async def _poll(self, endpoint: Endpoint, watch: Watch) -> None:
        """Reads the metrics of an engine. A failed look says nothing, but failed looks for long do."""
        load, asked = None, self._clock()
        try:
            response = await ask(self._fleet, endpoint, endpoint.address.root + "/metrics")
            watch.silent_since = None
            load = parse_load(response.body) if response.status == OK else None
            if load is not None:
                watch.misses = 0
                endpoint.takes_rid = SGLANG in response.body
            elif response.status in (OK, NOT_FOUND):
                watch.misses += 1
        except PenstockError:
            await self._unanswered(endpoint, watch, asked)
        finally:
            watch.polling = False
        self._tick(endpoint, load)
        if load is None:
            return
        verdict = watch.progress.observe(self._clock(), endpoint.in_flight, load)
        if verdict is Verdict.LOST:
            await self._give_up_lost(endpoint)
        elif verdict is Verdict.STALLED:
            await self._test(endpoint, watch)

    async def _hail(self, endpoint: Endpoint, watch: Watch) -> None:
        """Asks an endpoint without metrics for a sign of life: any answer is one."""
        asked = self._clock()
        try:
            await ask(self._fleet, endpoint, endpoint.address.root + "/health")
            watch.silent_since = None
        except PenstockError:
            await self._unanswered(endpoint, watch, asked)
        finally:
            watch.polling = False

    async def _unanswered(self, endpoint: Endpoint, watch: Watch, asked: float) -> None:
        """A question was not answered. When none is for `stall` seconds, and it does not say that it is well
        either, the endpoint is down (a process that is stopped, a host that is gone)."""
        if watch.silent_since is None:
            watch.silent_since = asked
        stall = self._fleet.settings.stall
        if stall is None or self._clock() - watch.silent_since < stall or not endpoint.up:
            return
        try:
            await health(self._fleet, endpoint)
        except TransportError as error:
            logger.warning("%s answers nothing any longer: %s", endpoint.name, error)
            self._down(endpoint, error)
            endpoint.transport.drop_silent(stall)
        except ResponseError:
            watch.silent_since = None  # an answer, if not a good one
        else:
            watch.silent_since = None

    async def _give_up_lost(self, endpoint: Endpoint) -> None:
        """Ends what an idle engine has lost. A paused one holds requests back, and its metrics show none."""
        try:
            paused = await self._paused(endpoint)
        except PenstockError:
            return
        count = 0 if paused else endpoint.transport.drop_silent(LOST_AFTER)
        if count:
            logger.warning("%s is idle and has lost %d requests: sent again", endpoint.name, count)

    async def _test(self, endpoint: Endpoint, watch: Watch) -> None:
        """Lets an engine that makes no tokens make one; without one it is down, and what it has is lost.

        The one token may have to queue behind what is there: when tokens flow again, the engine is alive.
        """
        tokens = watch.progress.tokens
        try:
            if not await self._paused(endpoint):
                await self._generate(endpoint)
        except PenstockError as error:
            if watch.progress.tokens != tokens:
                return
            logger.warning("%s has stopped generating: %s", endpoint.name, error)
            watch.testing = True
            self._down(endpoint, error)
            endpoint.transport.drop_silent(0.0)

    async def _generate(self, endpoint: Endpoint) -> None:
        """One token. Raises PenstockError when there is none in time; a 4xx is an answer."""
        listing = await ask(self._fleet, endpoint, endpoint.address.api + "/models")
        names = model_names(listing.body) if listing.status == OK else []
        body = orjson.dumps({"model": names[0] if names else "", "prompt": "1", "max_tokens": 1})
        path = endpoint.address.api + "/completions"
        response = await ask(self._fleet, endpoint, path, body, timeout=TEST_TIMEOUT)
        if response.status >= 500:
            raise response_error(response)

    async def _paused(self, endpoint: Endpoint) -> bool:
        """The engine has been told to wait, as for an update of its weights."""
        response = await ask(self._fleet, endpoint, endpoint.address.root + "/is_paused")
        return response.status == OK and b"true" in response.body.lower()

    async def _abort(self, endpoint: Endpoint, watch: Watch) -> None:
        """Tells an engine of requests nobody waits for. vLLM puts the route's prefix before an id."""
        count = MAX_ABORTS if endpoint.takes_rid else len(watch.orphans)
        orphans, watch.orphans = watch.orphans[:count], watch.orphans[count:]
        names = [f"{prefix}{id}" for id in orphans for prefix in ("", "chatcmpl-", "cmpl-")]
        path, bodies = "/abort_requests", [orjson.dumps({"request_ids": names})]
        if endpoint.takes_rid:
            path, bodies = "/abort_request", [orjson.dumps({"rid": id}) for id in orphans]
        try:
            path = endpoint.address.root + path
            answers = await asyncio.gather(*(ask(self._fleet, endpoint, path, body) for body in bodies))
            watch.can_abort = answers[-1].status != NOT_FOUND
        except PenstockError:
            pass
        finally:
            watch.aborting = False
            if watch.orphans:
                self._woken.set()

    def _down(self, endpoint: Endpoint, error: PenstockError) -> None:
        endpoint.health.refuse(error, self._clock())
        self._fleet.dispatch.refresh(endpoint)
        self._woken.set()


def _is_out(endpoint: Endpoint) -> bool:
    """It is down, or nobody has brought it to the fleet's policy version yet."""
    return endpoint.health.state is State.DOWN or endpoint.behind is not None


def _out_since(endpoint: Endpoint) -> float:
    return endpoint.health.since if endpoint.health.state is State.DOWN else endpoint.behind_since


async def ask(
    fleet: Fleet,
    endpoint: Endpoint,
    path: str,
    body: bytes | None = None,
    *,
    timeout: float | None = None,
) -> Response:
    """A GET, or with a body a POST, that needs no slot; `timeout`: ASK_TIMEOUT. Raises TransportError."""
    timeout = ASK_TIMEOUT if timeout is None else timeout
    head = fleet.head(endpoint, "GET" if body is None else "POST", path)
    try:
        async with asyncio.timeout(timeout):
            return await endpoint.transport.request(head, body or b"")
    except TimeoutError as error:
        if isinstance(error, PhaseTimeout):
            raise
        raise PhaseTimeout(
            f"{endpoint.name} did not answer {path} within {timeout:g} s", "first_byte"
        ) from None


async def health(fleet: Fleet, endpoint: Endpoint) -> None:
    """Raises TransportError or ResponseError unless the endpoint is there and serving.

    A server without the route counts as well: it has answered.
    """
    response = await ask(fleet, endpoint, endpoint.address.root + "/health")
    if response.status >= 500:
        raise response_error(response)


async def _logged(work: Coroutine[Any, Any, None]) -> None:
    """Nothing that goes wrong while looking after endpoints may end the looking after."""
    try:
        await work
    except Exception:
        logger.exception("a look at an endpoint failed")
