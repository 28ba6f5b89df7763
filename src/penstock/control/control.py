"""The control plane of a fleet: one call, every engine, an outcome of each.

It guarantees:
- a call goes to all engines at once, whatever kind each is, and is bounded in time at each;
- an engine that fails is data; with `all_or_nothing` it is ControlFailed, after the others were brought back
  to where they were; one that could not be, or could not be resumed, gets no requests until it has been;
- an engine that does not have the weights of the fleet's policy version gets no requests until it has caught
  up;
- `async with` owns the connections and the tasks. Its fleet has to be open, and has one Control.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import orjson

from penstock.control.dialect import KV_CACHE, WEIGHTS, Ask, Dialect, PauseMode
from penstock.control.engine import Engine, Outcome, answer_of, lacks_route, outcome, refused
from penstock.control.holding import Holding
from penstock.control.readmission import CatchUp, Readmission
from penstock.control.steps import Call, Kind, Steps
from penstock.control.transport import DiskReload, WeightTransport
from penstock.control.update import Transaction, WeightUpdate, check_mode, failures, together
from penstock.errors import ConfigError, ConnectFailed, ControlFailed, FleetDown, PenstockError
from penstock.fleet.endpoint import Endpoint
from penstock.fleet.fleet import Fleet
from penstock.fleet.health import State

TIMEOUT: Final = 60.0
"""Seconds a control call may take at one engine."""
UPDATE_TIMEOUT: Final = 600.0
"""Seconds one phase of a weight update may take at one engine."""
METHODS: Final = frozenset({"GET", "POST", "PUT", "DELETE", "PATCH"})

Outcomes = dict[str, Outcome]
"""By the endpoint's name."""
Asks = Callable[[Engine, Dialect], Sequence[Ask]]


