"""The attempts at one request: the only retry loop of the project is the one written around this.

    attempts = Attempts(fleet)
    while True:
        endpoint = attempts.take() or await attempts.begin()
        try:
            result = …                       # send it to the endpoint
        except BaseException as error:
            if not attempts.failed(error):
                raise
        else:
            attempts.succeeded(tokens, seconds)
            return result

It guarantees: a slot on the endpoint from `begin` on, given back exactly once, also under cancellation, and
before a backoff is slept; another endpoint on the next attempt where there is one; every wait bounded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TYPE_CHECKING, TypeVar

from penstock.errors import ConfigError, ConnectionLost, DeadlineExceeded, PenstockError, PhaseTimeout
from penstock.fleet.endpoint import Endpoint
from penstock.fleet.retry import REFUSED, Retries, classify

if TYPE_CHECKING:
    from penstock.fleet.fleet import Fleet

T = TypeVar("T")


class Attempts:
    """One request: a ticket of the dispatch queue while it waits, the holder of a slot while it is in flight.

    name: what it is called at the engines, by default the fleet's prefix and a serial number. deadline: on
    the fleet's clock; an attempt that could only begin later is not waited for.
    """

    __slots__ = (
        "_deadline",
        "_fleet",
        "_future",
        "_retries",
        "_wait",
        "_waits_for",
        "avoid",
        "endpoint",
        "name",
        "priority",
        "serial",
        "session",
        "trial",
    )

    def __init__(
        self,
        fleet: Fleet,
        *,
        name: str | None = None,
        priority: int = 0,
        session: int | None = None,
        deadline: float | None = None,
    ) -> None:
        self._fleet = fleet
        self.name = name
        self.serial = next(fleet.serials)
        self.priority = priority
        self.session = session
        self.avoid: Endpoint | None = None
        self.trial = 0
        self.endpoint: Endpoint | None = None
        """Where it is in flight."""
        self._deadline = deadline
        self._future: asyncio.Future[Endpoint] | None = None
        self._retries: Retries | None = None
        self._wait = 0.0
        self._waits_for: str | None = None

    @property
    def number(self) -> int:
        """Number of the attempt under way, from 1."""
        return 1 if self._retries is None else self._retries.failures + 1

    @property
    def request_id(self) -> str:
        """The id of the attempt under way: that of the request, with a number behind it from the second
        on."""
        id = self.name if self.name is not None else f"{self._fleet.prefix}{self.serial:x}"
        retries = self._retries
        return id if retries is None or not retries.failures else f"{id}-{self.number}"

    @property
    def plain(self) -> bool:
        """It is the first attempt of a request without a name of its own."""
        return self._retries is None and self.name is None

    def time_left(self) -> float | None:
        """Seconds to the deadline, None without one."""
        return None if self._deadline is None else max(0.0, self._deadline - self._fleet.clock())

    def whereabouts(self) -> str:
        """What the request is, or was last, waiting for, in words."""
        if self._waits_for is not None:
            return f"attempt {self.number} waited for {self._waits_for}"
        where = self.endpoint or self.avoid
        return f"attempt {self.number} was in flight at {where.name}" if where else "it had not begun"

    def take(self) -> Endpoint | None:
        """A slot for the first attempt, if it can be had without waiting."""
        if self._retries is not None:
            return None
        endpoint = self.endpoint = self._fleet.dispatch.take(self)
        return endpoint

    async def begin(self) -> Endpoint:
        """Waits out the backoff, then for a slot. Raises FleetDown, ConfigError when the fleet is closed."""
        if self._wait:
            self._waits_for = "its turn after a failure"
            await asyncio.sleep(self._wait)
        self._fleet.check_open()
        self._waits_for = None
        dispatch = self._fleet.dispatch
        free = self.endpoint = dispatch.take(self)
        if free is not None:
            return free
        future: asyncio.Future[Endpoint] = self._fleet.loop.create_future()
        self._future = future
        dispatch.wait(self)
        self._waits_for = "a slot"
        try:
            endpoint = await future
        except BaseException:
            dispatch.withdraw(self)
            if self.endpoint is not None:  # cancelled between the grant and the waking
                self._fleet.dropped(self.endpoint, self.trial)
                self.endpoint = None
            raise
        finally:
            self._future = None
        self._waits_for = None
        return endpoint

    def succeeded(self, tokens: int, seconds: float) -> None:
        """The attempt has brought its result: so many generated tokens, in so many seconds."""
        endpoint, self.endpoint = self.endpoint, None
        assert endpoint is not None
        self._fleet.succeeded(endpoint, tokens, seconds, self.trial)

    def failed(self, error: BaseException, *, final: bool = False) -> bool:
        """The attempt has ended with this error. Whether there is to be another; `begin` then waits for it.

        `final`: the caller does not want another.
        """
        endpoint, self.endpoint = self.endpoint, None
        assert endpoint is not None
        fleet = self._fleet
        self.avoid = endpoint
        if not isinstance(error, PenstockError):
            fleet.dropped(endpoint, self.trial)
            if endpoint.takes_rid:
                fleet.lost(endpoint, self.request_id)
            return False
        # A pool that was closed because its endpoint left has sent nothing.
        decision = REFUSED if endpoint.draining and isinstance(error, ConfigError) else classify(error)
        fleet.failed(endpoint, error, decision, self.trial)
        if isinstance(error, ConnectionLost | PhaseTimeout) and decision.charged:
            fleet.lost(endpoint, self.request_id)
        if final:
            return False
        if self._retries is None:
            self._retries = Retries()
        now = fleet.clock()
        wait = self._retries.fail(
            decision,
            fleet.retry,
            fleet.budget,
            now,
            fleet.random,
            in_flight=fleet.dispatch.in_flight + 1,
            deadline=self._deadline,
        )
        if wait is None or fleet.closed:
            return False
        fleet.retries += 1
        self._wait = wait
        return True

    # -- as a ticket ------------------------------------------------------------------------------

    def offer(self, endpoint: Endpoint) -> bool:
        future = self._future
        if future is None or future.done():
            return False
        self.endpoint = endpoint
        future.set_result(endpoint)
        return True

    def refuse(self, error: PenstockError) -> None:
        future = self._future
        if future is not None and not future.done():
            future.set_exception(type(error)(str(error)))


async def within(deadline: float, attempts: Attempts, work: Awaitable[T]) -> T:
    """Awaits `work` until `deadline`, loop time. Raises DeadlineExceeded, which says what was waited for."""
    scope = asyncio.timeout_at(deadline)
    try:
        async with scope:
            return await work
    except TimeoutError as error:
        if not scope.expired():
            raise
        raise DeadlineExceeded(f"the time of the request is over: {attempts.whereabouts()}") from error
