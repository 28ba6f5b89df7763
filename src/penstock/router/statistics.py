"""What the router counts, per worker and as a whole: plain numbers, changed in place and never reset."""

from __future__ import annotations

from collections.abc import Callable
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
        "openings",
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
        self.openings = 0
        """Times its breaker opened."""
        self.bytes_sent = 0
        """Bytes of request bodies to the engine."""
        self.bytes_received = 0
        """Bytes of response bodies from the engine."""
        self.latency = Histogram()
        """From the request sent to the response complete."""
        self.first_byte = Histogram()
        """From the request sent to the head of its response."""


class StreamCounting:
    """Counts the attempts of a stream that survives its engine, each at its worker."""

    __slots__ = ("_began", "_clock", "_counts", "_received", "_silent")

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._counts: WorkerStatistics | None = None
        self._began = 0.0
        self._received = 0
        self._silent = True
        """No byte of this attempt's response has come."""

    def begin(self, counts: WorkerStatistics) -> None:
        """An attempt begins at the worker these counts are of; one that was under way has failed."""
        if self._counts is not None:
            self._counts.retries += 1
            self.failed()
        self._counts, self._began, self._silent = counts, self._clock(), True

    def arrived(self, received: int) -> None:
        """So many bytes of responses have come so far, those of earlier attempts among them."""
        counts = self._counts
        assert counts is not None
        if self._silent:
            self._silent = False
            counts.first_byte.observe(self._clock() - self._began)
        counts.bytes_received += received - self._received
        self._received = received

    def ended(self) -> None:
        """The stream is complete."""
        counts, self._counts = self._counts, None
        if counts is not None:
            counts.latency.observe(self._clock() - self._began)
            counts.responses[2] += 1

    def failed(self) -> None:
        """The attempt has failed, if one is under way."""
        counts, self._counts = self._counts, None
        if counts is not None:
            counts.transport_errors += 1


class RouterStatistics:
    """Of the whole router."""

    __slots__ = (
        "broken",
        "cancelled",
        "given_up",
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
        """Requests refused because the queue was full."""
        self.queue_timeouts = 0
        """Requests that waited too long for a slot."""
        self.given_up = 0
        """Requests the router answered with an error because no worker had a response."""
        self.refused = 0
        """Requests without a valid key, or malformed."""
        self.cancelled = 0
        """Requests whose client went away."""
        self.broken = 0
        """Responses that broke off after their beginning had been given to the client."""
        self.resumed = 0
        """Streams that were continued on another worker."""
