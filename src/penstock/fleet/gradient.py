"""Hill climbing: the smallest number of requests in flight that has (nearly) the highest throughput.

`Climb` decides, `Turnover` and `TokenRate` measure; none of them knows an engine. Throughput rises with the
requests in flight up to a knee and is flat, or falls, beyond. The climb doubles while that pays, finds the
knee between what it has measured, and from then on tries a little more and a little less in turn; a try
that pays makes the next one larger. When throughput changes at an unchanged number, it looks for the knee
anew.

Where a queue may hide (`queues`), of two numbers that are as good the smaller one is taken, and after a
fall in throughput the number is halved to see whether that costs anything. Where the engine says that
nothing waits, only what raises throughput is worth a step; growth ends when it has brought nothing twice in
a row, less is accepted only when it is better twice, and if throughput is too unsteady to tell, the doubt
is for growth.

What it assumes: the number in flight is all that changes between two neighbouring measurements, apart from
noise, whose size it learns at an unchanged number. Where its precision ends: a rise of less than WORTH per
e-fold plus NOISE is not seen, so on an engine that saturates smoothly it stops within about a tenth of what
very many more requests would bring; and where throughput halves and doubles by itself within seconds, no
number in flight can be told from another, least of all when a queue may hide.
"""

from __future__ import annotations

import math
from enum import Enum
from typing import Final, NamedTuple

WORTH: Final = 0.07
"""Logarithm of the gain in throughput that an e-fold growth must bring at least. A doubling: 5 %."""
NOISE: Final = 0.03
"""Logarithm of the gain that a measurement may show by chance; that much more must a growth bring."""
SPREADS: Final = 1.5
"""The same, in mean deviations of what is measured at an unchanged number, where that is more."""
NOISY: Final = 0.04
"""Mean deviation from which an engine that says that nothing waits is given more unless that clearly
costs."""
MAX_NOISE: Final = 0.15
"""The same at most."""
LOSS: Final = 0.01
"""Logarithm of the loss in throughput, beside WORTH, that a smaller number may cost, all steps down
together."""
SURE: Final = 0.4
"""Relative gain per relative growth below which a growth is measured twice."""
CLOSER: Final = 1.02
"""Factor on what is missing at an estimated knee that was too low, throughput growing in proportion at
most."""
UNPAID: Final = 2
"""Growths in a row that must bring nothing before it ends, where the engine says that nothing waits."""
KEEP: Final = 0.965
"""Share of the highest throughput seen at which a smaller number is as good."""
UP: Final = 0.125
"""Relative step of a try upwards."""
DOWN: Final = 0.1
"""Relative step of a try downwards."""
MAX_DOWN: Final = 0.4
"""The same, once several have cost nothing, each twice the one before."""
JUMP: Final = 0.2
"""Logarithm of a change in throughput, at an unchanged number, that is not noise."""
JUMP_SPREADS: Final = 4.0
"""The same, in mean deviations, where that is more."""
MAX_PAUSE: Final = 2
"""Measurements between two tries, once the tries have stopped paying."""


class Point(NamedTuple):
    """A measurement."""

    level: float
    """Requests in flight."""
    rate: float
    """Throughput, in any unit."""


class Phase(Enum):
    GROW = "growing while it pays"
    DESCEND = "halving while it costs nothing"
    CHECK = "measuring at the estimated knee"
    HOLD = "at the knee, measuring"
    UP = "trying a little more"
    DOWN = "trying a little less"


