"""Generation against training: measured rates, which side waits for the other, and what to change.

Pure equations over what was measured in a span of time:

    generation rate = tokens generated / (seconds - seconds the engines stood idle)
    required rate   = tokens generated / (seconds - seconds the trainer waited for groups)

Both are in tokens per second. The first is what the engines give while they have work; the second is what
they would have to give so that the trainer never waits, tokens of dropped groups included. Their ratio, the
supply, is below 1 where generation is the bottleneck, and `engines / supply` engines would be enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, Literal, Protocol

import msgspec

from penstock.errors import ConfigError

MATTERS: Final = 0.05
"""Share of the time from which on a wait is worth a word."""
UPDATES_MATTER: Final = 0.2
"""The same of the time weight updates take."""
SPARE: Final = 1.1
"""Supply that must be left when an engine is taken away: below it the next measurement would add it again."""
PATIENCE: Final = 2
"""Measurements in a row that must ask for fewer engines before one is taken away."""

Side = Literal["generation", "training", "both", "none"]


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What happened in a span of time."""

    seconds: float
    generated: int
    """Tokens sampled."""
    trained: int
    """Tokens handed to the trainer."""
    batches: int
    trainer_waited: float
    """Seconds."""
    engines_idle: float
    """Seconds, weighted with the share of the engines' slots that were empty because nothing more might be
    begun before the trainer went on."""
    updating: float
    """Seconds of weight updates."""
    async_steps: int
    engines: int


class Balance(msgspec.Struct, frozen=True, kw_only=True):
    """The two sides of a run."""

    generation_rate: float
    """Tokens per second."""
    required_rate: float
    """Tokens per second."""
    trainer_waits: float
    """Share of the time."""
    engines_wait: float
    """Share of the time."""
    updating: float
    """Share of the time."""
    bottleneck: Side
    advice: str
    """In a sentence."""
    seconds: float
    """Measured over."""
    batches: int
    """Handed to the trainer."""
    engines: int
    in_flight: int = 0
    """Turns asked of the engines."""
    queued: int = 0
    """Of these, waiting for a slot."""
    generating: int = 0
    """Groups that are being generated."""
    ready: int = 0
    """Groups that wait for the trainer."""
    out: int = 0
    """Groups the trainer has, and has not said that they are trained on."""
    staleness: dict[int, int] = {}
    """Tokens handed to the trainer by their age in updates."""

    @property
    def supply(self) -> float:
        """Generation rate over required rate."""
        return self.generation_rate / self.required_rate if self.required_rate else math.inf


def balance(now: Measured) -> Balance:
    """The rates of a span of time, and what they ask for."""
    seconds = max(now.seconds, 1e-9)
    busy_engines = max(seconds - now.engines_idle, 1e-9)
    busy_trainer = max(seconds - now.trainer_waited, 1e-9)
    found = Balance(
        generation_rate=now.generated / busy_engines,
        required_rate=now.generated / busy_trainer,
        trainer_waits=now.trainer_waited / seconds,
        engines_wait=now.engines_idle / seconds,
        updating=now.updating / seconds,
        bottleneck="none",
        advice="",
        seconds=now.seconds,
        batches=now.batches,
        engines=now.engines,
    )
    if not now.batches or not now.generated:
        return msgspec.structs.replace(found, advice="Nothing has been trained on yet.")
    side = _bottleneck(found)
    return msgspec.structs.replace(found, bottleneck=side, advice=_advice(found, side, now))


def _bottleneck(found: Balance) -> Side:
    trainer, engines = found.trainer_waits > MATTERS, found.engines_wait > MATTERS
    if trainer and engines:
        return "both"
    if trainer:
        return "generation"
    return "training" if engines else "none"


def _advice(found: Balance, side: Side, now: Measured) -> str:
    waits, idle = f"{found.trainer_waits:.0%}", f"{found.engines_wait:.0%}"
    if found.updating > UPDATES_MATTER:
        return (
            f"Weight updates take {found.updating:.0%} of the time: a larger batch needs fewer of them, "
            "and in_flight='keep' shorter ones."
        )
    if side == "both":
        if now.async_steps == 0:
            return (
                f"Trainer and engines take turns ({waits} and {idle} of the time waiting): "
                "async_steps=1 lets them work at the same time."
            )
        slower = "engines" if found.supply < 1 else "training"
        return (
            f"Both sides wait ({waits} and {idle} of the time), for groups end unevenly: raise async_steps "
            f"(now {now.async_steps}) or the batch; the slower side is {slower}."
        )
    if side == "generation":
        return (
            f"Generation is the bottleneck: the trainer waits {waits} of the time; add engines: "
            f"{enough(found)} in place of {now.engines} would keep up."
        )
    if side == "training":
        fewer = enough(found)
        change = f"{fewer} engines in place of {now.engines} would do" if fewer < now.engines else ""
        lower = "lower async_steps for fresher samples" if now.async_steps > 1 else ""
        ways = ", or ".join(filter(None, (change, lower, "give the trainer more of the machine")))
        return f"Training is the bottleneck: the engines stand idle {idle} of the time; {ways}."
    return "Generation and training are in balance."


