"""Small random checkpoints written by transformers, and what transformers itself makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 211
MAX_LEN = 256
EOS = 7

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_LEN,
    "eos_token_id": EOS,
    "bos_token_id": None,
    "pad_token_id": None,
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def build(family: str) -> Any:
    """A model of the family with its own peculiarities switched on."""
    torch.manual_seed(len(family))
    model: Any
    if family == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(
                **_SHAPE,
                num_key_value_heads=4,
                head_dim=16,
                rope_parameters=LLAMA3_ROPE,
                attention_bias=True,
                mlp_bias=True,
            )
        )
    elif family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**_SHAPE, num_key_value_heads=2, tie_word_embeddings=True))
    elif family == "qwen3":
        model = Qwen3ForCausalLM(
            Qwen3Config(**_SHAPE, num_key_value_heads=2, head_dim=24, tie_word_embeddings=False)
        )
    else:
        linear = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
        model = LlamaForCausalLM(
            LlamaConfig(**_SHAPE, num_key_value_heads=1, head_dim=64, rope_parameters=linear)
        )
    spread(model)
    return model


def spread(model: torch.nn.Module) -> None:
    """Draw all parameters anew, biases and norms too, wide enough that no two logits come close."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.2)
            elif parameter.dim() == 1:
                parameter.normal_(0.0, 0.3)
            else:
                parameter.normal_(0.0, 0.25)


def write(family: str, folder: Path) -> Path:
    """Save a checkpoint; Qwen3 in several shards."""
    build(family).save_pretrained(folder, max_shard_size="60KB" if family == "qwen3" else "1GB")
    return folder


class Reference:
    """transformers' own model of a checkpoint."""

    def __init__(self, folder: Path) -> None:
        auto: Any = AutoModelForCausalLM
        self.model = auto.from_pretrained(folder, dtype=torch.float32)
        self.model.train(False)

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """The most likely continuation, past any end-of-sequence token."""
        with torch.inference_mode():
            output = self.model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt)),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                eos_token_id=VOCAB + 1,
                pad_token_id=0,
            )
        tokens: list[int] = output[0, len(prompt) :].tolist()
        return tokens

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """Logits after each token, float32 [len(tokens), vocabulary]."""
        with torch.inference_mode():
            result: torch.Tensor = self.model(torch.tensor([tokens])).logits[0].float()
        return result
