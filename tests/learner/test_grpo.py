"""The loss against figures worked out by hand and against loops over single numbers."""

from __future__ import annotations

import math
from statistics import mean, stdev

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from penstock.errors import ConfigError
from penstock.learner.grpo import (
    STD_FLOOR,
    Aggregation,
    Objective,
    Tokens,
    advantages,
    clipped_shares,
    completion_weights,
    importance,
    kl_estimate,
    policy_loss,
    step_advantages,
)

rewards_of_a_group = st.lists(st.none() | st.floats(-2, 2, width=16), min_size=1, max_size=6)


def advantages_of(*group: float | None, normalise_std: bool = False) -> list[float]:
    rewards = torch.tensor([[math.nan if one is None else one for one in group]])
    present = torch.tensor([[one is not None for one in group]])
    return [float(one) for one in advantages(rewards, present, normalise_std=normalise_std)[0]]


def test_steps_that_are_right_share_what_one_would_have() -> None:
    right = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 1]], dtype=torch.bool)
    expected = [[4 / 3, 2, 0, 0], [4 / 3, 0, 0, 0], [4 / 3, 2, 0, 0], [0, 0, 0, 0]]
    torch.testing.assert_close(step_advantages(right), torch.tensor(expected))


def test_an_advantage_is_the_distance_from_the_mean_of_the_group() -> None:
    assert advantages_of(1, 0, 0, 0) == [0.75, -0.25, -0.25, -0.25]


def test_or_that_in_standard_deviations() -> None:
    # mean 1/4, squares 9/16 + 3 * 1/16 = 3/4, over n - 1 = 3: a standard deviation of 1/2
    assert advantages_of(1, 0, 0, 0, normalise_std=True) == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)


def test_groups_whose_rewards_are_alike_teach_nothing() -> None:
    # The mean of seven times 0.7 is not 0.7 in float32; over a standard deviation of nearly 0 the
    # difference would count.
    for normalise_std in (False, True):
        assert advantages_of(*[0.7] * 7, normalise_std=normalise_std) == [0] * 7
        assert advantages_of(0.7, normalise_std=normalise_std) == [0]


def test_a_reward_that_failed_is_not_zero() -> None:
    assert advantages_of(1, None, 0, None) == [0.5, 0, -0.5, 0]
    assert advantages_of(None, None, normalise_std=True) == [0, 0]


@given(st.lists(rewards_of_a_group, min_size=1, max_size=4), st.booleans())
def test_advantages_equal_a_loop(groups: list[list[float | None]], normalise_std: bool) -> None:
    width = max(map(len, groups))
    padded = [group + [None] * (width - len(group)) for group in groups]
    rewards = torch.tensor([[0.0 if r is None else r for r in group] for group in padded])
    present = torch.tensor([[r is not None for r in group] for group in padded])
    found = advantages(rewards, present, normalise_std=normalise_std).tolist()
    for group, row in zip(padded, found, strict=True):
        known = [r for r in group if r is not None]
        if len(set(known)) < 2:
            assert row == [0] * width
            continue
        divisor = stdev(known) + STD_FLOOR if normalise_std else 1.0
        expected = [0.0 if r is None else (r - mean(known)) / divisor for r in group]
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [("token", [1 / 6] * 3), ("sequence", [1 / 4, 1 / 8, 0.5]), ("constant", [1 / 30] * 3)],
)
def test_weights_of_tokens(aggregation: Aggregation, expected: list[float]) -> None:
    lengths = torch.tensor([2, 4, 0])
    found = completion_weights(lengths, aggregation, 10 if aggregation == "constant" else None)
    assert found.tolist() == pytest.approx(expected)


def objective(**settings: object) -> Objective:
    return Objective(**settings)  # type: ignore[arg-type]


def tokens(
    *,
    advantage: list[float],
    old: list[float],
    engine: list[float] | None = None,
    reference: list[float] | None = None,
    weight: list[float] | None = None,
) -> Tokens:
    return Tokens(
        advantage=torch.tensor(advantage),
        weight=torch.tensor(weight or [1.0] * len(old)),
        logp_engine=torch.tensor(engine or old),
        logp_old=torch.tensor(old),
        logp_reference=None if reference is None else torch.tensor(reference),
    )


def logs(*probabilities: float) -> list[float]:
    return [math.log(one) for one in probabilities]


@pytest.mark.parametrize(
    ("ratio", "advantage", "gain"),
    [
        (1.0, 2.0, 2.0),
        (1.1, 2.0, 2.2),
        (1.5, 2.0, 2.56),  # clipped at 1.28
        (0.5, 2.0, 1.0),  # a token that lost ground may win it back
        (0.9, -2.0, -1.8),
        (0.5, -2.0, -1.6),  # clipped at 0.8
        (1.5, -2.0, -3.0),
    ],
)
def test_the_clip_is_asymmetric_and_only_holds_back_what_goes_too_far(
    ratio: float, advantage: float, gain: float
) -> None:
    logp = torch.tensor(logs(0.5 * ratio), requires_grad=True)
    given_ = tokens(advantage=[advantage], old=logs(0.5))
    loss = policy_loss(logp, given_, objective(clip_low=0.2, clip_high=0.28))
    assert loss.item() == pytest.approx(-gain)
    (gradient,) = torch.autograd.grad(loss, logp)
    held_back = gain in (2.56, -1.6)
    assert gradient.item() == pytest.approx(0 if held_back else -ratio * advantage)
    low, high = clipped_shares(logp, given_, objective(clip_low=0.2, clip_high=0.28))
    assert (low.item(), high.item()) == (gain == -1.6, gain == 2.56)