class Control:
    """Steers the engines of `fleet`.

    timeout: seconds a call may take at one engine. update_timeout: seconds one phase of a weight update may.
    catch_up: what brings an engine that missed updates to the fleet's version; by default the transport of
    the last update. Raises ConfigError.
    """

    def __init__(
        self,
        fleet: Fleet,
        *,
        timeout: float = TIMEOUT,
        update_timeout: float = UPDATE_TIMEOUT,
        catch_up: CatchUp | None = None,
    ) -> None:
        if not (timeout > 0 and update_timeout > 0):
            raise ConfigError(
                "timeout and update_timeout must be positive: no control call is without a bound"
            )
        self.fleet = fleet
        self._timeout = timeout
        self._update_timeout = update_timeout
        self._engines: dict[Endpoint, Engine] = {}
        self._readmission = Readmission(fleet, self._engine, catch_up)
        self._holding = Holding(fleet)
        self.steps = Steps(fleet, self._all, self._readmission.forget)
        """Weight updates whose steps come from outside; `step` takes one."""
        self._task: asyncio.Task[None] | None = None
        self._updating = False

    def __repr__(self) -> str:
        return f"<Control {self.fleet} at version {self.fleet.policy_version}>"

    async def __aenter__(self) -> Self:
        self.fleet.check_open()
        self.fleet.on_returned = self._returned
        self._task = self.fleet.loop.create_task(self._readmission.run(), name="penstock control")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._task is not None
        task, self._task = self._task, None
        task.cancel()
        await asyncio.wait([task])
        await self._holding.stop()
        self.fleet.on_returned = lambda endpoint: None
        for engine in self._engines.values():
            await engine.close()
        self._engines.clear()

    # -- calls ------------------------------------------------------------------------------------

    async def pause(
        self, mode: PauseMode = "keep", *, clear_cache: bool = True, all_or_nothing: bool = False
    ) -> Outcomes:
        """Stops generation; new requests are held by the engines. `mode`: what becomes of those in flight.

        clear_cache: forget what is cached; vLLM does not where mode is `keep`. Undone by a resume.
        Raises ControlFailed, ConfigError.
        """
        check_mode(mode)
        outcomes = await self._everywhere(
            "pause",
            lambda engine, dialect: dialect.pause(mode, clear_cache),
            lambda engine, dialect: dialect.resume(),
            all_or_nothing,
        )
        self._readmission.paused = mode
        return outcomes

    async def resume(self, *, all_or_nothing: bool = False) -> Outcomes:
        """Goes on. Undone by a pause in the mode of the last one. Raises ControlFailed."""
        mode = self._readmission.paused or "keep"
        outcomes = await self._everywhere(
            "resume",
            lambda engine, dialect: dialect.resume(),
            lambda engine, dialect: dialect.pause(mode, False),
            all_or_nothing,
        )
        self._readmission.paused = None
        return outcomes

    async def sleep(self, level: int = 1, *, all_or_nothing: bool = False) -> Outcomes:
        """Ends what is in flight and gives memory back: level 0 none, 1 the KV cache, 2 also the weights.

        After level 2 an engine gets no requests before it has new weights. Undone by a wake-up, which brings
        no weights back. Raises ControlFailed, ConfigError.
        """
        if level not in (0, 1, 2):
            raise ConfigError(f"the sleep level must be 0, 1 or 2, not {level!r}")
        await self._holding.stop()
        versions, engines = self.fleet.versions, self._all()
        before = {engine: engine.sleep_level for engine in engines}
        for engine in engines:
            engine.sleep_level = level
            if level == 2:
                versions.commit(engine.endpoint)
        self.fleet.show_versions()
        kept: set[Engine] = set()
        try:
            done = await self._ask_all(lambda engine, dialect: dialect.sleep(level))
            kept = {engine for engine, one in done.items() if _untouched(one.error)}
        finally:
            for engine in engines:
                if engine in kept:
                    engine.sleep_level = before[engine]
                if level == 2:
                    (versions.kept if engine in kept else versions.spoil)(engine.endpoint)
            self.fleet.show_versions()
        return await self._judge(
            "sleep", done, lambda engine, dialect: dialect.sleep(level), _wake_up, all_or_nothing
        )

    async def wake_up(self, tags: Sequence[str] = (), *, all_or_nothing: bool = False) -> Outcomes:
        """Takes memory back, by default all of it, and goes on. tags: `weights`, `kv_cache`.

        Undone by a sleep of the level before. Raises ControlFailed, ConfigError.
        """
        if unknown := set(tags) - {WEIGHTS, KV_CACHE}:
            raise ConfigError(f"{unknown.pop()!r} cannot be woken up; choose from 'weights' and 'kv_cache'")
        levels = {engine: engine.sleep_level for engine in self._all()}
        outcomes = await self._everywhere(
            "wake_up",
            lambda engine, dialect: dialect.wake_up(tags, levels.get(engine)),
            lambda engine, dialect: dialect.sleep(levels.get(engine) or 0),
            all_or_nothing,
        )
        for engine in levels:
            if engine.name in outcomes and outcomes[engine.name].ok and (not tags or KV_CACHE in tags):
                engine.sleep_level = None
        self._readmission.wake()
        return outcomes

    async def reset_prefix_cache(self, *, all_or_nothing: bool = False) -> Outcomes:
        """Forgets cached prefixes. An engine that is busy refuses. Cannot be undone. Raises ControlFailed."""
        return await self._everywhere(
            "reset_prefix_cache", lambda engine, dialect: dialect.reset_prefix_cache(), None, all_or_nothing
        )

    async def abort(self, *, all_or_nothing: bool = False) -> Outcomes:
        """Ends all requests in flight. Cannot be undone. Raises ControlFailed."""
        return await self._everywhere("abort", lambda engine, dialect: dialect.abort(), None, all_or_nothing)

    async def weight_versions(self) -> Outcomes:
        """The version each engine says its weights are of, as a number; None where that is none."""
        engines = self._all()
        done = await together({engine: outcome(engine.weight_version()) for engine in engines})
        return {engine.name: one for engine, one in done.items()}

    async def world_sizes(self) -> Outcomes:
        """The ranks each engine has in a group with the trainer."""
        done = await together({engine: outcome(engine.world_size()) for engine in self._all()})
        return {engine.name: one for engine, one in done.items()}

    async def call(
        self,
        method: str,
        path: str,
        body: bytes | Mapping[str, Any] | None = None,
        *,
        timeout: float | None = None,
        all_or_nothing: bool = False,
    ) -> Outcomes:
        """Any request, to every engine as it stands: nothing is translated, nothing can be undone.

        Raises ControlFailed, ConfigError.
        """
        if method not in METHODS:
            raise ConfigError(f"the method must be one of {', '.join(sorted(METHODS))}, not {method!r}")
        if not (path.startswith("/") and path.isascii() and path.isprintable() and " " not in path):
            raise ConfigError(f"a path begins with a slash and has no spaces; {path!r} is none")
        if timeout is not None and not timeout > 0:
            raise ConfigError("the timeout of a control call must be positive")
        content = orjson.dumps(body) if isinstance(body, Mapping) else body or b""

        async def one(engine: Engine) -> Any:
            response = await engine.request(Ask(path, method=method), body=content, timeout=timeout)
            return answer_of(engine.name, path, response)

        done = await together({engine: outcome(one(engine)) for engine in self._all()})
        outcomes = {engine.name: result for engine, result in done.items()}
        if all_or_nothing and not all(result.ok for result in outcomes.values()):
            raise ControlFailed(f"{method} {path}: {failures(outcomes)}; it cannot be undone", outcomes)
        return outcomes

    # -- weights ----------------------------------------------------------------------------------

    async def reload_weights(
        self,
        path: str | Path,
        version: int | None = None,
        *,
        pause: PauseMode | None = "keep",
        all_or_nothing: bool = False,
    ) -> WeightUpdate:
        """`update_weights` from a checkpoint folder that every engine can read."""
        return await self.update_weights(
            DiskReload(path), version, pause=pause, all_or_nothing=all_or_nothing
        )

    async def update_weights(
        self,
        transport: WeightTransport,
        version: int | None = None,
        *,
        pause: PauseMode | None = "keep",
        all_or_nothing: bool = False,
    ) -> WeightUpdate:
        """New weights for every engine that is there; the others catch up before they get requests again.

        version: of the new weights, by default the one after the fleet's. pause: how the engines are paused
        during the commit, None: not at all. all_or_nothing: given up, with nothing changed, when an engine is
        down or fails before the commit; what fails in the commit itself cannot be undone.
        Raises ControlFailed when it was given up, when no engine has the new weights, or when, with
        all_or_nothing, one has not; ConfigError.
        """
        if pause is not None:
            check_mode(pause)
        if self._updating:
            raise ConfigError("a weight update is under way: one at a time")
        self._updating = True
        held = await self._holding.stop() if pause is not None else []
        try:
            await self._readmission.hold()
            await self._prune()
            return await self._update(
                transport, self.fleet.versions.following(version), pause, all_or_nothing
            )
        finally:
            self._holding.hold(held, lambda engine: _call(engine, _resume))  # as all others are by now
            self._updating = False
            self._readmission.release()

    async def step(self, kind: Kind, call: Call, *, all_or_nothing: bool = False) -> Outcomes:
        """One step of a weight update that comes from outside, to all engines; see `penstock.control.steps`.

        all_or_nothing: a step that fails on one engine ends the update, given up where engines can.
        Raises ControlFailed, ConfigError.
        """
        if self._updating:
            raise ConfigError("a weight update is under way: one at a time")
        await self._prune()
        if kind not in ("commit", "label"):
            return await self.steps.take(kind, call, all_or_nothing=all_or_nothing)
        self._updating = True
        try:
            await self._readmission.hold()
            return await self.steps.take(kind, call, all_or_nothing=all_or_nothing)
        finally:
            self._updating = False
            self._readmission.release()

    async def sent(
        self, kind: Kind, path: str, done: Mapping[Engine, Outcome], *, all_or_nothing: bool = False
    ) -> Outcomes:
        """What a step means that was sent to `steps.taking_part()` by other ways. Raises ControlFailed."""
        return await self.steps.sent(kind, path, done, all_or_nothing=all_or_nothing)

    async def _update(
        self, transport: WeightTransport, version: int, pause: PauseMode | None, all_or_nothing: bool
    ) -> WeightUpdate:
        engines, missing = [], {}
        for engine in self._all():
            if engine.endpoint.health.state is State.DOWN:
                missing[engine.name] = Outcome(error=_why_down(engine.endpoint), phase="prepare")
            else:
                engines.append(engine)
        if not engines or (all_or_nothing and missing):
            raise ControlFailed(f"version {version} was not begun: {failures(missing)}", missing)
        transaction = Transaction(self.fleet, engines, transport, version, pause)
        transaction.outcomes.update(missing)
        try:
            await transaction.run(all_or_nothing=all_or_nothing)
        finally:
            if self.fleet.policy_version == version:
                self._readmission.last = transport
        outcomes = transaction.outcomes
        if self.fleet.policy_version != version:
            raise ControlFailed(
                f"no engine has the weights of version {version}: {failures(outcomes)}", outcomes
            )
        if all_or_nothing and not all(one.ok for one in outcomes.values()):
            raise ControlFailed(
                f"the fleet is at version {version}, which cannot be undone, without {failures(outcomes)}",
                outcomes,
            )
        return WeightUpdate(version, outcomes, transaction.seconds, transaction.checksums)

    # -- inside -----------------------------------------------------------------------------------

    def _all(self) -> list[Engine]:
        self.fleet.check_open()
        if self._task is None:
            raise ConfigError("the control plane is not open: use it inside `async with`")
        return [self._engine(endpoint) for endpoint in self.fleet.endpoints]

    def _engine(self, endpoint: Endpoint) -> Engine:
        engine = self._engines.get(endpoint)
        if engine is None:
            engine = Engine(self.fleet, endpoint, self._timeout, self._update_timeout)
            self._engines[endpoint] = engine
        return engine

    def _returned(self, endpoint: Endpoint) -> None:
        engine = self._engines.get(endpoint)
        if engine is not None:
            engine.forget()

    async def _everywhere(self, what: str, asks: Asks, undo: Asks | None, all_or_nothing: bool) -> Outcomes:
        if undo is not None:
            await self._holding.stop()
        return await self._judge(what, await self._ask_all(asks), asks, undo, all_or_nothing)

    async def _prune(self) -> None:
        """Lets go of endpoints that have left."""
        for endpoint in [endpoint for endpoint in self._engines if endpoint.draining]:
            await self._engines.pop(endpoint).close()

    async def _ask_all(self, asks: Asks) -> dict[Engine, Outcome]:
        await self._prune()
        return await together({engine: _call(engine, asks) for engine in self._all()})

    async def _judge(
        self, what: str, done: Mapping[Engine, Outcome], asks: Asks, undo: Asks | None, all_or_nothing: bool
    ) -> Outcomes:
        """The outcomes; or everything is brought back, and ControlFailed says so."""
        outcomes = {engine.name: one for engine, one in done.items()}
        failed = [engine for engine, one in done.items() if not one.ok]
        if undo is None:
            if failed and all_or_nothing:
                message = f"{what}: {failures(outcomes)}; it cannot be undone on the others"
                raise ControlFailed(message, outcomes)
            return outcomes
        if not failed or not all_or_nothing:
            self._holding.release(engine for engine, one in done.items() if one.ok)
            stuck = [engine for engine in failed if engine in self._holding or _is_stuck(what, done[engine])]
            self._holding.hold(stuck, lambda engine: _call(engine, asks))
            return outcomes
        message = f"{what}: {failures(outcomes)}"
        touched = [engine for engine, one in done.items() if one.ok or not _untouched(one.error)]
        touched += [engine for engine in failed if engine in self._holding and engine not in touched]
        undone = await together({engine: _call(engine, undo) for engine in touched})
        left = [engine for engine, one in undone.items() if not one.ok]
        self._holding.release(engine for engine, one in undone.items() if one.ok)
        self._holding.hold(left, lambda engine: _call(engine, undo))
        if left:
            told = failures({engine.name: undone[engine] for engine in left})
            message += f"; and it could not be undone on {told}; out of service until it is"
        raise ControlFailed(message, outcomes)


def _call(engine: Engine, asks: Asks) -> Any:
    async def call() -> Any:
        return await engine.ask(*asks(engine, await engine.dialect()))

    return outcome(call())


def _is_stuck(what: str, one: Outcome) -> bool:
    """An engine that would hold what it is sent: it has the route, and did not obey."""
    error = one.error
    return what in ("resume", "wake_up") and not (
        error is None or isinstance(error, ConfigError) or lacks_route(error)
    )


def _resume(engine: Engine, dialect: Dialect) -> Sequence[Ask]:
    return dialect.resume()


def _wake_up(engine: Engine, dialect: Dialect) -> Sequence[Ask]:
    return dialect.wake_up((), engine.sleep_level)


def _untouched(error: PenstockError | None) -> bool:
    """The engine has certainly done nothing."""
    return error is not None and (isinstance(error, ConfigError | ConnectFailed) or refused(error))


def _why_down(endpoint: Endpoint) -> PenstockError:
    return endpoint.health.error or FleetDown(f"{endpoint.name} is down")
