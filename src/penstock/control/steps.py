"""A weight update whose steps come from outside, one call after the other: a trainer speaks to a fleet as it
would to one engine.

It guarantees:
- a step goes to all engines at once; one that failed in it gets no later step of the same update;
- from the start of the last step until it has confirmed, an engine gets no requests; one whose answer was not
  clear, or that has other weights than the rest, is left out until an update succeeds on it;
- the first engine that confirms moves the fleet to the new version, and what brought engines to the version
  before is forgotten: it would bring them back there.

The steps are those of vLLM (start, update, finish) and of SGLang (update in place, with a version or not).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

import msgspec
import orjson

from penstock.control.dialect import Ask
from penstock.control.engine import Engine, Outcome, lacks_route, outcome, refused
from penstock.control.update import failures, together
from penstock.errors import ConfigError, ConnectFailed, ControlFailed, EngineError, PenstockError
from penstock.fleet.endpoint import Endpoint
from penstock.fleet.fleet import Fleet

Kind = Literal["join", "begin", "transfer", "place", "commit", "label", "abort"]
"""join: a group with the trainer's ranks. begin, transfer, commit, abort: as vLLM updates. place: weights are
replaced by the call itself, as SGLang does. label: a version for the weights that are there."""
JSON: Final = "application/json"
ABORT: Final = Ask("/abort_weight_update")
"""The embedded engine's; vLLM and SGLang cannot give an update up."""


class Call(msgspec.Struct, frozen=True):
    """One step, as it came."""

    path: str
    """With its query."""
    body: bytes = b""
    content_type: str = JSON


class Steps:
    """The steps of one fleet's updates. `engines`: those in use. `forget`: called when what brought engines
    to the version before is of no use any longer."""

    def __init__(self, fleet: Fleet, engines: Callable[[], list[Engine]], forget: Callable[[], None]) -> None:
        self._fleet = fleet
        self._engines = engines
        self._forget = forget
        self._failed: dict[Endpoint, str] = {}
        """Where a step of the update under way failed: which."""
        self._begun_at: int | None = None
        """The fleet's version when the update under way began; None: none is."""

    async def take(self, kind: Kind, call: Call, *, all_or_nothing: bool) -> dict[str, Outcome]:
        """One step. Raises ControlFailed, ConfigError for a version that cannot be."""
        if kind in ("commit", "label"):
            return await self._commit(kind, call, all_or_nothing)
        if kind in ("begin", "abort"):
            self._failed.clear()
        self._begun_at = {"begin": self._fleet.policy_version, "abort": None}.get(kind, self._begun_at)
        if kind == "join":
            bodies = await self._bodies(call, self._engines())
        else:
            bodies = dict.fromkeys(self.taking_part(), call.body)
        done = await together(
            {
                engine: outcome(engine.send(call.path, body, call.content_type))
                for engine, body in bodies.items()
            }
        )
        return await self.sent(kind, call.path, done, all_or_nothing=all_or_nothing)

    async def sent(
        self, kind: Kind, path: str, done: Mapping[Engine, Outcome], *, all_or_nothing: bool
    ) -> dict[str, Outcome]:
        """A step has been sent, by whatever way: what that means. Raises ControlFailed."""
        if kind in ("transfer", "place"):
            await self._transferred(kind, path, done)
        elif kind == "begin":
            self._note(path, done)
        outcomes = {**self._left_out(), **{engine.name: one for engine, one in done.items()}}
        if all_or_nothing and not _all_ok(outcomes):
            raise ControlFailed(await self._given_up(path, outcomes), outcomes)
        return outcomes

    def taking_part(self) -> list[Engine]:
        """The engines that get the next step."""
        return [engine for engine in self._engines() if engine.endpoint not in self._failed]

    # -- inside -----------------------------------------------------------------------------------

    async def _transferred(self, kind: Kind, path: str, done: Mapping[Engine, Outcome]) -> None:
        """Weights have been sent: who may be used now."""
        versions, before = self._fleet.versions, self._fleet.policy_version
        self._note(path, done)
        some = any(one.ok for one in done.values())
        for engine, one in done.items():
            clear = one.error is not None and (isinstance(one.error, ConnectFailed) or refused(one.error))
            if not one.ok and (not clear or (some and kind == "place")):
                versions.spoil(engine.endpoint)
        if kind == "place":
            took = [engine for engine, one in done.items() if one.ok]
            said = await together({engine: outcome(engine.weight_version()) for engine in took})
            for engine, one in said.items():
                if one.value is not None and one.value > before:
                    self._committed(engine, one.value)
                elif before == versions.fleet == 0 and len(took) == len(self._engines()):
                    versions.committed(engine.endpoint, 0)  # nobody counts: same calls, same weights
        self._fleet.show_versions()

    def _left_out(self) -> dict[str, Outcome]:
        """The engines that get no further step, with the reason."""
        return {
            endpoint.name: Outcome(error=EngineError(f"it failed in {path} and got no further step"))
            for endpoint, path in self._failed.items()
            if not endpoint.draining
        }

    def _note(self, path: str, done: Mapping[Engine, Outcome]) -> None:
        if self._begun_at is not None:
            step = path.partition("?")[0]
            self._failed.update({engine.endpoint: step for engine, one in done.items() if not one.ok})

    async def _commit(self, kind: Kind, call: Call, all_or_nothing: bool) -> dict[str, Outcome]:
        """The step after which engines have the new weights, or new ones have a version."""
        fleet = self._fleet
        given = _version_of(call)
        moved = self._begun_at is not None and fleet.policy_version > self._begun_at
        if kind == "commit" and given is None and moved:
            given = fleet.policy_version  # the weights came with it
        version = fleet.policy_version + 1 if given is None else given
        if version < fleet.policy_version:
            raise ConfigError(
                f"the fleet is at version {fleet.policy_version}: {version} does not come after it"
            )
        engines = self.taking_part()
        if kind == "label" or version == fleet.policy_version:
            engines = [engine for engine in engines if fleet.versions.admits(engine.endpoint)]
        missing = {engine.name: _behind(engine) for engine in self._engines() if engine not in engines}
        missing |= self._left_out()
        if not engines or (all_or_nothing and missing):
            message = await self._given_up(call.path, missing) if missing else "there is no engine"
            raise ControlFailed(message, missing)
        for engine in engines:
            fleet.versions.commit(engine.endpoint)
        fleet.show_versions()
        labels = kind == "commit" and given is None
        done = await together(
            {engine: outcome(self._commit_one(engine, call, version, labels)) for engine in engines}
        )
        self._failed.clear()
        self._begun_at = None
        outcomes = {**missing, **{engine.name: one for engine, one in done.items()}}
        if all_or_nothing and not _all_ok(outcomes):
            raise ControlFailed(
                f"the fleet is at version {fleet.policy_version}, which cannot be undone, without "
                f"{failures(outcomes)}",
                outcomes,
            )
        return outcomes

    async def _commit_one(self, engine: Engine, call: Call, version: int, labels: bool) -> Any:
        versions = self._fleet.versions
        try:
            value = await engine.send(call.path, call.body, call.content_type)
            if labels:
                await _label(engine, version)
        except BaseException as error:
            kept = isinstance(error, ConnectFailed) or refused(error)
            (versions.kept if kept else versions.spoil)(engine.endpoint)
            raise
        else:
            self._committed(engine, version)
            return value
        finally:
            self._fleet.show_versions()

    def _committed(self, engine: Engine, version: int) -> None:
        if version > self._fleet.policy_version:
            self._forget()
        self._fleet.versions.committed(engine.endpoint, max(version, self._fleet.policy_version))

    async def _given_up(self, path: str, outcomes: Mapping[str, Outcome]) -> str:
        """Gives the update under way up on every engine that can, and says what came of it."""
        message = f"{path.partition('?')[0]}: {failures(outcomes)}"
        if self._begun_at is None:
            return f"{message}; it cannot be undone on the others"
        undone = await together({engine: outcome(engine.ask(ABORT)) for engine in self._engines()})
        self._failed.clear()
        self._begun_at = None
        left = {engine.name: one for engine, one in undone.items() if not one.ok}
        if not left:
            return f"{message}; the update was given up, every engine keeps the weights it had"
        return f"{message}; the update was given up, which could not be undone on {failures(left)}"

    async def _bodies(self, call: Call, engines: list[Engine]) -> dict[Engine, bytes]:
        """The call for each engine: a rank_offset is that of the first, and each next one's comes after the
        ranks of those before it. Raises ControlFailed when an engine does not say how many it has."""
        fields, holder = _ranked(call.body)
        if holder is None or len(engines) < 2:
            return dict.fromkeys(engines, call.body)
        sizes = await together({engine: outcome(engine.world_size()) for engine in engines})
        if not all(one.ok for one in sizes.values()):
            outcomes = {engine.name: one for engine, one in sizes.items()}
            raise ControlFailed(f"the ranks could not be given out: {failures(outcomes)}", outcomes)
        bodies = {}
        for engine in engines:
            bodies[engine] = orjson.dumps(fields)
            holder["rank_offset"] += sizes[engine].value
        return bodies


