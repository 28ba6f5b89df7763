"""What is asked: the same numbered requests for every layer, every process and every run with the same seed.

A request is a function of its number. A group is n requests in a row with one prompt. Synthetic prompts carry
the number of their group behind the shared prefix, so that no two groups are equal and an engine's prefix
cache finds the prefix and nothing else; prompts of a dataset or a trace are sent as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import Any, Final

import msgspec

from penstock.errors import ConfigError
from penstock.loadtest.lengths import Lengths
from penstock.sample import SamplingParams

DISTINCT: Final = 1000
"""Prompts that are made before the clock starts; a longer run goes through them again."""

WORDS: Final = tuple(
    """
    time year people way day man thing woman life child world school state family student group country
    problem hand part place case week company system program question work government number night point
    home water room mother area money story fact month lot right study book eye job word business issue
    side kind head house service friend father power hour game line end member law car city
    """.split()  # noqa: SIM905 - a list of seventy literals is no easier to read
)
"""Short common words: about one token each with the tokenizers of today."""


class Item(msgspec.Struct, frozen=True):
    """One prompt."""

    messages: tuple[dict[str, Any], ...]
    """As they are sent, but for `tail`."""
    max_tokens: int | None = None
    """Tokens asked for; None: the server decides."""
    tail: str | None = None
    """Synthetic: the group's number and this follow the last message's content."""


class Workload(msgspec.Struct, frozen=True):
    """Numbered requests. Raises ConfigError when there are no prompts."""

    items: Sequence[Item]
    group: int = 1
    """Requests in a row that share a prompt."""
    times: tuple[float, ...] = ()
    """A recorded trace's send times, seconds after its first."""
    ignore_eos: bool = False
    """Have the engine generate all tokens asked for."""
    temperature: float | None = None

    def __post_init__(self) -> None:
        if not self.items:
            raise ConfigError("there is nothing to ask: the workload holds no prompt")
        if self.group < 1:
            raise ConfigError(f"a group has at least 1 request, not {self.group}")

    def messages(self, number: int) -> list[dict[str, Any]]:
        """The conversation of a request."""
        group = number // self.group
        item = self.items[group % len(self.items)]
        if item.tail is None:
            return list(item.messages)
        last = item.messages[-1]
        return [*item.messages[:-1], {**last, "content": f"{last['content']}{group} {item.tail}"}]

    def prompt(self, number: int) -> str:
        """The same as one text, for servers that are asked for completions: the contents of the messages."""
        contents = [message["content"] for message in self.messages(number)]
        return "\n\n".join(content for content in contents if isinstance(content, str))

    def params(self, number: int) -> SamplingParams:
        """The sampling parameters of a request."""
        item = self.items[number // self.group % len(self.items)]
        return SamplingParams(
            max_tokens=item.max_tokens,
            ignore_eos=True if self.ignore_eos else None,
            temperature=self.temperature,
        )


def synthetic(
    inputs: Lengths,
    outputs: Lengths,
    *,
    seed: int,
    distinct: int = DISTINCT,
    prefix: int = 0,
    prefixes: int = 1,
) -> list[Item]:
    """Prompts of random words.

    inputs: words in all, the prefix among them; a prompt is never shorter than its prefix and its number.
    outputs: max_tokens. prefix: words that prompts begin with alike. prefixes: how many such beginnings there
    are, dealt out in turn. Raises ConfigError.
    """
    if prefix < 0 or prefixes < 1 or distinct < 1:
        raise ConfigError("a prefix has 0 words or more, and there is at least one prefix and one prompt")
    random = Random(seed)
    beginnings = [words(random, prefix) for _ in range(prefixes)]
    items = []
    for number in range(distinct):
        beginning = beginnings[number % prefixes]
        rest = words(random, max(0, inputs.draw(random) - prefix - 1))
        message = {"role": "user", "content": f"{beginning} " if beginning else ""}
        items.append(Item((message,), outputs.draw(random), rest))
    return items


def words(random: Random, count: int) -> str:
    """So many words."""
    return " ".join(random.choices(WORDS, k=count))


def scaled(times: Sequence[float], speed: float) -> tuple[float, ...]:
    """A trace's times, faster or slower. Raises ConfigError for a speed that is not positive."""
    if not 0 < speed < math.inf:
        raise ConfigError(f"the speed of a replay must be positive, not {speed:g}")
    return tuple([time / speed for time in times])
