"""Train the shipped arithmetic model, or measure a model folder on the same held-out problems.

    python scripts/train_arithmetic.py --out DIR          trains and writes the folder
    python scripts/train_arithmetic.py --evaluate DIR     prints its accuracy, greedy and sampled

The seed fixes the problems, their order and the first weights; floating-point sums depend on the
machine, so a second run gives another model of the same quality, not the same bits. Training stops when
TARGET of the hard held-out problems are solved, on purpose: the rest is left to reinforcement learning.
What is measured and kept is the running average of the weights, whose accuracy rises smoothly enough to
stop at a point.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import save
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from penstock.demo.arithmetic import KINDS, LEVELS, Level, Problem, problems, verify

SEED: Final = 7

TARGET: Final = 0.37
"""Share of hard held-out problems solved greedily at which training stops."""

MOST_STEPS: Final = 3000
"""Optimizer steps; training has gone wrong if the target is not reached by then."""

BATCH: Final = 32
"""Problems in a batch."""

POOL: Final = 64
"""Batches whose problems are sorted by length together, so that a batch needs little padding."""

LEARNING_RATE: Final = 3e-3
WARM_UP: Final = 100
"""Steps."""

AVERAGED: Final = 0.99
"""Decay, a step, of the running average of the weights."""

CHECK_EVERY: Final = 50
"""Steps between two looks at the held-out problems."""

CHECK_BELOW: Final = 0.2
"""Loss, in nats a token. Above it hardly a problem is solved, and looking costs more than it tells."""

CHECK_PROBLEMS: Final = 200
"""Problems of a level looked at each time."""

CHECK_SEED: Final = 1001
REPORT_SEED: Final = 2002
"""What is reported is another draw than the one that decides when to stop."""

REPORT_PROBLEMS: Final = 1024
"""Of each level, for the greedy table."""

SAMPLED_PROBLEMS: Final = 256
"""Hard ones, tried eight times each."""

CONTEXT: Final = 2048
"""Positions."""

MOST_NEW_TOKENS: Final = 160
"""Longer than the longest trace."""

END_OF_TEXT, START, END, THINK, END_THINK = range(256, 261)
"""Ids of the added tokens; the ids below them are the bytes."""

ADDED: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
SPECIAL: Final = ADDED[:3]
"""The thinking tags are not special, as in Qwen3: they stay when special tokens are left out of a text."""

VOCABULARY: Final = 264
"""Rows of the embedding: 256 bytes, the added tokens, and three unused to make a multiple of eight."""

IGNORED: Final = -100
"""Label of a token without loss."""

CHAT_TEMPLATE: Final = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

CONFIG: Final[dict[str, Any]] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.05,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "bos_token_id": None,
    "eos_token_id": END,
    "pad_token_id": END_OF_TEXT,
    "torch_dtype": "float32",
    "use_cache": True,
}


def byte_alphabet() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte, and the byte (GPT-2's table).

    Printable bytes stand for themselves; the others are moved, in order, to the characters from 256.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)}
    moved = itertools.count(256)
    return {chr(byte if byte in printable else next(moved)): byte for byte in range(256)}


def byte_tokenizer() -> Tokenizer:
    """A tokenizer of single bytes: byte-level BPE without merges, so that any text has an encoding."""
    tokenizer = Tokenizer(models.BPE(vocab=byte_alphabet(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    for token in ADDED:
        tokenizer.add_tokens([AddedToken(token, special=token in SPECIAL, normalized=False)])
    return tokenizer


def tokenizer_settings() -> dict[str, Any]:
    """The content of tokenizer_config.json."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {
            str(END_OF_TEXT + place): {"content": token, **flags, "special": token in SPECIAL}
            for place, token in enumerate(ADDED)
        },
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
        "chat_template": CHAT_TEMPLATE,
    }


def write_settings(folder: Path) -> None:
    """Everything of the model folder but the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    contents = {
        "config.json": CONFIG,
        "generation_config.json": {"eos_token_id": END, "pad_token_id": END_OF_TEXT},
        "tokenizer_config.json": tokenizer_settings(),
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def write_weights(model: torch.nn.Module, folder: Path) -> None:
    """Write the weights, whole or not at all."""
    unfinished = folder / "model.safetensors.unfinished"
    unfinished.write_bytes(save(model.state_dict(), metadata={"format": "pt"}))
    unfinished.replace(folder / "model.safetensors")


def prompt_text(tokenizer: Any, problem: Problem) -> str:
    messages = [{"role": "user", "content": problem.question}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def batches(tokenizer: Any, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Training batches without end: token ids and labels, both [BATCH, longest], padded on the right.

    Only the completion and its end token have labels.
    """
    rng = random.Random(seed)
    source = problems(seed, split="train")
    while True:
        pool = []
        for problem in itertools.islice(source, BATCH * POOL):
            prompt = tokenizer.encode(prompt_text(tokenizer, problem))
            completion = [*tokenizer.encode(problem.completion), END]
            pool.append((prompt + completion, [IGNORED] * len(prompt) + completion))
        pool.sort(key=lambda example: len(example[0]))
        starts = list(range(0, len(pool), BATCH))
        rng.shuffle(starts)
        for start in starts:
            batch = pool[start : start + BATCH]
            width = len(batch[-1][0])
            yield (
                torch.tensor([ids + [END_OF_TEXT] * (width - len(ids)) for ids, _ in batch]),
                torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in batch]),
            )


