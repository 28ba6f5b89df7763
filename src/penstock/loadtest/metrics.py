"""What a load came to: the tallies of all processes merged into one point, and whether it can be trusted.

Pure. Names are those of vLLM's benchmark where it has one; times are milliseconds where a name ends in `_ms`.
A point is invalid when the generator was the bottleneck: what it shows is then the generator's own speed.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Sequence
from typing import Final

import msgspec

from penstock.loadtest.account import Account
from penstock.loadtest.histogram import Histogram
from penstock.loadtest.plan import METRICS, Load, Second, Tally

BUSY: Final = 0.9
"""Share of a core from which on a generator's process has no room left."""
LATE: Final = 0.1
"""Share of the median latency by which the generator may be late in one of a hundred cases."""
LATE_LEAST: Final = 0.02
"""Seconds it may be late in any case: what other processes on the machine do to each."""
PERCENTILES: Final = (("p50", 50.0), ("p90", 90.0), ("p99", 99.0), ("p99.9", 99.9))


class Latency(msgspec.Struct, frozen=True):
    """The distribution of one latency, in milliseconds."""

    count: int
    mean: float
    percentiles: dict[str, float]
    """By name: p50, p90, p99, p99.9."""
    curve: list[tuple[float, float]]
    """(milliseconds, share of the values that are no longer), ascending."""
    histogram: str
    """HDR, in microseconds, base64."""


class Usage(msgspec.Struct, frozen=True):
    """What a part used while it was measured."""

    cores: float
    """Seconds of CPU per second."""
    cpu_us_per_request: float | None
    cpu_us_per_chunk: float | None
    """All of its CPU over the pieces of streams; None: nothing was streamed."""
    rss_mib: float
    """At the most."""
    lag_p99_ms: float | None = None
    """How late its event loop is; of the router: how long an empty answer takes. None: not known."""


class Engine(msgspec.Struct, frozen=True):
    """One engine's share, by its own metrics. None: it does not say."""

    url: str
    requests: int | None = None
    tokens: int | None = None


class Moment(msgspec.Struct, frozen=True):
    """One second of a run, from its start."""

    second: int
    sent: int
    done: int
    failed: int
    tokens: int
    p50_ms: float | None
    p99_ms: float | None


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One layer under one load."""

    layer: str
    load: str
    concurrency: int | None
    request_rate: float | None
    """None: closed loop, or a replay, or as fast as can be."""
    invalid: list[str]
    """Why the figures are the generator's own and not those of what was measured; empty: they are valid."""
    duration: float
    """Seconds that were measured: see `throughput`."""
    sent: int
    completed: int
    errors: dict[str, int]
    input_tokens: int
    output_tokens: int
    chunks: int
    request_throughput: float
    output_throughput: float
    """Tokens/s."""
    goodput: float | None
    """Requests/s within every bound that was given; None: none was."""
    latency: dict[str, Latency]
    """ttft, tpot, itl, e2el; what was not measured is left out."""
    send_delay_p99_ms: float
    """Between the intended send time and the actual one."""
    connections_opened: int
    resets: int
    retries: int
    strays: int = 0
    """Answers that nobody had asked for, such as a second one to a request."""
    account: Account | None = None
    """None: the engines do not account for their requests."""
    engines: list[Engine] = []
    held: list[tuple[float, int]] = []
    """(seconds after the start, requests that run or wait at all engines), by their metrics."""
    usage: dict[str, Usage] = {}
    """Of the generator (which is the client, in the client's layers), the router and the engines."""
    timeline: list[Moment] = []

    @property
    def failed(self) -> int:
        return sum(self.errors.values())


def merged(
    layer: str, load: Load, tallies: Sequence[Tally], *, goodput: bool, asker: str = "generator"
) -> Point:
    """One point of the tallies of all processes. `asker`: what the generator's own usage is called."""
    histograms = {name: Histogram() for name in (*METRICS, "lag", "delay")}
    for tally in tallies:
        for name, encoded in tally.histograms.items():
            histograms[name].merge(encoded)
    completed = sum(t.done for t in tallies)
    duration, requests_per_second, tokens_per_second = throughput(tallies)
    good = sum(t.good for t in tallies) / completed if completed else 0.0
    finite = load.rate is not None and load.rate < float("inf")
    return Point(
        layer=layer,
        load=load.name,
        concurrency=load.concurrency,
        request_rate=load.rate if finite else None,
        invalid=saturation(tallies, histograms),
        duration=duration,
        sent=sum(t.sent for t in tallies),
        completed=completed,
        errors=dict(sum((t.errors for t in tallies), Counter())),
        input_tokens=sum(t.input_tokens for t in tallies),
        output_tokens=sum(t.output_tokens for t in tallies),
        chunks=sum(t.chunks for t in tallies),
        request_throughput=requests_per_second,
        output_throughput=tokens_per_second,
        goodput=good * requests_per_second if goodput else None,
        latency={name: latency_of(histograms[name]) for name in METRICS if histograms[name].count},
        send_delay_p99_ms=_ms(histograms["delay"].percentile(99)) or 0.0,
        connections_opened=sum(t.opened for t in tallies),
        resets=sum(t.resets for t in tallies),
        retries=sum(t.retries for t in tallies),
        strays=sum(t.strays for t in tallies),
        usage={asker: _generator_usage(tallies, histograms["lag"])},
        timeline=_timeline(tallies),
    )


