"""GRPO and its descendants: from rewards to a loss, as pure functions over tensors.

A group is the n completions of one prompt. Everything behind the advantages is flat: one number for each
token that is trained on, of all completions one after the other, so there is no padding to mask out. Symbols:

    π     the policy being trained, with gradients       logp
    π_old the policy at the start of the step            logp_old
    μ     the engine that sampled, maybe versions ago    logp_engine
    π_ref the policy training began with                 logp_reference

Sources:
- GRPO, and its KL term: Shao et al., DeepSeekMath, 2024, arXiv:2402.03300, section 4.1
- no division by the standard deviation, one constant for all lengths: Liu et al., Understanding R1-Zero-Like
  Training (Dr. GRPO), 2025, arXiv:2503.20783, section 3.2
- asymmetric clip, token-level loss: Yu et al., DAPO, 2025, arXiv:2503.14476, sections 3.1 and 3.3
- steps that are checked one by one: DeepSeekMath, section 4.1.3
- the mean over those that are right: Tajwar et al., Maximum Likelihood Reinforcement Learning (MaxRL), 2026,
  arXiv:2602.02710, theorem 2
- truncated importance sampling between engine and trainer: Yao et al., Your Efficient RL Framework Secretly
  Brings You Off-Policy RL Training, 2025
- clipped ratio: Schulman et al., Proximal Policy Optimization, 2017, arXiv:1707.06347, equation 7
- the estimate of the KL divergence: Schulman, Approximating KL Divergence, 2020, its k3
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from penstock.errors import ConfigError

Aggregation = Literal["token", "sequence", "constant"]

STD_FLOOR: Final = 1e-6
"""Added to a group's standard deviation, in units of reward."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Which loss. The defaults are DAPO's, without the standard deviation. Raises ConfigError."""

    normalise_std: bool = False
    """Divide advantages by the standard deviation of their group (GRPO), or do not (Dr. GRPO)."""
    clip_low: float = 0.2
    """A token whose advantage is negative is not pushed on once its ratio is below 1 - this."""
    clip_high: float = 0.28
    """A token whose advantage is positive is not pushed on once its ratio is above 1 + this."""
    aggregation: Aggregation = "token"
    """token: every token of the step weighs the same (DAPO); sequence: every completion does (GRPO);
    constant: as token, divided by completions times `max_tokens` instead of by the tokens there are
    (Dr. GRPO)."""
    max_tokens: int | None = None
    """Of a completion; for `constant` only."""
    importance_cap: float | None = 2.0
    """Weights π_old / μ of tokens are cut off here; the clip is then about π_old. None: no weights, and the
    clip is about μ itself."""
    kl: float = 0.0
    """How much the KL divergence from the reference counts. 0: there is no reference."""

    def __post_init__(self) -> None:
        for name, fits, range_ in (
            ("clip_low", 0.0 < self.clip_low <= 1.0, "in (0, 1]"),
            ("clip_high", 0.0 < self.clip_high < float("inf"), "above 0"),
            ("importance_cap", self.importance_cap is None or self.importance_cap > 0.0, "above 0, or None"),
            ("kl", 0.0 <= self.kl < float("inf"), "0 or more"),
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1"),
        ):
            if not fits:
                raise ConfigError(f"{name} must be {range_}, not {getattr(self, name)}.")
        if (self.aggregation == "constant") != (self.max_tokens is not None):
            raise ConfigError("aggregation 'constant' needs max_tokens, and no other has a use for it.")


def advantages(rewards: Tensor, present: Tensor, *, normalise_std: bool) -> Tensor:
    """How much better each completion is than its group: A = r - mean(r), or that over std(r).

    rewards: float [groups, n]. present: bool [groups, n]; where False there is no reward, the others are the
    group, and the advantage is 0. It is 0, too, in a group whose rewards are all alike. The standard
    deviation is of a sample (n - 1). Returns [groups, n].
    """
    rewards = torch.where(present, rewards, 0.0)
    count = present.sum(1, keepdim=True)
    apart = torch.where(present, rewards - rewards.sum(1, keepdim=True) / count.clamp(min=1), 0.0)
    highest = torch.where(present, rewards, -torch.inf).amax(1, keepdim=True)
    lowest = torch.where(present, rewards, torch.inf).amin(1, keepdim=True)
    apart = torch.where(highest > lowest, apart, 0.0)
    if not normalise_std:
        return apart
    std = (apart.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return apart / (std + STD_FLOOR)


def step_advantages(right: Tensor) -> Tensor:
    """Advantages of the steps of solutions, each of which was found right or wrong: n / k for a right one.

    k is how many of the n completions have the step right. A wrong one has 0, and so has what comes behind.
    The mean over completions of A ∇ log π is then, for each step, the mean of ∇ log π over those that have it
    right, which estimates ∇ log P(the step is right | those before it are) without bias up to the k-th
    order. Where all right ones are the same tokens, as in sums on paper, it has no variance at all.

    right: bool [n, steps]. Returns float [n, steps].
    """
    right = right.cumprod(1).float()
    return right * len(right) / right.sum(0).clamp(min=1)


def completion_weights(lengths: Tensor, aggregation: Aggregation, max_tokens: int | None = None) -> Tensor:
    """The weight of each token in the loss, by completion; see `Objective.aggregation`.

    lengths: [completions], the trained tokens of each in the whole step. The sum of the weights over all
    tokens is 1 for `token` and `sequence`, and mean length / max_tokens for `constant`; a completion without
    tokens is none of a `sequence`'s completions. Returns float [completions].
    """
    lengths = lengths.float()
    if aggregation == "token":
        return torch.ones_like(lengths) / lengths.sum().clamp(min=1)
    if aggregation == "sequence":
        return 1 / (lengths.clamp(min=1) * (lengths > 0).sum().clamp(min=1))
    assert max_tokens is not None
    return torch.full_like(lengths, 1 / (max(len(lengths), 1) * max_tokens))


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of a step or of a part of it, flat: each float32 [tokens]."""

    advantage: Tensor
    weight: Tensor
    logp_engine: Tensor
    logp_old: Tensor
    """Equal to `logp_engine` where the objective has no importance weights."""
    logp_reference: Tensor | None
    """None where the objective has no KL term."""


