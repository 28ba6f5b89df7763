"""What became of each request, by its id: what a load tester asks when it looks for lost generations.

A request is `in_flight` until it ends in exactly one way: `completed` (its answer was written whole),
`aborted` (the client went away first), `stopped` (ended by /abort_requests or /pause, and answered),
`refused`, or `faulted` (a fault, and which). Counts are exact and never reset but by `reset`; the memory of
single requests is bounded: over MAX_REQUESTS those that ended first are forgotten, and `forgotten` says how
many.

A client that tries again names its attempts ID, ID-2, ID-3, …: ID-k belongs to ID if that has been seen here.
`duplicated` are the requests completed beyond one for such a base id.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterator
from typing import Any, Final, Literal

MAX_REQUESTS: Final = 200_000
"""Requests remembered one by one."""

_ATTEMPT: Final = re.compile(r"(.+)-([2-9]|[1-9]\d+)")

Outcome = Literal["completed", "aborted", "stopped", "refused", "faulted"]
State = Literal["in_flight", "completed", "aborted", "stopped", "refused", "faulted"]


class Entry:
    """One request as it arrived. The same id may arrive more than once."""

    __slots__ = ("base", "fault", "id", "samples", "state", "tokens")

    def __init__(self, id: str, base: str) -> None:
        self.id = id
        self.base = base
        self.state: State = "in_flight"
        self.fault: str | None = None
        """The fault it met, whether or not that ended it."""
        self.samples = 0
        self.tokens = 0

    def as_dict(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "base": self.base,
            "state": self.state,
            "fault": self.fault,
            "samples": self.samples,
            "tokens": self.tokens,
        }


class Account:
    """Of one engine, since it started or was reset."""

    def __init__(self, max_requests: int = MAX_REQUESTS) -> None:
        self._max_requests = max_requests
        self._entries: dict[Entry, None] = {}
        self.reset()

    def reset(self) -> None:
        """Begins anew. Requests in flight are kept, and counted as seen."""
        kept = [entry for entry in self._entries if entry.state == "in_flight"]
        self._entries = dict.fromkeys(kept)
        self._over: deque[Entry] = deque()
        """Those that have ended, in that order."""
        self._bases: Counter[str] = Counter()
        """Requests remembered, by base id."""
        self._completed: Counter[str] = Counter()
        """Of those the completed ones."""
        self.seen = len(kept)
        self.in_flight = len(kept)
        self.duplicated = 0
        self.forgotten = 0
        self.outcomes: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        """Struck so far, by name."""
        for entry in kept:
            self._bases[entry.base] += 1

    def arrived(self, id: str) -> Entry:
        """A request is here."""
        entry = Entry(id, self._base(id))
        self._entries[entry] = None
        self._bases[entry.base] += 1
        self.seen += 1
        self.in_flight += 1
        if len(self._entries) > self._max_requests:
            self._forget()
        return entry

    def struck(self, entry: Entry, fault: str) -> None:
        """A request meets a fault."""
        entry.fault = fault
        self.faults[fault] += 1

    def ended(self, entry: Entry, outcome: Outcome, tokens: int = 0) -> None:
        """A request has ended, with so many tokens made. What comes after the first end does not count."""
        if entry.state != "in_flight":
            return
        entry.state = outcome
        entry.tokens = tokens
        self._over.append(entry)
        self.in_flight -= 1
        self.outcomes[outcome] += 1
        if outcome == "completed":
            self._completed[entry.base] += 1
            self.duplicated += self._completed[entry.base] > 1

    def killed(self) -> None:
        """All that is in flight ends at once."""
        for entry in list(self._entries):
            if entry.state == "in_flight":
                self.struck(entry, "kill")
                self.ended(entry, "faulted")

    def counts(self) -> dict[str, Any]:
        """All counts, as JSON has them."""
        outcomes = {
            name: self.outcomes[name] for name in ("completed", "aborted", "stopped", "refused", "faulted")
        }
        return {
            "seen": self.seen,
            "in_flight": self.in_flight,
            **outcomes,
            "duplicated": self.duplicated,
            "faults": dict(self.faults),
            "remembered": len(self._entries),
            "forgotten": self.forgotten,
        }

    def requests(self, id: str | None = None, state: str | None = None) -> Iterator[dict[str, Any]]:
        """Those remembered, in the order they came; only of one id (or base id), or in one state."""
        for entry in self._entries:
            if (id is None or id in (entry.id, entry.base)) and state in (None, entry.state):
                yield entry.as_dict()

    def _base(self, id: str) -> str:
        match = _ATTEMPT.fullmatch(id)
        return match[1] if match is not None and match[1] in self._bases else id

    def _forget(self) -> None:
        """Forgets the one that ended first; of those in flight there are no more than connections."""
        if not self._over:
            return
        entry = self._over.popleft()
        del self._entries[entry]
        self.forgotten += 1
        self._bases[entry.base] -= 1
        if not self._bases[entry.base]:
            del self._bases[entry.base], self._completed[entry.base]