class Climb:
    """Where to measure next. `level` is the answer, `measured` tells it what came of it."""

    def __init__(self, level: float, ceiling: float) -> None:
        self.level = level
        self.ceiling = ceiling
        self.queues = True
        """A number in flight beyond the knee may hide a queue: of two as good the smaller is better. False:
        the engine says that nothing waits, and only what raises throughput is worth a step."""
        self._spread = 0.0
        """Mean deviation of a throughput, as a logarithm, at an unchanged number."""
        self.phase = Phase.GROW
        self._step = 1.0
        self._points: list[Point] = []
        self._doubted: Point | None = None
        """A measurement that is made a second time before something follows from it."""
        self._held_for = 0
        """Measurements that `_spread` is made of."""
        self._unpaid = 0
        self._candidate: Point | None = None
        """A smaller number that seemed better, until the present one has been measured again."""
        self._fresh = True
        """Nothing is known below the first point."""
        self._tries = 0
        self._base: Point | None = None
        self._anchor: Point | None = None
        """Where the steps down began: what they cost is measured from here."""
        self._pause = 1
        self._left = 1
        self._down = DOWN
        self._last_try = Phase.DOWN

    @property
    def growing(self) -> bool:
        """Quick measurements will do."""
        return self.phase in (Phase.GROW, Phase.DESCEND) and self._doubted is None

    def hold(self, level: float, *, failed: bool = False) -> None:
        """Somebody who knows better says: stay here. `failed`: the growth that led beyond was for nothing."""
        if failed and self.phase in (Phase.GROW, Phase.UP):
            self._pause = min(2 * self._pause, MAX_PAUSE)
        base = self._base
        if base is not None and base.level == level:
            self._settle(base, self._anchor)
        else:
            self._settle(Point(level, 0.0))
            self._base = self._anchor = None

    def grow(self, step: float) -> None:
        """There may be room: grows from here, by the relative `step` at first, as long as it pays."""
        self.phase, self._step, self._fresh, self._points = Phase.GROW, step, False, []
        self._doubted = None
        self._unpaid = 0

    def measured(self, rate: float) -> None:
        """The throughput at `level`. Sets the next one."""
        if rate <= 0.0:
            return
        point = Point(self.level, rate)
        if self.phase is Phase.GROW:
            self._grew(point)
        elif self.phase is Phase.DESCEND:
            self._descended(point)
        elif self.phase is Phase.CHECK:
            self._checked(point)
        elif self.phase is Phase.HOLD:
            self._held(point)
        else:
            self._tried(point)

    # -- finding the knee -------------------------------------------------------------------------

    def _grew(self, point: Point) -> None:
        last = self._points[-1] if self._points else None
        if last is not None and _elasticity(last, point) < SURE:
            if self._doubted is None:
                self._doubted = point
                return
            if self.queues:
                point = Point(point.level, (point.rate + self._doubted.rate) / 2.0)
        self._doubted = None
        self._points.append(point)
        if last is None or self._pays(last, point):
            self._unpaid = 0
        else:
            self._unpaid += 1
        if point.level >= self.ceiling or self._unpaid >= (1 if self.queues or self._quiet else UNPAID):
            self._stop()
        else:
            self._rise(point)

    def _stop(self) -> None:
        """Growth has ended: where to?"""
        if self.queues:
            self._seek()
            return
        points = self._points
        best = max(point.rate for point in points[-1 - UNPAID :])
        good = [index for index, point in enumerate(points) if point.rate >= KEEP * best]
        low, high = good[0], good[-1]
        if low == high > 0 and high + 1 < len(points) and _elasticity(points[low - 1], points[low]) < SURE:
            low -= 1
        self._settle(points[low])
        if low < high:  # the knee is between two levels, and neither shows what it has
            self.hold(math.sqrt(points[low].level * points[low + 1].level))
        self._last_try = Phase.UP  # next, whether less is better

    def _rise(self, point: Point) -> None:
        self.level = min(max(point.level * (1.0 + self._step), point.level + 1.0), self.ceiling)
        self._step = min(1.0, 2.0 * self._step)

    def _descended(self, point: Point) -> None:
        self._points.append(point)
        if point.level > 1.0 and point.rate >= KEEP * self._best():
            self.level = max(1.0, point.level / 2.0)
        else:
            self._seek()

    def _seek(self) -> None:
        """Estimates the knee: throughput grows below it as it did between the points there (at first in
        proportion), until it reaches the highest. By concavity the knee is not below that."""
        best = self._best()
        points = self._points = sorted(self._points)
        first = next(index for index, point in enumerate(points) if point.rate >= KEEP * best)
        upper = points[first]
        if first == 0:
            if self._fresh and upper.level > 1.0:
                self.phase = Phase.DESCEND
                self.level = max(1.0, upper.level / 2.0)
            else:
                self._settle(upper)
            return
        lower = points[first - 1]
        slope = lower.rate / lower.level
        if first > 1:
            before = points[first - 2]
            slope = min(slope, (lower.rate - before.rate) / (lower.level - before.level))
        if slope <= 0.0:
            self._settle(upper)
            return
        knee = math.ceil(lower.level + (best - lower.rate) / slope)
        if knee >= 0.95 * upper.level:
            self._settle(upper)
        else:
            self.phase, self.level, self._tries = Phase.CHECK, float(knee), 3

    def _checked(self, point: Point) -> None:
        self._points.append(point)
        best = self._best()
        if point.rate >= KEEP * best:
            self._settle(point)
            return
        self._tries -= 1
        if not self._tries or any(
            other.level < point.level and other.rate > point.rate for other in self._points
        ):
            self._settle(point)  # or the engine has changed meanwhile
            return
        above = [other.level for other in self._points if other.level > point.level]
        self.level = min(
            math.ceil(CLOSER * point.level * best / point.rate), min(above, default=self.ceiling)
        )
        if self.level == point.level:
            self._settle(point)

    def _best(self) -> float:
        return max(point.rate for point in self._points)

    # -- staying at it ----------------------------------------------------------------------------

    def _settle(self, base: Point, anchor: Point | None = None) -> None:
        self.phase, self._base, self.level = Phase.HOLD, base, base.level
        self._anchor = anchor or base
        self._candidate = None
        self._left = self._pause
        self._points = []
        self._doubted = None

    def _held(self, point: Point) -> None:
        base = self._base
        if base is None:
            self._base = self._anchor = point
            return
        change = math.log(point.rate / base.rate)
        candidate, self._candidate = self._candidate, None
        if candidate is not None and math.log(candidate.rate / point.rate) > self._margin:
            self._spared(candidate, candidate)
            return
        if abs(change) > max(JUMP, JUMP_SPREADS * self._spread):
            if self._doubted is None:
                self._doubted = point
                return
            self._pause = 1
            self._settle(point)
            if change > 0.0:
                self.grow(2 * UP)
                self._points = [point]
                self._rise(point)
            elif self.queues and point.level > 1.0:
                self._fresh, self.phase, self._points = True, Phase.DESCEND, [point]
                self.level = max(1.0, point.level / 2.0)
            else:
                self._down, self._last_try = 2 * DOWN, Phase.UP
                self._try()
            return
        self._doubted = None
        self._held_for += 1
        self._spread += max(0.2, 1.0 / self._held_for) * (abs(change) - self._spread)
        self._base = Point(base.level, 0.5 * (base.rate + point.rate))
        if self._anchor is base:
            self._anchor = self._base
        self._left -= 1
        if self._left <= 0:
            self._try()

    def _try(self) -> None:
        base = self._base
        assert base is not None
        up = self._last_try is Phase.DOWN
        if (up and base.level >= self.ceiling) or (not up and base.level <= 1.0):
            up = not up
        if up:
            self.level = min(
                max(base.level * (1.0 + max(UP, 2.0 * self._margin)), base.level + 1.0), self.ceiling
            )
        else:
            self.level = max(
                min(base.level * (1.0 - max(self._down, 1.5 * self._margin)), base.level - 1.0), 1.0
            )
        self.phase = self._last_try = Phase.UP if up else Phase.DOWN
        if self.level == base.level:
            self._settle(base, self._anchor)

    def _tried(self, point: Point) -> None:
        base, anchor = self._base, self._anchor
        assert base is not None and anchor is not None
        if self.phase is Phase.UP and self._pays(base, point):
            self._pause = 1
            self.grow(4 * UP)
            self._points = [base]
            self._grew(point)
        elif self.phase is Phase.DOWN and self._spares(point, base, anchor):
            if self.queues or self._quiet:
                self._spared(point, anchor)
            else:
                self._settle(base, anchor)
                self._candidate = point
        else:
            self._down = DOWN
            self._pause = min(2 * self._pause, MAX_PAUSE)
            self._settle(base, anchor)

    def _spared(self, point: Point, anchor: Point) -> None:
        """Less was as good: less still?"""
        self._pause = 1
        self._settle(point, anchor)
        self._down = min(2.0 * self._down, MAX_DOWN)
        self._last_try = Phase.UP
        self._try()

    # -- comparing --------------------------------------------------------------------------------

    @property
    def _margin(self) -> float:
        """Logarithm of a difference between two throughputs that may be chance."""
        return min(max(NOISE, SPREADS * self._spread), MAX_NOISE)

    @property
    def _quiet(self) -> bool:
        """Throughput is known to be steady at an unchanged number."""
        return self._held_for >= 2 and self._spread <= NOISY

    def _pays(self, lower: Point, upper: Point) -> bool:
        """The larger number has the throughput to show for it."""
        gain = math.log(upper.rate / lower.rate)
        if not self.queues and self._spread > NOISY:
            return gain >= -0.5 * self._spread  # it cannot be told: nothing waits, so the doubt is for growth
        return gain >= WORTH * math.log(upper.level / lower.level) + self._margin

    def _spares(self, lower: Point, upper: Point, anchor: Point) -> bool:
        """The smaller number is as good, or better where only that counts."""
        if not self.queues:
            return math.log(lower.rate / upper.rate) > self._margin
        loss = math.log(anchor.rate / lower.rate)
        return loss <= WORTH * math.log(anchor.level / lower.level) + max(LOSS, 0.5 * self._margin)


