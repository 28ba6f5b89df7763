"""Token for token what transformers generates, whatever the engine does to get there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from penstock.engine.config import BackendName
from tests.engine_core.checkpoints import Reference
from tests.engine_core.conftest import FAMILIES
from tests.engine_core.runs import Completion, Completions, drain, engine, greedy, prompts

BACKENDS: tuple[BackendName, ...] = ("native", "torch")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, has_compiler: bool) -> str:
    """Both implementations of the kernels."""
    if request.param == "native" and not has_compiler:
        pytest.skip("no C compiler here")
    name: str = request.param
    return name


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_transformers(
    family: str, folders: dict[str, Path], references: dict[str, Reference], backend: str
) -> None:
    """Batches of mixed lengths, prompts in chunks, sequences that come and go."""
    subject = engine(folders[family], attention_backend=backend, max_num_seqs=5, max_num_batched_tokens=16)
    batch = prompts(1, [1, 3, 8, 16, 17, 31, 40, 64, 90])
    counts = [24, 1, 9, 16, 30, 5, 24, 12, 40]
    for i, (prompt, count) in enumerate(zip(batch, counts, strict=True)):
        subject.add_request(str(i), prompt, greedy(count))
    completions = drain(subject)
    for i, (prompt, count) in enumerate(zip(batch, counts, strict=True)):
        assert completions[str(i), 0].tokens == references[family].greedy(prompt, count), i
        assert completions[str(i), 0].finish_reason == "length"
    assert subject.stats().preemptions == 0
    assert subject.stats().kv_blocks_used == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_survive_preemption(
    family: str, folders: dict[str, Path], references: dict[str, Reference], backend: str
) -> None:
    """Too few blocks for the batch: sequences are thrown out and computed again."""
    subject = engine(
        folders[family],
        attention_backend=backend,
        max_model_len=96,
        num_gpu_blocks_override=20,
        max_num_seqs=6,
        max_num_batched_tokens=24,
        enable_prefix_caching=family != "qwen2",
    )
    batch = prompts(2, [10, 20, 30, 12, 25, 9, 33])
    for i, prompt in enumerate(batch):
        subject.add_request(str(i), prompt, greedy(40))
    completions = drain(subject)
    assert subject.stats().preemptions > 0
    for i, prompt in enumerate(batch):
        assert completions[str(i), 0].tokens == references[family].greedy(prompt, 40), i


def test_tokens_from_the_prefix_cache(qwen3: Path, references: dict[str, Reference], backend: str) -> None:
    """Prompts that begin alike share blocks: within a step, later, and after one of them has generated."""
    subject = engine(qwen3, attention_backend=backend, max_num_batched_tokens=64)
    head, *tails = prompts(3, [45, 1, 10, 30])
    alike = [head + tail for tail in tails]
    for i, prompt in enumerate(alike):
        subject.add_request(str(i), prompt, greedy(20))
    completions = drain(subject)
    assert completions["0", 0].cached == 0
    assert completions["1", 0].cached == completions["2", 0].cached == 40
    turn = alike[2] + completions["2", 0].tokens
    subject.add_request("next", [*turn, 5, 6, 7], greedy(20))
    subject.add_request("same", alike[0], greedy(20))
    drain(subject, completions)
    assert completions["next", 0].cached == (len(turn) - 1) // 8 * 8
    assert completions["same", 0].cached == 40
    stats = subject.stats()
    assert stats.prefix_cache_hits == 3 * 40 + completions["next", 0].cached
    assert stats.prefix_cache_queries == sum(map(len, alike)) + len(turn) + 3 + len(alike[0])
    for i, prompt in enumerate(alike):
        assert completions[str(i), 0].tokens == references["qwen3"].greedy(prompt, 20)
    assert completions["next", 0].tokens == references["qwen3"].greedy([*turn, 5, 6, 7], 20)
    assert completions["same", 0].tokens == completions["0", 0].tokens


def test_replaced_weights_leave_no_cached_prefix(qwen3: Path) -> None:
    """Also none of what running sequences computed before, or compute on top of it."""
    subject = engine(qwen3)
    (prompt,) = prompts(4, [40])
    subject.add_request("a", prompt, greedy(40))
    for _ in range(5):
        subject.step()
    subject.replace_weights({})
    completions = drain(subject)
    subject.add_request("b", prompt + completions["a", 0].tokens, greedy(1))
    assert drain(subject)["b", 0].cached == 0
    subject.add_request("c", prompt, greedy(1))
    assert drain(subject)["c", 0].cached == 32


def test_prefix_cache_is_reset_when_nothing_runs(qwen3: Path, references: dict[str, Reference]) -> None:
    subject = engine(qwen3, max_num_seqs=2)
    first, *others = prompts(4, [40, 30, 20])
    asked = {"0": others[0], "1": others[1], "a": first}
    for name, prompt in asked.items():
        subject.add_request(name, prompt, greedy(40))
    completions: Completions = {}
    for _ in range(5):
        for output in subject.step():
            completions.setdefault((output.request_id, 0), Completion()).tokens += output.token_ids
    assert not subject.reset_prefix_cache()
    assert subject.reset_prefix_cache(reset_running_requests=True)
    assert (subject.stats().running, subject.stats().kv_blocks_used) == (0, 0)
    assert subject.stats().preemptions == 2
    drain(subject, completions)
    for name, prompt in asked.items():
        assert completions[name, 0].tokens == references["qwen3"].greedy(prompt, 40)


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_equal_transformers(
    family: str, folders: dict[str, Path], references: dict[str, Reference], backend: str
) -> None:
    """Raw ones: neither temperature nor penalties show in them."""
    subject = engine(folders[family], attention_backend=backend, max_num_batched_tokens=64)
    batch = prompts(5, [5, 40, 21])
    for i, prompt in enumerate(batch):
        params = greedy(
            12, logprobs=(0, 5, 3)[i], temperature=(0.0, 0.7, 1.0)[i], repetition_penalty=1.3, seed=i
        )
        subject.add_request(str(i), prompt, params)
    completions = drain(subject)
    for i, prompt in enumerate(batch):
        completion = completions[str(i), 0]
        assert len(completion.logprobs) == 12
        logits = references[family].logits(prompt + completion.tokens)[len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)
        for token, found, row in zip(completion.tokens, completion.logprobs, expected, strict=True):
            assert found.logprob == pytest.approx(row[token].item(), abs=1e-4)
            ids, values = [id_ for id_, _ in found.top], [value for _, value in found.top]
            best = row.topk((0, 5, 3)[i]).values.tolist()
            assert values == pytest.approx(best, abs=1e-4)
            assert len(set(ids)) == len(ids), "two may be so close that their order differs"
            assert row[ids].tolist() == pytest.approx(values, abs=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs_close_to_float32(
    qwen3: Path, references: dict[str, Reference], dtype: str
) -> None:
    """The same computation, rounded: the logprobs of the first token are near the exact ones."""
    subject = engine(qwen3, dtype=dtype)
    (prompt,) = prompts(6, [20])
    subject.add_request("a", prompt, greedy(1, logprobs=3))
    (found,) = drain(subject)["a", 0].logprobs
    exact = references["qwen3"].logits(prompt)[-1].log_softmax(-1)
    assert found.logprob == pytest.approx(exact.max().item(), abs=0.7)
    assert subject.model.weights.embedding.dtype == getattr(torch, dtype)


def test_a_step_that_only_prefills_gives_nothing(qwen3: Path) -> None:
    """A prompt of 100 tokens takes seven steps of 16."""
    subject = engine(qwen3, max_num_seqs=4, max_num_batched_tokens=16)
    subject.add_request("a", prompts(7, [100])[0], greedy(2))
    for _ in range(6):
        assert subject.step() == []
        assert subject.has_unfinished()
    assert len(subject.step()) == 1
