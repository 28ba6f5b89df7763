"""A weight update of several engines, as a transaction: prepare, transfer, pause, commit, resume.

It guarantees:
- before `commit` nothing has changed anywhere; an update given up by then is taken back on every engine;
- an engine that fails in one phase takes no part in the next;
- from the start of its commit until it has confirmed, an engine gets no requests; what it did when there was
  no answer is not known, and it stays left out;
- an engine that was paused here is resumed, whatever happened, also when the update is cancelled.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, Literal

import msgspec

from penstock.control.dialect import PauseMode
from penstock.control.engine import Engine, Outcome, outcome, refused
from penstock.control.transport import WeightTransport
from penstock.errors import ConfigError, ConnectFailed, ControlFailed, PhaseTimeout
from penstock.fleet.fleet import Fleet

Phase = Literal["prepare", "transfer", "pause", "commit", "resume"]
PHASES: Final[tuple[Phase, ...]] = ("prepare", "transfer", "pause", "commit", "resume")


class WeightUpdate(msgspec.Struct, frozen=True):
    """What became of an update."""

    version: int
    """The fleet's, from now on."""
    outcomes: dict[str, Outcome]
    """By endpoint. One that failed gets no requests until it has caught up."""
    seconds: dict[Phase, float]
    """Each phase took, on the slowest engine; what was not done is missing."""
    checksums: dict[str, str | None]
    """What each engine that has committed gave as the checksum of its weights; None: it gives none."""


class Transaction:
    """One update of `engines` to `version`. pause: what becomes of requests in flight during the commit;
    None: the engines are not paused."""

    def __init__(
        self,
        fleet: Fleet,
        engines: Sequence[Engine],
        transport: WeightTransport,
        version: int,
        pause: PauseMode | None,
    ) -> None:
        self._fleet = fleet
        self._transport = transport
        self._version = version
        self._pause = pause
        self.taking_part = list(engines)
        self._open: dict[Engine, None] = {}
        """Where the transport has begun and not ended."""
        self._paused: dict[Engine, None] = {}
        """What may be paused."""
        self.outcomes: dict[str, Outcome] = {}
        """Of those that failed or have committed."""
        self.seconds: dict[Phase, float] = {}
        self.checksums: dict[str, str | None] = {}

    async def run(self, *, all_or_nothing: bool) -> None:
        """Raises ControlFailed when it was given up before the commit."""
        try:
            await self._phase("prepare", self._prepare)
            await self._phase("transfer", self._transfer)
            if self._pause is not None:
                await self._phase("pause", self._pause_one)
            if not self.taking_part or (all_or_nothing and self.outcomes):
                raise ControlFailed(self._given_up(), self.outcomes)
            await self._commit()
        finally:
            await self._tidy()

    # -- phases -----------------------------------------------------------------------------------

    async def _phase(self, phase: Phase, work: Callable[[Engine], Awaitable[Any]]) -> None:
        """Does something on every engine that takes part; whoever fails does not any longer."""
        started = time.perf_counter()
        done = await together({engine: _bounded(engine, phase, work) for engine in self.taking_part})
        self.seconds[phase] = time.perf_counter() - started
        for engine, one in done.items():
            if not one.ok:
                self.taking_part.remove(engine)
                self.outcomes[engine.name] = msgspec.structs.replace(one, phase=phase)

    async def _prepare(self, engine: Engine) -> None:
        self._open[engine] = None
        await self._transport.prepare(engine, self._version)

    async def _transfer(self, engine: Engine) -> None:
        await self._transport.transfer(engine, self._version)

    async def _pause_one(self, engine: Engine) -> None:
        assert self._pause is not None
        asks = (await engine.dialect()).pause(self._pause, True)
        self._paused[engine] = None
        await engine.ask(*asks, timeout=engine.update_timeout)

    async def _commit(self) -> None:
        versions, engines = self._fleet.versions, list(self.taking_part)
        for engine in engines:
            versions.commit(engine.endpoint)
            del self._open[engine]
        self._fleet.show_versions()
        await self._phase("commit", self._commit_one)
        for engine in self.taking_part:
            self.outcomes[engine.name] = Outcome(self._version, seconds=sum(self.seconds.values()))

    async def _commit_one(self, engine: Engine) -> None:
        versions = self._fleet.versions
        try:
            self.checksums[engine.name] = await self._transport.commit(engine, self._version)
        except BaseException as error:
            if isinstance(error, ConnectFailed) or refused(error):
                versions.kept(engine.endpoint)
                self._open[engine] = None
            else:
                versions.spoil(engine.endpoint)
            raise
        else:
            versions.committed(engine.endpoint, self._version)
        finally:
            self._fleet.show_versions()

    async def _tidy(self) -> None:
        """Takes back what is not committed, and resumes what was paused."""
        started = time.perf_counter()
        await together({engine: _bounded(engine, "abort", self._transport.abort) for engine in self._open})
        if not self._paused:
            return
        resumed = await together({engine: outcome(resume(engine)) for engine in self._paused})
        self.seconds["resume"] = time.perf_counter() - started
        for engine, one in resumed.items():
            if not one.ok:  # what it is sent would be held
                self._fleet.versions.spoil(engine.endpoint)
                if self.outcomes.get(engine.name, one).ok or engine.name not in self.outcomes:
                    self.outcomes[engine.name] = msgspec.structs.replace(one, phase="resume")
        self._fleet.show_versions()

    def _given_up(self) -> str:
        return (
            f"the update to version {self._version} was given up, every engine keeps the weights it had: "
            f"{failures(self.outcomes)}"
        )


async def resume(engine: Engine) -> None:
    await engine.ask(*(await engine.dialect()).resume())


def _bounded(engine: Engine, what: str, work: Callable[[Engine], Awaitable[Any]]) -> Awaitable[Outcome]:
    """Work of a transport, which may know no bounds of its own."""

    async def bounded() -> None:
        scope = asyncio.timeout(engine.update_timeout)
        try:
            async with scope:
                await work(engine)
        except TimeoutError as error:
            if not scope.expired():
                raise
            message = f"{engine.name} did not end {what!r} within {engine.update_timeout:g} s"
            raise PhaseTimeout(message, "idle") from error

    return outcome(bounded())


async def together(work: Mapping[Engine, Awaitable[Outcome]]) -> dict[Engine, Outcome]:
    """All at once; each result once all have ended."""
    tasks: dict[Engine, asyncio.Task[Outcome]] = {}
    async with asyncio.TaskGroup() as group:
        for engine, one in work.items():
            tasks[engine] = group.create_task(_await(one))
    return {engine: task.result() for engine, task in tasks.items()}


async def _await(work: Awaitable[Outcome]) -> Outcome:
    return await work


def failures(outcomes: Mapping[str, Outcome]) -> str:
    """Who failed, and why, in words."""
    failed = [f"{name}: {one.error}" for name, one in outcomes.items() if not one.ok]
    return "; ".join(failed) or "there is no engine"


def check_mode(mode: PauseMode) -> None:
    """Raises ConfigError."""
    if mode not in ("abort", "wait", "keep"):
        raise ConfigError(f"the pause mode must be 'abort', 'wait' or 'keep', not {mode!r}")
