"""The parameters of a model, by their Hugging Face names, and how a checkpoint fills them.

The matrices that are multiplied together (q, k, v; gate, up) are one tensor each; `parameters` holds views
into them under the checkpoint's names. So filling or replacing a parameter is always one in-place copy to
`parameters[name]`, and the addresses the model and its kernels know stay valid.

What replaces weights in use is checked as a whole before the first parameter is touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from penstock.engine.config import ModelConfig, read_json
from penstock.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Linear:
    """A weight as torch.mm wants it, [in, out] (a transposed view), and its bias [out]."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """[tokens, in] to [tokens, out]."""
        if self.bias is None:
            return torch.mm(inputs, self.weight)
        return torch.addmm(self.bias, inputs, self.weight)


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One transformer layer."""

    input_norm: torch.Tensor
    qkv: Linear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    output: Linear
    post_attention_norm: torch.Tensor
    gate_up: Linear
    down: Linear


class Weights:
    """All parameters of a model, allocated and not yet filled."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.parameters: dict[str, torch.Tensor] = {}
        """Checkpoint name to tensor, in the checkpoint's shape."""
        self._matrices: list[torch.Tensor] = []
        """What takes nearly all the memory; the C kernels know none of their addresses."""
        self._dtype = dtype
        self._device = device
        self.embedding = self._vector("model.embed_tokens", config.vocab_size, config.hidden_size)
        self._matrices.append(self.embedding)
        self.layers = [self._layer(f"model.layers.{i}", config) for i in range(config.num_layers)]
        self.final_norm = self._vector("model.norm", config.hidden_size)
        if config.tie_word_embeddings:
            self.lm_head = Linear(self.embedding.t(), None)
        else:
            self.lm_head = self._linear(("lm_head",), config.hidden_size, [config.vocab_size], False)

    def _layer(self, name: str, config: ModelConfig) -> LayerWeights:
        hidden, inner = config.hidden_size, config.intermediate_size
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        attention, mlp = f"{name}.self_attn", f"{name}.mlp"
        qkv_names = tuple(f"{attention}.{part}_proj" for part in "qkv")
        return LayerWeights(
            input_norm=self._vector(f"{name}.input_layernorm", hidden),
            qkv=self._linear(qkv_names, hidden, [queries, keys, keys], config.qkv_bias),
            q_norm=self._vector(f"{attention}.q_norm", config.head_dim) if config.qk_norm else None,
            k_norm=self._vector(f"{attention}.k_norm", config.head_dim) if config.qk_norm else None,
            output=self._linear((f"{attention}.o_proj",), queries, [hidden], config.output_bias),
            post_attention_norm=self._vector(f"{name}.post_attention_layernorm", hidden),
            gate_up=self._linear(
                (f"{mlp}.gate_proj", f"{mlp}.up_proj"), hidden, [inner, inner], config.mlp_bias
            ),
            down=self._linear((f"{mlp}.down_proj",), inner, [hidden], config.mlp_bias),
        )

    def _vector(self, name: str, *shape: int) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=self._dtype, device=self._device)
        self.parameters[f"{name}.weight"] = tensor
        return tensor

    def _linear(self, names: tuple[str, ...], width: int, heights: list[int], bias: bool) -> Linear:
        """One matrix for several of the checkpoint's, stacked along their outputs."""
        weight = torch.empty(sum(heights), width, dtype=self._dtype, device=self._device)
        biases = torch.empty(sum(heights), dtype=self._dtype, device=self._device) if bias else None
        self._matrices.append(weight)
        for name, part in zip(names, torch.split(weight, heights), strict=True):
            self.parameters[f"{name}.weight"] = part
        if biases is not None:
            for name, part in zip(names, torch.split(biases, heights), strict=True):
                self.parameters[f"{name}.bias"] = part
        return Linear(weight.t(), biases)

    def load(self, folder: Path) -> None:
        """Fill every parameter from the folder's safetensors. Raises ConfigError unless all fit."""
        for name, tensor in self._checked(folder):
            self.parameters[name].copy_(tensor)

    def read(self, folder: Path) -> dict[str, torch.Tensor]:
        """A checkpoint's tensor for every parameter, for `fill`. Raises ConfigError unless all fit."""
        return dict(self._checked(folder))

    def fill(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy to parameters; the tensors were checked with `check`."""
        for name, tensor in tensors.items():
            self.parameters[name].copy_(tensor)

    def check(self, source: object, name: str, shape: Iterable[int]) -> bool:
        """Whether a tensor of `source` has a parameter to fill; one that is redundant has none.

        Raises ConfigError for a name the model does not know, and for a wrong shape.
        """
        parameter = self.parameters.get(name)
        if parameter is None:
            if not is_redundant(name):
                raise ConfigError(f"{source} holds {name}, which this architecture does not have.")
            return False
        if list(parameter.shape) != (shape := list(shape)):
            raise ConfigError(
                f"{name} in {source} has shape {shape}; its config.json asks for {list(parameter.shape)}."
            )
        return True

    def _checked(self, folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
        missing = set(self.parameters)
        for name, tensor in checkpoint_tensors(folder):
            if self.check(folder, name, tensor.shape):
                yield name, tensor
                missing.discard(name)
        if missing:
            raise ConfigError(
                f"{folder} lacks {len(missing)} of {len(self.parameters)} tensors, {min(missing)} among them."
            )

    def largest_bytes(self) -> int:
        """Size in float32 of the largest parameter."""
        return 4 * max(parameter.numel() for parameter in self.parameters.values())

    def release(self) -> None:
        """Give the memory of all matrices back; nothing may be computed until `restore` and `fill`."""
        for matrix in self._matrices:
            matrix.untyped_storage().resize_(0)

    def restore(self) -> None:
        """Take the memory again, with nothing in it."""
        for matrix in self._matrices:
            matrix.untyped_storage().resize_(matrix.numel() * matrix.itemsize)


def is_redundant(name: str) -> bool:
    """Whether a tensor can be left out: a tied output matrix, or rotary frequencies old exports carry."""
    return name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq")


def checkpoint_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of every shard, one at a time. Raises ConfigError."""
    for shard in checkpoint_shards(folder):
        try:
            with safe_open(shard, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict: it can only be iterated this way
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{shard} cannot be read: {error}.") from None


def checkpoint_shards(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: the whole one, else those of its index. Raises ConfigError."""
    whole = folder / "model.safetensors"
    if whole.is_file():
        return [whole]
    index = read_json(folder / "model.safetensors.index.json")
    if index is None:
        shards = sorted(folder.glob("*.safetensors"))
        if not shards:
            raise ConfigError(f"{folder} has no weights: no *.safetensors file is in it.")
        return shards
    shards = sorted({folder / file for file in index.get("weight_map", {}).values()})
    for shard in shards:
        if not shard.is_file():
            raise ConfigError(f"{shard} is named in model.safetensors.index.json but does not exist.")
    return shards
