"""The slots of one process of several: what it has been lent, and what it knows of the others.

It guarantees:
- no more requests are in flight here than were lent, on any worker, and none above the process' share;
- `in_flight`, of a worker and of all, is the sum over the processes: the own exactly, the others' at most
  LOOK seconds old. Policies, metrics and draining go by it;
- what is asked of the parent and given back to it is told by `claims`, once for all that happens in one step
  of the event loop, and again while requests wait.

Pure but for the shared table: `ask` has `claims` called soon, and the clock is handed in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from penstock.fleet.dispatch import Ticket
from penstock.fleet.endpoint import UNLIMITED, Endpoint
from penstock.fleet.health import State
from penstock.fleet.limit import AdaptiveLimit
from penstock.router.counts import (
    DONE,
    IN_FLIGHT,
    MICROSECONDS,
    OVERLOADS,
    SATURATED,
    TOKENS,
    WAITING,
    Counts,
)
from penstock.router.dispatch import RouterDispatch, serves
from penstock.router.ledger import TOTAL, Claim, Lend, Share

LOOK: Final = 0.001
"""Seconds for which the others' counts are believed when a worker is chosen."""
NUMBERLESS: Final = 0
"""A worker's number until the parent has given it one."""


class SharedEndpoint(Endpoint):
    """A worker that other processes use too. `limit` is that of all processes together."""

    __slots__ = ("agreed", "barred", "bound", "counts", "lent", "own", "share", "told", "worker")

    def __init__(self, counts: Counts, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.counts = counts
        self.worker = NUMBERLESS
        self.agreed = self.limit
        """The limit that the parent knows of."""
        self.barred = False
        """Another process knows that it has not the weights it should have."""
        self.own = 0
        """Requests in flight from this process."""
        self.lent = 0
        self.share: int | None = None
        self.bound = 0
        """Requests that may be in flight from this process: the less of the two."""
        self.told = 0
        """What the parent was told is wanted."""
        if self.limiter is not None:
            self.limiter = SharedLimit(self, self.limiter.ceiling)
            self.limit = self.agreed = self.limiter.current

    @property
    def admits(self) -> bool:
        return self.own < self.bound and self.usable

    @property
    def usable(self) -> bool:
        """Whether a slot is all that is missing."""
        return self.health.admits and self.current and not self.draining and not self.barred

    @property
    def steered(self) -> bool:
        return isinstance(self.limiter, SharedLimit) and self.limiter.leads

    def rebound(self) -> None:
        """`lent` or `share` has changed."""
        self.bound = self.lent if self.share is None else min(self.lent, self.share)

    def take(self) -> int:
        self.own += 1
        self.in_flight += 1
        self.counts.rows[IN_FLIGHT][self.worker] = self.own
        health = self.health
        return health.begin_trial() if health.state is State.HALF_OPEN else 0

    def give_back(self) -> None:
        self.own -= 1
        self.in_flight -= 1
        assert self.own >= 0, f"{self.name}: more slots given back than taken"
        self.counts.rows[IN_FLIGHT][self.worker] = self.own


class SharedLimit(AdaptiveLimit):
    """The limit of a worker that several processes use: one, which `leads`, moves it by what all have seen;
    the others write down what they see."""

    __slots__ = ("_endpoint", "_seen", "leads")

    def __init__(self, endpoint: SharedEndpoint, ceiling: int, **options: Any) -> None:
        super().__init__(ceiling, **options)
        self._endpoint = endpoint
        self._seen: list[int] | None = None
        self.leads = False

    def finished(self, tokens: int, seconds: float = 0.0) -> None:
        rows, worker = self._endpoint.counts.rows, self._endpoint.worker
        rows[DONE][worker] += 1
        rows[TOKENS][worker] += tokens
        rows[MICROSECONDS][worker] += int(seconds * 1e6)

    def overloaded(self, now: float) -> None:
        self._endpoint.counts.rows[OVERLOADS][self._endpoint.worker] += 1

    def tick(self, now: float, in_flight: int, saturated: bool, load: Any) -> None:
        counts, worker = self._endpoint.counts, self._endpoint.worker
        if not self.leads or worker == NUMBERLESS:
            self._seen = None
            return
        kinds = (DONE, TOKENS, MICROSECONDS, SATURATED, OVERLOADS)
        sums = [sum(counts.get(row, kind, worker) for row in range(counts.processes)) for kind in kinds]
        # The row of a process that has died is cleared: what is missing then is nobody's.
        new = [max(0, now - was) for now, was in zip(sums, self._seen or sums, strict=True)]
        self._seen = sums
        done, tokens, microseconds, waits, overloads = new
        self._done, self._tokens, self._seconds = done, tokens, microseconds / 1e6
        if overloads:
            super().overloaded(now)
        super().tick(now, in_flight, saturated or waits > 0, load)


class SharedDispatch(RouterDispatch):
    """Slots of the endpoints of one process. `ask`: `claims` is to be called soon. `agree`: the limit of a
    worker, or of all (None), has been changed here."""

    def __init__(
        self,
        counts: Counts,
        *,
        ask: Callable[[], None],
        agree: Callable[[SharedEndpoint | None, int], None],
        cap: int | None,
        **options: Any,
    ) -> None:
        self.workers: dict[int, SharedEndpoint] = {}
        """Those with a number, until nothing is in flight on them in any process."""
        self.own = 0
        """Requests in flight from this process."""
        self.share: int | None = None
        """Of the slots of all workers."""
        self._counts = counts
        self._ask = ask
        self._agree = agree
        self._looked = float("-inf")
        self._covered = 0
        """Requests that may wait here before more is wanted than was told."""
        self._agreed_cap = UNLIMITED if cap is None else cap
        super().__init__(cap=cap, **options)

    @property
    def cap(self) -> int:
        """What `in_flight` is held against: no number where this process may begin a request, else 0."""
        return UNLIMITED if self.share is None or self.own < self.share else 0

    @cap.setter
    def cap(self, cap: int) -> None:
        """Changes the bound of all processes."""
        if cap != self._agreed_cap:
            self._agreed_cap = cap
            self._agree(None, cap)

    def agree_cap(self, cap: int | None) -> None:
        """The bound of all processes has been changed elsewhere."""
        self._agreed_cap = UNLIMITED if cap is None else cap

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot, in all processes."""
        return self.waiting_here + self._counts.waiting_elsewhere()

    @property
    def waiting_here(self) -> int:
        return sum(map(len, self.lanes.values()))

    def look(self) -> None:
        """Reads the others' counts."""
        self._looked = self._now()
        others = self._counts.elsewhere(IN_FLIGHT, max(self.workers, default=0) + 1)
        for worker, endpoint in self.workers.items():
            endpoint.in_flight = endpoint.own + others[worker]
        self.in_flight = self.own + sum(others) - others[WAITING]

    # -- as a dispatch ----------------------------------------------------------------------------

    def wait(self, ticket: Ticket) -> None:
        super().wait(ticket)
        waiting = self._counts.rows[IN_FLIGHT][WAITING] = self.waiting_here
        if waiting > self._covered:
            self._ask()

    def withdraw(self, ticket: Ticket) -> None:
        super().withdraw(ticket)
        self._counts.rows[IN_FLIGHT][WAITING] = self.waiting_here
        if not self.lanes:
            self._ask()

    def refuse_all(self, error: Any) -> None:
        super().refuse_all(error)
        self._counts.rows[IN_FLIGHT][WAITING] = 0

    def refresh(self, endpoint: Endpoint) -> None:
        assert isinstance(endpoint, SharedEndpoint)
        if endpoint.limit != endpoint.agreed:
            endpoint.agreed = endpoint.limit
            self._agree(endpoint, endpoint.limit)
        super().refresh(endpoint)
        if self.lanes and endpoint.told <= endpoint.own >= endpoint.bound and endpoint.usable:
            self._ask()

    def give_back(self, endpoint: Endpoint) -> None:
        assert isinstance(endpoint, SharedEndpoint)
        self.own -= 1
        super().give_back(endpoint)
        if endpoint.own < endpoint.lent and (endpoint.share is not None or self.share is not None):
            self._ask()

    def _grant(self, ticket: Ticket) -> Endpoint:
        free = self._free
        if len(free) == 1:
            endpoint = next(iter(free))
        else:
            if self._now() - self._looked > LOOK:
                self.look()
            endpoint = self._choose(ticket)
        assert isinstance(endpoint, SharedEndpoint)
        trial = ticket.trial = endpoint.take()
        self.in_flight += 1
        self.own += 1
        if trial or endpoint.own >= endpoint.bound:
            del free[endpoint]
        elif len(free) > 1:
            del free[endpoint]
            free[endpoint] = None
        return endpoint

    def _take_back(self, endpoint: Endpoint, ticket: Ticket) -> None:
        self.own -= 1
        super()._take_back(endpoint, ticket)
        self._ask()

    # -- with the parent --------------------------------------------------------------------------

    def hear(self, word: Lend | Share) -> None:
        """What the parent has said. Waiting requests go where they can now."""
        endpoint = self.workers.get(word.worker)
        if word.worker == TOTAL:
            assert isinstance(word, Share)
            self.share = word.slots
            self._pump()
        elif endpoint is not None:
            if isinstance(word, Lend):
                endpoint.lent += word.count
            else:
                endpoint.share = word.slots
            endpoint.rebound()
            self.refresh(endpoint)
        self._ask()

    def claims(self) -> list[Claim]:
        """What is to be told to the parent now."""
        found = []
        self._covered = _rounded(self.waiting_here)
        usable = sum(self._known(endpoint).usable for endpoint in self.endpoints)
        for endpoint in self.workers.values():
            waiting = self._waiting_for(endpoint) if endpoint in self.endpoints and endpoint.usable else 0
            more = _rounded(-(-waiting // usable)) if waiting else 0
            wants, returned = endpoint.own + more, 0
            fewer = False
            if endpoint.share is not None or self.share is not None:
                returned = endpoint.lent - endpoint.own
                if returned and self.own < self.cap and endpoint.own < endpoint.bound:
                    wants = endpoint.own  # those who wait have left it: it is of no use to them
                    self._covered = 0
                fewer = endpoint.told > endpoint.own + 2 * more
            if returned or fewer or (wants > endpoint.lent and wants > endpoint.told):
                endpoint.lent -= returned
                endpoint.told = wants
                endpoint.rebound()
                found.append(Claim(endpoint.worker, returned, wants))
                if not endpoint.admits:
                    self._free.pop(endpoint, None)
        return found

    def retell(self) -> None:
        """Requests have waited for a while: what they want is told anew where it was taken back."""
        if self.lanes:
            for endpoint in self.workers.values():
                endpoint.told = min(endpoint.told, endpoint.own)
            self._ask()

    def _known(self, endpoint: Endpoint) -> SharedEndpoint:
        assert isinstance(endpoint, SharedEndpoint)
        return endpoint

    def _waiting_for(self, endpoint: Endpoint) -> int:
        """Requests that wait and could go there."""
        return sum(
            len(lane) for (_, model), lane in self.lanes.items() if not model or serves(endpoint, model)
        )


def _rounded(wants: int) -> int:
    """Up to a power of two, so that a queue that grows is told of seldom."""
    return 1 << (wants - 1).bit_length() if wants else 0
