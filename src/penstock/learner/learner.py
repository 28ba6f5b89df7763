"""The learner: groups of rollouts in, one optimizer step and its figures out.

It guarantees:
- how a step is cut into micro-batches changes nothing but rounding: their gradients add up to the step's;
- `version` counts the steps that changed the weights, and a saved learner goes on as if it had not stopped;
- a step with nothing to learn from changes nothing, and says so.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from penstock.errors import ConfigError
from penstock.learner.examples import Credit, examples_of
from penstock.learner.grpo import Objective, Tokens, clipped_shares, importance, kl_estimate, policy_loss
from penstock.learner.micro_batch import MicroBatch, batches_of
from penstock.learner.policy import Policy
from penstock.rollout.group import Group


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """AdamW and its learning rate. Raises ConfigError."""

    learning_rate: float = 1e-6
    warm_up: int = 0
    """Steps in which the learning rate rises to its value."""
    decay_steps: int | None = None
    """Steps in which it then falls along half a cosine to a tenth of it. None: it stays."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this norm if it is longer."""
    parts: int = 1
    """Optimizer steps the completions of one step are divided into, group by group."""
    micro_batch_tokens: int = 8192
    """Tokens computed at once, padding included."""

    def __post_init__(self) -> None:
        for name, least in (("warm_up", 0), ("parts", 1), ("micro_batch_tokens", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, not {getattr(self, name)}.")
        for name in ("learning_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be above 0, not {getattr(self, name)}.")
        if self.decay_steps is not None and self.decay_steps < 1:
            raise ConfigError(f"decay_steps must be at least 1, not {self.decay_steps}.")

    def rate(self, step: int) -> float:
        """The learning rate of a step, the first being 0."""
        if step < self.warm_up:
            return self.learning_rate * (step + 1) / self.warm_up
        if self.decay_steps is None:
            return self.learning_rate
        done = min((step - self.warm_up) / self.decay_steps, 1.0)
        return self.learning_rate * (0.55 + 0.45 * math.cos(math.pi * done))


@dataclass(frozen=True, slots=True)
class StepFigures:
    """What a step did. Shares and means are over its trained tokens, those that were computed."""

    version: int
    """Of the weights after the step."""
    completions: int
    """With a reward."""
    computed: int
    """Of these, those that can change the policy: an advantage other than 0, or a KL term."""
    tokens: int
    """Trained tokens of the computed completions."""
    reward: float
    """Mean of all completions that have one."""
    loss: float
    grad_norm: float
    """Before it was scaled down."""
    learning_rate: float
    clipped_low: float
    clipped_high: float
    """Shares of tokens whose gradient the clip has cut."""
    importance: float
    """Mean of min(π_old / μ, cap); 1 where there are no importance weights."""
    engine_kl: float
    """KL(μ ‖ π_old): how far the policy is from the engine that sampled."""
    entropy: float
    """Of the engine that sampled, nats a token: the mean of -log μ."""
    reference_kl: float
    """KL(π ‖ reference); 0 where there is none."""
    seconds: float


class Learner:
    """Trains a policy on groups of rollouts. Raises ConfigError for a checkpoint it cannot train.

    model: a checkpoint folder. reference: the policy the KL term is about, by default that of `model`; it is
    loaded only when the objective has such a term. credit: which tokens of a group were how much better;
    None: all of a completion, by its reward.
    """

    def __init__(
        self,
        model: str | Path,
        objective: Objective,
        optimization: Optimization,
        *,
        reference: str | Path | None = None,
        credit: Credit | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.model = Path(model)
        self.objective = objective
        self.optimization = optimization
        self.credit = credit
        self.device = torch.device(device)
        self.policy = Policy.load(self.model, self.device)
        self.reference: Policy | None = None
        if objective.kl:
            self.reference = Policy.load(Path(reference or model), self.device).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters(),
            lr=optimization.learning_rate,
            betas=optimization.betas,
            weight_decay=optimization.weight_decay,
        )
        self.version = 0
        """Steps that changed the weights."""

    def __repr__(self) -> str:
        return f"<Learner {self.model.name} at version {self.version}>"

    def weights(self) -> dict[str, Tensor]:
        """The parameters as they are now, under the checkpoint's names; not copied."""
        return self.policy.state_dict()

    def step(self, groups: Sequence[Group]) -> StepFigures:
        """Learn from groups of rollouts.

        Raises ConfigError for a rollout that cannot be trained on; nothing has changed then.
        """
        started = time.monotonic()
        size = max(math.ceil(len(groups) / self.optimization.parts), 1)
        parts = [
            examples_of(groups[start : start + size], self.objective, self.credit)
            for start in range(0, len(groups), size)
        ]
        budget = self.optimization.micro_batch_tokens
        batches = [batches_of(part, budget, self.device) for part in parts]
        rate = self.optimization.rate(self.version)
        for settings in self.optimizer.param_groups:
            settings["lr"] = rate
        old: list[list[Tensor | None]] = [[None] * len(part) for part in batches]
        if self.objective.importance_cap is not None and len(batches) > 1:
            old = [[self._score(self.policy, batch) for batch in part] for part in batches]
        sums = Sums()
        norms = [self._update(part, known, sums) for part, known in zip(batches, old, strict=True) if part]
        self.version += bool(norms)
        rewards = [reward for group in groups for reward in group.rewards]
        tokens = max(sums.tokens, 1)
        return StepFigures(
            version=self.version,
            completions=len(rewards),
            computed=sum(batch.examples for part in batches for batch in part),
            tokens=sums.tokens,
            reward=sum(rewards) / max(len(rewards), 1),
            loss=sums.loss / max(len(norms), 1),
            grad_norm=sum(norms) / max(len(norms), 1),
            learning_rate=rate,
            clipped_low=sums.clipped_low / tokens,
            clipped_high=sums.clipped_high / tokens,
            importance=sums.importance / tokens,
            engine_kl=sums.engine_kl / tokens,
            entropy=sums.entropy / tokens,
            reference_kl=sums.reference_kl / tokens,
            seconds=time.monotonic() - started,
        )

    def _logprobs(self, policy: Policy, batch: MicroBatch) -> Tensor:
        """Of the trained tokens, [trained tokens]."""
        logp: Tensor = policy(batch.tokens, batch.wanted, batch.branches)
        return logp[batch.places]

    @torch.no_grad()
    def _score(self, policy: Policy, batch: MicroBatch) -> Tensor:
        return self._logprobs(policy, batch)

    def _update(self, batches: Sequence[MicroBatch], old: Sequence[Tensor | None], sums: Sums) -> float:
        """One optimizer step; returns the gradient's norm."""
        self.optimizer.zero_grad(set_to_none=True)
        for batch, known in zip(batches, old, strict=True):
            logp = self._logprobs(self.policy, batch)
            if self.objective.importance_cap is None:
                known = batch.logp_engine
            tokens = Tokens(
                advantage=batch.advantage,
                weight=batch.weight,
                logp_engine=batch.logp_engine,
                logp_old=logp.detach() if known is None else known,
                logp_reference=None if self.reference is None else self._score(self.reference, batch),
            )
            loss = policy_loss(logp, tokens, self.objective)
            torch.autograd.backward(loss)
            sums.add(loss.detach(), logp.detach(), tokens, self.objective)
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.optimization.max_grad_norm)
        self.optimizer.step()
        return float(norm)


@dataclass(slots=True)
class Sums:
    """Of a step so far, over tokens."""

    tokens: int = 0
    loss: float = 0.0
    clipped_low: float = 0.0
    clipped_high: float = 0.0
    importance: float = 0.0
    engine_kl: float = 0.0
    entropy: float = 0.0
    reference_kl: float = 0.0

    def add(self, loss: Tensor, logp: Tensor, tokens: Tokens, objective: Objective) -> None:
        low, high = clipped_shares(logp, tokens, objective)
        self.tokens += len(logp)
        self.loss += float(loss)
        self.clipped_low += float(low)
        self.clipped_high += float(high)
        if objective.importance_cap is None:
            self.importance += len(logp)
        else:
            self.importance += float(
                importance(tokens.logp_old, tokens.logp_engine, objective.importance_cap).sum()
            )
        # With the roles of kl_estimate turned round: the samples are of μ.
        self.engine_kl += float(kl_estimate(tokens.logp_engine, tokens.logp_old).sum())
        self.entropy -= float(tokens.logp_engine.sum())
        if tokens.logp_reference is not None:
            self.reference_kl += float(kl_estimate(logp, tokens.logp_reference).sum())