def _ranked(body: bytes) -> tuple[Any, dict[str, Any] | None]:
    """The JSON of a body, and the object in it that holds a rank_offset: SGLang's whole, vLLM's init_info."""
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None, None
    places = (fields, fields.get("init_info")) if isinstance(fields, dict) else ()
    for holder in places:
        if isinstance(holder, dict) and type(holder.get("rank_offset")) is int:
            return fields, holder
    return fields, None


def _version_of(call: Call) -> int | None:
    """The version a step gives the weights. Raises ConfigError unless it is one."""
    try:
        fields = orjson.loads(call.body or b"{}")
    except orjson.JSONDecodeError:
        raise ConfigError(f"the body of {call.path} is not JSON") from None
    given = None
    if isinstance(fields, dict):
        given = fields.get("weight_version") or fields.get("new_version")
    if given is None:
        return None
    try:
        version = int(given)
    except (TypeError, ValueError):
        version = -1
    if version < 0:
        raise ConfigError(f"the version of weights must be a whole number from 0 on, not {given!r}")
    return version


async def _label(engine: Engine, version: int) -> None:
    """Has an engine that took its weights without a version say that it is at this one."""
    try:
        await engine.ask(Ask("/update_weight_version", {"new_version": str(version)}))
    except PenstockError as error:
        if not lacks_route(error):
            raise EngineError(f"{engine.name} has new weights, but their version: {error}") from error


def _behind(engine: Engine) -> Outcome:
    error = engine.endpoint.behind or EngineError("it does not have the weights of the fleet's version")
    return Outcome(error=error)


def _all_ok(outcomes: Mapping[str, Outcome]) -> bool:
    return all(one.ok for one in outcomes.values())
