"""An engine and its clients in virtual time: discrete events, everything random from a seed.

The engine computes all running requests one token a step; a step's time depends on how many there are.
Requests pass a front end, wait in a queue first come, first served, and take one of `slots` and room in the
KV cache; one that finds no room for its next token is thrown out and computed again. A client has endless
work and sends as many as its limit allows, at once when an answer has arrived.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from penstock.fleet.limit import POLL, AdaptiveLimit
from penstock.fleet.load import EngineLoad


@dataclass
class Settings:
    """An engine and the work it gets."""

    slots: int = 10**9
    step: Callable[[int], float] = lambda running: 0.02
    """Seconds of a step, from the requests it computes."""
    tokens: float = 30.0
    """Mean tokens of an answer."""
    spread: float = 0.0
    """Sigma of the lognormal lengths; 0: all alike."""
    prompt: int = 20
    prefill: float = 0.00002
    """Seconds a step takes longer for each token that is computed before the first of an answer."""
    kv: int = 10**12
    """Tokens the KV cache holds."""
    front: float = 0.005
    """Seconds a request spends in the front end."""
    metrics: bool = True
    stale: int = 1
    """Steps between two renewals of the gauges."""
    usage: bool = True
    """Answers say how many tokens they have."""
    noise: float = 0.0
    """Sigma of the lognormal noise of a step's time."""
    timed: bool = True
    """The client knows how long each request took."""


def knee(at: float, seconds: float, decline: float = 1.0) -> Callable[[int], float]:
    """A step takes `seconds` up to `at` requests, and then longer: 1.0 shares, more is worse than sharing."""
    return lambda running: seconds * max(1.0, running / at) ** decline


def smooth(fixed: float, each: float) -> Callable[[int], float]:
    """Throughput that saturates smoothly."""
    return lambda running: fixed + each * running


@dataclass(eq=False)
class Request:
    client: Client
    sent: float
    left: int
    length: int
    held: int = 0
    ends: int = -1


@dataclass(eq=False)
class Client:
    """In flight up to a limit: a fixed one, or an adaptive one that is ticked every POLL seconds."""

    limit: int | AdaptiveLimit
    starts: float = 0.0
    idle: tuple[float, float] = (math.inf, math.inf)
    """Has next to no work in this span of time."""
    in_flight: int = 0
    tokens: int = 0
    saturated: bool = False

    @property
    def allowed(self) -> int:
        return self.limit if isinstance(self.limit, int) else self.limit.current


@dataclass
class Trace:
    """What was seen at one poll."""

    now: float
    running: int
    waiting: int
    tokens: int
    limits: tuple[int, ...]


