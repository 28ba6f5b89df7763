"""Running an engine to the end, and collecting what each sequence got."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from penstock.engine.config import EngineConfig
from penstock.engine.engine import LLMEngine
from penstock.engine.sampling import SamplingParams, TokenLogprobs
from tests.engine_core.checkpoints import VOCAB

MAX_STEPS = 20_000


@dataclass
class Completion:
    """All Outputs of one sequence, put together."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | None = None
    cached: int = 0


Completions = dict[tuple[str, int], Completion]


def engine(folder: Path, **settings: Any) -> LLMEngine:
    """An engine on CPU; float32 and small limits unless told otherwise."""
    limits: dict[str, Any] = {"device": "cpu", "max_num_seqs": 64}
    return LLMEngine(EngineConfig(model=str(folder), **(limits | settings)))


def drain(engine: LLMEngine, collected: Completions | None = None) -> Completions:
    """Step until nothing is left. Asserts that a sequence that finished gets nothing more."""
    completions: Completions = {} if collected is None else collected
    for _ in range(MAX_STEPS):
        if not engine.has_unfinished():
            return completions
        for output in engine.step():
            completion = completions.setdefault((output.request_id, output.index), Completion())
            assert completion.finish_reason is None
            completion.tokens += output.token_ids
            completion.logprobs += output.logprobs or []
            completion.finish_reason = output.finish_reason
            completion.stop_reason = output.stop_reason
            completion.cached = output.num_cached_tokens
    raise AssertionError(f"not finished after {MAX_STEPS} steps: {engine.stats()}")


def prompts(seed: int, lengths: list[int]) -> list[list[int]]:
    """Random prompts of the given lengths."""
    source = random.Random(seed)
    return [[source.randrange(VOCAB) for _ in range(length)] for length in lengths]


def greedy(max_tokens: int, **settings: Any) -> SamplingParams:
    """Greedy sampling of exactly `max_tokens`."""
    return SamplingParams(**({"max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True} | settings))
