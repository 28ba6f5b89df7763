"""What goes wrong on purpose: a chaos spec, parsed, and the fault each request draws.

    reset:0.01,stall:0.001,503:0.05:retry_after=2,kill:every=20s

A spec is a list of faults; a fault is its name, the probability that a request meets it, and its settings:

    reset        RST instead of an answer                 reset_mid    RST in the middle of the answer
    stall        silence instead of an answer             stall_mid    silence in the middle of the answer
                 for ever, or with `for=5s` that long, and then the rest
    half         half a body, then an ordinary close      slow         the first token comes `by=2s` later
    400 … 599    that status; `retry_after=2` adds the header, in seconds
    kill         `every=20s` all connections are reset and the port is closed for one second, or `down=3s`;
                 the first time after `every`, or `first=5s`

Each fault draws from randomness of its own, seeded by the engine's seed and its name, or by `seed=7`: to add
a fault changes nothing about when the others strike. Of several the first in the spec counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from random import Random
from typing import Final

from penstock.errors import ConfigError
from penstock.scripted.distribution import number, seconds

FAULTS: Final = ("reset", "reset_mid", "stall", "stall_mid", "half", "slow")
"""Faults of a request, besides statuses."""

IN_THE_MIDDLE: Final = frozenset({"reset_mid", "stall_mid", "half"})
"""Those that strike when a part of the answer has been given."""

DOWN: Final = 1.0
"""Seconds that a killed engine cannot be connected to."""

STATUSES: Final = range(400, 600)


@dataclass(frozen=True)
class Fault:
    """What may befall a request. `name` is that of the spec, a status or one of FAULTS."""

    name: str
    probability: float
    status: int | None = None
    retry_after: float | None = None
    """Seconds, of a status."""
    duration: float | None = None
    """Seconds a stall lasts (None: for ever), or a slow answer is late."""
    seed: int | None = None


@dataclass(frozen=True)
class Kill:
    """The whole engine goes away, again and again. All in seconds."""

    every: float
    down: float = DOWN
    first: float | None = None
    """Until the first time. None: `every`."""


@dataclass(frozen=True)
class Chaos:
    """A parsed spec."""

    faults: tuple[Fault, ...] = ()
    kill: Kill | None = None

    @classmethod
    def parse(cls, spec: str) -> Chaos:
        """Raises ConfigError, which names the part that is wrong."""
        faults: list[Fault] = []
        kill: Kill | None = None
        for item in filter(None, spec.split(",")):
            name, *settings = item.split(":")
            if name in {fault.name for fault in faults} or (name == "kill" and kill is not None):
                raise ConfigError(f"--chaos: {name} is given twice")
            try:
                if name == "kill":
                    kill = _kill(settings)
                else:
                    faults.append(_fault(name, settings))
            except ConfigError as error:
                raise ConfigError(f"--chaos {item!r}: {error}") from None
        return cls(tuple(faults), kill)


class Draws:
    """Draws the fault of each request, in the order they arrive."""

    def __init__(self, faults: Sequence[Fault], seed: int) -> None:
        self._faults = [
            (fault, Random(f"{seed if fault.seed is None else fault.seed}/{fault.name}")) for fault in faults
        ]

    def draw(self) -> Fault | None:
        """The fault of the next request, None for most."""
        struck = None
        for fault, random in self._faults:  # each draws, whatever struck before
            if random.random() < fault.probability and struck is None:
                struck = fault
        return struck


def _fault(name: str, settings: Sequence[str]) -> Fault:
    status = int(name) if name.isascii() and name.isdigit() else None
    if status is None and name not in FAULTS:
        known = [*FAULTS, "kill"]
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"{', '.join(known)} and statuses are known"
        raise ConfigError(f"there is no fault {name!r}; {hint}")
    if status is not None and status not in STATUSES:
        raise ConfigError("a status must be from 400 to 599")
    if not settings or "=" in settings[0]:
        raise ConfigError(f"give its probability first, such as {name}:0.01")
    probability = number(settings[0])
    if probability > 1.0:
        raise ConfigError(f"the probability {settings[0]} is above 1")
    allowed = {"seed"}
    if status is not None:
        allowed.add("retry_after")
    elif name == "slow":
        allowed.add("by")
    elif name.startswith("stall"):
        allowed.add("for")
    given = _named(settings[1:], allowed)
    if name == "slow" and "by" not in given:
        raise ConfigError("say how late, such as slow:0.1:by=2s")
    lasting = given.get("by", given.get("for"))
    wait, seed = given.get("retry_after"), given.get("seed")
    return Fault(
        name,
        probability,
        status,
        None if wait is None else number(wait.removesuffix("s")),
        None if lasting is None else seconds(lasting),
        None if seed is None else int(number(seed)),
    )


def _kill(settings: Sequence[str]) -> Kill:
    given = _named(settings, {"every", "down", "first"})
    if "every" not in given:
        raise ConfigError("say how often, such as kill:every=20s")
    first = seconds(given["first"]) if "first" in given else None
    kill = Kill(seconds(given["every"]), seconds(given["down"]) if "down" in given else DOWN, first)
    if not 0 < kill.down < kill.every:
        raise ConfigError(f"it must be down for less than the {kill.every:g} s from one kill to the next")
    return kill


def _named(settings: Sequence[str], allowed: set[str]) -> dict[str, str]:
    """`name=value` settings. Raises ConfigError for one that is not among `allowed`."""
    given: dict[str, str] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or name not in allowed or name in given:
            raise ConfigError(f"{setting!r} is none of its settings: {', '.join(sorted(allowed))}")
        given[name] = value
    return given
