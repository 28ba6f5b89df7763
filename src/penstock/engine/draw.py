"""The choice of tokens by given random numbers: what is chosen, and how torch does it.

A row's choice is a function of its own logits, settings and noise alone. A row that is not truncated is
inverted in the order of the vocabulary, a truncated one in order of probability, whatever the others are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Cuts:
    """Which tokens may be chosen; each [rows]. First min_p cuts, then top_k, then top_p what is left."""

    top_k: npt.NDArray[np.int64]
    """Only so many; the size of the vocabulary for all."""
    top_p: Floats
    """The likeliest that together have this share of what min_p and top_k leave, at least one."""
    min_p: Floats
    """Only those at least this many times as likely as the likeliest."""


@dataclass(frozen=True, slots=True)
class Choice:
    """How to choose from each row of logits; each [rows]."""

    temperatures: Floats
    """0 chooses the largest logit."""
    noise: Floats
    """Where to invert the distribution function, in [0, 1)."""
    cuts: Cuts | None
    """None when no row is truncated."""


def draw(logits: torch.Tensor, choice: Choice) -> torch.Tensor:
    """A token for each row of logits float32 [rows, vocabulary], int64 [rows]."""
    device = logits.device
    warmth = np.where(choice.temperatures > 0, choice.temperatures, np.float32(1))
    warm = logits / torch.from_numpy(warmth).to(device)[:, None]
    noise = torch.from_numpy(choice.noise).to(device)
    tokens = invert(warm.softmax(-1), noise)
    if choice.cuts is not None:
        cuts = choice.cuts
        cut = np.flatnonzero((cuts.top_k < logits.shape[-1]) | (cuts.top_p < 1) | (cuts.min_p > 0))
        rows = torch.from_numpy(cut).to(device)
        those = Cuts(cuts.top_k[cut], cuts.top_p[cut], cuts.min_p[cut])
        tokens[rows] = draw_truncated(warm[rows], noise[rows], those)
    random = torch.from_numpy(choice.temperatures > 0).to(device)
    return torch.where(random, tokens, logits.argmax(-1))


def draw_truncated(logits: torch.Tensor, noise: torch.Tensor, cuts: Cuts) -> torch.Tensor:
    """A token for each row, from the likeliest down; the logits are divided by the temperature already."""
    top_k, top_p, min_p = (
        torch.from_numpy(cut).to(logits.device)[:, None] for cut in (cuts.top_k, cuts.top_p, cuts.min_p)
    )
    width = min(int(cuts.top_k.max(initial=1)), logits.shape[-1])
    if width < logits.shape[-1]:
        ordered, ids = logits.topk(width)
    else:
        ordered, ids = logits.sort(descending=True, stable=True)
    ordered = ordered.masked_fill(ordered < ordered[:, :1] + min_p.log(), -torch.inf)
    ordered = ordered.masked_fill(torch.arange(width, device=logits.device) >= top_k, -torch.inf)
    probs = ordered.softmax(-1)
    above = probs.cumsum(-1) - probs
    excluded = above >= top_p
    excluded[:, 0] = False
    return ids.gather(1, invert(probs.masked_fill(excluded, 0.0), noise)[:, None])[:, 0]


def invert(weights: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Where each row's running sum passes `noise` times its whole: [rows, tokens], [rows] to [rows]."""
    reached = weights.cumsum(-1)
    return torch.searchsorted(reached, noise[:, None] * reached[:, -1:], right=True)[:, 0]
