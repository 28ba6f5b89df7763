"""Finding out when an endpoint that is down is back, and when to give up on a fleet that stays down.

`Watch.run` is one task, owned by the client. It sleeps while every endpoint is up. A down endpoint is probed
with growing intervals. While no endpoint is up the requests wait in the dispatch queue; once that has lasted
`outage` seconds, all of them end with FleetDown, which says what was waited for.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from penstock.errors import FleetDown, PenstockError
from penstock.fleet.dispatch import Dispatch
from penstock.fleet.endpoint import Endpoint

logger = logging.getLogger(__name__)

MIN_WAIT: Final = 0.02
"""Seconds between two rounds of probes at least."""

Probe = Callable[[Endpoint], Awaitable[None]]
"""Returns once the endpoint has answered; raises PenstockError when it is still down. Bounded in time."""

OnOutage = Callable[[float, PenstockError | None], None]
"""Told while no endpoint is up: for how many seconds, and why; told once with None when one is up again.
Without it both are logged."""


class Watch:
    """Probes the down endpoints of a dispatch. Wake it whenever an endpoint has gone down."""

    def __init__(
        self,
        dispatch: Dispatch,
        probe: Probe,
        *,
        outage: float | None,
        on_outage: OnOutage | None,
        clock: Callable[[], float],
    ) -> None:
        self._dispatch = dispatch
        self._probe = probe
        self._outage = outage
        self._on_outage = on_outage
        self._clock = clock
        self._woken = asyncio.Event()
        self._told = False

    def wake(self) -> None:
        self._woken.set()

    async def run(self) -> None:
        """Runs until cancelled."""
        while True:
            self._woken.clear()
            wait = self._judge()
            try:
                async with asyncio.timeout(wait):
                    await self._woken.wait()
            except TimeoutError:
                now = self._clock()
                due = [end for end in self._dispatch.endpoints if not end.up and end.next_probe <= now]
                await asyncio.gather(*(self._try(endpoint) for endpoint in due))

    def _judge(self) -> float | None:
        """Tells of an outage, gives up on one that lasts. Seconds to the next probe, None: all up."""
        down = [endpoint for endpoint in self._dispatch.endpoints if not endpoint.up]
        since = self._dispatch.down_since
        if since is None:
            if self._told:
                self._tell(0.0, None)
            if not down:
                return None
        now = self._clock()
        wait = min(endpoint.next_probe for endpoint in down) - now
        if since is not None:
            error = down[-1].error
            self._tell(now - since, error)
            if self._outage is not None:
                left = since + self._outage - now
                if left > 0:
                    wait = min(wait, left)
                else:
                    self._dispatch.refuse_all(FleetDown(self._message(now - since, down)))
        return max(wait, MIN_WAIT)

    def _message(self, seconds: float, down: list[Endpoint]) -> str:
        who = down[0].name if len(down) == 1 else f"any of {len(down)} endpoints"
        return f"waited {seconds:.0f} s for {who} to accept connections; the last error: {down[-1].error}"

    def _tell(self, seconds: float, error: PenstockError | None) -> None:
        told, self._told = self._told, error is not None
        if self._on_outage is not None:
            try:
                self._on_outage(seconds, error)
            except Exception:
                logger.exception("on_outage failed")
        elif error is None:
            logger.warning("an endpoint accepts connections again")
        elif not told:
            logger.warning("no endpoint accepts connections, requests wait: %s", error)

    async def _try(self, endpoint: Endpoint) -> None:
        try:
            await self._probe(endpoint)
        except PenstockError as error:
            endpoint.fail_probe(error, self._clock())
        else:
            self._dispatch.accepted(endpoint)
