"""What the sampler may choose, what it must choose, and that the choice depends on nothing else."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.engine.sampling import SamplingParams, noise_key, uniforms
from penstock.errors import ConfigError
from tests.engine_core.checkpoints import EOS, VOCAB, Reference
from tests.engine_core.runs import drain, engine, greedy, prompts


def sampled(max_tokens: int, **settings: Any) -> SamplingParams:
    return SamplingParams(**({"max_tokens": max_tokens, "ignore_eos": True} | settings))


def shares(folder: Path, prompt: list[int], count: int, **settings: Any) -> Counter[int]:
    """How often each token came first in `count` seeded completions of a prompt."""
    subject = engine(folder, max_num_seqs=200, max_num_batched_tokens=400)
    subject.add_request("a", prompt, sampled(1, n=count, seed=11, **settings))
    return Counter(completion.tokens[0] for completion in drain(subject).values())


def test_samples_follow_the_distribution(qwen3: Path, references: dict[str, Reference]) -> None:
    """Chi-square of 3,000 draws over the tokens that matter, at temperature 2."""
    prompt = prompts(1, [20])[0]
    count = 3000
    found = shares(qwen3, prompt, count, temperature=2.0)
    expected = (references["qwen3"].logits(prompt)[-1] / 2.0).softmax(-1) * count
    likely = [token for token in range(VOCAB) if expected[token] >= 5]
    rest = count - sum(expected[likely].tolist())
    distance = sum((found[token] - float(expected[token])) ** 2 / float(expected[token]) for token in likely)
    distance += (count - sum(found[token] for token in likely) - rest) ** 2 / rest
    freedom = len(likely)
    assert freedom > 3
    assert distance < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    "cut", [{"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 5, "top_p": 0.7, "min_p": 0.05}], ids=str
)
def test_truncation(cut: dict[str, float], qwen3: Path, references: dict[str, Reference]) -> None:
    """The tokens drawn are exactly those vLLM's definitions leave: min_p, then top_k, then top_p."""
    prompt = prompts(2, [20])[0]
    probs = (references["qwen3"].logits(prompt)[-1] / 3.0).softmax(-1)
    kept = torch.where(probs >= cut.get("min_p", 0.0) * probs.max(), probs, 0.0)
    floor = kept.sort(descending=True).values[int(cut.get("top_k", VOCAB)) - 1]
    kept = torch.where(kept >= floor, kept, 0.0)
    kept /= kept.sum()
    ordered = kept.sort(descending=True)
    above = ordered.values.cumsum(-1) - ordered.values
    allowed = set(ordered.indices[(above < cut.get("top_p", 1.0)) & (ordered.values > 0)].tolist())
    found = shares(qwen3, prompt, 1500, temperature=3.0, **cut)
    assert set(found) <= allowed
    surely = {token for token in allowed if kept[token] > 0.01}
    assert surely <= set(found)
    assert 1 < len(allowed) < VOCAB


def test_a_seed_fixes_the_tokens_whatever_else_runs(qwen3: Path) -> None:
    """Alone, in a batch, in chunks, preempted: the same; another seed: not."""
    prompt, *others = prompts(3, [20, 30, 11, 40, 25])
    params = sampled(30, seed=42, n=3, temperature=1.5)

    def run(**settings: Any) -> list[list[int]]:
        subject = engine(qwen3, **settings)
        for i, other in enumerate(others):
            subject.add_request(f"other {i}", other, sampled(25, temperature=1.0, top_p=0.9))
        subject.add_request("a", prompt, params)
        completions = drain(subject)
        if "num_gpu_blocks_override" in settings:
            assert subject.stats().preemptions > 0
        return [completions["a", index].tokens for index in range(3)]

    alone = engine(qwen3)
    alone.add_request("a", prompt, params)
    completions = drain(alone)
    expected = [completions["a", index].tokens for index in range(3)]
    assert len({tuple(tokens) for tokens in expected}) == 3
    assert run() == expected
    assert run(max_num_batched_tokens=8, max_num_seqs=8) == expected
    assert run(num_gpu_blocks_override=16, max_model_len=100, max_num_seqs=7) == expected
    alone.add_request("b", prompt, sampled(30, seed=43, n=3, temperature=1.5))
    assert drain(alone)["b", 0].tokens not in expected


def test_without_a_seed_no_two_requests_are_alike(qwen3: Path) -> None:
    subject = engine(qwen3)
    (prompt,) = prompts(4, [10])
    for i in range(3):
        subject.add_request(str(i), prompt, sampled(20, n=2, temperature=1.5))
    assert len({tuple(completion.tokens) for completion in drain(subject).values()}) == 6


def test_the_engine_seed_makes_a_run_repeatable(qwen3: Path) -> None:
    runs = []
    for seed in (1, 1, 2):
        subject = engine(qwen3, seed=seed)
        for i, prompt in enumerate(prompts(5, [10, 20])):
            subject.add_request(str(i), prompt, sampled(15, temperature=1.5))
        runs.append([completion.tokens for completion in drain(subject).values()])
    assert runs[0] == runs[1] != runs[2]


