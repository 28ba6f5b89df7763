"""When requests are to be sent: intended times, decided before anything is measured.

Pure: no clock, and randomness is handed in. Times are seconds after the start of a run. In an open loop
(`send_times`) they do not depend on the answers, so that a slow server cannot slow its own test down; in a
closed loop (`first_send`, `Shape.resume`) a request follows the answer to the one before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from random import Random

import msgspec

from penstock.errors import ConfigError


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """How load changes over time: a linear ramp at the start, and pauses as weight updates make them.

    Raises ConfigError for negative times.
    """

    ramp: float = 0.0
    """Seconds until the whole load is there."""
    work: float = math.inf
    """Seconds of sending between two pauses."""
    pause: float = 0.0
    """Seconds of a pause, in which nothing is sent and what is in flight goes on."""

    def __post_init__(self) -> None:
        if not 0 <= self.ramp < math.inf:
            raise ConfigError(f"the ramp must be 0 s or more, not {self.ramp:g}")
        if not (self.work > 0 and 0 <= self.pause < math.inf):
            raise ConfigError(
                f"pauses need more than 0 s between them and 0 s or more each, "
                f"not {self.work:g} and {self.pause:g}"
            )

    @property
    def pauses(self) -> bool:
        return self.pause > 0 and self.work < math.inf

    def at(self, amount: float) -> float:
        """The time at which so many seconds' worth of the whole load have been sent.

        The inverse of the load's integral: a rate that rises over the ramp R sends t²/2R in its first t ≤ R.
        """
        ramp = self.ramp
        active = math.sqrt(2 * ramp * amount) if amount < ramp / 2 else amount + ramp / 2
        return active + math.floor(active / self.work) * self.pause if self.pauses else active

    def resume(self, time: float) -> float:
        """When what is ready at this time may be sent: at once, or after the pause it falls into."""
        if not self.pauses:
            return time
        cycle = self.work + self.pause
        phase = time % cycle
        return time if phase < self.work else time + (cycle - phase)


def send_times(
    rate: float, random: Random, *, burstiness: float = 1.0, group: int = 1, shape: Shape | None = None
) -> Iterator[float]:
    """Intended times of an open loop, without end, in ascending order.

    rate: requests/s once the ramp is over; inf: all at the beginning. burstiness: the shape of the Gamma
    distribution of the intervals, as in vLLM's benchmark: 1 is Poisson, less is burstier, inf is even.
    group: requests that arrive at once, as the samples of one prompt; the rate counts requests.
    Raises ConfigError.
    """
    if not rate > 0:
        raise ConfigError(f"the request rate must be positive, not {rate:g}")
    if not burstiness > 0:
        raise ConfigError(f"the burstiness must be positive, not {burstiness:g}")
    if group < 1:
        raise ConfigError(f"a group has at least 1 request, not {group}")
    return _send_times(rate / group, random, burstiness, group, shape or Shape())


def _send_times(rate: float, random: Random, burstiness: float, group: int, shape: Shape) -> Iterator[float]:
    amount = 0.0
    scale = 0.0 if rate == math.inf else 1 / (rate * burstiness)
    while True:
        if rate < math.inf:
            amount += 1 / rate if burstiness == math.inf else random.gammavariate(burstiness, scale)
        time = shape.at(amount) if amount else 0.0
        for _ in range(group):
            yield time


def first_send(worker: int, workers: int, shape: Shape) -> float:
    """When a closed loop's worker, counted from 0, sends its first request: they join over the ramp."""
    return shape.ramp * worker / workers
