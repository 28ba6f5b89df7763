"""Engines that could not be brought to the state of the others: out of service until they have been.

It guarantees:
- an engine that is held gets no requests, and is asked again, with growing pauses, until it obeys or leaves;
- a later call that steers the whole fleet takes the place of what a held engine was asked for.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

from penstock.control.engine import Engine, Outcome, lacks_route
from penstock.fleet.fleet import Fleet
from penstock.fleet.retry import Retry

BACKOFF: Final = Retry(base=0.5, cap=10.0)
"""Between two tries to bring a held engine to the state of the others."""

Ask = Callable[[Engine], Awaitable[Outcome]]

logger = logging.getLogger(__name__)


class Holding:
    """The held engines of `fleet`."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._engines: dict[Engine, asyncio.Task[None] | None] = {}

    def __contains__(self, engine: Engine) -> bool:
        return engine in self._engines

    def hold(self, engines: Iterable[Engine], ask: Ask) -> None:
        """From now on these get no requests until `ask` has succeeded on them."""
        for engine in engines:
            logger.warning("%s differs from the others and gets no requests until it does not", engine.name)
            self._fleet.versions.hold(engine.endpoint, True)
            if task := self._engines.get(engine):
                task.cancel()
            self._engines[engine] = self._fleet.loop.create_task(self._mend(engine, ask))
        self._fleet.show_versions()

    def release(self, engines: Iterable[Engine]) -> None:
        """They are as the others again."""
        for engine in engines:
            if engine in self._engines:
                self._engines.pop(engine)
                self._fleet.versions.hold(engine.endpoint, False)
        self._fleet.show_versions()

    async def stop(self) -> list[Engine]:
        """Asks no longer; who is held stays so, and is returned."""
        tasks = [task for task in self._engines.values() if task is not None]
        self._engines = dict.fromkeys(self._engines)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        return list(self._engines)

    async def _mend(self, engine: Engine, ask: Ask) -> None:
        tries = 0
        while not engine.endpoint.draining:
            tries += 1
            await asyncio.sleep(BACKOFF.backoff(tries, self._fleet.random))
            one = await ask(engine)
            if one.error is None or lacks_route(one.error):
                break
        self.release([engine])
