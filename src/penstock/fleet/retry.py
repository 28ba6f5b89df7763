"""Whether, where and when a failed request is sent again. Decided by the error's type, never by its words.

`Attempts` is the state machine of one request; the loop around it is `penstock.client`'s, the only one in the
project. An endpoint that cannot be connected to costs no attempt, for nothing was sent: it is marked down,
and the request goes elsewhere or waits for the fleet. Such refusals are bounded by time (`Retry.outage`), the
rest by number (`Retry.attempts`).
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from penstock.errors import (
    ConfigError,
    ConnectFailed,
    FleetDown,
    Overloaded,
    PenstockError,
    PhaseTimeout,
    ServerFailed,
    TransportError,
)


class Decision(msgspec.Struct, frozen=True):
    """What a failure means for the request and for the endpoint."""

    retry: bool
    """Sending it again may succeed."""
    refused: bool = False
    """Nothing was sent: the endpoint does not accept connections."""
    wait: float = 0.0
    """Seconds the server asked us to wait."""


_GIVE_UP = Decision(retry=False)
_AGAIN = Decision(retry=True)
_REFUSED = Decision(retry=True, refused=True)


def classify(error: BaseException) -> Decision:
    """The decision for an error, by its type alone."""
    if isinstance(error, FleetDown):
        return _GIVE_UP
    if isinstance(error, ConnectFailed) or (isinstance(error, PhaseTimeout) and error.phase == "connect"):
        return _REFUSED
    if isinstance(error, Overloaded):
        return Decision(retry=True, wait=error.retry_after or 0.0)
    if isinstance(error, TransportError | ServerFailed):
        return _AGAIN
    return _GIVE_UP


class Retry(msgspec.Struct, frozen=True, kw_only=True):
    """How long a request is kept trying."""

    attempts: int = 8
    """Times a request is sent at most. With one answer in five a 429, eight lose fewer than three rows in a
    million; five would lose three in ten thousand."""
    base: float = 0.5
    """Seconds the first backoff is at most; each one after may be twice as long."""
    cap: float = 30.0
    """Seconds any backoff is at most. A longer Retry-After is obeyed all the same."""
    outage: float | None = 300.0
    """Seconds to wait while no connection can be made, or because a server says so. None: no limit."""

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ConfigError(f"attempts must be at least 1, not {self.attempts}")
        for name in ("base", "cap", "outage"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ConfigError(f"{name} must not be negative, but is {value}")

    def backoff(self, failures: int, random: Callable[[], float]) -> float:
        """Seconds to wait after the given number of failures (1 or more): full jitter.

        Source: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
        """
        return random() * min(self.cap, self.base * 2.0 ** min(failures - 1, 64))


class Attempts:
    """The attempts at one request so far."""

    __slots__ = ("_random", "_refused_since", "_retry", "failures")

    def __init__(self, retry: Retry, random: Callable[[], float]) -> None:
        self._retry = retry
        self._random = random
        self.failures = 0
        """Times the request was sent and failed."""
        self._refused_since: float | None = None

    @property
    def number(self) -> int:
        """Number of the attempt under way, from 1."""
        return self.failures + 1

    def fail(self, error: PenstockError, now: float) -> float | None:
        """Counts a failure. Seconds to wait before sending again, or None: the error is final."""
        decision = classify(error)
        if not decision.retry:
            return None
        outage = self._retry.outage
        if decision.refused:
            if self._refused_since is None:
                self._refused_since = now
            waited = now - self._refused_since
            return None if outage is not None and waited >= outage else 0.0
        self._refused_since = None
        self.failures += 1
        if self.failures >= self._retry.attempts or (outage is not None and decision.wait > outage):
            return None
        return decision.wait + self._retry.backoff(self.failures, self._random)
