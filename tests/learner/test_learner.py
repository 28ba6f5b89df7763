"""Steps of the learner: what they change, what they do not, and that they are exact."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor

from penstock.errors import ConfigError
from penstock.learner.examples import examples_of
from penstock.learner.grpo import Objective
from penstock.learner.learner import Learner, Optimization
from penstock.learner.micro_batch import micro_batches
from penstock.learner.policy import Policy
from penstock.rollout.group import Group
from tests.learner.groups import group, random_groups, rollout

FAST = Optimization(learning_rate=1e-3)


def learner(folder: Path, objective: Objective | None = None, optimization: Optimization = FAST) -> Learner:
    return Learner(folder, objective or Objective(), optimization)


def snapshot(one: Learner) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in one.weights().items()}


def distance(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    return max(float((before[name] - after[name]).abs().max()) for name in before)


def gradients(one: Learner) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in one.policy.named_parameters() if p.grad is not None}


def score(policy: Policy, groups: list[Group]) -> list[float]:
    """The logprob of each rollout's trained tokens, computed one by one."""
    found = []
    for rollout_ in (one for group_ in groups for one in group_.rollouts):
        ids = torch.tensor([[*rollout_.prompt_ids, *rollout_.token_ids]])
        wanted = torch.tensor([[*[False] * len(rollout_.prompt_ids), *rollout_.mask]])
        with torch.no_grad():
            found.append(float(policy(ids, wanted).sum()))
    return found


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
@pytest.mark.parametrize("cap", [2.0, None])
def test_how_a_step_is_cut_changes_nothing(folder: Path, aggregation: str, cap: float | None) -> None:
    objective = Objective(
        aggregation=aggregation,  # type: ignore[arg-type]
        max_tokens=20 if aggregation == "constant" else None,
        importance_cap=cap,
        kl=0.05,
    )
    groups = random_groups(1, 5)
    whole = learner(folder, objective, replace(FAST, micro_batch_tokens=10**6))
    cut = learner(folder, objective, replace(FAST, micro_batch_tokens=40))
    assert whole.step(groups).loss == pytest.approx(cut.step(groups).loss, rel=1e-4, abs=1e-6)
    one, other = gradients(whole), gradients(cut)
    scale = max(float(tensor.abs().max()) for tensor in one.values())
    assert distance(one, other) < 1e-5 * max(scale, 1.0)


def test_a_step_raises_what_was_better_and_lowers_what_was_worse(folder: Path) -> None:
    one = learner(folder)
    groups = [group(rollout([9, 8, 7], 1.0), rollout([3, 4], 0.0))]
    good, bad = score(one.policy, groups)
    figures = one.step(groups)
    better, worse = score(one.policy, groups)
    assert better > good
    assert worse < bad
    assert (figures.version, one.version, figures.reward) == (1, 1, 0.5)
    assert (figures.computed, figures.completions, figures.tokens) == (2, 2, 5)


def test_tokens_that_are_masked_and_rewards_that_failed_teach_nothing(folder: Path) -> None:
    def trained(*rollouts: tuple[list[int], float | None, list[bool]]) -> dict[str, Tensor]:
        one = learner(folder)
        one.step([group(*(rollout(ids, reward, mask=mask) for ids, reward, mask in rollouts))])
        return snapshot(one)

    plain = trained(([9, 8, 7], 1.0, [True] * 3), ([3, 4], 0.0, [True] * 2))
    failed = trained(([9, 8, 7], 1.0, [True] * 3), ([1, 1, 1], None, [True] * 3), ([3, 4], 0.0, [True] * 2))
    masked = trained(([9, 8, 7, 5, 5], 1.0, [True] * 3 + [False] * 2), ([3, 4], 0.0, [True] * 2))
    observed = trained(([9, 5, 8, 7], 1.0, [True, False, True, True]), ([3, 4], 0.0, [True] * 2))
    # The first step of AdamW makes much of rounding where there is hardly a gradient.
    assert distance(plain, failed) < 1e-5
    assert distance(plain, masked) < 1e-5
    assert distance(plain, observed) > 1e-4, "what is masked is context all the same"


