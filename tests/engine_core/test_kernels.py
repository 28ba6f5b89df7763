"""Both kernel implementations against plain formulas in float64, over ragged batches in scattered blocks."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from penstock.engine.attention import Batch, Kernels, TorchKernels, allocate_cache, rotary_table
from penstock.engine.config import ModelConfig
from penstock.engine.draw import Choice, Cuts
from penstock.engine.native import NativeKernels
from penstock.engine.weights import Weights
from penstock.errors import ConfigError
from tests.engine_core.runs import drain, engine, greedy

BLOCKS = 128
EPS = 1e-6
SHAPES = [(4, 4, 8, 8), (8, 1, 16, 8), (6, 2, 24, 16), (4, 2, 64, 8), (3, 3, 64, 8), (10, 2, 32, 8)]
"""(heads, kv_heads, head_dim, block_size): every way the C kernel divides its work."""


def model_config(heads: int, kv_heads: int, head_dim: int, qk_norm: bool) -> ModelConfig:
    config = {
        "architectures": ["Qwen3ForCausalLM" if qk_norm else "LlamaForCausalLM"],
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 128,
        "rms_norm_eps": EPS,
    }
    return ModelConfig.parse(config, {})


class Subject:
    """Kernels over a cache, with the same keys and values kept contiguous beside it."""

    def __init__(
        self, implementation: type[TorchKernels], shape: tuple[int, int, int, int], qk_norm: bool
    ) -> None:
        heads, kv_heads, head_dim, block_size = shape
        self.config = model_config(heads, kv_heads, head_dim, qk_norm)
        torch.manual_seed(heads)
        cpu = torch.device("cpu")
        self.weights = Weights(self.config, torch.float32, cpu)
        for parameter in self.weights.parameters.values():
            parameter.normal_(1.0, 0.3)
        self.rotary = rotary_table(self.config, 128, cpu)
        cache = allocate_cache(self.config, BLOCKS, block_size, torch.float32, cpu)
        self.kernels: Kernels = implementation(self.config, self.weights.layers, cache, self.rotary)
        self.block_size = block_size
        order = np.random.default_rng(0).permutation(BLOCKS).astype(np.int32)
        width = 128 // block_size
        self.tables = order[: len(order) // width * width].reshape(-1, width)
        self.history: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def step(self, rows: list[int], starts: list[int], counts: list[int]) -> None:
        """One step over random activations; asserts that every layer gives what the formulas give."""
        config = self.config
        offsets = np.cumsum([0, *counts]).astype(np.int32)
        batch = Batch(np.array(rows, np.int32), np.array(starts, np.int32), offsets, self.tables)
        self.kernels.begin(batch)
        width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        for layer in range(config.num_layers):
            qkv = torch.randn(int(offsets[-1]), width)
            expected = [
                self.expect(layer, row, start, qkv[offsets[i] : offsets[i + 1]].double())
                for i, (row, start) in enumerate(zip(rows, starts, strict=True))
            ]
            found = self.kernels.attend(layer, qkv)
            torch.testing.assert_close(found, torch.cat(expected).float(), rtol=1e-4, atol=1e-5)

    def expect(self, layer: int, row: int, start: int, qkv: torch.Tensor) -> torch.Tensor:
        """Attention by the book, one query at a time."""
        config, weights = self.config, self.weights.layers[layer]
        heads = qkv.view(len(qkv), -1, config.head_dim)
        query = heads[:, : config.num_heads]
        key = heads[:, config.num_heads : -config.num_kv_heads]
        value = heads[:, -config.num_kv_heads :]
        if weights.q_norm is not None and weights.k_norm is not None:
            query, key = rms_norm(query, weights.q_norm), rms_norm(key, weights.k_norm)
        positions = torch.arange(start, start + len(qkv))
        query, key = self.rotate(query, positions), self.rotate(key, positions)
        place = row * config.num_layers + layer
        if start > 0:
            keys, values = self.history[place]
            key, value = torch.cat((keys[:start], key)), torch.cat((values[:start], value))
        self.history[place] = key, value
        group = config.num_heads // config.num_kv_heads
        output = torch.empty_like(query)
        for i in range(len(query)):
            for head in range(config.num_heads):
                seen_keys, seen_values = (
                    key[: start + i + 1, head // group],
                    value[: start + i + 1, head // group],
                )
                scores = seen_keys @ query[i, head] / config.head_dim**0.5
                output[i, head] = scores.softmax(-1) @ seen_values
        return output.view(len(qkv), -1)

    def rotate(self, heads: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        angles = positions[:, None].double() * 10_000.0 ** -(
            torch.arange(0, self.config.head_dim, 2).double() / self.config.head_dim
        )
        rotation = torch.polar(torch.ones_like(angles), angles)[:, None]
        first, second = heads.chunk(2, dim=-1)
        turned = torch.complex(first, second) * rotation
        return torch.cat((turned.real, turned.imag), dim=-1)


def rms_norm(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return inputs / (inputs.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


@pytest.fixture(params=[NativeKernels, TorchKernels])
def implementation(request: pytest.FixtureRequest, has_compiler: bool) -> type[TorchKernels]:
    """Both of them."""
    if request.param is NativeKernels and not has_compiler:
        pytest.skip("no C compiler here")
    kind: type[TorchKernels] = request.param
    return kind


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention(implementation: type[TorchKernels], shape: tuple[int, int, int, int]) -> None:
    """Prompts, chunks of prompts and single tokens in one step, across block boundaries."""
    subject = Subject(implementation, shape, qk_norm=shape[1] == 2)
    subject.step([0, 3], [0, 0], [5, 33])
    subject.step([3, 1, 0, 2], [33, 0, 5, 0], [1, 16, 20, 1])
    subject.step([0, 1, 2, 3], [25, 16, 1, 34], [1, 1, 1, 60])


@pytest.mark.parametrize("size", [8, 40])
def test_norms_and_activation(implementation: type[TorchKernels], size: int) -> None:
    subject = Subject(implementation, SHAPES[0], qk_norm=False).kernels
    inputs, residual, weight = torch.randn(3, size), torch.randn(3, size) * 30, torch.randn(size)
    torch.testing.assert_close(subject.norm(inputs, weight), rms_norm(inputs.double(), weight).float())
    total = residual + inputs
    normed = subject.add_norm(inputs.clone(), residual, weight)
    torch.testing.assert_close(residual, total)
    torch.testing.assert_close(normed, rms_norm(total.double(), weight).float())
    gate_up = torch.randn(5, 2 * size) * 40
    gate, up = gate_up.double().chunk(2, dim=-1)
    torch.testing.assert_close(
        subject.silu_mul(gate_up.clone()), (gate * torch.sigmoid(gate) * up).float(), rtol=1e-5, atol=1e-6
    )


def test_draw(implementation: type[TorchKernels]) -> None:
    """Exactly the token at which the distribution function passes the noise."""
    subject = Subject(implementation, SHAPES[0], qk_norm=False).kernels
    torch.manual_seed(5)
    rows, size = 400, 61
    logits = torch.randn(rows, size) * 5
    logits[:, 10] = logits[:, 0] = -torch.inf
    temperatures = np.random.default_rng(1).choice(np.array([0.0, 0.3, 1.0, 2.5], dtype=np.float32), rows)
    noise = np.random.default_rng(2).random(rows, dtype=np.float32) * np.float32(1 - 2**-23)
    noise[:5] = 0.0
    found = subject.draw(logits.clone(), Choice(temperatures, noise, None)).tolist()
    for row in range(rows):
        if temperatures[row] == 0:
            assert found[row] == int(logits[row].argmax())
            continue
        probs = (logits[row].double() / float(temperatures[row])).softmax(-1)
        reached = probs.cumsum(-1)
        assert probs[found[row]] > 0
        assert reached[found[row]] - probs[found[row]] <= noise[row] + 1e-5
        assert reached[found[row]] >= noise[row] - 1e-5


def test_truncated_draw(implementation: type[TorchKernels]) -> None:
    """min_p, then top_k, then top_p, then the noise over what is left, from the likeliest token down."""
    subject = Subject(implementation, SHAPES[0], qk_norm=False).kernels
    source = np.random.default_rng(3)
    torch.manual_seed(6)
    rows, size = 600, 45
    logits = torch.randn(rows, size).double() * 3
    logits[:, 7] = -torch.inf
    temperatures = source.choice(np.array([0.0, 0.5, 1.0, 4.0], dtype=np.float32), rows)
    noise = source.random(rows, dtype=np.float32) * np.float32(1 - 2**-23)
    cuts = Cuts(
        source.choice(np.array([1, 2, 10, 44, size]), rows),
        source.choice(np.array([0.05, 0.5, 0.95, 1.0], dtype=np.float32), rows),
        source.choice(np.array([0.0, 0.0, 0.1, 0.9], dtype=np.float32), rows),
    )
    found = subject.draw(logits.float(), Choice(temperatures, noise, cuts)).tolist()
    for row in range(rows):
        if temperatures[row] == 0:
            assert found[row] == int(logits[row].argmax())
            continue
        probs = (logits[row] / float(temperatures[row])).softmax(-1)
        probs, ids = probs.sort(descending=True)
        probs[probs < float(cuts.min_p[row]) * (1 - 1e-6) * probs[0]] = 0
        probs[cuts.top_k[row] :] = 0
        probs /= probs.sum()
        above = probs.cumsum(-1) - probs
        probs[1:][above[1:] >= float(cuts.top_p[row]) * (1 + 1e-6)] = 0
        if cuts.top_k[row] == size and cuts.top_p[row] == 1 and cuts.min_p[row] == 0:
            ids, order = ids.sort()
            probs = probs[order]
        probs /= probs.sum()
        place = ids.tolist().index(found[row])
        assert probs[place] > 0
        assert probs[:place].sum() <= noise[row] + 1e-5
        assert probs[: place + 1].sum() >= noise[row] - 1e-5


def test_copied_blocks_are_read_before_any_is_written(implementation: type[TorchKernels]) -> None:
    """A block can be both source and target."""
    subject = Subject(implementation, SHAPES[0], qk_norm=False)
    cache = subject.kernels.cache  # type: ignore[attr-defined]
    cache.normal_()
    before = cache.clone()
    subject.kernels.copy_blocks([(1, 2), (2, 3), (1, 4)])
    assert torch.equal(cache[:, [2, 3, 4]], before[:, [1, 2, 1]])
    assert torch.equal(cache[:, 5:], before[:, 5:])


def test_without_a_compiler_torch_takes_over(
    qwen3: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With one warning; asked for explicitly, the native kernels are an error instead."""
    monkeypatch.setenv("PATH", "")
    with caplog.at_level(logging.WARNING):
        subject = engine(qwen3)
    assert isinstance(subject.kernels, TorchKernels) and not isinstance(subject.kernels, NativeKernels)
    assert len(caplog.records) == 1
    assert "No C compiler" in caplog.text
    subject.add_request("a", [1, 2, 3], greedy(3))
    assert len(drain(subject)["a", 0].tokens) == 3
    with pytest.raises(ConfigError, match="No C compiler"):
        engine(qwen3, attention_backend="native")


def test_a_broken_compiler_is_reported(qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo broken 1.0 && exit 0\necho no luck >&2; exit 1\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match="no luck"):
        engine(qwen3, attention_backend="native")
    assert not list((tmp_path / "cache" / "penstock").iterdir())


def test_the_library_is_compiled_once(qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    engine(qwen3)
    (library,) = (tmp_path / "penstock").iterdir()
    compiled = library.stat().st_mtime_ns
    engine(qwen3)
    assert library.stat().st_mtime_ns == compiled
    engine(qwen3, block_size=16)
    assert len(list((tmp_path / "penstock").iterdir())) == 2