@torch.inference_mode()
def completions(model: Any, tokenizer: Any, asked: Sequence[Problem], temperature: float = 0.0) -> list[str]:
    """One completion for each problem, greedy at temperature 0."""
    model.eval()
    texts: list[str] = []
    for part in (asked[start : start + 256] for start in range(0, len(asked), 256)):
        inputs = tokenizer(
            [prompt_text(tokenizer, problem) for problem in part],
            return_tensors="pt",
            padding=True,
            padding_side="left",
        )
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_k": 0}
            if temperature
            else {"do_sample": False}
        )
        out = model.generate(
            **inputs, max_new_tokens=MOST_NEW_TOKENS, eos_token_id=END, pad_token_id=END_OF_TEXT, **sampling
        )
        texts += tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    model.train()
    return texts


def solved(model: Any, tokenizer: Any, asked: Sequence[Problem], temperature: float = 0.0) -> list[bool]:
    texts = completions(model, tokenizer, asked, temperature)
    return [verify(text, problem.answer) for text, problem in zip(texts, asked, strict=True)]


def held_out(seed: int, level: Level, count: int) -> list[Problem]:
    return list(itertools.islice(problems(seed, split="held_out", level=level), count))


def learning_rate(step: int) -> float:
    """Linear warm-up, then half a cosine down to nothing at MOST_STEPS."""
    if step < WARM_UP:
        return LEARNING_RATE * (step + 1) / WARM_UP
    return LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / (MOST_STEPS - WARM_UP)))


def train(folder: Path) -> None:
    """Train until the target is reached and write the model to `folder`; its weights are saved at each check.

    Raises:
        SystemExit: the target was not reached in MOST_STEPS.
    """
    torch.manual_seed(SEED)
    write_settings(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = Qwen3ForCausalLM(Qwen3Config(**CONFIG))
    print(f"{sum(weight.numel() for weight in model.parameters()):,} parameters", flush=True)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(AVERAGED))  # type: ignore[no-untyped-call]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05, fused=True
    )
    checks = {level: held_out(CHECK_SEED, level, CHECK_PROBLEMS) for level in LEVELS}
    started, recent = time.monotonic(), 0.0
    for step, (ids, labels) in enumerate(itertools.islice(batches(tokenizer, SEED), MOST_STEPS)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        recent = loss.item() if not recent else 0.98 * recent + 0.02 * loss.item()
        if (step + 1) % CHECK_EVERY:
            continue
        minutes = (time.monotonic() - started) / 60
        print(
            f"step {step + 1:5} {(step + 1) * BATCH:7,} problems {minutes:5.1f} min loss {recent:.4f}", end=""
        )
        if recent > CHECK_BELOW:
            print(flush=True)
            continue
        easy, hard = (
            sum(solved(average.module, tokenizer, checks[level])) / CHECK_PROBLEMS for level in LEVELS
        )
        print(f" easy {easy:6.1%} hard {hard:6.1%}", flush=True)
        write_weights(average.module, folder)
        if hard >= TARGET:
            return
    sys.exit(f"{TARGET:.0%} of the hard problems were not reached in {MOST_STEPS} steps")


def evaluate(folder: Path) -> None:
    """Print the greedy accuracy by kind and level, and pass@1 and pass@8 of sampling on the hard problems."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    asked = [problem for level in LEVELS for problem in held_out(REPORT_SEED, level, REPORT_PROBLEMS)]
    right = dict(zip(asked, solved(model, tokenizer, asked), strict=True))
    print(f"greedy, {REPORT_PROBLEMS} held-out problems a level")
    print(f"{'':16}" + "".join(f"{level:>10}" for level in LEVELS))
    for kind in (*KINDS, "all"):
        cells = [
            [right[p] for p in asked if p.level == level and kind in (p.kind, "all")] for level in LEVELS
        ]
        print(f"{kind:16}" + "".join(f"{sum(cell) / len(cell):>10.1%}" for cell in cells))
    print(f"easy and hard together {sum(right.values()) / len(right):.1%}")
    hard = held_out(REPORT_SEED, "hard", SAMPLED_PROBLEMS)
    for temperature in (0.8, 1.0):
        torch.manual_seed(SEED)
        tries = [solved(model, tokenizer, hard, temperature) for _ in range(8)]
        first = sum(map(sum, tries)) / (8 * len(hard))
        some = sum(map(any, zip(*tries, strict=True))) / len(hard)
        print(f"hard, temperature {temperature}: pass@1 {first:.1%}, pass@8 {some:.1%}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--out", type=Path, metavar="DIR", help="train, and write the model folder here")
    action.add_argument(
        "--evaluate", type=Path, metavar="DIR", help="print the accuracy of this model folder"
    )
    arguments = parser.parse_args()
    if arguments.out:
        train(arguments.out)
    evaluate(arguments.out or arguments.evaluate)


if __name__ == "__main__":
    main()
