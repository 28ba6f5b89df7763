"""How far a job is: counts, rates, and the time left. Pure: the clock is handed in.

Counts never go down. What a run found done when it began is in `samples_done`, and in no rate.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable
from typing import Final

from penstock.batch.eta import quantile, time_left
from penstock.batch.trace import Trace, failure_class
from penstock.errors import PenstockError
from penstock.fleet.fleet import FleetStatistics

RATE_WINDOW: Final = 15.0
"""Seconds over which rates are measured."""

RECENT: Final = 4096
"""Latencies kept for quantiles: those of the samples that finished last."""

LATENCY_BOUNDS: Final = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2500.0)
"""Upper bounds of the histogram of latencies, in seconds."""


class Progress:
    """Counts of one job. `samples` = samples_done + samples_failed + samples owed.

    rows, samples: None while the end of an input that is read once is not known.
    """

    def __init__(
        self,
        *,
        rows: int | None,
        rows_done: int,
        rows_failed: int,
        samples: int | None,
        samples_done: int,
        samples_failed: int,
    ) -> None:
        self.rows = rows
        self.rows_done = rows_done
        self.rows_failed = rows_failed
        self.samples = samples
        self.samples_done = samples_done
        self.resumed_samples = samples_done
        """Samples that were there when this run began."""
        self.samples_failed = samples_failed
        self.samples_dropped = 0
        """Of those done in this run, left out of their rows."""
        self.fleet: Callable[[], FleetStatistics] | None = None
        """Asks what is in flight and waits; None: nobody knows, as from another process."""
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.retries = 0
        self.failures: Counter[str] = Counter()
        """Samples that failed in this run, by class."""
        self.latencies: deque[float] = deque(maxlen=RECENT)
        """Seconds, of the samples that finished last."""
        self.latency_counts = [0] * (len(LATENCY_BOUNDS) + 1)
        """Samples of this run by `LATENCY_BOUNDS`; the last ones took longer."""
        self.latency_sum = 0.0
        self.began: float | None = None
        """When this run began to generate, by the monotonic clock."""
        self.notice = ""
        """One line about something the person should know now, such as an engine that does not answer."""

    @property
    def samples_owed(self) -> int | None:
        return None if self.samples is None else self.samples - self.samples_done - self.samples_failed

    def add_trace(self, trace: Trace) -> None:
        """A sample is done."""
        metadata = trace.metadata
        self.samples_done += 1
        self.samples_dropped += trace.dropped
        self.prompt_tokens += metadata.prompt_tokens
        self.completion_tokens += metadata.completion_tokens
        self.retries += max(0, metadata.attempts - metadata.requests)
        latency = metadata.latency
        self.latencies.append(latency)
        self.latency_counts[bisect_left(LATENCY_BOUNDS, latency)] += 1
        self.latency_sum += latency

    def add_failure(self, error: PenstockError, *, new_row: bool) -> None:
        """A sample has failed; new_row: it is the first of its row."""
        self.samples_failed += 1
        self.rows_failed += new_row
        self.failures[failure_class(error)] += 1


class Rates:
    """Tokens and samples per second over the last `RATE_WINDOW` seconds, latencies, and the time left."""

    def __init__(self, progress: Progress, now: float) -> None:
        self._progress = progress
        self._marks = deque([self._mark(now)])
        self._tail_since: float | None = None
        """Since when nothing waits to be sent."""

    def mark(self, now: float) -> None:
        """The counts as they are now: called a few times a second, or every few seconds."""
        self._marks.append(self._mark(now))
        while self._marks[1][0] < now - RATE_WINDOW:
            self._marks.popleft()
        owed = self._progress.samples_owed
        in_tail = owed is not None and owed <= self.in_flight()
        self._tail_since = (self._tail_since or now) if in_tail else None

    def tokens(self) -> float:
        """Generated tokens a second."""
        return self._rate(1)

    def samples(self) -> float:
        return self._rate(2)

    def prompt_tokens(self) -> float:
        return self._rate(3)

    def in_flight(self) -> int:
        """Requests sent and not answered."""
        fleet = self._progress.fleet
        return 0 if fleet is None else sum(fleet().in_flight.values())

    def latency(self, share: float) -> float | None:
        """Quantile of the latencies of samples that finished lately, in seconds."""
        return quantile(share, sorted(self._progress.latencies)) if self._progress.latencies else None

    def eta(self) -> float | None:
        """Seconds until nothing is owed, as `penstock.batch.eta` says; None while nothing is known."""
        progress, now = self._progress, self._marks[-1][0]
        age = 0.0 if self._tail_since is None else now - self._tail_since
        latencies = sorted(progress.latencies)
        return time_left(progress.samples_owed, self.in_flight(), self.samples(), latencies, age)

    def _mark(self, now: float) -> tuple[float, int, int, int]:
        progress = self._progress
        return now, progress.completion_tokens, progress.samples_done, progress.prompt_tokens

    def _rate(self, which: int) -> float:
        first, last = self._marks[0], self._marks[-1]
        return (last[which] - first[which]) / (last[0] - first[0]) if last[0] > first[0] else 0.0
