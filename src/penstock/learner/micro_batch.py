"""Examples as the rows that are computed together.

It guarantees:
- micro-batches hold every example once, and no more than the token budget unless one row alone does;
- the same examples give the same micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from penstock.learner.examples import Example
from penstock.learner.policy import Branches
from penstock.learner.tree import Tree, branches_of, trees_of


def micro_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Places of rows that are computed together, each with rows times longest of `budget` at most.

    Rows of like length go together, so that little is padding.
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
    """Trees side by side, on the learner's device; the flat tensors go example by example."""

    examples: int
    tokens: Tensor
    """int64 [rows, width], padded on the right."""
    wanted: Tensor
    """bool [rows, width]: whose log probabilities are needed."""
    branches: Branches | None
    """None where each row is a sequence."""
    places: Tensor
    """int64 [trained tokens]: which of the wanted tokens, row by row, is this one of an example."""
    logp_engine: Tensor
    """float32 [trained tokens], as the two below."""
    advantage: Tensor
    weight: Tensor

    @classmethod
    def of(cls, trees: Sequence[Tree], device: torch.device) -> MicroBatch:
        width = max(len(one) for one in trees)
        tokens = np.zeros((len(trees), width), dtype=np.int64)
        wanted = np.zeros((len(trees), width), dtype=np.bool_)
        places: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = []
        before = 0
        for row, tree in enumerate(trees):
            tokens[row, : len(tree)] = tree.tokens
            wanted[row, : len(tree)] = tree.wanted()
            order = before - 1 + wanted[row].cumsum()
            places += [order[path[one.trained]] for one, path in zip(tree.examples, tree.paths, strict=True)]
            before += int(wanted[row].sum())
        examples = [one for tree in trees for one in tree.examples]
        weights = [np.full(len(one.advantage), one.weight, dtype=np.float32) for one in examples]
        flat = {
            "places": np.concatenate(places),
            "logp_engine": np.concatenate([one.logp_engine for one in examples]),
            "advantage": np.concatenate([one.advantage for one in examples]),
            "weight": np.concatenate(weights),
        }
        return cls(
            examples=len(examples),
            tokens=torch.from_numpy(tokens).to(device),
            wanted=torch.from_numpy(wanted).to(device),
            branches=branches_of(trees, width, device),
            **{name: torch.from_numpy(array).to(device) for name, array in flat.items()},
        )


def batches_of(examples: Sequence[Example], budget: int, device: torch.device) -> list[MicroBatch]:
    """The micro-batches of the examples that have a token to train on, of `budget` tokens at most."""
    trees = trees_of([one for one in examples if len(one.logp_engine)])
    places = micro_batches([len(one) for one in trees], budget)
    return [MicroBatch.of([trees[place] for place in batch], device) for batch in places]
