"""How many requests one endpoint may have in flight: as many as its engine uses, and a short queue.

`AdaptiveLimit` is a pure state machine. Every POLL seconds it is told what is in flight and, where the
engine has metrics, what it says of itself; `current` is the answer, from 1 to the ceiling it was made with.

With metrics the engine's queue steers. What stands in it for WINDOW looks, beyond the requests one step
needs to refill its slots, is cut in one go. The cut is the part of the queue that is ours (in flight /
(running + waiting)), so several clients of one engine share it and their sum settles. As long as no queue
stands the limit climbs with the engine's count of tokens (`penstock.fleet.gradient`); a full KV cache stops
it, and more than PREEMPTED preemptions per answer shorten it. An engine that runs more than at its last
queue has become larger: growth begins anew. Without metrics the limit climbs by the throughput of the
answers alone.

Only while the limit binds (`saturated`) can throughput say anything of it; else it stays. A 429 or 503 cuts
it, once per burst.

In simulation, with answers that take up to 1.5 s: with metrics it is within 10 % of the best fixed limit,
with a queue under 10 % of the running requests, 15 s after the start and after the engine's capacity has
halved or doubled. Without metrics its throughput is within 10 % after 15 s, and 30 s after such a change; a
queue that the first growth left, or that a halving made, may stand for half a minute (about 20 turnovers of
what is in flight). An engine with far fewer slots than START has a queue until those first requests have
been answered.

Where precision ends: with answers of fewer than about 15 tokens the requests that arrive during one step
are a queue of 10 % by themselves, and are let be. Gauges that are seldom renewed (SGLang's: at each
prefill, else every 40 steps) delay a cut by as much. What two clients get of one engine they share is not
made equal.
"""

from __future__ import annotations

from collections import deque
from typing import Final, NamedTuple

from penstock.fleet.gradient import Climb, TokenRate, Turnover
from penstock.fleet.load import EngineLoad

POLL: Final = 0.5
"""Seconds between two looks."""
START: Final = 32
"""Requests in flight at first."""
WINDOW: Final = 4
"""Looks of which the second shortest queue is the standing one (CoDel's idea): one look may see what merely
arrived, or a moment between two waves."""
CAPACITY_WINDOW: Final = 8
"""Looks whose most running requests are what the engine can run. Longer, as answers may come in waves."""
AIM: Final = 0.03
"""Standing queue to keep, as a share of the running requests: a freed slot is refilled without a round
trip."""
STEP: Final = 1.6
"""Standing queue to keep, in requests that end in one step, if that is more; those refill the slots of the
next."""
STEP_AIM: Final = 0.07
"""What this may come to at most, as a share of the running requests, but for answers of very few tokens."""
TRANSIT: Final = 1.25
"""What may wait without there being a queue, in requests that end in one step."""
SLACK: Final = 0.03
"""What the standing queue may have above that before it is cut, as a share of the running requests."""
CAP_SLACK: Final = 0.02
"""Relative difference in running requests that is no chance."""
KV_FULL: Final = 0.95
"""KV usage from which the limit does not grow."""
PREEMPTED: Final = 1.0
"""Preemptions per answer from which the limit is shortened, by PREEMPTION_CUT."""
PREEMPTION_CUT: Final = 0.05
PREEMPTION_PAUSE: Final = 3.0
"""Seconds between two such cuts."""
OVERLOAD_CUT: Final = 0.25
"""Relative cut for a 429 or 503."""
OVERLOAD_BURST: Final = 2.0
"""Seconds in which further 429s or 503s are of the same burst."""
OVERLOAD_PAUSE: Final = 10.0
"""Seconds without growth after one."""
ARRIVED: Final = 0.8
"""Share of our requests that must have reached the scheduler before growth is measured."""
PATIENCE: Final = 10
"""Failed looks after which an endpoint that had metrics is treated as one without."""
DRAINED: Final = 1.05
"""Requests in flight per limit down to which a cut has shown."""
LARGE_CUT: Final = 0.75
"""Ratio of the limit to the one before from which what was sent before disturbs for longer."""
LENGTH_MEMORY: Final = 0.2
"""Weight of the last look's answers in the mean length."""


class _Look(NamedTuple):
    """What one look at the metrics says."""

    in_flight: int
    running: float
    waiting: float


