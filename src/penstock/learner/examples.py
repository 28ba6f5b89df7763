"""From groups of rollouts to the micro-batches of a step.

It guarantees:
- a rollout whose reward failed is not trained on, and not part of its group's mean;
- micro-batches hold every example once, and no more than the token budget unless one example alone does;
- the same examples give the same micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.errors import ConfigError
from penstock.learner.grpo import Objective, advantages, completion_weights
from penstock.rollout.group import Group, Rollout

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Example:
    """A rollout with what the loss needs."""

    tokens: Ids
    """Prompt and completion up to the last token that is trained on, [tokens]."""
    trained: npt.NDArray[np.bool_]
    """Which of them the loss is about, [tokens]."""
    logp_engine: Floats
    """Of the trained tokens, [trained tokens]."""
    advantage: float
    weight: float
    """Of each trained token in the loss of the step."""


def examples_of(groups: Sequence[Group], objective: Objective) -> list[Example]:
    """The examples of a step, group by group, those without a reward left out.

    The rollouts were sampled at temperature 1: the engines' logprobs are those of the policy itself. Raises
    ConfigError for a rollout that cannot be trained on.
    """
    kept: list[Rollout] = []
    gains: list[float] = []
    for group in groups:
        if group.scored:
            rewards = torch.tensor([group.rewards])
            present = torch.ones_like(rewards, dtype=torch.bool)
            found = advantages(rewards, present, normalise_std=objective.normalise_std)
            gains += found[0].tolist()
            kept += group.scored
    for rollout in kept:
        _check(rollout)
    lengths = torch.tensor([sum(rollout.mask) for rollout in kept])
    weights = completion_weights(lengths, objective.aggregation, objective.max_tokens).tolist()
    return [_example(*parts) for parts in zip(kept, gains, weights, strict=True)]


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


def _example(rollout: Rollout, gain: float, weight: float) -> Example:
    mask = np.array(rollout.mask, dtype=np.bool_)
    trained = np.concatenate((np.zeros(len(rollout.prompt_ids), dtype=np.bool_), mask))
    end = int(trained.nonzero()[0].max(initial=-1)) + 1
    return Example(
        tokens=np.array((*rollout.prompt_ids, *rollout.token_ids)[:end], dtype=np.int64),
        trained=trained[:end],
        logp_engine=np.array(rollout.logprobs, dtype=np.float32)[mask],
        advantage=gain,
        weight=weight,
    )


def micro_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Places of examples that are computed together, each with rows times longest of `budget` at most.

    Examples of like length go together, so that little is padding.
    """
    batches: list[list[int]] = []
    width = 0
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if not batches or (len(batches[-1]) + 1) * width > budget:
            batches.append([])
            width = lengths[place]
        batches[-1].append(place)
    return batches


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Examples side by side, on the learner's device; the flat tensors go row by row."""

    tokens: Tensor
    """int64 [rows, width], padded on the right."""
    trained: Tensor
    """bool [rows, width]."""
    logp_engine: Tensor
    """float32 [trained tokens], as the two below."""
    advantage: Tensor
    weight: Tensor

    @classmethod
    def of(cls, examples: Sequence[Example], device: torch.device) -> MicroBatch:
        width = max(len(one.tokens) for one in examples)
        tokens = np.zeros((len(examples), width), dtype=np.int64)
        trained = np.zeros((len(examples), width), dtype=np.bool_)
        for row, one in enumerate(examples):
            tokens[row, : len(one.tokens)] = one.tokens
            trained[row, : len(one.trained)] = one.trained
        counts = torch.tensor([len(one.logp_engine) for one in examples])
        flat = {
            "logp_engine": torch.from_numpy(np.concatenate([one.logp_engine for one in examples])),
            "advantage": torch.tensor([one.advantage for one in examples]).repeat_interleave(counts),
            "weight": torch.tensor([one.weight for one in examples]).repeat_interleave(counts),
        }
        return cls(
            torch.from_numpy(tokens).to(device),
            torch.from_numpy(trained).to(device),
            **{name: tensor.to(device) for name, tensor in flat.items()},
        )