def test_importance_is_cut_off_above_and_scales_the_gain() -> None:
    old, engine = logs(0.5, 0.5, 0.2), logs(0.4, 0.1, 0.5)
    assert importance(torch.tensor(old), torch.tensor(engine), 2.0).tolist() == pytest.approx([1.25, 2, 0.4])
    given_ = tokens(advantage=[1, 1, -1], old=old, engine=engine, weight=[0.5, 0.25, 0.25])
    loss = policy_loss(torch.tensor(old), given_, objective(importance_cap=2.0))
    assert loss.item() == pytest.approx(-(0.5 * 1.25 + 0.25 * 2 - 0.25 * 0.4))
    without = policy_loss(torch.tensor(old), given_, objective(importance_cap=None))
    assert without.item() == pytest.approx(-(0.5 + 0.25 - 0.25))


def test_kl_is_estimated_without_bias_and_never_below_zero() -> None:
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    each = kl_estimate(p.log(), q.log())
    assert (each >= 0).all()
    assert (p * each).sum().item() == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-5)
    assert kl_estimate(p.log(), p.log()).tolist() == [0, 0, 0]


def test_the_kl_term_is_added_to_the_loss() -> None:
    given_ = tokens(advantage=[0.0], old=logs(0.5), reference=logs(0.25))
    loss = policy_loss(torch.tensor(logs(0.5)), given_, objective(kl=0.1))
    assert loss.item() == pytest.approx(0.1 * (0.5 - math.log(0.5) - 1))


def naive_loss(logp: list[float], given_: Tokens, settings: Objective) -> float:
    total = 0.0
    for i, new in enumerate(logp):
        old, engine, gain = (float(one[i]) for one in (given_.logp_old, given_.logp_engine, given_.advantage))
        ratio = math.exp(new - old)
        clipped = min(max(ratio, 1 - settings.clip_low), 1 + settings.clip_high)
        term = -min(ratio * gain, clipped * gain)
        if settings.importance_cap is not None:
            term *= min(math.exp(old - engine), settings.importance_cap)
        if given_.logp_reference is not None:
            apart = float(given_.logp_reference[i]) - new
            term += settings.kl * (math.exp(apart) - apart - 1)
        total += float(given_.weight[i]) * term
    return total


logprob = st.floats(-4, 0)


@given(
    st.lists(
        st.tuples(logprob, logprob, logprob, logprob, st.floats(-2, 2), st.floats(0, 1)),
        min_size=1,
        max_size=8,
    ),
    st.none() | st.floats(0.5, 4),
    st.sampled_from((0.0, 0.05)),
)
def test_loss_equals_a_loop(rows: list[tuple[float, ...]], importance_cap: float | None, kl: float) -> None:
    new, old, engine, reference, gain, weight = (
        torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True)
    )
    settings = objective(importance_cap=importance_cap, kl=kl)
    given_ = Tokens(gain, weight, engine, old, reference if kl else None)
    found = policy_loss(new, given_, settings).item()
    assert found == pytest.approx(naive_loss(new.tolist(), given_, settings), rel=1e-9, abs=1e-9)


def test_gradients_are_those_of_the_loss() -> None:
    torch.manual_seed(3)
    new = (-3 * torch.rand(12, dtype=torch.float64)).requires_grad_()
    old, engine, reference = (-3 * torch.rand(12, dtype=torch.float64) for _ in range(3))
    given_ = Tokens(
        torch.randn(12, dtype=torch.float64), torch.rand(12, dtype=torch.float64), engine, old, reference
    )

    def loss(logp: Tensor) -> Tensor:
        return policy_loss(logp, given_, objective(kl=0.1))

    assert torch.autograd.gradcheck(loss, new)


def test_no_gradient_flows_into_importance() -> None:
    logp = torch.tensor(logs(0.5), requires_grad=True)
    given_ = Tokens(torch.tensor([1.0]), torch.tensor([1.0]), torch.tensor(logs(0.25)), logp.detach(), None)
    (gradient,) = torch.autograd.grad(policy_loss(logp, given_, objective(importance_cap=1.5)), logp)
    assert gradient.item() == pytest.approx(-1.5)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"clip_low": 1.5}, "clip_low"),
        ({"clip_high": 0.0}, "clip_high"),
        ({"importance_cap": 0.0}, "importance_cap"),
        ({"kl": -1.0}, "kl"),
        ({"aggregation": "constant"}, "max_tokens"),
        ({"max_tokens": 100}, "max_tokens"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        objective(**settings)
