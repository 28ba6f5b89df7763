"""The settings of a scripted engine: the flags of `penstock engine --scripted`, and what they mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from penstock.errors import ConfigError
from penstock.scripted.chaos import Chaos
from penstock.scripted.distribution import Distribution
from penstock.scripted.schedule import Capacity

DEFAULT_CONTEXT: Final = 32_768
"""Tokens of context, where the KV cache holds as many."""


@dataclass(frozen=True, kw_only=True)
class ScriptedConfig:
    """What an engine does, checked."""

    names: tuple[str, ...]
    """Names clients may use; answers carry the first."""
    capacity: Capacity
    ttft: Distribution
    """Seconds from the end of the prefill to the first token."""
    length: Distribution | None
    """Tokens a completion has, if the request lets it. None: as many as the request asks for."""
    context: int
    """Tokens of prompt and completion together, at most."""
    chaos: Chaos
    seed: int

    @property
    def model(self) -> str:
        return self.names[0]


@dataclass(frozen=True, kw_only=True)
class ScriptedArgs:
    """Serve vLLM's API without a model, as fast, slow or faulty as is told."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0: any free port; the ready line says which."""
    served_model_name: tuple[str, ...] = ("scripted",)
    """Names clients may use; answers carry the first."""
    itl: str = "10ms"
    """Time from one token to the next of a request that runs alone: a time, or a distribution such as
    lognormal:mean=10ms,sigma=0.3, drawn for each step of the batch."""
    itl_per_seq: str = "0"
    """Time that each further running request adds to it."""
    ttft: str = "0"
    """Time from the end of the prefill to the first token: a time, or a distribution, drawn per sample."""
    prefill_tokens_per_second: float | None = None
    """Speed of the prefill, one prompt after the other. None: at once."""
    length: str = "max_tokens"
    """Tokens of a completion: a number or a distribution such as lognormal:mean=200,sigma=0.8, cut at
    max_tokens. max_tokens: as many as the request allows."""
    max_num_seqs: int = 256
    """Samples that run at the same time; further ones wait."""
    knee: int | None = None
    """Running samples from which the throughput no longer grows. None: it grows up to max_num_seqs."""
    kv_tokens: int = 500_000
    """Tokens the KV cache holds; when it is full, samples are preempted."""
    block_size: int = 16
    """Tokens of one KV block."""
    tokens_per_step: int = 1
    """Tokens a sample makes at a time, all in one chunk, as with speculative decoding."""
    max_model_len: int | None = None
    """Tokens of context. None: 32768, or what the KV cache holds."""
    chaos: str = ""
    """What goes wrong, such as reset:0.01,stall:0.001,503:0.05:retry_after=2,kill:every=20s."""
    seed: int = 0
    """Of all that is drawn, and of the texts."""
    shutdown_timeout: float = 2.0
    """Seconds that requests in flight have to finish after SIGTERM or SIGINT."""

    def config(self) -> ScriptedConfig:
        """Raises ConfigError in one sentence for what cannot work."""
        if not self.served_model_name:
            raise ConfigError("--served-model-name needs a name")
        capacity = Capacity(
            itl=_read("itl", self.itl, seconds=True),
            itl_per_seq=_read("itl-per-seq", self.itl_per_seq, seconds=True).mean,
            knee=self.knee,
            max_num_seqs=self.max_num_seqs,
            kv_tokens=self.kv_tokens,
            block_size=self.block_size,
            prefill_rate=self.prefill_tokens_per_second,
            tokens_per_step=self.tokens_per_step,
        )
        held = capacity.blocks * capacity.block_size
        context = min(DEFAULT_CONTEXT, held) if self.max_model_len is None else self.max_model_len
        if not 2 <= context <= held:
            raise ConfigError(f"--max-model-len must be from 2 to the {held} tokens the KV cache holds")
        return ScriptedConfig(
            names=self.served_model_name,
            capacity=capacity,
            ttft=_read("ttft", self.ttft, seconds=True),
            length=None if self.length == "max_tokens" else _read("length", self.length, seconds=False),
            context=context,
            chaos=Chaos.parse(self.chaos),
            seed=self.seed,
        )


def _read(flag: str, text: str, *, seconds: bool) -> Distribution:
    try:
        return Distribution.of_seconds(text) if seconds else Distribution.of_numbers(text)
    except ConfigError as error:
        raise ConfigError(f"--{flag}: {error}") from None