def policy_loss(logp: Tensor, tokens: Tokens, objective: Objective) -> Tensor:
    """What the step minimises, a scalar: Σ weight · (kl · KL - importance · min(ρ A, clip(ρ) A)).

    ρ = π / π_old is clipped to [1 - clip_low, 1 + clip_high]; KL and importance are the functions below.
    logp: [tokens]; gradients flow through it alone. Parts of a step add up to the loss of the step.
    """
    ratio = torch.exp(logp - tokens.logp_old)
    clipped = ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high)
    gain = torch.minimum(ratio * tokens.advantage, clipped * tokens.advantage)
    if objective.importance_cap is not None:
        gain = gain * importance(tokens.logp_old, tokens.logp_engine, objective.importance_cap)
    loss = -gain
    if tokens.logp_reference is not None:
        loss = loss + objective.kl * kl_estimate(logp, tokens.logp_reference)
    return (tokens.weight * loss).sum()


def importance(logp_old: Tensor, logp_engine: Tensor, cap: float) -> Tensor:
    """min(π_old / μ, cap), [tokens]: makes up for tokens that were sampled from another policy than π_old.

    The other policy is an earlier version, or the same one computed by other kernels.
    """
    return torch.exp(logp_old - logp_engine).clamp(max=cap)


def kl_estimate(logp: Tensor, logp_reference: Tensor) -> Tensor:
    """π_ref/π - log(π_ref/π) - 1, [tokens]: never negative; its mean over samples of π is KL(π ‖ π_ref)."""
    difference = logp_reference - logp
    return torch.exp(difference) - difference - 1


def clipped_shares(logp: Tensor, tokens: Tokens, objective: Objective) -> tuple[Tensor, Tensor]:
    """Of which tokens, by weight-free count, the clip has cut the gradient: below and above, as scalars."""
    ratio = torch.exp(logp - tokens.logp_old)
    low = (ratio < 1 - objective.clip_low) & (tokens.advantage < 0)
    high = (ratio > 1 + objective.clip_high) & (tokens.advantage > 0)
    return low.sum(), high.sum()
