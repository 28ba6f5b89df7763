"""Paged attention and the small operations around it, behind one interface with two implementations.

`Kernels` is what the model calls between its matrix products. `TorchKernels` here runs on any device and in
any dtype and says what is meant; `native.NativeKernels` does the same in C for float32 on CPU.

The KV cache is one tensor [layers, blocks, kv_heads, 2, head_dim * block_size]. Within a block and head the
keys lie as [head_dim, block_size], so that scores of neighbouring tokens are computed side by side, and the
values after them as [block_size, head_dim]. It begins as zeros: what no token wrote is finite, and can be
masked.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name

from penstock.engine.config import ModelConfig, RopeConfig
from penstock.engine.draw import Choice, draw
from penstock.engine.weights import LayerWeights


@dataclass(frozen=True, slots=True)
class Batch:
    """The shape of one step, on the host. Sequence i has tokens offsets[i] … offsets[i+1]-1 of the batch."""

    rows: npt.NDArray[np.int32]
    """Row of each sequence in `tables`, [sequences]."""
    starts: npt.NDArray[np.int32]
    """Position of each sequence's first token, [sequences]."""
    offsets: npt.NDArray[np.int32]
    """[sequences + 1]."""
    tables: npt.NDArray[np.int32]
    """Block tables of all rows, [rows, blocks]."""


