"""What the completions of a group begin with in common, computed once: a tree of tokens.

It guarantees:
- every token of every example is a node that sees the tokens before it in its example and no others, so the
  numbers are those of the examples one by one, but for rounding;
- a group is one tree only where that has no more pairs of tokens than its examples one by one: attention over
  a tree is computed for all pairs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from penstock.learner.examples import Example, Ids
from penstock.learner.policy import Branches

ROOT = -1
"""The parent of a first token."""


@dataclass(frozen=True, slots=True)
class Tree:
    """Tokens of one or more examples; each stands behind its parent, at a higher place."""

    tokens: Ids
    """[nodes], as the two below."""
    parents: Ids
    positions: Ids
    """How many tokens come before it in its example."""
    examples: tuple[Example, ...]
    paths: tuple[Ids, ...]
    """Of each example, the node of each of its tokens."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def chain(self) -> bool:
        """Whether no token has two behind it, so that each sees all before it."""
        return bool((self.parents == np.arange(ROOT, len(self) - 1)).all())

    def wanted(self) -> npt.NDArray[np.bool_]:
        """The nodes some example trains on, [nodes]."""
        found = np.zeros(len(self), dtype=np.bool_)
        for example, path in zip(self.examples, self.paths, strict=True):
            found[path[example.trained]] = True
        return found

    def visible(self) -> npt.NDArray[np.bool_]:
        """[node, seen node]: each sees itself and what leads to it."""
        found = np.zeros((len(self), len(self)), dtype=np.bool_)
        for node, parent in enumerate(self.parents.tolist()):
            if parent != ROOT:
                found[node] = found[parent]
            found[node, node] = True
        return found


def tree_of(examples: Sequence[Example]) -> Tree:
    """One tree of examples."""
    places: dict[tuple[int, int], int] = {}
    positions: list[int] = []
    paths = []
    for example in examples:
        node, path = ROOT, []
        for position, token in enumerate(example.tokens.tolist()):
            node = places.setdefault((node, token), len(places))
            if node == len(positions):
                positions.append(position)
            path.append(node)
        paths.append(np.array(path, dtype=np.int64))
    nodes = np.array(list(places), dtype=np.int64).reshape(-1, 2)
    return Tree(nodes[:, 1], nodes[:, 0], np.array(positions, dtype=np.int64), tuple(examples), tuple(paths))


def trees_of(examples: Sequence[Example]) -> list[Tree]:
    """A tree for each group, or for each example where nothing would be won."""
    found: list[Tree] = []
    for _, members in itertools.groupby(examples, key=lambda one: one.group):
        group = list(members)
        tree = tree_of(group)
        shares = len(tree) ** 2 <= sum(len(one.tokens) ** 2 for one in group)
        found += [tree] if shares else [tree_of([one]) for one in group]
    return found


def branches_of(trees: Sequence[Tree], width: int, device: torch.device) -> Branches | None:
    """Where the tokens of trees stand that are padded to `width`; None where each is a chain."""
    if all(tree.chain for tree in trees):
        return None
    parents = np.zeros((len(trees), width), dtype=np.int64)
    positions = np.zeros((len(trees), width), dtype=np.int64)
    visible = np.zeros((len(trees), width, width), dtype=np.bool_)
    visible[:, range(width), range(width)] = True  # padding sees itself: without anything it would be NaN
    for row, tree in enumerate(trees):
        parents[row, : len(tree)] = tree.parents
        positions[row, : len(tree)] = tree.positions
        visible[row, : len(tree), : len(tree)] = tree.visible()
    return Branches(*(torch.from_numpy(one).to(device) for one in (parents, positions, visible)))