def enough(found: Balance) -> int:
    """Engines that would just keep the trainer busy."""
    if not math.isfinite(found.supply) or found.supply <= 0:
        return max(1, found.engines)
    return max(1, math.ceil(found.engines / found.supply - 1e-9))


class Engines(Protocol):
    """Engines that can be made more or fewer, each a member of the fleet while it serves."""

    @property
    def count(self) -> int:
        """Of those that serve."""
        ...

    async def scale(self, count: int) -> None:
        """From now on there are to be so many; returns when they serve, and the others are gone.

        Raises PenstockError.
        """
        ...


class Elastic(msgspec.Struct, frozen=True, kw_only=True):
    """How engines are added and removed by themselves."""

    engines: Engines
    least: int = 1
    most: int = 8
    every: float = 60.0
    """Seconds between two decisions, each of which looks at what was measured since the last; more where
    the trainer got no batch in them."""

    def check(self) -> None:
        """Raises ConfigError."""
        if not 1 <= self.least <= self.most:
            raise ConfigError(f"least and most engines are {self.least} and {self.most}: they cannot be")
        if not self.every > 0:
            raise ConfigError("engines are added and removed every so many seconds, more than 0")


def engines_wanted(found: Balance, rule: Elastic) -> int:
    """Engines there should be from now on. Adds as many as the rates ask for, removes one at a time."""
    wanted = found.engines
    if found.bottleneck == "generation":
        wanted = max(found.engines + 1, enough(found))
    elif found.bottleneck == "training" and found.supply * (found.engines - 1) >= SPARE * found.engines:
        wanted = found.engines - 1
    return min(max(wanted, rule.least), rule.most)


class Scaler:
    """Decides from one measurement to the next; pure.

    Engines are added at once, and taken away only after PATIENCE measurements that ask for it in a row, so
    that one slow batch does not start an engine which the next stops. None of them may reach back before the
    last change.
    """

    def __init__(self, rule: Elastic) -> None:
        self._rule = rule
        self._fewer = 0
        """Measurements in a row that asked for fewer."""

    def wanted(self, found: Balance) -> int:
        """Engines there should be from now on."""
        wanted = engines_wanted(found, self._rule)
        self._fewer = self._fewer + 1 if wanted < found.engines else 0
        if self._fewer and self._fewer < PATIENCE and found.engines <= self._rule.most:
            return found.engines
        self._fewer = 0
        return wanted


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """Totals of a `Meter` at a moment."""

    at: float
    generated: int
    trained: int
    batches: int
    trainer_waited: float
    engines_idle: float
    updating: float

    def since(self, earlier: Reading, *, async_steps: int, engines: int) -> Measured:
        """What happened between two readings."""
        return Measured(
            seconds=self.at - earlier.at,
            generated=self.generated - earlier.generated,
            trained=self.trained - earlier.trained,
            batches=self.batches - earlier.batches,
            trainer_waited=self.trainer_waited - earlier.trainer_waited,
            engines_idle=self.engines_idle - earlier.engines_idle,
            updating=self.updating - earlier.updating,
            async_steps=async_steps,
            engines=engines,
        )


class Meter:
    """Measures between two calls of `since`; `tick` is called whenever something has changed."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last = clock()
        self._idle = 0.0
        self.empty = 0.0
        """Share of the slots that are empty because nothing more may be begun."""
        self.generated = 0
        self.trained = 0
        self.batches = 0

    def tick(self, empty: float) -> None:
        """From now on this share of the slots is empty."""
        now = self._clock()
        self._idle += self.empty * (now - self._last)
        self._last, self.empty = now, empty

    def reading(self, *, trainer_waited: float, updating: float) -> Reading:
        """Totals so far; in seconds what the trainer has waited for groups, and for weight updates."""
        self.tick(self.empty)
        return Reading(
            at=self._last,
            generated=self.generated,
            trained=self.trained,
            batches=self.batches,
            trainer_waited=trainer_waited,
            engines_idle=self._idle,
            updating=updating,
        )