def test_groups_without_spread_change_nothing(folder: Path) -> None:
    one = learner(folder)
    before = snapshot(one)
    for groups in ([], [group(rollout([9, 8], 1.0), rollout([3], 1.0))], [group(rollout([9], None))]):
        figures = one.step(groups)
        assert (figures.computed, figures.version, figures.loss) == (0, 0, 0.0)
    assert distance(before, snapshot(one)) == 0


def test_the_kl_term_holds_the_policy_near_its_reference(folder: Path) -> None:
    groups = random_groups(2, 6)
    reached = []
    for kl in (1e-6, 10.0):
        one = learner(folder, Objective(kl=kl))
        assert one.step(groups).reference_kl == pytest.approx(0, abs=1e-6)
        for _ in range(6):
            figures = one.step(groups)
        reached.append(figures.reference_kl)
    assert 0 < reached[1] < 0.5 * reached[0]
    assert learner(folder).step(groups).reference_kl == 0


def test_parts_are_steps_of_their_own_against_one_old_policy(folder: Path) -> None:
    groups = random_groups(3, 6)
    whole, parts = learner(folder), learner(folder, optimization=replace(FAST, parts=3))
    first, second = whole.step(groups), parts.step(groups)
    assert (first.version, second.version) == (1, 1)
    assert first.tokens == second.tokens
    assert distance(whole.weights(), parts.weights()) > 1e-5
    # The policy has moved on when the later parts come, and their ratios say so.
    single = learner(folder)
    for start in range(0, 6, 2):
        single.step(groups[start : start + 2])
    assert distance(single.weights(), parts.weights()) > 0


def test_figures_against_the_engine(folder: Path) -> None:
    """Logprobs that are the policy's own give a KL of 0 and weights of 1; lower ones give more than 1."""
    one = learner(folder)
    ids = [9, 8, 7, 3]
    with torch.no_grad():
        own = one.policy(torch.tensor([[5, 6, *ids]]), torch.tensor([[False] * 2 + [True] * 4])).tolist()
    exact = [group(rollout(ids, 1.0, logprobs=own), rollout(ids, 0.0, logprobs=own))]
    figures = learner(folder).step(exact)
    assert figures.engine_kl == pytest.approx(0, abs=1e-6)
    assert figures.importance == pytest.approx(1, abs=1e-5)
    assert figures.entropy == pytest.approx(-sum(own) / 4, rel=1e-5)
    lower = [x - 1 for x in own]
    apart = [group(rollout(ids, 1.0, logprobs=lower), rollout(ids, 0.0, logprobs=lower))]
    figures = learner(folder, Objective(importance_cap=1.5)).step(apart)
    assert figures.importance == pytest.approx(1.5)
    # (ρ - 1) - log ρ with ρ = π_old / μ = e
    assert figures.engine_kl == pytest.approx(math.e - 2, rel=1e-4)


def test_rollouts_that_cannot_be_trained_on_are_refused_before_anything_changes(folder: Path) -> None:
    one = learner(folder)
    before = snapshot(one)
    good, other = rollout([9, 8], 1.0), rollout([3], 0.0)
    for bad, word in (
        (rollout([9, 8], 1.0, prompt_ids=()), "prompt"),
        (rollout([9, 8], 1.0, logprobs=[-1.0]), "logprobs"),
        (rollout([9, 8], 1.0, mask=[True]), "mask"),
        (msgspec.structs.replace(good, reward=msgspec.structs.replace(good.reward, value=math.nan)), "nan"),
    ):
        with pytest.raises(ConfigError, match=word):
            one.step([group(good, other), group(bad, other)])
    assert one.version == 0
    assert distance(before, snapshot(one)) == 0


