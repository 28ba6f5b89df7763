"""Who waits for what, since when: every wait of the rollouts has a name here while it lasts.

Clock handed in. Exact: a wait is counted from its first moment to its last, whatever ends it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec


class Waiting(msgspec.Struct, frozen=True):
    """Those who wait for the same."""

    who: str
    what: str
    count: int
    seconds: float
    """The one that has waited longest."""


def loop_time() -> float:
    """The clock of the running loop, in seconds."""
    return asyncio.get_running_loop().time()


class Signal:
    """Something has changed: whoever waits looks again. Between look and wait nothing may be awaited."""

    def __init__(self) -> None:
        self._waiters: list[asyncio.Future[None]] = []

    def notify(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def wait(self) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter


class _Kind:
    """Waits of the same name."""

    __slots__ = ("busy_since", "since", "total")

    def __init__(self) -> None:
        self.since: dict[object, float] = {}
        """Start of each wait, the oldest first."""
        self.total = 0.0
        """Seconds in which anybody waited, without the present stretch."""
        self.busy_since = 0.0


class Waits:
    """All waits of one `Rollouts`. clock: in seconds; the running loop's by default."""

    def __init__(self, clock: Callable[[], float] = loop_time) -> None:
        self._clock = clock
        self._kinds: dict[tuple[str, str], _Kind] = {}

    def __repr__(self) -> str:
        return f"<Waits {[(*name, len(kind.since)) for name, kind in self._kinds.items() if kind.since]}>"

    @contextmanager
    def on(self, who: str, what: str) -> Iterator[None]:
        """`who` waits for `what` while the block lasts."""
        kind = self._kinds.setdefault((who, what), _Kind())
        wait, now = object(), self._clock()
        if not kind.since:
            kind.busy_since = now
        kind.since[wait] = now
        try:
            yield
        finally:
            del kind.since[wait]
            if not kind.since:
                kind.total += self._clock() - kind.busy_since

    def now(self) -> list[Waiting]:
        """The waits that last, the longest first."""
        now = self._clock()
        found = [
            Waiting(who, what, len(kind.since), now - next(iter(kind.since.values())))
            for (who, what), kind in self._kinds.items()
            if kind.since
        ]
        return sorted(found, key=lambda one: -one.seconds)

    def seconds(self, who: str, what: str | None = None) -> float:
        """Time in which anybody of that name waited for it (None: for anything, one wait at a time)."""
        now = self._clock()
        return sum(
            kind.total + (now - kind.busy_since if kind.since else 0.0)
            for (one, thing), kind in self._kinds.items()
            if one == who and what in (None, thing)
        )
