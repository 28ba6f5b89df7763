"""Virtual time: an event loop whose clock jumps to the next timer, and engines that live in it.

`run` runs a scenario on a `VirtualLoop`. `Engine` is a transport (`penstock.fleet.transport`) whose other end
is simulated: requests pass a queue into `slots`, take their time, and meet the faults that were asked for.
Everything random comes from a seed, so that a run can be repeated exactly.
"""

from __future__ import annotations

import asyncio
import random
import re
import selectors
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final, TypeVar

import msgspec

from penstock.errors import ConnectFailed, ConnectionLost
from penstock.fleet.transport import ByteStream
from penstock.wire.address import Address
from penstock.wire.connection import Response
from penstock.wire.pool import PoolStatistics
from tests.scripted import chat_body

T = TypeVar("T")

STEPS: Final = 5_000_000
"""Iterations a scenario may take."""


class _Jump(selectors.DefaultSelector):
    """Waits for nothing: time passes instead."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.steps = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.steps += 1
        if self.steps > STEPS:
            raise RuntimeError(f"the scenario has not ended after {STEPS} steps, at {self.now:.3f} s")
        if timeout is None:
            raise RuntimeError(f"at {self.now:.3f} s nothing is left that could ever happen")
        self.now += max(0.0, timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop that sleeps for nobody. Without sockets, threads and signals."""

    def __init__(self) -> None:
        self._jump = _Jump()
        super().__init__(self._jump)

    def time(self) -> float:
        return self._jump.now

    @property
    def steps(self) -> int:
        return self._jump.steps


def run(main: Callable[[VirtualLoop], Coroutine[Any, Any, T]]) -> T:
    """Runs the scenario; asserts that no task is left."""
    loop = VirtualLoop()
    try:
        result = loop.run_until_complete(main(loop))
        for _ in range(3):
            loop.run_until_complete(asyncio.sleep(0))
        assert not asyncio.all_tasks(loop), asyncio.all_tasks(loop)
        return result
    finally:
        loop.close()


class Plan(msgspec.Struct, kw_only=True):
    """An engine and what goes wrong with it. Shares are of the requests to generate."""

    slots: int = 1_000_000
    seconds: float = 1.0
    """Mean time of an answer in a slot."""
    spread: float = 0.5
    """Sigma of the lognormal times; 0: all alike."""
    tokens: int = 30
    """Per answer."""
    metrics: bool = True
    refused: float = 0.0
    reset_before: float = 0.0
    reset_after: float = 0.0
    error_500: float = 0.0
    error_503: float = 0.0
    error_429: float = 0.0
    lost: float = 0.0
    """Accepted and forgotten: no answer, not in the metrics."""
    outages: tuple[tuple[float, float], ...] = ()
    """From when and for how long it accepts no connections; what it had is gone."""
    stalls: tuple[tuple[float, float], ...] = ()
    """From when and for how long it makes no token, and answers its metrics all the same."""


class Job:
    """One request to generate, at its engine."""

    __slots__ = ("future", "id", "left", "since", "timer")

    def __init__(self, id: str, left: float, future: asyncio.Future[Response], since: float) -> None:
        self.id = id
        self.left = left
        """Seconds in a slot."""
        self.future = future
        self.since = since
        self.timer: asyncio.TimerHandle | None = None


_ID: Final = re.compile(rb"\r\nx-request-id: ([^\r]+)", re.IGNORECASE)
_FAULTS: Final = ("refused", "reset_before", "reset_after", "error_500", "error_503", "error_429", "lost")
TEST: Final = "test"
"""The id of a request that has none: the monitor's own."""


