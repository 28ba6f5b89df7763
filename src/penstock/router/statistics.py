"""What the router counts, per worker and as a whole: plain numbers, changed in place and never reset."""

from __future__ import annotations

from typing import Final

BUCKETS: Final = 24
"""Of a histogram of seconds: the bounds are powers of two from 2**-10 s (1 ms) to 2**12 s, and none."""
_SCALE: Final = 1024


class Histogram:
    """Seconds, in buckets whose bounds double."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * BUCKETS
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        bucket = int(seconds * _SCALE).bit_length()
        self.counts[bucket if bucket < BUCKETS else BUCKETS - 1] += 1
        self.total += seconds

    @staticmethod
    def bounds() -> list[float]:
        """Upper bounds of the buckets but the last, seconds."""
        return [2**bucket / _SCALE for bucket in range(BUCKETS - 1)]


class WorkerStatistics:
    """Of one worker."""

    __slots__ = (
        "bytes_received",
        "bytes_sent",
        "first_byte",
        "latency",
        "responses",
        "retries",
        "transport_errors",
    )

    def __init__(self) -> None:
        self.responses = [0] * 6
        """Responses relayed by hundreds of their status: index 2 counts 2xx."""
        self.transport_errors = 0
        """Attempts that brought no whole response."""
        self.retries = 0
        """Attempts that failed here and were followed by another."""
        self.bytes_sent = 0
        """Bytes of request bodies to the engine."""
        self.bytes_received = 0
        """Bytes of response bodies from the engine."""
        self.latency = Histogram()
        """From the request sent to the response complete."""
        self.first_byte = Histogram()
        """From the request sent to the head of its response."""


class RouterStatistics:
    """Of the whole router."""

    __slots__ = (
        "broken",
        "cancelled",
        "queue_full",
        "queue_timeouts",
        "queued",
        "refused",
        "requests",
        "resumed",
    )

    def __init__(self) -> None:
        self.requests = 0
        """Requests to be relayed."""
        self.queued = Histogram()
        """Seconds that requests waited for a slot, of those that had to."""
        self.queue_full = 0
        self.queue_timeouts = 0
        self.refused = 0
        """Requests without a valid key, or malformed."""
        self.cancelled = 0
        """Requests whose client went away."""
        self.broken = 0
        """Responses that broke off after their beginning had been given to the client."""
        self.resumed = 0
        """Streams that were continued on another worker."""
