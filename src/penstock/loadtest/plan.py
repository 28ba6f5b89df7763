"""What a generator process is told, and what it tells: plain data that crosses between processes.

Times on the clock are those of `time.monotonic`, which all processes of a machine share.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from penstock.errors import ConfigError
from penstock.loadtest.arrivals import Shape

Asker = Literal["raw", "client"]
Api = Literal["chat", "completions"]
"""raw: on the bare connections of penstock.wire, without retries. client: through penstock.Client."""

METRICS: Final = ("ttft", "tpot", "itl", "e2el")
"""Latencies, under the names of vLLM's benchmark: time to first token, time per output token but the first,
between two pieces of a stream, and of the whole request."""
UNFINISHED: Final = "Unfinished"
"""The error of a request that was cut off at the end of the drain."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """How much is asked at a time. Exactly one of the three is set. Raises ConfigError."""

    concurrency: int | None = None
    """Closed loop: requests in flight."""
    rate: float | None = None
    """Open loop: requests/s; inf: all at once."""
    replay: bool = False
    """Open loop at the times of the workload's trace."""
    burstiness: float = 1.0
    shape: Shape = Shape()

    def __post_init__(self) -> None:
        if (self.concurrency is not None) + (self.rate is not None) + self.replay != 1:
            raise ConfigError("a load is a concurrency, a request rate or a replay: give one of them")
        if self.concurrency is not None and self.concurrency < 1:
            raise ConfigError(f"the concurrency must be at least 1, not {self.concurrency}")
        if self.rate is not None and not self.rate > 0:
            raise ConfigError(f"the request rate must be positive, not {self.rate:g}")

    @property
    def name(self) -> str:
        if self.concurrency is not None:
            return f"{self.concurrency} in flight"
        return "replay" if self.rate is None else f"{self.rate:g} requests/s"


@dataclass(frozen=True, kw_only=True)
class Extent:
    """How long a load is kept up, and what of it counts. Raises ConfigError."""

    count: int | None = None
    """Requests that are measured."""
    duration: float | None = None
    """Seconds in which what is sent is measured."""
    warmup: float = 0.0
    """Seconds after the ramp whose requests do not count."""
    drain: float = 60.0
    """Seconds that requests in flight have to end after the last was sent; what is left is cut off."""

    def __post_init__(self) -> None:
        if (self.count is None) == (self.duration is None):
            raise ConfigError("give the number of prompts or the duration, one of them")
        if self.count is not None and self.count < 1:
            raise ConfigError(f"the number of prompts must be at least 1, not {self.count}")
        if self.duration is not None and not 0 < self.duration < math.inf:
            raise ConfigError(f"the duration must be positive, not {self.duration:g}")
        if not (self.warmup >= 0 and self.drain >= 0):
            raise ConfigError("warm-up and drain are 0 s or more")


@dataclass(frozen=True, kw_only=True)
class Target:
    """Who is asked, and how."""

    urls: Sequence[str]
    asker: Asker
    model: str | None = None
    api_key: str | None = None
    api: Api = "chat"
    stream: bool = True
    timeout: float | None = None
    """Seconds without a byte, before the answer or in it, after which a request is given up."""
    resume_streams: bool = False
    """The client continues a stream that broke off; bare connections never do."""
    max_in_flight: int | None = None
    """Requests the client lets be in flight at each URL. None: all."""
    source_addresses: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Job:
    """One measured point, for one of `processes` processes."""

    run: str
    """What its request ids begin with; a dot and the request's number follow."""
    target: Target
    load: Load
    extent: Extent
    seed: int
    start: float
    """On the clock."""
    goodput: tuple[tuple[str, float], ...] = ()
    """(metric, seconds it may take at most)."""
    index: int = 0
    processes: int = 1


@dataclass
class Second:
    """One second of the timeline."""

    sent: int = 0
    done: int = 0
    failed: int = 0
    tokens: int = 0
    e2el: Counter[int] = field(default_factory=Counter)
    """Milliseconds of requests that ended here, to two digits."""


@dataclass(frozen=True)
class Beat:
    """Where a process is, now and then."""

    sent: int
    done: int
    failed: int
    tokens: int
    in_flight: int


@dataclass
class Tally:
    """What one process has measured."""

    sent: int = 0
    """Measured requests."""
    done: int = 0
    unanswered: list[int] = field(default_factory=list)
    """Numbers of requests that did not end in an answer, warm-up included."""
    asked: int = 0
    """Requests, warm-up included."""
    errors: Counter[str] = field(default_factory=Counter)
    input_tokens: int = 0
    output_tokens: int = 0
    chunks: int = 0
    """Pieces of streams."""
    good: int = 0
    """Requests within every bound of the goodput."""
    first_sent: float = math.inf
    last_done: float = 0.0
    """On the clock."""
    histograms: dict[str, bytes] = field(default_factory=dict)
    """Encoded; METRICS, and `lag` of the event loop and `delay` between intended and actual send."""
    window: float | None = None
    """Seconds of the duration, where one was given."""
    window_done: int = 0
    """Requests that were answered within it, whenever they were sent, and their tokens."""
    window_tokens: int = 0
    timeline: dict[int, Second] = field(default_factory=dict)
    """By seconds after the start."""
    cpu: float = 0.0
    """Seconds this process used while it measured."""
    wall: float = 0.0
    """Seconds it measured: from the end of the warm-up to the end of the duration, or to the last answer."""
    cpu_done: int = 0
    """Requests answered in that time."""
    rss: int = 0
    """Bytes, at the most."""
    opened: int = 0
    """Connections."""
    resets: int = 0
    """Connections that broke under a request, whether it was sent again or is an error."""
    retries: int = 0
    """Requests sent again: by the wire, because a kept connection had died, or by the client."""
    strays: int = 0
    """Answers that nobody had asked for."""