class _Queue:
    """The engine's queue over the last looks.

    Requests wait for good only beyond what the engine has been seen to run: those that arrived during a
    step, be they many at a time, wait while slots are empty.
    """

    def __init__(self) -> None:
        self._looks: deque[_Look] = deque(maxlen=WINDOW)
        self._ran: deque[float] = deque(maxlen=CAPACITY_WINDOW)
        self._running = self._ends = 0.0
        self.full = 0.0
        """Requests the engine ran when a queue stood last; 0: not known."""

    def look(self, in_flight: int, load: EngineLoad, length: float) -> None:
        """length: mean tokens of an answer; 0 when unknown."""
        self.ran(load)
        self._looks.append(_Look(in_flight, load.running, load.waiting))
        self._ends = self._running / length if length > 0 else 0.0

    def ran(self, load: EngineLoad) -> None:
        """What the engine runs, whatever the limit."""
        self._ran.append(load.running)
        self._running = max(self._ran)

    @property
    def known(self) -> bool:
        """Something has been seen since the last cut."""
        return bool(self._looks)

    @property
    def _aim(self) -> float:
        """Requests that may wait."""
        share = self._running
        return max(AIM * share, min(STEP * self._ends, STEP_AIM * share), self._ends)

    @property
    def _transit(self) -> float:
        """Requests that wait though there is no queue: they arrived during a step."""
        return max(TRANSIT * self._ends, AIM / 3 * self._running)

    def _excess(self, looks: int) -> list[float]:
        return [look.running + look.waiting - self._running for look in list(self._looks)[-looks:]]

    @property
    def room(self) -> float | None:
        """The limit to cut to; None: the queue is no longer than it should be."""
        if len(self._looks) < WINDOW or self._running <= 0:
            return None
        aim = self._aim
        if sorted(self._excess(WINDOW))[1] <= aim + SLACK * self._running:
            return None
        rooms = []
        for look in self._looks:
            known = look.running + look.waiting
            share = min(1.0, look.in_flight / known) if known > 0 else 1.0
            rooms.append(look.in_flight - share * (known - self._running - aim))
        return sorted(rooms)[-2]

    def empty(self, looks: int) -> bool:
        """Over that many looks, one saw no queue to speak of."""
        return min(self._excess(looks)) <= self._transit

    def capped(self) -> bool:
        """More is there than the engine ran at the last queue, and it runs no more than then: it is full."""
        there = max(look.running + look.waiting for look in self._looks)
        return (
            there >= (1.0 + CAP_SLACK) * self.full > 0 and self._running <= (1.0 + CAP_SLACK / 2) * self.full
        )

    def widened(self) -> bool:
        """The engine runs more than when a queue stood last: it has more room. Told once."""
        wider = self.full > 0 and all(
            look.running > (1.0 + CAP_SLACK / 2) * self.full and look.waiting <= self._transit
            for look in self._looks
        )
        if wider and len(self._looks) == WINDOW:
            self.full = 0.0
            return True
        return False

    def cut(self) -> None:
        """The limit is cut because of what was seen."""
        self.full = self._running

    def forget(self) -> None:
        """What was seen is of another limit."""
        self._looks.clear()


