"""Whether an engine that answers its metrics still generates, judged from what those metrics say.

A state machine of one endpoint, fed at each look. Two ways an engine can leave requests hanging without an
error are told apart from a long generation:
- STALLED: it says that it has work, and has not made a token for `stall` seconds (a process that is stopped,
  a collective operation that hangs). To be confirmed by a request of one token before anything is done about
  it.
- LOST: it says that it has nothing to do, for LOST_AFTER seconds, while we wait for an answer: the request or
  its answer is gone.
Flowing tokens, whoever asked for them, count as alive. Without metrics nothing is concluded.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Final

from penstock.fleet.load import EngineLoad

LOST_AFTER: Final = 15.0
"""Seconds an engine says that it is idle before what we wait for is taken for lost."""


class Verdict(Enum):
    ALIVE = auto()
    STALLED = auto()
    LOST = auto()


class Progress:
    """What one engine's metrics said, and since when."""

    __slots__ = ("_idle_since", "_moved_at", "_stall", "tokens")

    def __init__(self, stall: float | None) -> None:
        self._stall = stall
        """Seconds without a token; None: never."""
        self.tokens: float | None = None
        """Tokens generated since it started, at the last look."""
        self._moved_at: float | None = None
        self._idle_since: float | None = None

    def rest(self) -> None:
        """Nothing of ours is there, or nothing is known of it: spans begin anew."""
        self._idle_since = self._moved_at = None

    def observe(self, now: float, in_flight: int, load: EngineLoad) -> Verdict:
        """`in_flight`: requests of ours on this endpoint."""
        busy = load.running + load.waiting > 0
        if in_flight == 0:
            self.rest()
            self.tokens = load.generation_tokens
            return Verdict.ALIVE
        if busy:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = now
        if not busy or load.generation_tokens != self.tokens or self._moved_at is None:
            self._moved_at = now
        self.tokens = load.generation_tokens
        if self._idle_since is not None and now - self._idle_since >= LOST_AFTER:
            self._idle_since = now
            return Verdict.LOST
        silent = now - self._moved_at
        if self._stall is not None and load.generation_tokens is not None and silent >= self._stall:
            self._moved_at = now
            return Verdict.STALLED
        return Verdict.ALIVE