class Engine:
    """One endpoint; `log` gets (time, engine, what, request id) of all that happens."""

    def __init__(
        self, name: str, plan: Plan, loop: VirtualLoop, dice: random.Random, log: list[tuple[Any, ...]]
    ) -> None:
        self.name = name
        self.plan = plan
        self.slots = plan.slots
        self.generated: Counter[str] = Counter()
        """How often the engine began to work on a request, by the id of the attempt."""
        self.in_flight = 0
        self.most_in_flight = 0
        self.down = False
        self.stalled = False
        self.side: Mapping[str, Response] = {}
        self.asked: Counter[str] = Counter()
        self._loop = loop
        self._dice = dice
        self._log = log
        usage = {"prompt_tokens": 3, "completion_tokens": plan.tokens, "total_tokens": 3 + plan.tokens}
        self._whole = Response(200, {}, chat_body(usage=usage))
        self._jobs: dict[Job, None] = {}
        self._running: dict[Job, None] = {}
        self._waiting: deque[Job] = deque()
        self._tokens = 0.0
        self._counted_at = 0.0
        self._timers = [
            loop.call_at(start + shift, act)
            for spans, begin, end in (
                (plan.outages, self._go_down, self._come_back),
                (plan.stalls, self._stall, self._go_on),
            )
            for start, length in spans
            for shift, act in ((0.0, begin), (length, end))
        ]

    # -- as a transport ---------------------------------------------------------------------------

    async def request(self, head: bytes, body: bytes = b"") -> Response:
        if self.down:
            raise ConnectFailed(f"cannot connect to {self.name}: refused")
        path = head.split(b" ", 2)[1].decode()
        if path in ("/v1/chat/completions", "/v1/completions"):
            found = _ID.search(head)
            return await self._generate(found[1].decode() if found else TEST)
        self.asked[path] += 1
        return self._answer(path)

    async def stream(self, head: bytes, body: bytes = b"") -> ByteStream:
        raise AssertionError("simulated engines do not stream")

    def drop_silent(self, seconds: float) -> int:
        bound = self._loop.time() - seconds
        silent = [job for job in self._jobs if job.since <= bound]
        self._lose(silent)
        return len(silent)

    def statistics(self) -> PoolStatistics:
        return PoolStatistics(self.in_flight, 0, 0, 0)

    async def close(self) -> None:
        self._lose(list(self._jobs))

    def stop(self) -> None:
        """Ends what is still to happen to it."""
        for timer in self._timers:
            timer.cancel()

    # -- answers ----------------------------------------------------------------------------------

    def _answer(self, path: str) -> Response:
        if path in self.side:
            return self.side[path]
        if path == "/health":
            return Response(200, {}, b"")
        if path == "/v1/models":
            return Response(200, {}, b'{"data": [{"id": "m"}]}')
        if path == "/metrics" and self.plan.metrics:
            self._count()
            return Response(
                200,
                {},
                b'vllm:num_requests_running{engine="0"} %d\nvllm:num_requests_waiting{engine="0"} %d\n'
                b'vllm:kv_cache_usage_perc{engine="0"} 0.1\nvllm:num_preemptions_total{engine="0"} 0\n'
                b'vllm:generation_tokens_total{engine="0"} %d\n'
                % (len(self._running), len(self._waiting), int(self._tokens)),
            )
        return Response(404, {}, b"{}")

    async def _generate(self, id: str) -> Response:
        plan, dice, now = self.plan, self._dice, self._loop.time()
        luck, fault = dice.random(), None
        for name in _FAULTS:
            luck -= getattr(plan, name)
            if luck < 0:
                fault = name
                break
        self._log.append((now, self.name, fault or "sent", id))
        if fault == "refused":
            raise ConnectFailed("refused")
        self.in_flight += id != TEST
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return await self._work(id, fault)
        finally:
            self.in_flight -= id != TEST

    async def _work(self, id: str, fault: str | None) -> Response:
        plan, dice = self.plan, self._dice
        if fault in ("error_500", "error_503", "error_429"):
            await asyncio.sleep(0.01)
            status = int(fault.removeprefix("error_"))
            return Response(status, {b"retry-after": b"2"} if status == 503 else {}, b"{}")
        if fault == "reset_before":
            await asyncio.sleep(0.01)
            raise ConnectionLost("reset before it was read")
        if id != TEST:
            self.generated[id] += 1
        if fault == "reset_after":
            await asyncio.sleep(plan.seconds * dice.random())
            raise ConnectionLost("reset", response_started=True)
        seconds = plan.seconds
        if plan.spread:
            seconds *= dice.lognormvariate(-(plan.spread**2) / 2, plan.spread)
        job = Job(id, seconds, self._loop.create_future(), self._loop.time())
        self._jobs[job] = None
        if fault != "lost":
            self._waiting.append(job)
            self._fill()
        try:
            return await job.future
        finally:
            self._leave(job)

    # -- slots ------------------------------------------------------------------------------------

    def resize(self, slots: int) -> None:
        """From now on so many requests run; the others that do are finished."""
        self.slots = slots
        self._fill()

    def _count(self) -> None:
        """Brings the count of tokens up to now."""
        now = self._loop.time()
        if not self.stalled:
            rate = self.plan.tokens / self.plan.seconds
            self._tokens += rate * len(self._running) * (now - self._counted_at)
        self._counted_at = now

    def _fill(self) -> None:
        self._count()
        while self._waiting and len(self._running) < self.slots:
            job = self._waiting.popleft()
            self._running[job] = None
            if not self.stalled:
                job.timer = self._loop.call_later(job.left, self._finish, job)

    def _finish(self, job: Job) -> None:
        self._log.append((self._loop.time(), self.name, "done", job.id))
        if not job.future.done():
            job.future.set_result(self._whole)

    def _leave(self, job: Job) -> None:
        self._count()
        if job.timer is not None:
            job.timer.cancel()
        self._jobs.pop(job, None)
        if job in self._running:
            del self._running[job]
            self._fill()
        elif job in self._waiting:
            self._waiting.remove(job)

    def _lose(self, jobs: list[Job]) -> None:
        for job in jobs:
            if not job.future.done():
                self._log.append((self._loop.time(), self.name, "cut", job.id))
                job.future.set_exception(ConnectionLost("cut off"))

    # -- what happens to it -----------------------------------------------------------------------

    def _go_down(self) -> None:
        self.down = True
        self._lose(list(self._jobs))

    def _come_back(self) -> None:
        self.down = False

    def _stall(self) -> None:
        self._count()
        self.stalled = True
        for job in self._running:
            if job.timer is not None:
                job.left = max(0.0, job.timer.when() - self._loop.time())
                job.timer.cancel()

    def _go_on(self) -> None:
        self._count()
        self.stalled = False
        for job in self._running:
            job.timer = self._loop.call_later(job.left, self._finish, job)


class World:
    """Engines by address: what a client is given as its transport."""

    def __init__(self, loop: VirtualLoop, seed: int, plans: list[Plan]) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.urls = [f"http://engine{number}:8000" for number in range(len(plans))]
        self.engines = [
            Engine(url, plan, loop, random.Random(f"{seed} {url}"), self.log)
            for url, plan in zip(self.urls, plans, strict=True)
        ]

    def transport(self, address: Address) -> Engine:
        return self.engines[self.urls.index(str(address))]

    def stop(self) -> None:
        for engine in self.engines:
            engine.stop()