def test_examples_keep_order_and_carry_their_groups_advantage() -> None:
    groups = [
        group(rollout([1], 1.0), rollout([2, 3], 0.0)),
        group(rollout([4], None), rollout([5], 3.0), rollout([6, 7, 8], 1.0)),
    ]
    found = examples_of(groups, Objective())
    assert [one.tokens[2:].tolist() for one in found] == [[1], [2, 3], [5], [6, 7, 8]]
    assert [one.advantage.tolist() for one in found] == [[0.5], [-0.5] * 2, [1.0], [-1.0] * 3]
    assert [one.group for one in found] == [0, 0, 1, 1]
    assert [one.weight for one in found] == pytest.approx([1 / 7] * 4)


def test_examples_keep_the_logprobs_of_what_is_trained() -> None:
    masked = rollout([1, 2, 3], 1.0, logprobs=[-1.0, 0.0, -3.0], mask=[True, False, True])
    (found,) = examples_of([group(masked)], Objective(kl=0.1))
    assert found.logp_engine.tolist() == [-1, -3]
    assert found.trained.tolist() == [False, False, True, False, True]


def test_examples_end_with_the_last_token_that_is_trained() -> None:
    cut = rollout([1, 2, 3, 4], 1.0, mask=[False, True, False, False])
    empty = rollout([1, 2], 0.0, mask=[False, False])
    first, second = examples_of([group(cut, empty)], Objective(kl=0.1))
    assert (first.tokens.tolist(), first.trained.tolist()) == ([5, 6, 1, 2], [False] * 3 + [True])
    assert first.logp_engine.tolist() == [-1] and second.tokens.tolist() == []


def test_credit_is_given_to_tokens() -> None:
    groups = [group(rollout([1, 2, 3], 1.0), rollout([1, 5], 0.0))]
    first, second = examples_of(groups, Objective(), lambda _: [[2.0, 1.0, 0.0], [0.0, 0.0]])
    assert first.tokens.tolist() == [5, 6, 1, 2] and first.advantage.tolist() == [2, 1]
    assert first.trained.tolist() == [False, False, True, True]
    assert len(second.advantage) == 0 and first.weight == pytest.approx(1 / 5)
    with pytest.raises(ConfigError, match=r"\[3\] tokens"):
        examples_of(groups, Objective(), lambda _: [[1.0, 1.0, 1.0]])


def test_credit_for_single_tokens_raises_these_alone(folder: Path) -> None:
    groups = [group(rollout([9, 8], 0.0), rollout([9, 4], 0.0))]
    one = Learner(folder, Objective(), FAST, credit=lambda _: [[0.0, 1.0], [0.0, 0.0]])
    ids, wanted = torch.tensor([[5, 6, 9, 8]]), torch.tensor([[False, False, True, True]])
    before = one.policy(ids, wanted).tolist()
    figures = one.step(groups)
    after = one.policy(ids, wanted).tolist()
    assert after[1] > before[1] and after[1] - before[1] > abs(after[0] - before[0])
    assert (figures.computed, figures.tokens) == (1, 1)


@pytest.mark.parametrize("budget", [1, 10, 25, 10**6])
def test_micro_batches_hold_each_example_once_within_the_budget(budget: int) -> None:
    lengths = [3, 9, 1, 4, 12, 4, 4, 30, 2]
    batches = micro_batches(lengths, budget)
    assert sorted(place for batch in batches for place in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[place] for place in batch) <= budget
    assert micro_batches([], budget) == []


def test_the_learning_rate_warms_up_and_decays() -> None:
    plain = Optimization(learning_rate=1.0, warm_up=4)
    assert [plain.rate(step) for step in (0, 1, 3, 4, 100)] == [0.25, 0.5, 1, 1, 1]
    decayed = replace(plain, decay_steps=10)
    assert [decayed.rate(step) for step in (4, 9, 14, 99)] == pytest.approx([1, 0.55, 0.1, 0.1])


@pytest.mark.parametrize(
    "name", ["learning_rate", "max_grad_norm", "parts", "micro_batch_tokens", "decay_steps"]
)
def test_optimization_that_cannot_work(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        Optimization(**{name: 0})  # type: ignore[arg-type]
