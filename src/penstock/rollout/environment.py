"""Rollouts of several turns: an environment that answers the policy, and its answers as tokens.

It guarantees that what the policy has sampled is never tokenized again: behind it come the tokens the chat
template writes between an assistant's turn and the next one, and nothing before them changes. So a template
that rewrites earlier turns (that leaves out their reasoning, say) does not do so here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec

from penstock.client import Client
from penstock.errors import ConfigError
from penstock.prompt import Message, Prompt
from penstock.rollout.score import Score
from penstock.sample import Sample


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """What an environment makes of a turn."""

    observation: Sequence[Message] = ()
    """What the policy is told before its next turn, as chat messages (role `tool`, `user`)."""
    done: bool = False
    reward: Score | float = 0.0
    """Those of all steps are added up, and to that of the reward function."""


class Environment(Protocol):
    """One conversation. Each rollout has an environment of its own."""

    async def reset(self, prompt: Prompt) -> Sequence[Message]:
        """The conversation up to the policy's first turn."""
        ...

    async def step(self, sample: Sample) -> Step:
        """The policy's turn is over. An error fails the rollout, not the run; ConfigError ends the run."""
        ...

    async def close(self) -> None:
        """The rollout is over, failed, or cut off at any moment; called once."""
        ...


MakeEnvironment = Callable[[], Environment]


class SingleTurn:
    """The environment that is none: the prompt, and one turn."""

    async def reset(self, prompt: Prompt) -> Sequence[Message]:
        return prompt.messages

    async def step(self, sample: Sample) -> Step:
        return Step(done=True)

    async def close(self) -> None:
        """There is nothing to close."""


class Renderer:
    """Turns observations into tokens, with the tokenizer and the chat template of the engines.

    The tokens are the difference between two renderings of a small conversation, with and without the
    observation. That of its assistant's turns, x and y, shows where what closes a turn begins.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._before: tuple[int, ...] | None = None
        """Closing of a turn and opening of the next, as far as that is the same without an observation."""
        self._length = 0
        """Of the small conversation up to there."""

    async def observation(self, messages: Sequence[Message], last: int) -> tuple[int, ...]:
        """The tokens to come behind a turn whose last token is `last`, up to where the next one begins.

        Raises ConfigError where the chat template does not allow it, TransportError, ResponseError.
        """
        closing = await self._closing()
        whole = await self._render("x", messages)
        tokens = whole[self._length :]
        if not tokens or tokens[0] != closing[0]:
            raise ConfigError("the chat template renders a turn differently when another one follows it")
        return tokens[1:] if last == closing[0] else tokens

    async def _closing(self) -> tuple[int, ...]:
        if self._before is None:
            x, y = await self._render("x", ()), await self._render("y", ())
            same = 0
            while same < min(len(x), len(y)) and x[-1 - same] == y[-1 - same]:
                same += 1
            if not same or same == len(x):
                raise ConfigError("the chat template does not show where an assistant's turn ends")
            self._before, self._length = x[len(x) - same :], len(x) - same
        return self._before

    async def _render(self, word: str, messages: Sequence[Message]) -> tuple[int, ...]:
        base: list[dict[str, Any]] = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": word},
        ]
        return await self._client.tokenize([*base, *messages])
