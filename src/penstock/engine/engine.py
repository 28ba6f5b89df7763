"""The engine: requests of token ids in, tokens out, one step at a time.

`LLMEngine` is synchronous and owned by one thread. A step schedules, computes and samples; every sequence it
sampled for yields exactly one `Output`, and the last Output of a sequence carries its finish reason. An
aborted sequence yields nothing more. What is added before a step can be part of that step.

Weights change between two steps, all at once, and their version is a count: what was sampled before has the
version before. Nothing that was computed with earlier weights is served to a request that comes later.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import torch

from penstock.engine.attention import (
    Batch,
    Kernels,
    TorchKernels,
    allocate_cache,
    release_cache,
    restore_cache,
    rotary_table,
)
from penstock.engine.config import EngineConfig, ModelConfig
from penstock.engine.kv_cache import BlockPool
from penstock.engine.model import Model
from penstock.engine.native import NativeKernels, unsupported
from penstock.engine.sampling import Draw, Sampler, SamplingParams, TokenLogprobs, noise_key
from penstock.engine.scheduler import Pause, Scheduler, Step
from penstock.engine.sequence import Sequence
from penstock.engine.weights import Weights
from penstock.errors import ConfigError, EngineError

log = logging.getLogger(__name__)

USUAL_LEN: Final = 1024
"""Tokens per sequence the KV cache has room for on CPU unless its size is given."""

SLEEPERS: Final = frozenset({"weights", "kv_cache"})
"""What sleeps and is woken, under vLLM's tags."""


class Output(msgspec.Struct, gc=False):
    """New tokens of one sequence."""

    request_id: str
    index: int
    """Which of the request's n completions."""
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    """One for each of `token_ids` when the request asked for them."""
    finish_reason: str | None
    """`stop` or `length` on the sequence's last Output, else None."""
    stop_reason: int | None
    """The stop token id that ended it; None for an end-of-sequence token."""
    num_cached_tokens: int
    """Prompt tokens that came from the prefix cache."""


class EngineStats(msgspec.Struct, frozen=True):
    """Counts since the start, and the state between two steps."""

    running: int
    waiting: int
    kv_blocks_total: int
    kv_blocks_used: int
    """Blocks held by running sequences, shared ones counted once."""
    kv_slots_used: int
    """Token slots in them."""
    kv_tokens_held: int
    """Token slots in them that hold a token."""
    preemptions: int
    prompt_tokens: int
    """Prompt tokens of requests whose prompt has been computed."""
    generation_tokens: int
    prefix_cache_queries: int
    """Tokens looked up in the prefix cache."""
    prefix_cache_hits: int
    """Tokens found there."""
    weight_version: int


