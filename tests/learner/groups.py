"""Groups of rollouts made by hand or by chance."""

from __future__ import annotations

import random
from collections.abc import Sequence

from penstock.prompt import Prompt
from penstock.rollout.group import Group, Rollout, VersionSpan
from penstock.rollout.score import Score


def rollout(
    token_ids: Sequence[int],
    reward: float | None,
    *,
    prompt_ids: Sequence[int] = (5, 6),
    logprobs: Sequence[float] | None = None,
    mask: Sequence[bool] | None = None,
) -> Rollout:
    """reward None: it failed."""
    return Rollout(
        prompt_ids=tuple(prompt_ids),
        token_ids=tuple(token_ids),
        logprobs=tuple(logprobs if logprobs is not None else [-1.0] * len(token_ids)),
        mask=tuple(mask if mask is not None else [True] * len(token_ids)),
        versions=(VersionSpan(0, len(token_ids)),),
        finish_reason="stop",
        reward=Score.failure("it took too long") if reward is None else Score(reward),
        text="",
    )


def group(*rollouts: Rollout, position: int = 0) -> Group:
    prompt = Prompt(position, str(position), [{"role": "user", "content": "?"}], b"{}")
    return Group(key=prompt.key, position=position, prompt=prompt, rollouts=rollouts)


def random_groups(seed: int, count: int, n: int = 4, vocabulary: int = 200) -> list[Group]:
    """Of prompts and completions of all lengths, with rewards of 0 and 1."""
    draw = random.Random(seed)

    def tokens(most: int) -> list[int]:
        return [draw.randrange(vocabulary) for _ in range(draw.randint(1, most))]

    groups = []
    for position in range(count):
        prompt = tokens(12)
        rollouts = []
        for index in range(n):
            completion = tokens(20)
            rollouts.append(
                rollout(
                    completion,
                    float((index + position) % 3 == 0),
                    prompt_ids=prompt,
                    logprobs=[draw.uniform(-6.0, -4.0) for _ in completion],
                    mask=[draw.random() < 0.9 for _ in completion],
                )
            )
        groups.append(group(*rollouts, position=position))
    return groups