@dataclass
class Simulation:
    settings: Settings
    clients: list[Client]
    seed: int = 0
    changes: list[tuple[float, Callable[[Settings], None]]] = field(default_factory=list)
    lost_polls: float = 0.0
    """Share of the looks at the metrics that fail."""
    refuse_above: int = 10**9
    """Requests in the engine beyond which it answers 429."""
    silent: tuple[float, float] = (math.inf, math.inf)
    """The engine stands still in this span of time."""

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.now = 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.order = 0
        self.queue: deque[Request] = deque()
        self.running: dict[Request, None] = {}
        self.ending: list[tuple[int, int, Request]] = []
        self.steps = 0
        self.kv_used = 0
        self.preemptions = 0
        self.tokens = 0
        self.stepping = False
        self.gauges = (0, 0)
        self.trace: list[Trace] = []
        for change in self.changes:
            self.at(change[0], lambda apply=change[1]: apply(self.settings))  # type: ignore[misc]
        for client in self.clients:
            self.at(client.starts, lambda client=client: self.pump(client))  # type: ignore[misc]
        self.at(POLL, self.poll)

    def at(self, when: float, what: Callable[[], None]) -> None:
        self.order += 1
        heapq.heappush(self.events, (when, self.order, what))

    def run(self, until: float) -> Simulation:
        while self.events and self.events[0][0] <= until:
            self.now, _, what = heapq.heappop(self.events)
            what()
        return self

    # -- clients ----------------------------------------------------------------------------------

    def pump(self, client: Client) -> None:
        if self.now < client.starts:
            return
        allowed = client.allowed
        if client.idle[0] <= self.now < client.idle[1]:
            allowed = min(allowed, 4)
        else:
            client.saturated = True
        settings = self.settings
        while client.in_flight < allowed:
            client.in_flight += 1
            if len(self.queue) + len(self.running) >= self.refuse_above:
                self.at(self.now + 0.01, lambda: self.refused(client))
                continue
            length = settings.tokens
            if settings.spread:
                length *= self.random.lognormvariate(-(settings.spread**2) / 2, settings.spread)
            size = max(1, round(length))
            request = Request(client, self.now, size, size)
            self.at(self.now + settings.front, lambda request=request: self.arrive(request))  # type: ignore[misc]

    def refused(self, client: Client) -> None:
        client.in_flight -= 1
        if isinstance(client.limit, AdaptiveLimit):
            client.limit.overloaded(self.now)
        self.at(self.now + 0.5, lambda: self.pump(client))

    def done(self, request: Request) -> None:
        client = request.client
        client.in_flight -= 1
        client.tokens += request.length
        if isinstance(client.limit, AdaptiveLimit):
            seconds = self.now - request.sent if self.settings.timed else 0.0
            client.limit.finished(request.length if self.settings.usage else 0, seconds)
        self.pump(client)

    def poll(self) -> None:
        running, waiting = self.gauges
        settings = self.settings
        load = EngineLoad(
            running=float(running),
            waiting=float(waiting),
            kv_usage=min(1.0, self.kv_used / settings.kv),
            preemptions=float(self.preemptions),
            generation_tokens=float(self.tokens),
        )
        for client in self.clients:
            if isinstance(client.limit, AdaptiveLimit) and self.now >= client.starts:
                known = settings.metrics and self.random.random() >= self.lost_polls
                client.limit.tick(self.now, client.in_flight, client.saturated, load if known else None)
                client.saturated = False
                self.pump(client)
        limits = tuple(client.allowed for client in self.clients)
        self.trace.append(Trace(self.now, len(self.running), len(self.queue), self.tokens, limits))
        self.at(self.now + POLL * self.random.uniform(0.98, 1.02), self.poll)

    # -- engine -----------------------------------------------------------------------------------

    def arrive(self, request: Request) -> None:
        self.queue.append(request)
        if not self.stepping:
            self.begin()

    def begin(self) -> None:
        """Admits what there is room for and starts a step."""
        settings = self.settings
        seconds = 0.0
        while self.queue and len(self.running) < settings.slots:
            request = self.queue[0]
            need = settings.prompt + request.length - request.left
            if self.running and self.kv_used + need + len(self.running) > settings.kv:
                break
            self.queue.popleft()
            request.held = need
            request.ends = self.steps + request.left
            self.kv_used += need
            seconds += need * settings.prefill
            self.running[request] = None
            self.order += 1
            heapq.heappush(self.ending, (request.ends, self.order, request))
        if not self.running:
            self.stepping = False
            return
        self.stepping = True
        seconds += settings.step(len(self.running))
        if settings.noise:
            seconds *= self.random.lognormvariate(0.0, settings.noise)
        if self.silent[0] <= self.now < self.silent[1]:
            seconds += self.silent[1] - self.now
        self.at(self.now + seconds, self.end)

    def end(self) -> None:
        """Every running request has one token more."""
        settings = self.settings
        self.steps += 1
        self.tokens += len(self.running)
        self.kv_used += len(self.running)
        finished: list[Request] = []
        while self.ending and self.ending[0][0] <= self.steps:
            ends, _, request = heapq.heappop(self.ending)
            if request in self.running and request.ends == ends:
                del self.running[request]
                self.kv_used -= settings.prompt + request.length
                finished.append(request)
        while self.kv_used > settings.kv and len(self.running) > 1:
            request = next(reversed(self.running))
            del self.running[request]
            made = self.steps - (request.ends - request.left)
            self.kv_used -= request.held + made
            request.left -= made
            request.ends = -1
            self.preemptions += 1
            self.queue.appendleft(request)
        if self.steps % settings.stale == 0:
            self.gauges = (len(self.running), len(self.queue))
        for request in finished:
            self.at(self.now + 0.001, lambda request=request: self.done(request))  # type: ignore[misc]
        self.begin()

    # -- results ----------------------------------------------------------------------------------

    def between(self, start: float, end: float) -> list[Trace]:
        return [look for look in self.trace if start <= look.now <= end]

    def throughput(self, start: float, end: float) -> float:
        looks = self.between(start, end)
        return (looks[-1].tokens - looks[0].tokens) / (looks[-1].now - looks[0].now)

    def queue_share(self, start: float, end: float) -> float:
        """The standing queue as a share of the running requests: the shortest of each three looks,
        averaged."""
        looks = self.between(start, end)
        standing = [min(look.waiting for look in looks[index : index + 3]) for index in range(len(looks) - 2)]
        running = sum(look.running for look in looks) / len(looks)
        return sum(standing) / len(standing) / running
