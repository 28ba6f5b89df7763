"""Tokens per second of the embedded engine beside a real vLLM, same checkpoint, one thread each, in one run.

    python bench/tokens.py [--model DIR] [--vllm /path/to/vllm-venv/bin/python]

Chat requests of 32 tokens over HTTP, 1, 32 and 256 in flight. Without --model a random Qwen3 of 0.3 million
parameters is made, so that what is compared is mostly the engines' own overhead. Without --vllm only the
embedded engine runs.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from penstock.client import Client
from penstock.models import ARITHMETIC
from penstock.sample import SamplingParams
from penstock.wire.loop import run

LEVELS = {1: 60, 32: 1_500, 256: 5_000}
"""Requests in flight: requests sent."""

PARAMS = SamplingParams(max_tokens=32, ignore_eos=True, temperature=0.0)

VLLM_ENVIRONMENT = {
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
VLLM_FLAGS = [
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"),
    *("--distributed-executor-backend", "uni", "--kv-cache-memory-bytes", "256M"),
]


@dataclass(frozen=True)
class Args:
    """Tokens per second, side by side."""

    model: Path | None = None
    vllm: Path | None = (
        Path(os.environ["PENSTOCK_VLLM_PYTHON"]) if "PENSTOCK_VLLM_PYTHON" in os.environ else None
    )
    """The Python of an environment that vLLM is installed in."""
    rounds: int = 3


def random_checkpoint(folder: Path) -> Path:
    """A Qwen3 of 0.3 million random parameters, with the shipped model's tokenizer."""
    shutil.copytree(ARITHMETIC, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    hidden, inner, layers, heads, kv_heads, size = 96, 320, 2, 4, 2, 32
    config |= {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    config |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": size}
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (config["vocab_size"], hidden),
    }
    for number in range(layers):
        at = f"model.layers.{number}"
        shapes |= {
            f"{at}.input_layernorm.weight": (hidden,),
            f"{at}.post_attention_layernorm.weight": (hidden,),
            f"{at}.self_attn.q_proj.weight": (heads * size, hidden),
            f"{at}.self_attn.k_proj.weight": (kv_heads * size, hidden),
            f"{at}.self_attn.v_proj.weight": (kv_heads * size, hidden),
            f"{at}.self_attn.o_proj.weight": (hidden, heads * size),
            f"{at}.self_attn.q_norm.weight": (size,),
            f"{at}.self_attn.k_norm.weight": (size,),
            f"{at}.mlp.gate_proj.weight": (inner, hidden),
            f"{at}.mlp.up_proj.weight": (inner, hidden),
            f"{at}.mlp.down_proj.weight": (hidden, inner),
        }
    torch.manual_seed(0)
    weights = {name: torch.ones(s) if len(s) == 1 else torch.randn(s) * 0.1 for name, s in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def commands(folder: Path, vllm: Path | None) -> dict[str, Sequence[str]]:
    common = ["--host", "127.0.0.1", "--served-model-name", "bench"]
    ours = [sys.executable, "-m", "penstock.engine", "--model", str(folder), "--threads", "1", *common]
    found: dict[str, Sequence[str]] = {"embedded engine": ours}
    if vllm is not None:
        found["vLLM"] = [str(vllm.parent / "vllm"), "serve", str(folder), *common, *VLLM_FLAGS]
    return found


@asynccontextmanager
async def serving(command: Sequence[str]) -> AsyncIterator[Client]:
    port = free_port()
    process = subprocess.Popen(
        [*command, "--port", str(port)],
        env=os.environ | VLLM_ENVIRONMENT | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        async with Client(f"http://127.0.0.1:{port}", model="bench") as client, asyncio.timeout(180):
            while (await client.health())[f"http://127.0.0.1:{port}"] is not None:
                if process.poll() is not None:
                    sys.exit(f"{command[0]} ended with status {process.returncode} before it was ready")
                await asyncio.sleep(0.2)
        async with Client(f"http://127.0.0.1:{port}", model="bench") as client:
            yield client
    finally:
        process.terminate()
        process.wait(30)


async def tokens_per_second(client: Client, in_flight: int, requests: int) -> float:
    numbers = iter(range(requests))
    tokens = 0

    async def work() -> None:
        nonlocal tokens
        for number in numbers:
            messages = [{"role": "user", "content": f"What is {number} + {number * 7}?"}]
            sample = await client.chat(messages, PARAMS)
            tokens += sample.usage.completion_tokens

    started = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(in_flight)))
    assert tokens == requests * 32, "an engine generated another number of tokens than it was asked for"
    return tokens / (time.perf_counter() - started)


async def measure(folder: Path, args: Args) -> dict[str, dict[int, float]]:
    """The best of some rounds for each engine and level; the engines take turns."""
    best: dict[str, dict[int, float]] = {}
    for _ in range(args.rounds):
        for name, command in commands(folder, args.vllm).items():
            async with serving(command) as client:
                await tokens_per_second(client, 32, 64)
                for in_flight, requests in LEVELS.items():
                    rate = await tokens_per_second(client, in_flight, requests)
                    found = best.setdefault(name, {})
                    found[in_flight] = max(rate, found.get(in_flight, 0.0))
    return best


def main() -> None:
    args = tyro.cli(Args)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model or random_checkpoint(Path(scratch, "tiny"))
        best = run(measure(folder, args))
    table = Table(title=f"tokens/s, chat requests of 32 tokens, best of {args.rounds} rounds")
    table.add_column("")
    for in_flight in LEVELS:
        table.add_column(f"{in_flight} in flight", justify="right")
    for name, rates in best.items():
        table.add_row(name, *(f"{rate:,.0f}" for rate in rates.values()))
    if len(best) == 2:
        ours, theirs = best.values()
        table.add_row("ratio", *(f"{ours[level] / theirs[level]:.1f}" for level in LEVELS))
    Console().print(table)


if __name__ == "__main__":
    main()
