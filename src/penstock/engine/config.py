"""What an engine is asked to be (`EngineConfig`) and what a checkpoint says it is (`ModelConfig`).

Nothing here imports torch. Reading a checkpoint's configuration either gives a `ModelConfig` that the
model computes exactly, or raises a `ConfigError` naming what is not supported: nothing is ignored that
would change the tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from penstock.engine.size import Size
from penstock.errors import ConfigError

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
DeviceName = Literal["auto", "cpu", "cuda"]
BackendName = Literal["auto", "native", "torch"]

ARCHITECTURES: Final = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""The dense decoder-only families the model computes."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How to run a checkpoint; names are vLLM's. Raises ConfigError for values that cannot work."""

    model: str
    """Checkpoint folder: config.json and *.safetensors."""
    dtype: DtypeName = "auto"
    """`auto` is the checkpoint's own."""
    device: DeviceName = "auto"
    """`auto` is CUDA where there is one."""
    max_model_len: int | None = None
    """Longest prompt plus completion, in tokens. None: the model's own, or what the KV cache holds."""
    block_size: int = 8
    """Tokens in a KV block. Eight fill a vector register; on average 3.5 slots of a sequence are empty."""
    num_gpu_blocks_override: int | None = None
    """KV blocks, whatever the device; goes before `kv_cache_memory_bytes`."""
    kv_cache_memory_bytes: Size | None = None
    """KV cache size in bytes, also as 64M. None: on CUDA what memory is left; on CPU 1,024 tokens for each
    sequence, or one of the longest if that is more, within a quarter of the free memory."""
    gpu_memory_utilization: float = 0.9
    """Share of a GPU's memory that weights and KV cache may take together."""
    max_num_seqs: int = 256
    """Sequences computed in one step at most."""
    max_num_batched_tokens: int = 2048
    """Tokens computed in one step at most; longer prompts are computed in chunks."""
    enable_prefix_caching: bool = True
    """Keep full KV blocks for later prompts that begin alike."""
    seed: int | None = None
    """Seed of the requests that bring none. None: from the operating system."""
    threads: int | None = None
    """CPU threads of the matrix products (torch). None: torch's own choice."""
    attention_backend: BackendName = "auto"
    """`native` is the C kernel (CPU, float32); `auto` uses it where it can be compiled and applies."""

    def __post_init__(self) -> None:
        for name in ("block_size", "max_num_seqs", "max_num_batched_tokens"):
            require_positive(name, getattr(self, name))
        for name in ("max_model_len", "num_gpu_blocks_override", "kv_cache_memory_bytes", "threads"):
            if getattr(self, name) is not None:
                require_positive(name, getattr(self, name))
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}): every running sequence computes a token each step."
            )
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ConfigError(f"gpu_memory_utilization must be in (0, 1], not {self.gpu_memory_utilization}.")


def require_positive(name: str, value: int) -> None:
    """Raise ConfigError unless value is at least 1."""
    if value < 1:
        raise ConfigError(f"{name} must be at least 1, not {value}.")


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary embedding: base frequency and how it is stretched.

    `kind` is `default`, `linear` (positions divided by `factor`) or `llama3` (low frequencies divided by
    `factor`, those between the two bounds blended, as in the Llama 3.1 release).
    """

    theta: float = 10_000.0
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> RopeConfig:
        """Read `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before it)."""
        settings = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
        theta = settings.get("rope_theta", config.get("rope_theta", 10_000.0))
        kind = settings.get("rope_type", settings.get("type", "default"))
        partial = settings.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
        if partial not in (None, 1, 1.0):
            raise ConfigError(f"partial_rotary_factor {partial} is not supported, only 1.")
        if kind == "default":
            return cls(theta=theta)
        if kind == "linear":
            return cls(theta=theta, kind="linear", factor=settings["factor"])
        if kind == "llama3":
            return cls(
                theta=theta,
                kind="llama3",
                factor=settings["factor"],
                low_freq_factor=settings["low_freq_factor"],
                high_freq_factor=settings["high_freq_factor"],
                original_max_position_embeddings=settings["original_max_position_embeddings"],
            )
        raise ConfigError(f"Rope scaling {kind!r} is not supported; supported: default, linear, llama3.")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a checkpoint."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_window: int | None
    """Tokens a position may look back where that is less than the context, None where it is not limited."""
    dtype: str
    """The checkpoint's own: float32, bfloat16 or float16."""
    eos_token_ids: tuple[int, ...]
    """From generation_config.json and config.json, in that order, each once."""

    @classmethod
    def load(cls, folder: Path) -> ModelConfig:
        """Read `folder`/config.json and generation_config.json. Raises ConfigError."""
        if not folder.is_dir():
            raise ConfigError(f"Model folder {folder} does not exist.")
        config = read_json(folder / "config.json")
        if config is None:
            raise ConfigError(f"{folder} has no config.json: it is not a Hugging Face checkpoint folder.")
        generation = read_json(folder / "generation_config.json") or {}
        try:
            return cls.parse(config, generation)
        except KeyError as error:
            raise ConfigError(f"{folder / 'config.json'} lacks {error.args[0]!r}.") from None

    @classmethod
    def parse(cls, config: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
        """Interpret the two files' contents. Raises ConfigError, or KeyError naming what is missing."""
        architecture = (config.get("architectures") or ["none"])[0]
        if architecture not in ARCHITECTURES:
            supported = ", ".join(ARCHITECTURES)
            raise ConfigError(f"Architecture {architecture} is not supported; supported: {supported}.")
        if config.get("quantization_config"):
            raise ConfigError("Quantized checkpoints are not supported: use the original weights.")
        if config.get("hidden_act", "silu") not in ("silu", "swish"):
            raise ConfigError(f"Activation {config['hidden_act']!r} is not supported, only silu.")
        qwen2, qwen3 = architecture == "Qwen2ForCausalLM", architecture == "Qwen3ForCausalLM"
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or (128 if qwen3 else config["hidden_size"] // heads)
        bias = bool(config.get("attention_bias", False)) and not qwen2
        return cls(
            architecture=architecture,
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            max_position_embeddings=config["max_position_embeddings"],
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope=RopeConfig.parse(config),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=bias or qwen2,
            output_bias=bias,
            mlp_bias=bool(config.get("mlp_bias", False)),
            qk_norm=qwen3,
            sliding_window=sliding_window(config, architecture),
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
            eos_token_ids=eos_token_ids(config, generation),
        )


def sliding_window(config: Mapping[str, Any], architecture: str) -> int | None:
    """The attention window of the layers that have one, None when every layer sees the whole context."""
    window: int | None = config.get("sliding_window")
    if architecture == "LlamaForCausalLM":
        return None
    if architecture != "MistralForCausalLM":
        first = config.get("max_window_layers", 0)
        if not config.get("use_sliding_window") or first >= config["num_hidden_layers"]:
            return None
    return window


def eos_token_ids(config: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids that end a completion, in the order named, each once."""
    ids: dict[int, None] = {}
    for source in (generation, config):
        named = source.get("eos_token_id")
        ids.update(dict.fromkeys(named if isinstance(named, list) else [] if named is None else [named]))
    return tuple(ids)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, None when there is no such file. Raises ConfigError when it is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a JSON object.")
    return content
