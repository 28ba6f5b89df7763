"""Whether an endpoint gets requests: the state machine of one endpoint, the clock handed in.

    UP          gets requests
    DOWN        accepts no connections, or says that it is not well: gets none until a probe is answered
    OPEN        accepts connections but fails what it is sent (the breaker is open): gets none for a while
    HALF_OPEN   gets one request at a time; its outcome closes the breaker or opens it again

It guarantees:
- only what an endpoint did wrong opens its breaker: a 4xx, a 429 or a cancelled request never does;
- while half open, at most one request is on trial, and requests sent before the breaker opened decide
  nothing;
- it is never opened where the caller says that too much of the fleet is out already.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Final

import msgspec

from penstock.errors import ConfigError, PenstockError

FIRST_PROBE: Final = 0.25
"""Seconds from the first refused connection to the first probe."""
MAX_PROBE: Final = 2.0
"""Seconds between two probes of an endpoint that stays down; each wait is twice the one before."""


class State(Enum):
    UP = auto()
    DOWN = auto()
    OPEN = auto()
    HALF_OPEN = auto()


class Breaker(msgspec.Struct, frozen=True, kw_only=True):
    """When an endpoint that fails requests is left alone, and for how long."""

    failure_threshold: int = 10
    """Failures among the last twice as many outcomes that open the breaker."""
    success_threshold: int = 1
    """Requests on trial that must succeed, one after the other, to close it."""
    timeout: float = 5.0
    """Seconds it stays open; each time it opens without having been closed, twice as long."""
    max_timeout: float = 60.0

    def __post_init__(self) -> None:
        if self.failure_threshold < 1 or self.success_threshold < 1:
            raise ConfigError("the breaker's failure_threshold and success_threshold must be at least 1")
        if not 0 < self.timeout <= self.max_timeout:
            raise ConfigError("the breaker's timeout must be positive and at most its max_timeout")


class Health:
    """State of one endpoint."""

    __slots__ = (
        "_breaker",
        "_probe_delay",
        "_successes",
        "_timeout",
        "_trials",
        "_window",
        "error",
        "next_probe",
        "on_trial",
        "outcomes",
        "since",
        "state",
        "until",
    )

    def __init__(self, breaker: Breaker) -> None:
        self._breaker = breaker
        self._window = (1 << 2 * breaker.failure_threshold) - 1
        self.outcomes = 0
        """The last outcomes, a bit each, 1 a failure; the newest lowest."""
        self._timeout = breaker.timeout
        self._successes = 0
        self._trials = 0
        self._probe_delay = FIRST_PROBE
        self.state = State.UP
        self.error: PenstockError | None = None
        """Why it is not up."""
        self.since = 0.0
        """When it went down."""
        self.next_probe = 0.0
        self.until = 0.0
        """When the open breaker is to be half open."""
        self.on_trial = 0
        """Number of the request on trial, 0 while there is none."""

    def __repr__(self) -> str:
        return f"<Health {self.state.name} outcomes={self.outcomes:b}>"

    @property
    def admits(self) -> bool:
        return self.state is State.UP or (self.state is State.HALF_OPEN and not self.on_trial)

    def begin_trial(self) -> int:
        """A request is on trial from now on; its number."""
        self._trials += 1
        self.on_trial = self._trials
        return self._trials

    # -- outcomes of requests: `trial` is the number of one that was on trial, else 0 -----------------

    def succeeded(self, trial: int) -> None:
        """A request was answered, if only with a 4xx."""
        if self.outcomes:
            self.outcomes = self.outcomes << 1 & self._window
        if trial and self._ends_trial(trial):
            self._successes += 1
            if self._successes >= self._breaker.success_threshold:
                self._recover()

    def failed(self, error: PenstockError, now: float, *, trial: int, may_open: bool) -> None:
        """A request failed and the endpoint is to blame."""
        self.outcomes = (self.outcomes << 1 | 1) & self._window
        if trial and self._ends_trial(trial):
            self._timeout = min(2 * self._timeout, self._breaker.max_timeout)
            self._open(error, now)
        elif (
            self.state is State.UP
            and may_open
            and self.outcomes.bit_count() >= self._breaker.failure_threshold
        ):
            self._open(error, now)

    def dropped(self, trial: int) -> None:
        """A request was cancelled: nothing is known."""
        if trial:
            self._ends_trial(trial)

    # -- time and probes --------------------------------------------------------------------------

    def refuse(self, error: PenstockError, now: float) -> None:
        """It accepts no connections, or is not well. The first time starts the outage."""
        if self.state is State.DOWN:
            return
        self.state = State.DOWN
        self.on_trial = 0
        self.error = error
        self.since = now
        self._probe_delay = FIRST_PROBE
        self.next_probe = now + FIRST_PROBE

    def fail_probe(self, error: PenstockError, now: float) -> None:
        """A probe found it still down."""
        self.error = error
        self._probe_delay = min(2 * self._probe_delay, MAX_PROBE)
        self.next_probe = now + self._probe_delay

    def accept(self) -> None:
        """A probe was answered: a down endpoint is up, with a clean slate."""
        if self.state is State.DOWN:
            self._recover()

    def half_open(self, now: float) -> bool:
        """Whether the breaker's time is over; it is then half open."""
        if self.state is not State.OPEN or now < self.until:
            return False
        self.state = State.HALF_OPEN
        self.on_trial = 0
        self._successes = 0
        return True

    # -- inside -----------------------------------------------------------------------------------

    def _ends_trial(self, trial: int) -> bool:
        """The trial is over; whether it still matters."""
        if self.state is not State.HALF_OPEN or trial != self.on_trial:
            return False
        self.on_trial = 0
        return True

    def _open(self, error: PenstockError, now: float) -> None:
        self.state = State.OPEN
        self.error = error
        self.until = now + self._timeout

    def _recover(self) -> None:
        self.state = State.UP
        self.error = None
        self.outcomes = 0
        self._timeout = self._breaker.timeout
