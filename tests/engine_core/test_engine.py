"""The engine's other promises: forks, aborts, memory, limits and counts."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from penstock.engine.sampling import SamplingParams
from penstock.errors import ConfigError
from tests.engine_core.checkpoints import MAX_LEN, VOCAB, Reference
from tests.engine_core.runs import drain, engine, greedy, prompts


def test_a_prompt_with_n_completions_is_computed_once(qwen3: Path, references: dict[str, Reference]) -> None:
    """The completions share its blocks, and each copies the last one before writing to it."""
    subject = engine(qwen3, max_num_seqs=8)
    (prompt,) = prompts(1, [21])
    subject.add_request("a", prompt, greedy(12, n=4))
    assert len(subject.step()) == 4
    stats = subject.stats()
    assert (stats.kv_blocks_used, stats.kv_tokens_held) == (3, 21)
    subject.step()
    stats = subject.stats()
    assert (stats.kv_blocks_used, stats.kv_tokens_held) == (2 + 4, 16 + 4 * 6)
    completions = drain(subject)
    expected = references["qwen3"].greedy(prompt, 12)
    assert all(completions["a", index].tokens == expected[2:] for index in range(4))
    assert subject.stats().prompt_tokens == 21
    assert subject.stats().generation_tokens == 4 * 12
    assert subject.stats().prefix_cache_queries == 21


def test_forked_completions_go_their_own_ways(qwen3: Path, references: dict[str, Reference]) -> None:
    """Each token's logprob is the one of its own prefix: no completion wrote into another's block."""
    subject = engine(qwen3, max_num_seqs=8)
    batch = prompts(2, [21, 24, 3])
    for i, prompt in enumerate(batch):
        subject.add_request(
            str(i),
            prompt,
            SamplingParams(max_tokens=20, n=5, seed=i, temperature=2.0, logprobs=0, ignore_eos=True),
        )
    completions = drain(subject)
    for i, prompt in enumerate(batch):
        assert len({tuple(completions[str(i), index].tokens) for index in range(5)}) == 5
        for index in range(5):
            completion = completions[str(i), index]
            rows = (
                references["qwen3"].logits(prompt + completion.tokens)[len(prompt) - 1 : -1].log_softmax(-1)
            )
            expected = [float(row[token]) for row, token in zip(rows, completion.tokens, strict=True)]
            assert [found.logprob for found in completion.logprobs] == pytest.approx(expected, abs=1e-4)


def test_more_completions_than_rows(qwen3: Path, references: dict[str, Reference]) -> None:
    """Those that find no row wait for one."""
    subject = engine(qwen3, max_num_seqs=3)
    (prompt,) = prompts(3, [30])
    subject.add_request("a", prompt, greedy(9, n=8))
    completions = drain(subject)
    expected = references["qwen3"].greedy(prompt, 9)
    assert [completions["a", index].tokens for index in range(8)] == [expected] * 8


def test_allocated_memory_is_filled(qwen3: Path) -> None:
    """In a batch of mixed lengths at least 96 % of the slots in held blocks hold a token, on average."""
    source = random.Random(4)
    subject = engine(qwen3, max_num_seqs=24, max_num_batched_tokens=512)
    for i in range(60):
        length = source.randint(40, 200)
        prompt = [source.randrange(VOCAB) for _ in range(length)]
        subject.add_request(str(i), prompt, greedy(source.randint(10, 56)))
    held = slots = 0
    while subject.has_unfinished():
        subject.step()
        stats = subject.stats()
        assert stats.kv_slots_used == 8 * stats.kv_blocks_used
        held += stats.kv_tokens_held
        slots += stats.kv_slots_used
    assert held / slots >= 0.96


def test_aborted_requests_leave_nothing(qwen3: Path) -> None:
    """Waiting, in the middle of the prompt, waiting to be forked, or running: and the others go on."""
    subject = engine(qwen3, max_num_seqs=6, max_num_batched_tokens=16)
    batch = prompts(5, [40, 8, 8, 8])
    for i, prompt in enumerate(batch):
        subject.add_request(str(i), prompt, greedy(10, n=2))
    subject.step()
    assert subject.abort("0", 1)
    assert not subject.abort("0", 1)
    subject.step()
    assert subject.abort("3")
    subject.step()
    assert subject.abort("0")
    assert not subject.abort("0")
    assert not subject.abort("nobody")
    completions = drain(subject)
    assert {name for name, _ in completions if completions[name, 0].finish_reason} == {"1", "2"}
    stats = subject.stats()
    assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)
    subject.add_request("0", batch[0], greedy(2))
    assert len(drain(subject)["0", 0].tokens) == 2


def test_sequences_end_at_the_context_length(qwen3: Path) -> None:
    subject = engine(qwen3, max_model_len=32)
    (prompt,) = prompts(6, [30])
    subject.add_request("a", prompt, greedy(100))
    completion = drain(subject)["a", 0]
    assert (len(completion.tokens), completion.finish_reason) == (2, "length")


def test_requests_that_can_never_be_served_are_refused(qwen3: Path) -> None:
    subject = engine(qwen3, max_model_len=32)
    with pytest.raises(ConfigError, match="prompt is empty"):
        subject.add_request("a", [], greedy(1))
    with pytest.raises(ConfigError, match="32 tokens; the context of 32"):
        subject.add_request("a", [1] * 32, greedy(1))
    with pytest.raises(ConfigError, match=f"Prompt token ids must be in 0 … {VOCAB - 1}"):
        subject.add_request("a", [1, VOCAB], greedy(1))
    with pytest.raises(ConfigError, match="Stop token ids"):
        subject.add_request("a", [1], greedy(1, stop_token_ids=(-1,)))
    subject.add_request("a", [1] * 31, greedy(1))
    with pytest.raises(ConfigError, match="'a' is in use"):
        subject.add_request("a", [1], greedy(1))
    assert len(drain(subject)) == 1


def test_the_context_fits_the_cache(qwen3: Path) -> None:
    """What the cache cannot hold is refused when asked for, and else not offered."""
    assert engine(qwen3).max_model_len == MAX_LEN
    assert engine(qwen3, num_gpu_blocks_override=10).max_model_len == 80
    with pytest.raises(ConfigError, match="holds 80 tokens, fewer than max_model_len"):
        engine(qwen3, num_gpu_blocks_override=10, max_model_len=81)
    block = 2 * 3 * 2 * 24 * 8 * 4
    assert engine(qwen3, kv_cache_memory_bytes=50 * block + 5).stats().kv_blocks_total == 50
    with pytest.raises(ConfigError, match="No memory for the KV cache"):
        engine(qwen3, kv_cache_memory_bytes=block - 1)
    with pytest.raises(ConfigError, match="greater than the model's max_position_embeddings"):
        engine(qwen3, max_model_len=MAX_LEN + 1)
    with pytest.raises(ConfigError, match="must be at least max_num_seqs"):
        engine(qwen3, max_num_batched_tokens=10, max_num_seqs=11)
