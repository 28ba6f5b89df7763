"""Trees of tokens: fewer to compute, and the numbers of the sequences one by one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import ConfigError
from penstock.learner.examples import Example, examples_of
from penstock.learner.grpo import Objective
from penstock.learner.learner import Learner, Optimization
from penstock.learner.micro_batch import MicroBatch, batches_of
from penstock.learner.policy import Branches, Policy
from penstock.learner.tree import tree_of, trees_of
from tests.engine_core.checkpoints import MAX_LEN
from tests.engine_core.conftest import FAMILIES
from tests.learner.groups import group, rollout

CPU = torch.device("cpu")


def example(tokens: list[int], prompt: int = 1, place: int = 0) -> Example:
    trained = np.arange(len(tokens)) >= prompt
    flat = np.zeros(int(trained.sum()), dtype=np.float32)
    return Example(place, np.array(tokens, dtype=np.int64), trained, flat, flat + 1.0, 1.0)


def logprobs(policy: Policy, batches: list[MicroBatch]) -> torch.Tensor:
    return torch.cat([policy(one.tokens, one.wanted, one.branches)[one.places] for one in batches])


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=6))
def test_a_tree_holds_each_beginning_once_and_each_token_sees_what_is_before_it(
    rows: list[list[int]],
) -> None:
    tree = tree_of([example([7, *row]) for row in rows])
    beginnings = {tuple(row[:end]) for row in rows for end in range(len(row) + 1)}
    assert len(tree) == len(beginnings)
    visible = tree.visible()
    for row, path in zip(rows, tree.paths, strict=True):
        assert tree.tokens[path].tolist() == [7, *row]
        assert tree.positions[path].tolist() == list(range(len(row) + 1))
        for place, node in enumerate(path):
            assert sorted(visible[node].nonzero()[0]) == sorted(path[: place + 1])
    assert tree.chain == (sorted(rows, key=len)[-1][: len(tree)] == tree.tokens[1:].tolist())


def test_groups_that_share_little_are_not_made_trees() -> None:
    alike = [example([1, 2, 3, 4, last]) for last in (5, 6, 7)]
    apart = [example([1, first, 3, 4, 5], place=1) for first in (5, 6, 7)]
    other = [example([1, 2, 3, 4, 8], place=2)]
    assert [len(one.examples) for one in trees_of([*alike, *apart, *other])] == [3, 1, 1, 1, 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_of_a_tree_are_those_of_its_sequences(folders: dict[str, Path], family: str) -> None:
    torch.manual_seed(0)
    stem = torch.randint(200, (12,)).tolist()
    rows = [[*stem, 1, 2, 3], [*stem, 1, 5], [*stem[:7], 9, 9], stem, [*stem, 1, 2, 3]]
    examples = [example(row, prompt=4) for row in rows]
    examples += [example([3, 4, 5, 6, 7, 8], prompt=4, place=1)]
    policy = Policy.load(folders[family], CPU)
    (whole,) = batches_of(examples, 10**6, CPU)
    assert whole.branches is not None and whole.tokens.shape == (2, len(tree_of(examples[:5])))
    single = [batches_of([one], 10**6, CPU)[0] for one in examples]
    assert all(one.branches is None for one in single)
    torch.testing.assert_close(logprobs(policy, [whole]), logprobs(policy, single), atol=1e-5, rtol=1e-4)
    grads = []
    for batches in ([whole], single):
        policy.zero_grad()
        torch.autograd.backward(logprobs(policy, batches).sum())
        grads.append([p.grad.clone() for p in policy.parameters() if p.grad is not None])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_a_step_over_trees_is_the_step_over_sequences(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stem = list(range(20, 40))
    groups = [group(*(rollout([*stem, last, last], float(last % 3 == 0)) for last in range(6)))]
    tree, rows = (Learner(folder, Objective(kl=0.1), Optimization(learning_rate=1e-3)) for _ in range(2))
    first = tree.step(groups)
    monkeypatch.setattr(
        "penstock.learner.micro_batch.trees_of", lambda examples: [tree_of([one]) for one in examples]
    )
    second = rows.step(groups)
    assert first.loss == pytest.approx(second.loss, abs=1e-6)
    assert first.grad_norm == pytest.approx(second.grad_norm, rel=1e-3)
    assert first.tokens == second.tokens == 6 * 22
    assert len(batches_of(examples_of(groups, Objective()), 10**6, CPU)) == 1


def test_a_tree_may_be_larger_but_no_deeper_than_the_model_sees(folder: Path) -> None:
    policy = Policy.load(folder, CPU)
    tokens = torch.zeros(1, MAX_LEN + 8, dtype=torch.int64)
    eye = torch.eye(MAX_LEN + 8, dtype=torch.bool)[None]
    shallow = Branches(torch.zeros_like(tokens), torch.zeros_like(tokens), eye)
    policy(tokens, tokens.bool(), shallow)
    deep = Branches(shallow.parents, torch.arange(MAX_LEN + 8)[None], eye)
    with pytest.raises(ConfigError, match=str(MAX_LEN + 8)):
        policy(tokens, tokens.bool(), deep)
