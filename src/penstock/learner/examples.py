"""From groups of rollouts to the examples of a step.

It guarantees:
- a rollout whose reward failed is not trained on, and not part of its group's mean;
- a token that cannot change the policy is not trained on, and what comes behind the last one that can is
  not computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from penstock.errors import ConfigError
from penstock.learner.grpo import Objective, advantages, completion_weights
from penstock.rollout.group import Group, Rollout

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

Credit = Callable[[Group], Sequence[Sequence[float]]]
"""Advantages within a group: of each scored rollout, for each of its `token_ids`."""


@dataclass(frozen=True, slots=True)
class Example:
    """A rollout with what the loss needs."""

    group: int
    """Place of its group in the step."""
    tokens: Ids
    """Prompt and completion up to the last token that is trained on, [tokens]."""
    trained: npt.NDArray[np.bool_]
    """Which of them the loss is about, [tokens]."""
    logp_engine: Floats
    """Of the trained tokens, [trained tokens], as the next."""
    advantage: Floats
    weight: float
    """Of each trained token in the loss of the step."""


def examples_of(groups: Sequence[Group], objective: Objective, credit: Credit | None = None) -> list[Example]:
    """The examples of a step, group by group, those without a reward left out.

    credit: None: the reward of a rollout is the credit of all its tokens, see `grpo.advantages`. The rollouts
    were sampled at temperature 1: the engines' logprobs are those of the policy itself. Raises ConfigError
    for a rollout that cannot be trained on.
    """
    kept = [(place, one) for place, group in enumerate(groups) for one in group.scored]
    for _, rollout in kept:
        _check(rollout)
    gains: list[Sequence[float]] = []
    for group in groups:
        if group.scored:
            found = _outcome(group, objective) if credit is None else credit(group)
            _check_credit(group, found)
            gains += found
    lengths = torch.tensor([sum(rollout.mask) for _, rollout in kept])
    weights = completion_weights(lengths, objective.aggregation, objective.max_tokens).tolist()
    return [
        _example(place, rollout, gain, weight, everything=objective.kl > 0)
        for (place, rollout), gain, weight in zip(kept, gains, weights, strict=True)
    ]


def _outcome(group: Group, objective: Objective) -> list[Sequence[float]]:
    rewards = torch.tensor([group.rewards])
    present = torch.ones_like(rewards, dtype=torch.bool)
    found = advantages(rewards, present, normalise_std=objective.normalise_std)[0].tolist()
    return [[gain] * len(one.token_ids) for gain, one in zip(found, group.scored, strict=True)]


def _check_credit(group: Group, found: Sequence[Sequence[float]]) -> None:
    expected = [len(one.token_ids) for one in group.scored]
    if [len(one) for one in found] != expected:
        raise ConfigError(
            f"The credit of a group has advantages for {[len(one) for one in found]} tokens, its scored "
            f"rollouts have {expected}."
        )


def _check(rollout: Rollout) -> None:
    if not rollout.prompt_ids:
        raise ConfigError(
            "A rollout without prompt ids cannot be trained on: its first token has no logprob."
        )
    if not math.isfinite(rollout.reward.value):
        raise ConfigError(
            f"The reward of a rollout is {rollout.reward.value}, and it is not marked as failed."
        )
    if not len(rollout.token_ids) == len(rollout.logprobs) == len(rollout.mask):
        raise ConfigError(
            f"A rollout has {len(rollout.token_ids)} tokens, {len(rollout.logprobs)} logprobs and a mask of "
            f"{len(rollout.mask)}."
        )


def _example(
    place: int, rollout: Rollout, gain: Sequence[float], weight: float, *, everything: bool
) -> Example:
    """everything: also what has no advantage can change the policy."""
    advantage = np.array(gain, dtype=np.float32)
    mask = np.array(rollout.mask, dtype=np.bool_)
    if not everything:
        mask &= advantage != 0
    trained = np.concatenate((np.zeros(len(rollout.prompt_ids), dtype=np.bool_), mask))
    end = int(trained.nonzero()[0].max(initial=-1)) + 1
    return Example(
        group=place,
        tokens=np.array((*rollout.prompt_ids, *rollout.token_ids)[:end], dtype=np.int64),
        trained=trained[:end],
        logp_engine=np.array(rollout.logprobs, dtype=np.float32)[mask],
        advantage=advantage[mask],
        weight=weight,
    )
