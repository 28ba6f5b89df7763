"""Latencies in HDR histograms: 1 µs to an hour, three significant digits, merged without loss.

What is recorded is counted first by the bucket of the histogram it belongs to, which costs a tenth of a call
into the library; the library holds the counts when they are read, merged or sent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, Final

from penstock.errors import ConfigError

LOWEST: Final = 1
HIGHEST: Final = 3_600_000_000
"""Microseconds; what is longer counts as this."""
DIGITS: Final = 3
_BITS: Final = 11
"""Leading bits that tell a bucket from the next, at three digits."""

CURVE: Final = (*range(100), 99.5, 99.9, 99.95, 99.99, 100)
"""Percentiles of a distribution as it is drawn."""


def library() -> Any:
    """The library's histogram. Raises ConfigError when it is not installed."""
    try:
        from hdrh.histogram import HdrHistogram  # type: ignore[import-untyped]
    except ModuleNotFoundError:
        raise ConfigError(
            "Load tests need HdrHistogram: install it with pip install 'penstock[loadtest]'."
        ) from None
    return HdrHistogram


class Histogram:
    """Durations in seconds."""

    __slots__ = ("_counts", "_library")

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()
        self._library: Any = None

    def add(self, seconds: float) -> None:
        """Counts one."""
        value = int(seconds * 1e6)
        shift = value.bit_length() - _BITS
        self._counts[value >> shift << shift if shift > 0 else value] += 1

    def extend(self, durations: Iterable[float]) -> None:
        """Counts many."""
        counts = self._counts
        for seconds in durations:
            value = int(seconds * 1e6)
            shift = value.bit_length() - _BITS
            counts[value >> shift << shift if shift > 0 else value] += 1

    def encoded(self) -> bytes:
        """As it is sent to another process and written to a file."""
        encoded: bytes = self._whole().encode()
        return encoded

    def merge(self, encoded: bytes) -> None:
        """Adds what another one had."""
        self._whole().decode_and_add(encoded)

    @property
    def count(self) -> int:
        return int(self._whole().total_count)

    def percentile(self, percent: float) -> float | None:
        """Seconds; None when it is empty."""
        whole = self._whole()
        return whole.get_value_at_percentile(percent) / 1e6 if whole.total_count else None

    def mean(self) -> float | None:
        """Seconds; None when it is empty."""
        whole = self._whole()
        return whole.get_mean_value() / 1e6 if whole.total_count else None

    def curve(self) -> list[tuple[float, float]]:
        """(seconds, share of the values that are no longer) in ascending order; empty when it is empty."""
        whole = self._whole()
        if not whole.total_count:
            return []
        values = whole.get_percentile_to_value_dict(list(CURVE))
        return [(values[percent] / 1e6, percent / 100) for percent in CURVE]

    def _whole(self) -> Any:
        if self._library is None:
            self._library = library()(LOWEST, HIGHEST, DIGITS)
        for value, count in self._counts.items():
            self._library.record_value(min(max(value, LOWEST), HIGHEST), count)
        self._counts.clear()
        return self._library