def throughput(tallies: Sequence[Tally]) -> tuple[float, float, float]:
    """Seconds that were measured, and requests and tokens per second in them.

    With a duration what was answered within it counts, whenever it was sent: so a request that takes long
    does not thin out what it is measured by. With a number of prompts, as in vLLM's benchmark, all of them
    from the first send to the last answer.
    """
    seconds = tallies[0].window
    if seconds is not None:
        done, tokens = sum(t.window_done for t in tallies), sum(t.window_tokens for t in tallies)
    else:
        seconds = max(0.0, max(t.last_done for t in tallies) - min(t.first_sent for t in tallies))
        done, tokens = sum(t.done for t in tallies), sum(t.output_tokens for t in tallies)
    return seconds, *((done / seconds, tokens / seconds) if seconds > 0 else (0.0, 0.0))


def saturation(tallies: Sequence[Tally], histograms: dict[str, Histogram]) -> list[str]:
    """Why the generator was the bottleneck, in a sentence each; empty when it was not."""
    reasons = []
    busiest = max((t.cpu / t.wall for t in tallies if t.wall > 0), default=0.0)
    if busiest > BUSY:
        reasons.append(f"a process of the generator used {busiest:.0%} of a core")
    median = histograms["e2el"].percentile(50) or 0.0
    bound = max(LATE_LEAST, LATE * median)
    lag, delay = histograms["lag"].percentile(99) or 0.0, histograms["delay"].percentile(99) or 0.0
    if lag > bound:
        reasons.append(
            f"the generator's event loop was {lag * 1e3:.0f} ms late (p99; {bound * 1e3:.0f} are tolerable)"
        )
    if delay > bound:
        reasons.append(
            f"requests were sent {delay * 1e3:.0f} ms later than intended "
            f"(p99; {bound * 1e3:.0f} are tolerable)"
        )
    return reasons


def latency_of(histogram: Histogram) -> Latency:
    """A distribution that is not empty."""
    return Latency(
        count=histogram.count,
        mean=_ms(histogram.mean()) or 0.0,
        percentiles={name: _ms(histogram.percentile(percent)) or 0.0 for name, percent in PERCENTILES},
        curve=[(seconds * 1e3, share) for seconds, share in histogram.curve()],
        histogram=base64.b64encode(histogram.encoded()).decode(),
    )


def usage_of(
    cpu: float, wall: float, done: int, chunks: int, rss: int, lag_p99: float | None = None
) -> Usage:
    """cpu: seconds used in `wall` seconds, in which so many requests and pieces of streams were done. rss:
    bytes. lag_p99: seconds."""
    return Usage(
        cores=cpu / wall if wall > 0 else 0.0,
        cpu_us_per_request=cpu / done * 1e6 if done else None,
        cpu_us_per_chunk=cpu / chunks * 1e6 if chunks else None,
        rss_mib=rss / (1 << 20),
        lag_p99_ms=_ms(lag_p99),
    )


def _generator_usage(tallies: Sequence[Tally], lag: Histogram) -> Usage:
    return usage_of(
        sum(t.cpu for t in tallies),
        max(t.wall for t in tallies),
        sum(t.cpu_done for t in tallies),
        sum(t.chunks for t in tallies),
        sum(t.rss for t in tallies),
        lag.percentile(99),
    )


def _timeline(tallies: Sequence[Tally]) -> list[Moment]:
    seconds: dict[int, Second] = {}
    for tally in tallies:
        for number, second in tally.timeline.items():
            whole = seconds.setdefault(number, Second())
            whole.sent += second.sent
            whole.done += second.done
            whole.failed += second.failed
            whole.tokens += second.tokens
            whole.e2el.update(second.e2el)
    return [
        Moment(n, s.sent, s.done, s.failed, s.tokens, _counted(s.e2el, 0.5), _counted(s.e2el, 0.99))
        for n, s in sorted(seconds.items())
    ]


def _counted(counts: Counter[int], share: float) -> float | None:
    """The value that so large a share of the counted ones does not exceed."""
    left = share * counts.total()
    for value in sorted(counts):
        left -= counts[value]
        if left <= 0:
            return float(value)
    return None


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3
