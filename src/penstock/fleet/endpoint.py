"""One endpoint as the dispatcher sees it: requests in flight, how many there may be, and how it is.

`in_flight` is changed only by `take` and `give_back`, is exact and never clamped: a count below zero is a bug
and an AssertionError.
"""

from __future__ import annotations

import sys
from hashlib import blake2b
from typing import Final

from penstock.errors import PenstockError
from penstock.fleet.health import Breaker, Health, State
from penstock.fleet.limit import AdaptiveLimit
from penstock.fleet.transport import Transport
from penstock.wire.address import Address

UNLIMITED: Final = sys.maxsize


class Endpoint:
    """State of one address.

    limit: requests in flight at most; None: no limit. With `adaptive` it is a ceiling, and the limit moves
    below it.
    """

    __slots__ = (
        "address",
        "behind",
        "behind_since",
        "current",
        "draining",
        "gives_token_ids",
        "health",
        "heads",
        "in_flight",
        "key",
        "limit",
        "limiter",
        "name",
        "policy_version",
        "saturated",
        "takes_rid",
        "transport",
    )

    def __init__(
        self,
        address: Address,
        transport: Transport,
        *,
        limit: int | None = None,
        adaptive: bool = False,
        breaker: Breaker | None = None,
    ) -> None:
        self.address = address
        self.transport = transport
        self.name = str(address)
        self.key = int.from_bytes(blake2b(self.name.encode(), digest_size=8).digest(), "little")
        """The name as a number, the same in every process."""
        self.health = Health(breaker or Breaker())
        self.in_flight = 0
        self.limiter = AdaptiveLimit(limit or UNLIMITED) if adaptive else None
        self.limit = self.limiter.current if self.limiter is not None else limit or UNLIMITED
        self.saturated = False
        """Requests waited while it was at its limit, since this was last set to False."""
        self.draining = False
        """It gets no more requests."""
        self.current = True
        """It has the weights of the fleet's policy version; the fleet sets it."""
        self.policy_version: int | None = 0
        """The number of the weight update it is known to be at."""
        self.behind: PenstockError | None = None
        """Why it must first be brought to the fleet's policy version, where that is not under way."""
        self.behind_since = 0.0
        self.gives_token_ids = True
        """Its streams come with token ids when asked, as far as is known."""
        self.takes_rid = False
        """It is SGLang: a request is named by its field `rid`, and one that is given up has to be aborted by
        that name, for the server itself looks only every four seconds whether anybody still waits."""
        self.heads: dict[str, bytes] = {}
        """Request heads by route, made once."""

    def __repr__(self) -> str:
        limit = "" if self.shown_limit is None else f"/{self.limit}"
        return f"<Endpoint {self.name} {self.health.state.name} in_flight={self.in_flight}{limit}>"

    @property
    def admits(self) -> bool:
        """Whether it can be given a request now."""
        return self.in_flight < self.limit and self.health.admits and self.current and not self.draining

    @property
    def up(self) -> bool:
        return self.health.state is State.UP

    @property
    def steered(self) -> bool:
        """Its limit is moved here, by what its metrics say."""
        return self.limiter is not None

    @property
    def shown_limit(self) -> int | None:
        """The limit, None when there is none."""
        return None if self.limit == UNLIMITED else self.limit

    def take(self) -> int:
        """One more in flight; its number if it is the one on trial, else 0."""
        self.in_flight += 1
        health = self.health
        return health.begin_trial() if health.state is State.HALF_OPEN else 0

    def give_back(self) -> None:
        self.in_flight -= 1
        assert self.in_flight >= 0, f"{self.name}: more slots given back than taken"
