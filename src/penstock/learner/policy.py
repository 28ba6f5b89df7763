"""The decoder as a module that can be trained: the same checkpoints and numbers as the embedded engine's.

It guarantees:
- its `state_dict` has the names and shapes of the Hugging Face checkpoint, so that what is saved or sent to
  an engine needs no translation;
- rows are independent: what is padded, or stands beside a row, changes nothing in it.

There is no cache and no sampling: it scores tokens that are known.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn

from penstock.engine.attention import inverse_frequencies
from penstock.engine.config import ModelConfig
from penstock.engine.weights import checkpoint_tensors, is_redundant
from penstock.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Branches:
    """Rows that are trees: several sequences which begin alike, held once as far as they do."""

    parents: Tensor
    """int64 [rows, width]: which token of the row comes before; of a first token it means nothing."""
    positions: Tensor
    """int64 [rows, width]: how many come before it in its sequence."""
    visible: Tensor
    """bool [rows, width, width]: whether a token sees another. Each sees itself."""


class Policy(nn.Module):
    """A dense Llama, Qwen2, Qwen3 or Mistral decoder in float32. Its weights are those torch starts with."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> Policy:
        """The policy of a checkpoint folder. Raises ConfigError for what it lacks or has too much."""
        policy = cls(ModelConfig.load(folder))
        tensors = dict(checkpoint_tensors(folder))
        names = set(policy.state_dict())
        if missing := sorted(names - set(tensors)):
            raise ConfigError(
                f"{folder} lacks {len(missing)} of {len(names)} tensors, {missing[0]} among them."
            )
        for name in set(tensors) - names:
            if not is_redundant(name):
                raise ConfigError(f"{folder} holds {name}, which this architecture does not have.")
        try:
            policy.load_state_dict({name: tensors[name] for name in names})
        except RuntimeError as error:
            raise ConfigError(f"{folder} does not fit its config.json: {error}.") from None
        return policy.to(device)

    def forward(self, tokens: Tensor, wanted: Tensor, branches: Branches | None = None) -> Tensor:
        """Log probabilities, at temperature 1, of the tokens marked in `wanted`, each given all before it.

        tokens: int64 [rows, width], padded on the right with any id. wanted: bool [rows, width]; what has
        nothing before it cannot be wanted. branches: of rows that are trees; None: each is a sequence.
        Returns float32 [number wanted], row by row.
        """
        if branches is None:
            self._check(tokens.shape[1])
            hidden = self.model(tokens[:, :-1])[wanted[:, 1:]]
        else:
            self._check(int(branches.positions.max()) + 1)
            rows, _ = wanted.nonzero(as_tuple=True)
            hidden = self.model(tokens, branches)[rows, branches.parents[wanted]]
        logits = self.lm_head(hidden) if self.lm_head else F.linear(hidden, self.model.embed_tokens.weight)
        return token_logprobs(logits.float(), tokens[wanted])

    def _check(self, length: int) -> None:
        window = self.config.sliding_window
        longest = min(self.config.max_position_embeddings, window or self.config.max_position_embeddings)
        if length > longest:
            raise ConfigError(
                f"A sequence has {length} tokens; this model can be trained on {longest} at most."
            )


def token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """The log probability of each target: logits [tokens, vocabulary], targets int64 [tokens] → [tokens]."""
    return -F.cross_entropy(logits, targets, reduction="none")


class Decoder(nn.Module):
    """Token ids [rows, width] to hidden states [rows, width, hidden]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.register_buffer(
            "frequencies", inverse_frequencies(config.rope, config.head_dim), persistent=False
        )
        self.frequencies: Tensor

    def forward(self, tokens: Tensor, branches: Branches | None = None) -> Tensor:
        if branches is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        else:
            positions = branches.positions[:, None]  # one for all heads
        angles = positions[..., None].float() * self.frequencies
        rotation = angles.cos(), angles.sin()
        visible = None if branches is None else branches.visible[:, None]
        hidden: Tensor = self.embed_tokens(tokens)
        for layer in self.layers:
            hidden = layer(hidden, rotation, visible)
        normed: Tensor = self.norm(hidden)
        return normed


class Layer(nn.Module):
    """Attention, then the feed-forward part, each added to what goes in."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, hidden: Tensor, rotation: tuple[Tensor, Tensor], visible: Tensor | None) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rotation, visible)
        added: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return added


class Attention(nn.Module):
    """Attention to what is visible, or to all before, with grouped key-value heads and rotary positions, and
    QK-norm where there is one."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.output_bias)
        self.q_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, inputs: Tensor, rotation: tuple[Tensor, Tensor], visible: Tensor | None) -> Tensor:
        query, key, value = (
            projection(inputs).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        attended = F.scaled_dot_product_attention(
            rotate(query.transpose(1, 2), rotation),
            rotate(key.transpose(1, 2), rotation),
            value.transpose(1, 2),
            attn_mask=visible,
            is_causal=visible is None,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        output: Tensor = self.o_proj(attended.transpose(1, 2).flatten(2))
        return output


def rotate(heads: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding over the two halves of each head: [rows, heads, width, head_dim] in and out."""
    cos, sin = rotation
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class FeedForward(nn.Module):
    """The gated feed-forward part."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.down_proj(F.silu(self.gate_proj(inputs)) * self.up_proj(inputs))
        return output
