"""Whether, where and when a failed request is sent again. Decided by the error's type, never by its words.

- An endpoint that cannot be connected to costs no attempt, for nothing was sent: the request goes elsewhere
  or waits for the fleet. Such refusals are bounded by time (`Retry.outage`), the rest by number
  (`Retry.attempts`).
- What may have been generated already is sent again only within the fleet's `Budget`: one such retry for
  every ten requests, and a trickle in time. A request over the budget waits for its share; it is not given
  up.
- `Retries` is the state machine of one request, `Budget` that of a fleet; the clock is handed in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec

from penstock.errors import (
    ConfigError,
    ConnectFailed,
    FleetDown,
    Overloaded,
    PhaseTimeout,
    ServerFailed,
    TransportError,
)

UNAVAILABLE: Final = 503
"""Status of a server that is starting, ending, or whose engine has died: worth asking how it is."""


class Decision(msgspec.Struct, frozen=True):
    """What a failure means for the request and for the endpoint."""

    retry: bool
    """Sending it again may succeed."""
    refused: bool = False
    """Nothing was sent: the endpoint does not accept connections."""
    charged: bool = False
    """It may have been generated: another try counts against the budget."""
    blamed: bool = False
    """The endpoint failed: its breaker counts it."""
    suspect: bool = False
    """The endpoint may be down: it is asked how it is."""
    overloaded: bool = False
    """The endpoint has too much to do: its limit is cut."""
    wait: float = 0.0
    """Seconds the server asked us to wait."""


_GIVE_UP: Final = Decision(retry=False)
_FAILED: Final = Decision(retry=True, charged=True, blamed=True, suspect=True)
REFUSED: Final = Decision(retry=True, refused=True)
"""That of a request that was never sent."""


def classify(error: BaseException) -> Decision:
    """The decision for an error, by its type alone."""
    if isinstance(error, FleetDown):
        return _GIVE_UP
    if isinstance(error, ConnectFailed) or (isinstance(error, PhaseTimeout) and error.phase == "connect"):
        return REFUSED
    if isinstance(error, Overloaded):
        unavailable = error.status == UNAVAILABLE
        return Decision(retry=True, overloaded=True, suspect=unavailable, wait=error.retry_after or 0.0)
    if isinstance(error, TransportError | ServerFailed):
        return _FAILED
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
    budget: float = 0.1
    """Retries of what may have been generated, for each request answered."""

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ConfigError(f"attempts must be at least 1, not {self.attempts}")
        for name in ("base", "cap", "outage", "budget"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ConfigError(f"{name} must not be negative, but is {value}")

    def backoff(self, failures: int, random: Callable[[], float]) -> float:
        """Seconds to wait after the given number of failures (1 or more): full jitter.

        Source: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
        """
        return random() * min(self.cap, self.base * 2.0 ** min(failures - 1, 64))


class Budget:
    """The retries a fleet can afford: credit earned by the requests answered and, slowly, by time.

    All that has been in flight at once may be lost once, as when an engine dies, and is tried again without
    delay; what comes on top waits for its turn. Source: https://sre.google/sre-book/handling-overload/ (retry
    budgets), here with a wait in place of an error.
    """

    BURST: Final = 100.0
    """Retries that may be saved up at least; else as many as have been in flight at once."""
    SHARE: Final = 0.1
    """Retries a second that are always affordable, for each that may be saved up."""

    __slots__ = ("_at", "_ratio", "burst", "owed")

    def __init__(self, ratio: float) -> None:
        self._ratio = ratio
        self._at: float | None = None
        self.burst = self.BURST
        self.owed = 0.0
        """Retries made that have not been earned since; above `burst` they have been promised for later."""

    def earn(self) -> None:
        """A request has been answered."""
        self.owed = max(0.0, self.owed - self._ratio)

    def due(self, now: float, in_flight: int) -> float:
        """Seconds until the next retry is due. in_flight: requests of the fleet, the failed one included."""
        self.burst = max(self.burst, float(in_flight))
        if self._at is not None:
            self.owed = max(0.0, self.owed - self.SHARE * self.burst * (now - self._at))
        self._at = now
        return max(0.0, (self.owed + 1.0 - self.burst) / (self.SHARE * self.burst))

    def spend(self, now: float, in_flight: int) -> float:
        """Takes one retry. Seconds until it is due."""
        wait = self.due(now, in_flight)
        self.owed += 1.0
        return wait


class Retries:
    """The failures of one request so far, and what follows from them."""

    __slots__ = ("_refused_since", "failures")

    def __init__(self) -> None:
        self.failures = 0
        """Times the request was sent and failed."""
        self._refused_since: float | None = None

    def fail(
        self,
        decision: Decision,
        retry: Retry,
        budget: Budget,
        now: float,
        random: Callable[[], float],
        *,
        in_flight: int = 1,
        deadline: float | None = None,
    ) -> float | None:
        """Counts a failure. Seconds to wait before sending again, or None: the error is final.

        in_flight: requests of the fleet, this one included. What could only be sent after the deadline takes
        nothing out of the budget.
        """
        if not decision.retry:
            return None
        outage = retry.outage
        if decision.refused:
            if self._refused_since is None:
                self._refused_since = now
            waited = now - self._refused_since
            return None if outage is not None and waited >= outage else 0.0
        self._refused_since = None
        self.failures += 1
        if self.failures >= retry.attempts or (outage is not None and decision.wait > outage):
            return None
        wait = decision.wait + retry.backoff(self.failures, random)
        if decision.charged:
            wait = max(wait, budget.due(now, in_flight))
        if deadline is not None and now + wait >= deadline:
            return None
        if decision.charged:
            budget.spend(now, in_flight)
        return wait
