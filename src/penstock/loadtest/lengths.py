"""Lengths of prompts and outputs, drawn from a distribution that is written in one word.

    128                 always so many
    uniform:64:256      any from the first to the last
    normal:128:32       mean and standard deviation
    lognormal:256:1.2   median and sigma: the long tail of reasoning traces

A further `:MAX` bounds what is drawn; nothing is ever less than 1.
"""

from __future__ import annotations

import math
from random import Random
from typing import Final

import msgspec

from penstock.errors import ConfigError

LONGEST: Final = 1_000_000
"""Tokens; the bound of a distribution that is given none."""

FORMS: Final = {
    "uniform": "uniform:LOW:HIGH",
    "normal": "normal:MEAN:DEVIATION",
    "lognormal": "lognormal:MEDIAN:SIGMA",
}


class Lengths(msgspec.Struct, frozen=True):
    """One distribution."""

    kind: str
    first: float
    second: float = 0.0
    longest: int = LONGEST

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """Raises ConfigError, with the form that was expected."""
        kind, *words = text.split(":")
        try:
            numbers = [float(word) for word in words] if kind in FORMS else [float(text)]
        except ValueError:
            numbers = []
        if kind not in FORMS:
            if not numbers or not _is_count(numbers[0]):
                forms = ", ".join(FORMS.values())
                raise ConfigError(f"{text!r} is no length: write a whole number, or one of {forms}")
            return cls("constant", numbers[0])
        if len(numbers) not in (2, 3) or not all(map(math.isfinite, numbers)):
            raise ConfigError(
                f"{text!r} is no length: write it as {FORMS[kind]}, with :MAX behind it if wanted"
            )
        first, second = numbers[:2]
        longest = numbers[2] if len(numbers) == 3 else LONGEST
        if not (_is_count(longest) and first >= 1 and second >= 0):
            raise ConfigError(f"{text!r}: lengths are from 1 to {LONGEST:,}, a spread is not negative")
        if kind == "uniform" and second < first:
            raise ConfigError(f"{text!r}: {second:g} is less than {first:g}")
        return cls(kind, first, second, int(longest))

    def draw(self, random: Random) -> int:
        """A length, from 1 to `longest`."""
        match self.kind:
            case "uniform":
                drawn = random.uniform(self.first - 0.5, self.second + 0.5)
            case "normal":
                drawn = random.gauss(self.first, self.second)
            case "lognormal":
                drawn = self.first * math.exp(min(self.second * random.gauss(0, 1), 50.0))
            case _:
                drawn = self.first
        return max(1, min(round(drawn), self.longest))


def _is_count(value: float) -> bool:
    return 1 <= value <= LONGEST and value == int(value)
