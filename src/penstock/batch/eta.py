"""How long a job has still to run, its tail included.

A job ends when its last sample does. While samples wait to be sent the engines work at a rate, and what is
owed over that rate is the time to the last sending. Then the slots empty one by one, and the longest of those
in flight decides: with n samples in flight that is about the (1 - 1/(n+1)) quantile of the latencies, which
under heavy tails is many times their mean.

    sending = (owed - in flight) / rate
    tail    = quantile(1 - 1/(n + 1)) of the latencies, n = those in flight when the last one is sent

Once nothing waits to be sent, only latencies longer than the tail has lasted count, and what it has lasted is
taken off. Latencies are those of the samples that finished last: at the beginning of a job, when only short
ones have finished, the tail is thought shorter than it is.
"""

from __future__ import annotations

from collections.abc import Sequence


def time_left(
    owed: int | None, in_flight: int, rate: float, latencies: Sequence[float], tail_age: float
) -> float | None:
    """Seconds until nothing is owed; None while that cannot be said.

    owed: samples neither done nor failed, those in flight included; None: not known. rate: samples a second.
    latencies: seconds of samples finished lately, sorted. tail_age: seconds since nothing waits to be sent.
    """
    if owed == 0:
        return 0.0
    if owed is None:
        return None
    waiting = max(0, owed - in_flight)
    if waiting:
        if rate <= 0:
            return None
        return waiting / rate + longest_of(in_flight, latencies)
    older = [latency - tail_age for latency in latencies if latency > tail_age]
    if not older:
        return None
    return longest_of(owed, older)


def longest_of(count: int, latencies: Sequence[float]) -> float:
    """About the longest of `count` draws from the sorted `latencies`; 0 where there are none."""
    if not count or not latencies:
        return 0.0
    return quantile(1.0 - 1.0 / (count + 1), latencies)


def quantile(share: float, ordered: Sequence[float]) -> float:
    """The value that `share` of `ordered` (sorted, not empty) are at most; between two, in proportion."""
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
