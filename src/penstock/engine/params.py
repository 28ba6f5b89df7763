"""What a checked request asks of the engine: defaults filled in, limits and ranges kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from penstock.engine.config import read_json
from penstock.engine.protocol import ChatRequest, CompletionRequest
from penstock.engine.sampling import SamplingParams
from penstock.errors import ConfigError
from penstock.wire.openai_server import DEFAULT_COMPLETION_TOKENS, MAX_LOGPROBS, MAX_SAMPLES, Refused

MIN_TEMPERATURE: Final = 0.01
"""Lower temperatures, but for zero, are raised to this one: the logits would overflow."""

MAX_TEMPERATURE: Final = 2.0

GREEDY_TEMPERATURE: Final = 1e-5
"""Temperatures below this one mean greedy sampling."""

NAMED_IN_ERRORS: Final = frozenset({"temperature", "top_p", "max_tokens"})
"""Sampling parameters that vLLM names as the `param` of an error body; of others it names only the rule."""

Value = TypeVar("Value")


class Defaults(msgspec.Struct, frozen=True, kw_only=True):
    """Sampling parameters of requests that leave them out, from the checkpoint's generation_config.json."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_new_tokens: int | None = None

    @classmethod
    def load(cls, folder: Path) -> Defaults:
        """Raises ConfigError when the file holds something else."""
        settings = read_json(folder / "generation_config.json") or {}
        given = {name: settings[name] for name in cls.__struct_fields__ if settings.get(name) is not None}
        try:
            return msgspec.convert(given, cls)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{folder / 'generation_config.json'}: {error}") from None


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What the model can take."""

    max_model_len: int
    vocab_size: int


def completion_length(request: ChatRequest | CompletionRequest, limits: Limits) -> int | None:
    """The max_tokens asked for. Raises Refused when no prompt at all would leave room for it."""
    name, wanted = "max_tokens", request.max_tokens
    if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
        name, wanted = "max_completion_tokens", request.max_completion_tokens
    elif isinstance(request, CompletionRequest) and wanted is None:
        wanted = DEFAULT_COMPLETION_TOKENS
    if wanted is not None and wanted > limits.max_model_len:
        raise Refused(
            f"{name}={wanted} cannot be greater than max_model_len={limits.max_model_len}. "
            "Please request fewer output tokens.",
            param=name,
        )
    return wanted


def check_prompt(token_ids: Sequence[int], limits: Limits) -> None:
    """Raises Refused for a prompt that is empty, does not fit, or has ids the model does not know."""
    if not token_ids:
        raise Refused("The decoder prompt cannot be empty")
    if len(token_ids) > limits.max_model_len:
        raise Refused(
            f"This model's maximum context length is {limits.max_model_len} tokens. However, your prompt "
            f"contains {len(token_ids)} input tokens, which exceeds this limit even without any output "
            "tokens. Please reduce the length of the input prompt.",
            param="input_tokens",
        )
    if (largest := max(token_ids)) >= limits.vocab_size:
        raise Refused(f"Token id {largest} is out of vocabulary")


def sampling_params(
    request: ChatRequest | CompletionRequest, defaults: Defaults, limits: Limits, max_tokens: int
) -> SamplingParams:
    """What the engine is asked for. Raises Refused for values out of range."""
    temperature = _given(request.temperature, defaults.temperature)
    _check_bounds(request, temperature, limits)
    try:
        return _resolved(request, defaults, temperature, max_tokens)
    except ConfigError as error:
        name = str(error).partition(" ")[0]
        raise Refused(str(error), param=name if name in NAMED_IN_ERRORS else None) from None


def _resolved(
    request: ChatRequest | CompletionRequest, defaults: Defaults, temperature: float, max_tokens: int
) -> SamplingParams:
    return SamplingParams(
        n=1 if request.n is None else request.n,
        temperature=max(temperature, MIN_TEMPERATURE) if temperature > 0.0 else temperature,
        top_p=_given(request.top_p, defaults.top_p),
        top_k=_given(request.top_k, defaults.top_k),
        min_p=_given(request.min_p, defaults.min_p),
        repetition_penalty=_given(request.repetition_penalty, defaults.repetition_penalty),
        presence_penalty=_given(request.presence_penalty, defaults.presence_penalty),
        frequency_penalty=_given(request.frequency_penalty, defaults.frequency_penalty),
        seed=None if request.seed == -1 else request.seed,
        stop_token_ids=tuple(dict.fromkeys(request.stop_token_ids or ())),
        max_tokens=max_tokens,
        min_tokens=request.min_tokens,
        ignore_eos=request.ignore_eos,
        logprobs=_logprobs(request),
    )


def _given(value: Value | None, default: Value) -> Value:
    return default if value is None else value


def _logprobs(request: ChatRequest | CompletionRequest) -> int | None:
    if isinstance(request, CompletionRequest):
        return request.logprobs
    return (request.top_logprobs or 0) if request.logprobs else None


def _check_bounds(request: ChatRequest | CompletionRequest, temperature: float, limits: Limits) -> None:
    """The bounds that are the server's and not the sampler's."""
    n, logprobs, stop_ids = request.n, _logprobs(request), request.stop_token_ids or ()
    if n is not None and n > MAX_SAMPLES:
        raise Refused(f"n must be at most {MAX_SAMPLES}, got {n}.")
    if n is not None and n > 1 and temperature < GREEDY_TEMPERATURE:
        raise Refused(f"n must be 1 when using greedy sampling, got {n}.")
    if temperature > MAX_TEMPERATURE:
        raise Refused(f"temperature must be in [0, 2], got {temperature}.", param="temperature")
    if logprobs is not None and not 0 <= logprobs <= MAX_LOGPROBS:
        raise Refused(
            f"Requested sample logprobs of {logprobs}, which is greater than max allowed: {MAX_LOGPROBS}",
            param="logprobs",
        )
    if unknown := [token for token in stop_ids if not 0 <= token < limits.vocab_size]:
        raise Refused(f"stop_token_ids {unknown} are not in the vocabulary.", param="stop_token_ids")
