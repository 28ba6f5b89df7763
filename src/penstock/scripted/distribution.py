"""Distributions of latencies and lengths, written in one word on the command line.

    10ms                          always the same
    uniform:low=5ms,high=15ms
    exponential:mean=200ms
    normal:mean=200ms,std=20ms    cut at zero
    lognormal:mean=200,sigma=0.8  mean is that of the values, sigma that of their logarithms

A time needs a unit (us, ms, s, min), a length is a plain number. A sample is never negative. Parsing is pure;
the randomness is handed in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from random import Random
from typing import Final

from penstock.errors import ConfigError

UNITS: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}
"""Seconds of each unit of time."""

_NUMBER: Final = re.compile(r"(\d+(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+)([a-z]*)")

Sampler = Callable[[Random], float]


def seconds(text: str) -> float:
    """A time such as `10ms`, in seconds. Raises ConfigError."""
    match = _NUMBER.fullmatch(text)
    if match is not None and match[2] in UNITS:
        return float(match[1]) * UNITS[match[2]]
    if match is not None and not match[2] and float(match[1]) == 0.0:
        return 0.0
    raise ConfigError(f"{text!r} is no time: give a number with us, ms, s or min behind it, such as 10ms")


def number(text: str) -> float:
    """A plain number that is not negative. Raises ConfigError."""
    match = _NUMBER.fullmatch(text)
    if match is None or match[2] or not math.isfinite(value := float(match[1])):
        raise ConfigError(f"{text!r} is not a number from 0 on")
    return value


class Distribution:
    """A parsed distribution. mean: of its values; for a normal one before the cut at zero."""

    __slots__ = ("mean", "sample", "text")

    def __init__(self, text: str, mean: float, sample: Sampler) -> None:
        self.text = text
        self.mean = mean
        self.sample = sample

    def __repr__(self) -> str:
        return f"<Distribution {self.text}>"

    @classmethod
    def of_seconds(cls, text: str) -> Distribution:
        """Of a time. Raises ConfigError, which says how it is written."""
        return _parse(text, seconds)

    @classmethod
    def of_numbers(cls, text: str) -> Distribution:
        """Of a plain number. Raises ConfigError, which says how it is written."""
        return _parse(text, number)


def _fixed(value: float) -> tuple[float, Sampler]:
    return value, lambda random: value


def _uniform(low: float, high: float) -> tuple[float, Sampler]:
    if low > high:
        raise ConfigError("its low is above its high")
    return (low + high) / 2, lambda random: random.uniform(low, high)


def _exponential(mean: float) -> tuple[float, Sampler]:
    return mean, lambda random: -mean * math.log(1.0 - random.random())


def _normal(mean: float, std: float) -> tuple[float, Sampler]:
    return mean, lambda random: max(0.0, random.gauss(mean, std))


def _lognormal(mean: float, sigma: float) -> tuple[float, Sampler]:
    if mean == 0.0:
        raise ConfigError("its mean must be above 0")
    mu = math.log(mean) - sigma * sigma / 2  # the mean of a lognormal is exp(mu + sigma²/2)
    return mean, lambda random: math.exp(random.gauss(mu, sigma))


_KINDS: Final[Mapping[str, tuple[Callable[..., tuple[float, Sampler]], tuple[str, ...]]]] = {
    "fixed": (_fixed, ("value",)),
    "uniform": (_uniform, ("low", "high")),
    "exponential": (_exponential, ("mean",)),
    "normal": (_normal, ("mean", "std")),
    "lognormal": (_lognormal, ("mean", "sigma")),
}


def _parse(text: str, unit: Callable[[str], float]) -> Distribution:
    kind, colon, rest = text.partition(":")
    if not colon:
        return Distribution(text, *_fixed(unit(text)))
    if kind not in _KINDS:
        raise ConfigError(f"there is no distribution {kind!r}: {', '.join(_KINDS)} are known")
    make, names = _KINDS[kind]
    given = dict(part.partition("=")[::2] for part in rest.split(","))
    if sorted(given) != sorted(names) or len(rest.split(",")) != len(names):
        shape = ",".join(f"{name}=…" for name in names)
        raise ConfigError(f"{text!r} must be written as {kind}:{shape}")
    try:
        values = {name: number(value) if name == "sigma" else unit(value) for name, value in given.items()}
        return Distribution(text, *make(**values))
    except ConfigError as error:
        raise ConfigError(f"{text!r}: {error}") from None