class Kernels(Protocol):
    """The model's operations other than matrix products. Activations are [tokens, features]."""

    def begin(self, batch: Batch) -> None:
        """Prepare a step; the calls below belong to it until the next `begin`."""

    def norm(self, inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMS norm."""

    def add_norm(self, delta: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Add `delta` to `residual` in place; returns the RMS norm of the sum, maybe in `delta`'s place."""

    def attend(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """Write the step's keys and values to the cache; attention of each token to all up to itself.

        `qkv` is [tokens, (heads + 2 * kv_heads) * head_dim], not yet normed or rotated, and may be
        overwritten. Returns [tokens, heads * head_dim].
        """

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up of [gate, up] side by side; may overwrite its input."""

    def draw(self, logits: torch.Tensor, choice: Choice) -> torch.Tensor:
        """A token for each row of logits float32 [rows, vocabulary], int64 [rows]; see draw.py."""

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Copy (from, to) blocks in all layers; every source is read before any target is written."""


def allocate_cache(
    config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """The KV cache, zeros. On CPU its memory is taken from the system page by page as it is written."""
    shape = (config.num_layers, num_blocks, config.num_kv_heads, 2, config.head_dim * block_size)
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def release_cache(cache: torch.Tensor) -> None:
    """Give the cache's memory back to the system; what it held is lost."""
    if cache.device.type != "cpu":
        cache.untyped_storage().resize_(0)
    elif (advice := getattr(mmap, "MADV_DONTNEED", None)) is not None:
        # On Linux the pages of an anonymous mapping are zeros when they are touched again.
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        madvise(cache.data_ptr(), cache.numel() * cache.itemsize, advice)


def restore_cache(cache: torch.Tensor) -> None:
    """Undo `release_cache`; the cache is finite, as it was at first."""
    if cache.device.type != "cpu":
        cache.untyped_storage().resize_(cache.numel() * cache.itemsize)
        cache.zero_()


def rotary_table(config: ModelConfig, max_model_len: int, device: torch.device) -> torch.Tensor:
    """Cosines and sines of each position's angles, float32 [max_model_len, 2, head_dim / 2]."""
    angles = torch.outer(
        torch.arange(max_model_len).float(), inverse_frequencies(config.rope, config.head_dim)
    )
    return torch.stack((angles.cos(), angles.sin()), dim=1).to(device)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Radians per position of each rotated pair, [head_dim / 2]; `llama3` as in Meta's Llama 3.1 code."""
    frequencies = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        wavelengths = 2 * torch.pi / frequencies
        context = rope.original_max_position_embeddings
        kept = (context / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        kept = kept.clamp(0.0, 1.0)
        return kept * frequencies + (1 - kept) * frequencies / rope.factor
    return frequencies


class TorchKernels:
    """`Kernels` in plain torch operations."""

    def __init__(
        self, config: ModelConfig, layers: list[LayerWeights], cache: torch.Tensor, rotary: torch.Tensor
    ) -> None:
        self.config = config
        self.layers = layers
        self.cache = cache
        self.rotary = rotary
        self.block_size = cache.shape[-1] // config.head_dim
        self._keys = cache[:, :, :, 0].view(*cache.shape[:3], config.head_dim, self.block_size)
        self._values = cache[:, :, :, 1].view(*cache.shape[:3], self.block_size, config.head_dim)

    def begin(self, batch: Batch) -> None:
        """See Kernels."""
        counts = np.diff(batch.offsets)
        positions = np.arange(batch.offsets[-1]) + np.repeat(batch.starts - batch.offsets[:-1], counts)
        blocks = batch.tables[np.repeat(batch.rows, counts), positions // self.block_size]
        self._slots = self._to_device(blocks), self._to_device(positions % self.block_size)
        self._cos_sin = self.rotary[self._to_device(positions)]
        self._groups = [self._group(batch, members) for members in groups_by_length(counts)]

    def _group(self, batch: Batch, members: npt.NDArray[np.int64]) -> tuple[torch.Tensor, ...]:
        """Tokens [s, q], block tables [s, b], mask [s, 1, q, b * block_size] of s sequences of q tokens."""
        count = int(batch.offsets[members[0] + 1] - batch.offsets[members[0]])
        tokens = batch.offsets[members][:, None] + np.arange(count)
        positions = batch.starts[members][:, None] + np.arange(count)
        width = -(-(int(positions.max()) + 1) // self.block_size)
        mask = np.arange(width * self.block_size) <= positions[:, :, None]
        tables = batch.tables[batch.rows[members], :width]
        return self._to_device(tokens), self._to_device(tables), self._to_device(mask)[:, None]

    def norm(self, inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """See Kernels; the mean is taken in float32, as transformers does."""
        wide = inputs.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return weight * (wide * scale).to(inputs.dtype)

    def add_norm(self, delta: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """See Kernels."""
        residual += delta
        return self.norm(residual, weight)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See Kernels."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def attend(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """See Kernels."""
        config, weights = self.config, self.layers[layer]
        heads = qkv.view(len(qkv), -1, config.head_dim)
        parts = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        query, key, value = torch.split(heads, parts, dim=1)
        if weights.q_norm is not None and weights.k_norm is not None:
            query, key = self.norm(query, weights.q_norm), self.norm(key, weights.k_norm)
        query, key = self._rotate(query), self._rotate(key)
        blocks, places = self._slots
        self._keys[layer][blocks, :, :, places] = key
        self._values[layer][blocks, :, places] = value
        output = torch.empty_like(query)
        for tokens, tables, mask in self._groups:
            output[tokens] = self._attend_group(layer, query[tokens], tables, mask)
        return output.view(len(qkv), -1)

    def _attend_group(
        self, layer: int, query: torch.Tensor, tables: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Attention of s sequences with q tokens each: [s, q, heads, head_dim] in and out.

        The heads that share a kv head are taken as further queries to it.
        """
        config = self.config
        sequences, count = query.shape[:2]
        group = config.num_heads // config.num_kv_heads
        width = mask.shape[-1]
        keys = self._keys[layer][tables].permute(0, 2, 1, 4, 3)
        values = self._values[layer][tables].permute(0, 2, 1, 3, 4)
        by_kv_head = query.view(sequences, count, config.num_kv_heads, group, config.head_dim)
        output = F.scaled_dot_product_attention(
            by_kv_head.permute(0, 2, 3, 1, 4).reshape(sequences, config.num_kv_heads, -1, config.head_dim),
            keys.reshape(sequences, config.num_kv_heads, width, config.head_dim),
            values.reshape(sequences, config.num_kv_heads, width, config.head_dim),
            attn_mask=mask.repeat(1, 1, group, 1),
        )
        shape = (sequences, config.num_kv_heads, group, count, config.head_dim)
        return output.view(shape).permute(0, 3, 1, 2, 4).reshape(query.shape)

    def _rotate(self, heads: torch.Tensor) -> torch.Tensor:
        """Rotary embedding over the two halves of each head, [tokens, heads, head_dim]."""
        cos, sin = self._cos_sin[:, None, 0], self._cos_sin[:, None, 1]
        first, second = heads.float().chunk(2, dim=-1)
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return rotated.to(heads.dtype)

    def draw(self, logits: torch.Tensor, choice: Choice) -> torch.Tensor:
        """See Kernels."""
        return draw(logits, choice)

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """See Kernels."""
        sources, targets = zip(*copies, strict=True)
        self.cache[:, list(targets)] = self.cache[:, list(sources)]

    def _to_device(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(array).to(self.cache.device, non_blocking=True)


def groups_by_length(counts: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """Indices of the sequences that decode (one token each), all in one group; every other one alone."""
    decoding = np.flatnonzero(counts == 1)
    groups = [decoding] if len(decoding) else []
    return groups + [np.array([i]) for i in np.flatnonzero(counts > 1)]
