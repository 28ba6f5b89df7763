"""A small random Qwen3 checkpoint folder with a byte-level tokenizer and a chat template.

Rows of the output layer that stand for parts of characters are zero, so that a greedy continuation is valid
text. The logits of the others are far apart, so that engines with different kernels agree on the largest.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 384
HIDDEN = 64
LAYERS = 2
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 32
"""vLLM's CPU attention takes no fewer."""
INTERMEDIATE = 128
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TWINS = {"<|im_end|>": "Q", "<|endoftext|>": "*"}
"""A special token that ends a text, and the letter in whose place a greedy continuation has it."""

CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- if message.role == 'stranger' %}{{ raise_exception('No strangers here') }}{% endif %}
    {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

CORPUS = [
    "The quick brown fox jumps over the lazy dog. What is two plus two? Four, and one more is five.",
    "user assistant system Hello there, how are you today? I think that the answer is 42.",
    "Größe, naïve café, 東京は日本の首都です。 Привет, мир! 🙂🚀 and back to plain text again.",
]


def _tokenizer(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def _weights(tokenizer: Tokenizer, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 0.15) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * std

    weights = {
        "model.embed_tokens.weight": normal(VOCABULARY, HIDDEN, std=1.0),
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": normal(VOCABULARY, HIDDEN, std=0.5),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        weights |= {
            f"{at}.input_layernorm.weight": torch.ones(HIDDEN),
            f"{at}.post_attention_layernorm.weight": torch.ones(HIDDEN),
            f"{at}.self_attn.q_proj.weight": normal(HEADS * HEAD_DIM, HIDDEN),
            f"{at}.self_attn.k_proj.weight": normal(KV_HEADS * HEAD_DIM, HIDDEN),
            f"{at}.self_attn.v_proj.weight": normal(KV_HEADS * HEAD_DIM, HIDDEN),
            f"{at}.self_attn.o_proj.weight": normal(HIDDEN, HEADS * HEAD_DIM),
            f"{at}.self_attn.q_norm.weight": torch.ones(HEAD_DIM),
            f"{at}.self_attn.k_norm.weight": torch.ones(HEAD_DIM),
            f"{at}.mlp.gate_proj.weight": normal(INTERMEDIATE, HIDDEN),
            f"{at}.mlp.up_proj.weight": normal(INTERMEDIATE, HIDDEN),
            f"{at}.mlp.down_proj.weight": normal(HIDDEN, INTERMEDIATE),
        }
    for token in range(VOCABULARY):
        text = tokenizer.decode([token], skip_special_tokens=True)
        if not text or "\N{REPLACEMENT CHARACTER}" in text:
            weights["lm_head.weight"][token] = 0.0
    for special, letter in TWINS.items():
        row = weights["lm_head.weight"][tokenizer.token_to_id(letter)]
        weights["lm_head.weight"][tokenizer.token_to_id(special)] = 1.1 * row
    return weights


def make_checkpoint(folder: Path, *, context: int = 2048, seed: int = 0) -> Path:
    """Write config.json, model.safetensors and the tokenizer's files into `folder` and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(folder)
    save_file(_weights(tokenizer, seed), folder / "model.safetensors", metadata={"format": "pt"})
    end_of_text, _, end_of_turn = (tokenizer.token_to_id(token) for token in SPECIAL_TOKENS)
    config: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_turn,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": CHAT_TEMPLATE,
        "eos_token": SPECIAL_TOKENS[2],
        "pad_token": SPECIAL_TOKENS[0],
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end_of_turn, end_of_text]}))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=1))
    return folder