class LLMEngine:
    """Runs one checkpoint. Raises ConfigError when the checkpoint or the configuration cannot work."""

    def __init__(self, config: EngineConfig) -> None:
        folder = Path(config.model)
        self.config = config
        self.model_config = model_config = ModelConfig.load(folder)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.device = resolve_device(config)
        dtype = resolve_dtype(config, model_config)
        wanted_len = resolve_max_model_len(config, model_config)
        weights = Weights(model_config, dtype, self.device)
        weights.load(folder)
        num_blocks = resolve_num_blocks(config, model_config, wanted_len, dtype, self.device)
        self.max_model_len = fit_max_model_len(config, wanted_len, num_blocks)
        self._cache = allocate_cache(model_config, num_blocks, config.block_size, dtype, self.device)
        rotary = rotary_table(model_config, self.max_model_len, self.device)
        self.kernels = choose_kernels(config, model_config, weights, self._cache, rotary)
        self.weights = weights
        self.weight_version = 0
        """Counts the weights that were put in place of others, unless it is set."""
        self._asleep: set[str] = set()
        self._weights_lost = False
        """Since they were released: nothing can be computed until they are all replaced."""
        self._pause = Pause.NONE
        """The pause asked for, which holds once the engine is awake and has weights."""
        self.model = Model(weights, self.kernels)
        self.scheduler = Scheduler(
            BlockPool(num_blocks, config.block_size),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            caching=config.enable_prefix_caching,
        )
        self.sampler = Sampler(config.max_num_seqs, model_config.vocab_size, self.kernels, self.device)
        self._random = random.Random(config.seed)
        self._requests: dict[str, list[Sequence]] = {}
        self._arrivals = 0
        self._prompt_tokens = 0
        self._generation_tokens = 0

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a completion unless `ignore_eos`."""
        return self.model_config.eos_token_ids

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self.model_config.vocab_size

    def add_request(self, request_id: str, prompt_token_ids: list[int], params: SamplingParams) -> None:
        """Queue a request for its n completions. Raises ConfigError when it can never be served."""
        self._check(request_id, prompt_token_ids, params)
        stop_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids = stop_ids.union(self.eos_token_ids)
        limit = min(len(prompt_token_ids) + params.max_tokens, self.max_model_len)
        seed = self._random.getrandbits(64) if params.seed is None else params.seed
        sequences = []
        for index in range(params.n):
            sequence = Sequence(
                request_id,
                index,
                prompt_token_ids,
                params,
                arrival=self._arrivals,
                limit=limit,
                stop_ids=stop_ids,
                noise_key=noise_key(seed, index),
            )
            self._arrivals += 1
            sequences.append(sequence)
            self.scheduler.add(sequence)
        self._requests[request_id] = sequences

    def _check(self, request_id: str, prompt: list[int], params: SamplingParams) -> None:
        if request_id in self._requests:
            raise ConfigError(f"Request id {request_id!r} is in use.")
        if not prompt:
            raise ConfigError("The prompt is empty.")
        if len(prompt) >= self.max_model_len:
            raise ConfigError(
                f"The prompt has {len(prompt)} tokens; the context of {self.max_model_len} tokens "
                f"must hold it and at least one more."
            )
        for name, ids in (("Prompt", prompt), ("Stop", params.stop_token_ids)):
            if ids and not (min(ids) >= 0 and max(ids) < self.vocab_size):
                raise ConfigError(f"{name} token ids must be in 0 … {self.vocab_size - 1}.")

    def abort(self, request_id: str, index: int | None = None) -> bool:
        """Drop a request's unfinished sequences, or one of them; False when there are none."""
        dropped = [
            sequence
            for sequence in self._requests.get(request_id, ())
            if index is None or sequence.index == index
        ]
        for sequence in dropped:
            self._drop(sequence)
        return bool(dropped)

    def _drop(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        siblings = self._requests[sequence.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._requests[sequence.request_id]

    def has_unfinished(self) -> bool:
        """Whether there are requests."""
        return bool(self._requests)

    def can_run(self) -> bool:
        """Whether a further step would do anything."""
        return bool(self._requests) and self.scheduler.can_run()

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """Compute one step; [] when it only worked on prompts, or there was nothing to do."""
        step = self.scheduler.schedule()
        if not step.sequences:
            return []
        for sequence in step.admitted:
            self.sampler.admit(sequence)
        logits = self._compute(step)
        if not step.sampled:
            return []
        return self._advance(step.sampled, self.sampler.sample(logits, step.sampled))

    def _compute(self, step: Step) -> torch.Tensor:
        """Logits of the sampled sequences, [sampled, vocabulary]."""
        if step.copies:
            self.kernels.copy_blocks(step.copies)
        count = len(step.sequences)
        offsets = np.zeros(count + 1, dtype=np.int32)
        np.cumsum(step.counts, out=offsets[1:])
        self.kernels.begin(
            Batch(
                rows=np.array([sequence.row for sequence in step.sequences], dtype=np.int32),
                starts=np.array(step.starts, dtype=np.int32),
                offsets=offsets,
                tables=self.scheduler.tables,
            )
        )
        tokens = torch.from_numpy(np.array(step.tokens)).to(self.device)
        wanted = None
        if step.last_tokens != list(range(len(step.tokens))):
            wanted = torch.tensor(step.last_tokens, dtype=torch.int64, device=self.device)
        return self.model.forward(tokens, wanted)

    def _advance(self, sampled: list[Sequence], draw: Draw) -> list[Output]:
        """Append the tokens drawn, and let go of the sequences they finish."""
        outputs = []
        self._generation_tokens += len(sampled)
        for row, (sequence, token) in enumerate(zip(sampled, draw.tokens, strict=True)):
            tokens = sequence.tokens
            if sequence.index == 0 and len(tokens) == sequence.num_prompt:
                self._prompt_tokens += sequence.num_prompt
            tokens.append(token)
            finish_reason = stop_reason = None
            if token in sequence.stop_ids and len(tokens) - sequence.num_prompt >= sequence.params.min_tokens:
                finish_reason = "stop"
                if token in sequence.params.stop_token_ids and token not in self.eos_token_ids:
                    stop_reason = token
            elif len(tokens) >= sequence.limit:
                finish_reason = "length"
            logprobs = [draw.logprobs[row]] if row in draw.logprobs else None
            outputs.append(
                Output(
                    sequence.request_id,
                    sequence.index,
                    [token],
                    logprobs,
                    finish_reason,
                    stop_reason,
                    sequence.num_cached,
                )
            )
            if finish_reason is not None:
                self._drop(sequence)
        return outputs

    def stats(self) -> EngineStats:
        """Counts and state; cheap enough for every step."""
        scheduler = self.scheduler
        pool = scheduler.pool
        slots = pool.num_held * pool.block_size
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            kv_blocks_total=pool.num_blocks,
            kv_blocks_used=pool.num_held,
            kv_slots_used=slots,
            kv_tokens_held=slots - scheduler.num_empty_slots(),
            preemptions=scheduler.num_preemptions,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            prefix_cache_queries=scheduler.prefix_queries,
            prefix_cache_hits=scheduler.prefix_hits,
            weight_version=self.weight_version,
        )

    # -- control ----------------------------------------------------------------------------------

    def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        """Forget all cached prefixes; as vLLM, False and nothing is forgotten while sequences hold blocks.

        With `reset_running_requests` they give them back, and are computed again from their tokens.
        """
        if reset_running_requests:
            self.scheduler.preempt_all()
        if self.scheduler.running:
            return False
        self.scheduler.pool.forget()
        return True

    @property
    def paused(self) -> bool:
        """Whether anything is held back, by a pause or by sleep."""
        return self._pause is not Pause.NONE or bool(self._asleep)

    def pause(self, how: Pause) -> None:
        """Hold back what `how` says. Raises ConfigError when a sleeping engine is to go on."""
        if how is Pause.NONE and self._asleep:
            raise ConfigError(f"The engine is asleep ({', '.join(sorted(self._asleep))}): wake it up first.")
        self._pause = how
        self._settle()

    def sleep(self, level: int) -> None:
        """Level 1 gives back the memory of the KV cache, level 2 also that of the weights.

        Sequences that run are put back in the queue. An engine that is asleep stays as it is.
        """
        if level == 0 or self._asleep:
            return
        self.reset_prefix_cache(reset_running_requests=True)
        release_cache(self._cache)
        self._asleep = set(SLEEPERS)
        if level == 2:
            self.weights.release()
            self._weights_lost = True
        self._settle()

    def wake_up(self, tags: Iterable[str] | None = None) -> bool:
        """Take back the memory of what is named by `tags` (None: of all); whether nothing is asleep any more.

        Then the pause ends, too; after a sleep of level 2 only `replace_weights` lets requests go on. As
        vLLM, nothing is woken when a tag is not asleep; `scheduling` names nothing that has memory.
        """
        wanted = self._asleep & SLEEPERS if tags is None else {tag for tag in tags if tag != "scheduling"}
        if wanted <= self._asleep:
            self._asleep -= wanted
            if "kv_cache" in wanted:
                restore_cache(self._cache)
            if "weights" in wanted and self._weights_lost:
                self.weights.restore()
        if not self._asleep:
            self._pause = Pause.NONE
        self._settle()
        return not self._asleep

    def replace_weights(self, tensors: Mapping[str, torch.Tensor], version: int | None = None) -> None:
        """Put tensors that were checked with `Weights.check` in place of parameters; version None: the next.

        Running sequences keep their keys and values; cached prefixes are forgotten. Raises ConfigError, and
        nothing has changed, when the weights are asleep, or when they were released and not all are here.
        """
        if "weights" in self._asleep:
            raise ConfigError("The weights are asleep: wake them up before they are replaced.")
        if self._weights_lost and (missing := self.weights.parameters.keys() - tensors.keys()):
            raise ConfigError(
                f"The weights were released, so all are needed; {len(missing)} of "
                f"{len(self.weights.parameters)} are not given, {min(missing)} among them."
            )
        self.weights.fill(tensors)
        self._weights_lost = False
        self.scheduler.pool.forget()
        self.weight_version = self.weight_version + 1 if version is None else version
        self._settle()

    def _settle(self) -> None:
        idle = bool(self._asleep) or self._weights_lost
        self.scheduler.pause = Pause.ALL if idle else self._pause


def resolve_device(config: EngineConfig) -> torch.device:
    """The device asked for. Raises ConfigError when it is not there."""
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ConfigError("device is cuda, but torch finds no CUDA device.")
    return torch.device("cuda" if config.device != "cpu" and available else "cpu")


def resolve_dtype(config: EngineConfig, model: ModelConfig) -> torch.dtype:
    """The dtype of weights and KV cache."""
    name = model.dtype if config.dtype == "auto" else config.dtype
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in dtypes:
        raise ConfigError(f"dtype {name!r} is not supported; supported: {', '.join(dtypes)}.")
    return dtypes[name]


def resolve_max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    """The longest sequence asked for. Raises ConfigError when the model does not reach it."""
    length = config.max_model_len or model.max_position_embeddings
    if length > model.max_position_embeddings:
        raise ConfigError(
            f"max_model_len ({length}) is greater than the model's max_position_embeddings "
            f"({model.max_position_embeddings})."
        )
    window = model.sliding_window
    if window is not None and length > window:
        if config.max_model_len is not None:
            raise ConfigError(
                f"max_model_len ({length}) is greater than the model's sliding window ({window}), "
                f"and sliding window attention is not supported."
            )
        return window
    return length


def resolve_num_blocks(
    config: EngineConfig, model: ModelConfig, max_model_len: int, dtype: torch.dtype, device: torch.device
) -> int:
    """KV blocks to allocate. Raises ConfigError when there is no memory for one."""
    if config.num_gpu_blocks_override is not None:
        return config.num_gpu_blocks_override
    block_bytes = (
        2 * model.num_layers * model.num_kv_heads * model.head_dim * config.block_size * dtype.itemsize
    )
    if config.kv_cache_memory_bytes is not None:
        memory = config.kv_cache_memory_bytes
    elif device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        memory = free - int((1.0 - config.gpu_memory_utilization) * total)
    else:
        memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    usual_len = max_model_len if device.type == "cuda" else min(max_model_len, USUAL_LEN)
    needed = max(config.max_num_seqs * usual_len, max_model_len) // config.block_size + config.max_num_seqs
    affordable = memory // block_bytes
    if affordable < 1:
        raise ConfigError(
            f"No memory for the KV cache: a block takes {block_bytes} bytes of the {memory} there are."
        )
    return affordable if config.kv_cache_memory_bytes is not None else min(needed, affordable)


def fit_max_model_len(config: EngineConfig, max_model_len: int, num_blocks: int) -> int:
    """`max_model_len`, or what the KV cache holds of it unless it was asked for. Raises ConfigError."""
    capacity = num_blocks * config.block_size
    if capacity >= max_model_len:
        return max_model_len
    if config.max_model_len is None:
        return capacity
    raise ConfigError(
        f"The KV cache holds {capacity} tokens, fewer than max_model_len ({max_model_len}): "
        f"give it more memory or lower max_model_len."
    )


def choose_kernels(
    config: EngineConfig, model: ModelConfig, weights: Weights, cache: torch.Tensor, rotary: torch.Tensor
) -> Kernels:
    """The C kernels where they apply and can be compiled, else torch's."""
    if config.attention_backend == "torch":
        return TorchKernels(model, weights.layers, cache, rotary)
    reason = unsupported(model, config.block_size, cache.dtype, cache.device)
    if reason is None:
        try:
            return NativeKernels(model, weights.layers, cache, rotary)
        except EngineError as error:
            reason = str(error)
            if config.attention_backend == "auto":
                log.warning("Using slower torch kernels: %s", reason)
    if config.attention_backend == "native":
        raise ConfigError(f"The native kernels cannot be used: {reason.rstrip('.')}.")
    return TorchKernels(model, weights.layers, cache, rotary)