def test_penalties_equal_a_direct_implementation(
    folders: dict[str, Path], references: dict[str, Reference]
) -> None:
    """Repetition over prompt and output, presence and frequency over the output; also when preempted."""
    cases: list[dict[str, float]] = [
        {"repetition_penalty": 1.8},
        {"repetition_penalty": 0.5},
        {"presence_penalty": 2.0},
        {"frequency_penalty": 1.5},
        {"frequency_penalty": -2.0},
        {"repetition_penalty": 1.2, "presence_penalty": 0.7, "frequency_penalty": 0.4},
        {},
    ]
    subject = engine(folders["qwen2"], num_gpu_blocks_override=24, max_model_len=80, max_num_seqs=6)
    batch = prompts(6, [12, 20, 9, 15, 30, 22, 10])
    for i, (prompt, case) in enumerate(zip(batch, cases, strict=True)):
        subject.add_request(str(i), prompt, greedy(24, **case))
    completions = drain(subject)
    assert subject.stats().preemptions > 0
    plain = 0
    for i, (prompt, case) in enumerate(zip(batch, cases, strict=True)):
        expected = penalized_greedy(references["qwen2"], prompt, 24, case)
        plain += expected == references["qwen2"].greedy(prompt, 24)
        assert completions[str(i), 0].tokens == expected, case
    assert plain < len(cases) - 2


def penalized_greedy(
    reference: Reference, prompt: list[int], count: int, case: dict[str, float]
) -> list[int]:
    output: list[int] = []
    for _ in range(count):
        logits = reference.logits(prompt + output)[-1].double()
        repetition = case.get("repetition_penalty", 1.0)
        for token in set(prompt + output):
            logits[token] = logits[token] / repetition if logits[token] > 0 else logits[token] * repetition
        for token, times in Counter(output).items():
            logits[token] -= case.get("frequency_penalty", 0.0) * times + case.get("presence_penalty", 0.0)
        output.append(int(logits.argmax()))
    return output


def test_stopping(qwen3: Path, references: dict[str, Reference]) -> None:
    """End-of-sequence, stop ids, min_tokens, ignore_eos and the reasons given."""
    subject = engine(qwen3)
    (prompt,) = prompts(7, [15])
    free = references["qwen3"].greedy(prompt, 40)
    stop = free[9]
    first = free.index(stop)
    subject.add_request("stop", prompt, greedy(40, stop_token_ids=(stop,)))
    subject.add_request(
        "late", prompt, greedy(40, stop_token_ids=(stop,), min_tokens=first + 3, ignore_eos=False)
    )
    completions = drain(subject)
    assert completions["stop", 0].tokens == free[: first + 1]
    assert completions["stop", 0].finish_reason == "stop"
    assert completions["stop", 0].stop_reason == stop
    late = completions["late", 0].tokens
    assert late[:first] == free[:first]
    assert stop not in late[: first + 2] and EOS not in late[: first + 2]


def test_end_of_sequence(qwen3: Path) -> None:
    """Sampled hot, the end-of-sequence token comes sooner or later, and ends what does not ignore it."""
    subject = engine(qwen3)
    (prompt,) = prompts(8, [15])
    for name, ignore in (("heed", False), ("ignore", True)):
        subject.add_request(
            name, prompt, SamplingParams(max_tokens=200, n=10, seed=1, temperature=20.0, ignore_eos=ignore)
        )
    completions = drain(subject)
    ended = 0
    for index in range(10):
        heeding, ignoring = completions["heed", index], completions["ignore", index]
        assert ignoring.tokens[: len(heeding.tokens)] == heeding.tokens
        assert ignoring.finish_reason == "length"
        if heeding.finish_reason == "stop":
            ended += 1
            assert heeding.tokens.index(EOS) == len(heeding.tokens) - 1
            assert heeding.stop_reason is None
            assert EOS in ignoring.tokens
    assert ended > 3


@given(seed=st.integers(-(2**63), 2**64), index=st.integers(0, 10_000), position=st.integers(0, 2**20))
def test_noise_depends_on_each_of_its_arguments(seed: int, index: int, position: int) -> None:
    key = noise_key(seed, index)
    assert 0 <= key < 2**64
    assert key == noise_key(seed, index) != noise_key(seed, index + 1)
    assert key != noise_key(seed + 1, index)
    keys = np.array([key, key, noise_key(seed, index + 1)], dtype=np.uint64)
    drawn = uniforms(keys, np.array([position, position + 1, position], dtype=np.uint64))
    assert ((drawn >= 0) & (drawn < 1)).all()


def test_noise_is_uniform() -> None:
    """Over positions of one sequence, and over the sequences of one position."""
    positions = np.arange(50_000, dtype=np.uint64)
    one = np.full(50_000, noise_key(7, 0), dtype=np.uint64)
    many = np.array([noise_key(7, index) for index in range(20_000)], dtype=np.uint64)
    for drawn in (uniforms(one, positions), uniforms(many, np.full(20_000, 3, dtype=np.uint64))):
        counts = np.histogram(drawn, bins=50, range=(0, 1))[0]
        expected = len(drawn) / 50
        assert ((counts - expected) ** 2 / expected).sum() < 50 + 5 * math.sqrt(100)
        assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.02


@settings(max_examples=30)
@given(
    bad=st.sampled_from(
        [
            {"n": 0},
            {"max_tokens": 0},
            {"temperature": -0.1},
            {"temperature": math.nan},
            {"top_p": 0.0},
            {"top_p": 1.1},
            {"top_k": -2},
            {"min_p": 1.5},
            {"repetition_penalty": 0.0},
            {"presence_penalty": 3.0},
            {"frequency_penalty": -2.5},
            {"min_tokens": 99},
            {"logprobs": -1},
        ]
    )
)
def test_values_out_of_range_are_refused_by_name(bad: dict[str, Any]) -> None:
    (name,) = bad
    with pytest.raises(ConfigError, match=f"^{name} must be"):
        SamplingParams(**({"max_tokens": 10} | bad))
