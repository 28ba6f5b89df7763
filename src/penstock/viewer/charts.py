"""What is drawn of all samples, counted as they pass: a few kilobytes, however many there are."""

from __future__ import annotations

from array import array
from collections import Counter
from math import isfinite, log10
from typing import Any, Final

from penstock.viewer.trace_row import Trace

PER_DECADE: Final = 24
DECADES: Final = 8
MOST_VALUES: Final = 400
"""Different rewards told apart; above it they are rounded to one digit less."""
MOST_STEPS: Final = 240
"""Steps of the series; at twice as many, neighbours are joined."""


class LogHistogram:
    """Counts by value: bin 0 for zero, then 24 bins a power of ten from 1 on."""

    def __init__(self) -> None:
        self.counts = array("Q", bytes(8 * (PER_DECADE * DECADES + 1)))

    def add(self, value: int) -> None:
        place = 1 + int(log10(value) * PER_DECADE + 1e-9) if value >= 1 else 0
        self.counts[min(place, len(self.counts) - 1)] += 1


class Values:
    """Counts by value, rounded to as many digits as keep their number small."""

    def __init__(self) -> None:
        self.counts: Counter[float] = Counter()
        self._digits = 4

    def add(self, value: float) -> None:
        self.counts[round(value, self._digits)] += 1
        while len(self.counts) > MOST_VALUES:
            self._digits -= 1
            joined: Counter[float] = Counter()
            for key, count in self.counts.items():
                joined[round(key, self._digits)] += count
            self.counts = joined


class Series:
    """Mean speed of samples in the order of the file, which is the order in which its rows finished."""

    def __init__(self) -> None:
        self.width = 1
        """Samples a step."""
        self.tokens = array("d", [0.0])
        self.seconds = array("d", [0.0])
        self._in_step = 0

    def add(self, tokens: int, seconds: float) -> None:
        if self._in_step == self.width:
            if len(self.tokens) == 2 * MOST_STEPS:
                self.tokens, self.seconds = _paired(self.tokens), _paired(self.seconds)
                self.width *= 2
            self.tokens.append(0.0)
            self.seconds.append(0.0)
            self._in_step = 0
        self.tokens[-1] += tokens
        self.seconds[-1] += seconds
        self._in_step += 1

    def speeds(self) -> list[float]:
        """Tokens a second of one request, a step each."""
        return [round(t / s, 3) for t, s in zip(self.tokens, self.seconds, strict=True) if s > 0]


class Charts:
    """Counts over samples."""

    def __init__(self) -> None:
        self.rows = 0
        self.samples = 0
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.finish: Counter[str] = Counter()
        self.completion = LogHistogram()
        self.prompt = LogHistogram()
        self.rewards = Values()
        self.speed = Series()

    def add(self, trace: Trace) -> None:
        self.samples += 1
        self.finish[trace.finish or "none"] += 1
        if trace.prompt_tokens is not None:
            self.prompt_tokens += trace.prompt_tokens
            self.prompt.add(trace.prompt_tokens)
        if trace.completion_tokens is not None:
            self.completion_tokens += trace.completion_tokens
            self.completion.add(trace.completion_tokens)
            if trace.latency:
                self.speed.add(trace.completion_tokens, trace.latency)
        if trace.reward is not None and isfinite(trace.reward):
            self.rewards.add(trace.reward)

    def data(self) -> dict[str, Any]:
        """What the page draws. Bin i > 0 of a histogram begins at 10 ** ((i - 1) / `per_decade`)."""
        return {
            "rows": self.rows,
            "samples": self.samples,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "per_decade": PER_DECADE,
            "finish": self.finish.most_common(12),
            "completion": self.completion.counts.tolist(),
            "prompt": self.prompt.counts.tolist(),
            "rewards": sorted(self.rewards.counts.items()),
            "speed": self.speed.speeds(),
            "speed_step": self.speed.width,
        }


def _paired(values: array[float]) -> array[float]:
    return array("d", (a + b for a, b in zip(values[::2], values[1::2], strict=True)))