def _elasticity(lower: Point, upper: Point) -> float:
    return math.log(upper.rate / lower.rate) / math.log(upper.level / lower.level)


MIN_DONE: Final = 6
"""Requests that must end before a throughput is told."""
SILENCE: Final = 5.0
"""Seconds without an answer, and SILENCES of the usual time, after which what ends next says nothing."""
SILENCES: Final = 4.0


class Turnover:
    """Throughput from the answers of our own requests.

    It first waits until as many have ended as are in flight, so that what is measured was sent under the
    present limit; then it takes requests in flight × tokens per second of a request (Little's law). Neither
    waves of requests that were sent together nor the lengths of the answers disturb that. Where the time of
    a request is not known, answers are counted per second, which both do disturb.
    """

    def __init__(self) -> None:
        self._last: float | None = None
        self._silent = 0.0
        self._turn = 0.0
        self.turns = 1.0
        """Times as many as are in flight that must have ended before the next measurement begins."""
        self.restart()

    def restart(self) -> None:
        """The limit, or what limits, is another."""
        self._settling = True
        self._done = 0
        self._elapsed = self._weight = self._seconds = self._levels = 0.0
        self._ticks = 0

    def tick(
        self, now: float, in_flight: int, done: int, weight: float, seconds: float, quick: bool
    ) -> float:
        """What ended since the last tick; its throughput, 0: not known yet."""
        elapsed = 0.0 if self._last is None else now - self._last
        self._last = now
        self._silent += elapsed
        if not done:
            return 0.0
        if self._silent > max(SILENCE, SILENCES * self._turn):
            self.restart()
        silent, self._silent = self._silent, 0.0
        self._done += done
        self._elapsed += silent
        if self._settling:
            if self._done >= self.turns * in_flight:
                self._turn = self._elapsed / self.turns
                self.turns = 1.0
                self.restart()
                self._settling = False
            return 0.0
        self._weight += weight
        self._seconds += seconds
        self._levels += in_flight
        self._ticks += 1
        if self._done < max(MIN_DONE, in_flight / 3 if quick else in_flight):
            return 0.0
        if self._seconds > 0.0:
            rate = self._levels / self._ticks * self._weight / self._seconds
        else:
            rate = self._weight / self._elapsed if self._elapsed > 0.0 else 0.0
        self.restart()
        self._settling = False
        return rate


class TokenRate:
    """Throughput from the engine's own count of tokens: a few ticks suffice, however long the requests."""

    def __init__(self) -> None:
        self._last: tuple[float, float] | None = None
        self.restart()

    def restart(self) -> None:
        """The limit, or what limits, is another."""
        self._ticks = 0
        self._from: tuple[float, float] | None = None

    def tick(self, now: float, tokens: float, quick: bool) -> float:
        """The count at this moment; the throughput since the last measurement, 0: not known yet."""
        self._ticks += 1
        settle, measure = (1, 1) if quick else (2, 3)
        if self._ticks <= settle or self._from is None:
            self._from = (now, tokens)
            return 0.0
        since, before = self._from
        if self._ticks < settle + measure:
            return 0.0
        rate = (tokens - before) / (now - since) if now > since else 0.0
        self._from = (now, tokens)
        self._ticks = settle
        return max(rate, 0.0)
