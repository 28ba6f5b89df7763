"""Bringing engines to the fleet's policy version before they get requests again.

One task, owned by `Control`. An engine that missed an update, failed in one, joined late or was away is asked
for the version of its weights; unless that is the fleet's, they are brought to it anew, again and again with
growing pauses. Engines in use are asked every VERSION_POLL seconds: one that was restarted between two
requests, and so was never seen down, is found by that. During an update nothing of this runs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Final

from penstock.control.dialect import PauseMode
from penstock.control.engine import Engine, lacks_route
from penstock.control.transport import WeightTransport
from penstock.control.update import Transaction, resume
from penstock.errors import ConfigError, ConnectFailed, ControlFailed, PenstockError
from penstock.fleet.endpoint import Endpoint
from penstock.fleet.fleet import Fleet
from penstock.fleet.health import State
from penstock.fleet.retry import Retry

VERSION_POLL: Final = 5.0
"""Seconds between two questions for the version of an engine in use."""
BACKOFF: Final = Retry(base=0.5, cap=30.0)
"""Between two tries to bring an engine to the fleet's version."""

logger = logging.getLogger(__name__)

CatchUp = Callable[[int], WeightTransport]
"""Given the fleet's version: what brings an engine of any version to it."""


class Readmission:
    """Looks after the versions of `fleet`.

    engine: the control plane's end of an endpoint. catch_up: None: the transport of the last update.
    """

    def __init__(self, fleet: Fleet, engine: Callable[[Endpoint], Engine], catch_up: CatchUp | None) -> None:
        self._fleet = fleet
        self._engine = engine
        self._catch_up = catch_up
        self.last: WeightTransport | None = None
        """That of the update the fleet has committed last."""
        self.paused: PauseMode | None = None
        """How the fleet is paused, where it is: an engine that comes back has to be as well."""
        self._work: dict[Endpoint, asyncio.Task[None]] = {}
        self._held = 0
        self._woken = asyncio.Event()

    def wake(self) -> None:
        self._woken.set()

    def forget(self) -> None:
        """What brought the engines to the fleet's version before the present one."""
        self.last = None

    async def run(self) -> None:
        """Runs until cancelled."""
        self._fleet.on_behind = self.wake
        loop = asyncio.get_running_loop()
        next_poll = loop.time() + VERSION_POLL
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    self._woken.clear()
                    due = loop.time() >= next_poll
                    if due:
                        next_poll = loop.time() + VERSION_POLL
                    if not self._held and self._fleet.policy_version > 0:
                        self._start(group, due)
                    try:
                        async with asyncio.timeout(next_poll - loop.time()):
                            await self._woken.wait()
                    except TimeoutError:
                        pass
        finally:
            self._fleet.on_behind = lambda: None

    async def hold(self) -> None:
        """Ends what is under way, and starts nothing until `release`."""
        self._held += 1
        work = list(self._work.values())
        for task in work:
            task.cancel()
        if work:
            await asyncio.wait(work)

    def release(self) -> None:
        self._held -= 1
        self.wake()

    # -- inside -----------------------------------------------------------------------------------

    def _start(self, group: asyncio.TaskGroup, due: bool) -> None:
        for endpoint in self._fleet.endpoints:
            if endpoint in self._work or endpoint.health.state is State.DOWN:
                continue
            engine = self._engine(endpoint)
            if self._fleet.versions.behind(endpoint):
                if engine.sleep_level is None:  # asleep, it takes no weights
                    self._begin(group, endpoint, self._bring(engine))
            elif due and endpoint.current and engine.has_version:
                self._begin(group, endpoint, self._compare(engine))

    def _begin(self, group: asyncio.TaskGroup, endpoint: Endpoint, work: Coroutine[Any, Any, None]) -> None:
        async def guarded() -> None:
            try:
                await work
            except Exception:  # nothing that goes wrong with one engine may end the looking after
                logger.exception("bringing %s to the fleet's version failed", endpoint.name)
            finally:
                del self._work[endpoint]

        task = self._work[endpoint] = group.create_task(guarded())
        task.add_done_callback(lambda _: work.close())  # of one that is cancelled before it begins

    async def _compare(self, engine: Engine) -> None:
        """Asks an engine in use for its version."""
        endpoint = engine.endpoint
        try:
            await self._observe(engine)
        except ConnectFailed as error:
            endpoint.health.refuse(error, self._fleet.clock())
            self._fleet.dispatch.refresh(endpoint)
        except PenstockError as error:
            logger.debug("%s did not say its version: %s", engine.name, error)
        if self._fleet.versions.behind(endpoint):
            logger.warning("%s was restarted unseen: %s", engine.name, endpoint.behind)
            engine.forget()
            self.wake()

    async def _observe(self, engine: Engine) -> None:
        try:
            label = await engine.weight_version()
        except PenstockError as error:
            if not lacks_route(error):
                raise
            engine.has_version = False
            return
        self._fleet.versions.observe(engine.endpoint, label)
        self._fleet.show_versions()

    async def _bring(self, engine: Engine) -> None:
        """Tries until the engine has the fleet's weights, is down, or has left."""
        endpoint, versions = engine.endpoint, self._fleet.versions
        tries = 0
        while True:
            try:
                if not versions.tainted(endpoint):
                    await self._observe(engine)
                if versions.behind(endpoint):
                    await self._update(engine)
                logger.info("%s is at version %d and gets requests", engine.name, self._fleet.policy_version)
                return
            except ConnectFailed as error:
                endpoint.health.refuse(error, self._fleet.clock())
                self._fleet.dispatch.refresh(endpoint)
                return
            except PenstockError as error:
                if not tries:
                    # As text: a log record that is kept would keep the error, and with it the weights.
                    logger.warning("%s is left out until it has caught up: %s", engine.name, str(error))
            tries += 1
            await asyncio.sleep(BACKOFF.backoff(tries, self._fleet.random))
            down = endpoint.health.state is State.DOWN
            if endpoint.draining or down or not versions.behind(endpoint):
                return

    async def _pause_as_the_others(self, engine: Engine) -> None:
        """An engine without the route cannot be paused, and is not."""
        try:
            if self.paused is None:
                await resume(engine)
            else:
                await engine.ask(*(await engine.dialect()).pause(self.paused, True))
        except PenstockError as error:
            if not lacks_route(error):
                raise

    async def _update(self, engine: Engine) -> None:
        """One try. Raises PenstockError."""
        version = self._fleet.policy_version
        transport = self.last if self._catch_up is None else self._catch_up(version)
        if transport is None:
            raise ConfigError(f"nothing is known that brings {engine.name} to version {version}")
        await self._pause_as_the_others(engine)
        transaction = Transaction(self._fleet, [engine], transport, version, None)
        try:
            await transaction.run(all_or_nothing=False)
        except ControlFailed:
            pass
        error = transaction.outcomes[engine.name].error
        if error is not None:
            raise error