class AdaptiveLimit:
    """The limit of one endpoint. ceiling: at least 1. start: where it begins, unless the ceiling is lower."""

    __slots__ = (
        "_binding",
        "_climb",
        "_counter",
        "_done",
        "_last_overload",
        "_length",
        "_misses",
        "_no_growth_before",
        "_preemptions",
        "_queue",
        "_seconds",
        "_tokens",
        "_turnover",
        "ceiling",
        "current",
        "start",
    )

    def __init__(self, ceiling: int, *, start: int = START) -> None:
        if ceiling < 1 or start < 1:
            raise ValueError(f"a limit is at least 1: ceiling {ceiling}, start {start}")
        self.ceiling = ceiling
        self.start = min(start, ceiling)
        self.current = self.start
        """Requests allowed in flight now."""
        self._done = self._tokens = 0
        self._seconds = 0.0
        self._length = 0.0
        self._misses = 0
        self._binding = True
        self._queue: _Queue | None = None
        """None: the endpoint has no metrics."""
        self._climb = Climb(self.start, ceiling)
        self._turnover = Turnover()
        self._counter = TokenRate()
        self._preemptions: deque[tuple[float, int]] = deque(maxlen=WINDOW + 1)
        self._last_overload = float("-inf")
        self._no_growth_before = float("-inf")

    def __repr__(self) -> str:
        mode = "gradient" if self._queue is None else "metrics"
        return f"<AdaptiveLimit {self.current}/{self.ceiling} by {mode}, {self._climb.phase.value}>"

    def finished(self, tokens: int, seconds: float = 0.0) -> None:
        """A request was answered. seconds: from its being sent to its answer; 0: unknown."""
        self._done += 1
        self._tokens += tokens
        self._seconds += seconds

    def overloaded(self, now: float) -> None:
        """The endpoint refused a request because it has too many. Those of one burst count once."""
        if now - self._last_overload < OVERLOAD_BURST:
            return
        self._last_overload = now
        self._no_growth_before = now + OVERLOAD_PAUSE
        self._go(self.current * (1.0 - OVERLOAD_CUT), failed=True)

    def tick(self, now: float, in_flight: int, saturated: bool, load: EngineLoad | None) -> None:
        """A look, POLL seconds after the last.

        in_flight: our requests there now. saturated: since the last look requests waited while the limit was
        reached. load: None when there are no metrics, or this look at them failed.
        """
        done, tokens, seconds = self._done, self._tokens, self._seconds
        self._done, self._tokens, self._seconds = 0, 0, 0.0
        if done and tokens:
            mean = tokens / done
            self._length += (mean - self._length) * (LENGTH_MEMORY if self._length else 1.0)
        if load is not None:
            self._misses = 0
            self._look(now, in_flight, done, load)
        elif self._queue is not None:
            self._misses += 1
            if self._misses < PATIENCE:
                return
            self._queue = None
            self._climb.queues = True
            self._restart()
        binding = saturated and not self._draining(in_flight)
        bound, self._binding = self._binding, binding
        if not (bound and binding):
            self._restart()  # what ended since the last look says nothing about the limit
            return
        level = self._climb.level
        quick = self._climb.growing
        rate = self._turnover.tick(now, in_flight, done, tokens or done, seconds, quick)
        if self._queue is not None and load is not None:
            if not self._may_climb(load):
                self._counter.restart()
                return
            if load.generation_tokens is not None:
                rate = self._counter.tick(now, load.generation_tokens, quick)
        if rate <= 0.0 or now < self._no_growth_before:
            return
        self._climb.measured(rate)
        if self._climb.level != level:
            self._set(self._climb.level)

    # -- with metrics -----------------------------------------------------------------------------

    def _look(self, now: float, in_flight: int, done: int, load: EngineLoad) -> None:
        """What the engine says: cuts a standing queue, and says when there is room again."""
        queue = self._queue
        if queue is None:
            queue = self._queue = _Queue()
            self._climb.queues = False
            self._restart()
        if self._draining(in_flight):
            queue.ran(load)
            queue.forget()  # a cut has been made and has yet to show
            return
        queue.look(in_flight, load, self._length)
        room = queue.room
        if room is not None and room < self.current:
            queue.cut()
            self._go(room, failed=True)
        elif queue.widened():
            self._climb.grow(0.25)
            self._restart()
        self._preempted(now, done, load)

    def _preempted(self, now: float, done: int, load: EngineLoad) -> None:
        if load.preemptions is None:
            return
        history = self._preemptions
        history.append((load.preemptions, done))
        count = load.preemptions - history[0][0]
        answers = sum(done for _, done in history) - history[0][1]
        if count > PREEMPTED * max(answers, 10) and now >= self._no_growth_before:
            self._no_growth_before = now + PREEMPTION_PAUSE
            self._go(self.current * (1.0 - PREEMPTION_CUT), failed=True)

    def _may_climb(self, load: EngineLoad) -> bool:
        """Whether a measurement now could lead to growth."""
        queue = self._queue
        assert queue is not None
        growing = self._climb.growing
        if not queue.known:
            return False
        if not queue.empty(2 if growing else WINDOW) or (queue.capped() and not growing):
            if not growing:
                self._climb.hold(self.current)
            return False
        return load.kv_usage is None or load.kv_usage < KV_FULL

    # -- moving -----------------------------------------------------------------------------------

    def _go(self, level: float, *, failed: bool) -> None:
        """To a level that the climb did not choose."""
        self._climb.hold(max(1.0, min(level, self.ceiling)), failed=failed)
        self._set(self._climb.level)

    def _set(self, level: float) -> None:
        before, self.current = self.current, max(1, min(int(level), self.ceiling))
        if self.current < before:
            self._binding = False  # what ends until the next look was sent under the old limit
            if self.current < LARGE_CUT * before:
                self._turnover.turns = 2.0  # and the longest of that for a while after
        self._restart()

    def _draining(self, in_flight: int) -> bool:
        """More are in flight than there should be: the limit was cut, and answers are awaited."""
        return in_flight > self.current * DRAINED + 1

    def _restart(self) -> None:
        self._turnover.restart()
        self._counter.restart()
