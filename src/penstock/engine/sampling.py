"""From logits to tokens: `SamplingParams`, and the sampler of a whole batch.

Each random draw uses one uniform number that is a pure function of (seed, completion index, position).
A request with a seed therefore gives the same tokens whatever else is in the batch, and again after a
preemption; the n completions of one seeded request differ from each other.

The order of operations is vLLM's: raw logprobs, minimum length, penalties, greedy choice or temperature,
then min_p, top_k, top_p.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from penstock.engine.attention import Kernels
from penstock.engine.draw import Choice, Cuts
from penstock.engine.sequence import Sequence
from penstock.errors import ConfigError

RANDOM: Final = 1
TRUNCATED: Final = 2
PENALIZED: Final = 4
LOGPROBS: Final = 8
MIN_TOKENS: Final = 16
"""Bits of what a row needs beyond the largest logit; a batch pays only for the bits that occur in it."""

_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)
_MIX_1: Final = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2: Final = np.uint64(0x94D049BB133111EB)
"""Constants of splitmix64 (Steele, Lea and Flood, Fast splittable pseudorandom number generators, 2014)."""

_SEED_MASK: Final = (1 << 64) - 1


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How to choose tokens, all defaults resolved. Names and meaning are vLLM's.

    Raises ConfigError for values outside their range.
    """

    max_tokens: int
    n: int = 1
    temperature: float = 1.0
    """0 chooses the most likely token."""
    top_p: float = 1.0
    top_k: int = 0
    """0 or -1: all tokens."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    """Most likely tokens to report per token; 0: only the chosen one's own logprob; None: nothing."""

    def __post_init__(self) -> None:
        for name, fits, range_ in (
            ("n", self.n >= 1, "at least 1"),
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", 0.0 <= self.temperature < float("inf"), "0 or more"),
            ("top_p", 0.0 < self.top_p <= 1.0, "in (0, 1]"),
            ("top_k", self.top_k >= -1, "-1 (all), 0 (all) or more"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "in [0, 1]"),
            ("repetition_penalty", 0.0 < self.repetition_penalty < float("inf"), "above 0"),
            ("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "in [-2, 2]"),
            ("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, "in [-2, 2]"),
            ("min_tokens", 0 <= self.min_tokens <= self.max_tokens, "between 0 and max_tokens"),
            ("logprobs", self.logprobs is None or self.logprobs >= 0, "0 or more"),
        ):
            if not fits:
                raise ConfigError(f"{name} must be {range_}, not {getattr(self, name)}.")


class TokenLogprobs(msgspec.Struct, gc=False):
    """Natural logs of probabilities before temperature and penalties."""

    logprob: float
    """Of the chosen token."""
    top: list[tuple[int, float]]
    """(token id, logprob) of the most likely tokens, best first; empty when none were asked for."""


class Draw(msgspec.Struct):
    """What was chosen for each row."""

    tokens: list[int]
    logprobs: dict[int, TokenLogprobs]
    """By row of the batch, for the rows that asked."""


def noise_key(seed: int, index: int) -> int:
    """64 bits that differ for every (seed, index)."""
    with np.errstate(over="ignore"):
        key = mix(np.array([seed & _SEED_MASK], dtype=np.uint64))
        key = mix(key + np.uint64(index + 1) * _GOLDEN)
    return int(key[0])


def uniforms(keys: npt.NDArray[np.uint64], positions: npt.NDArray[np.uint64]) -> npt.NDArray[np.float32]:
    """A number in [0, 1) for each (key, position), of 23 bits: its product with a sum stays below the sum."""
    bits = mix(keys + (positions + np.uint64(1)) * _GOLDEN)
    return ((bits >> np.uint64(41)).astype(np.float32)) * np.float32(2.0**-23)


def mix(bits: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of splitmix64."""
    bits = (bits ^ (bits >> np.uint64(30))) * _MIX_1
    bits = (bits ^ (bits >> np.uint64(27))) * _MIX_2
    return bits ^ (bits >> np.uint64(31))


class Sampler:
    """Chooses tokens for batches; keeps the settings of each running sequence by its row."""

    def __init__(self, max_num_seqs: int, vocab_size: int, kernels: Kernels, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self._kernels = kernels
        self._shape = (max_num_seqs, vocab_size)
        self._flags = np.zeros(max_num_seqs, dtype=np.int64)
        self._keys = np.zeros(max_num_seqs, dtype=np.uint64)
        columns = ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")
        self._settings = {name: np.zeros(max_num_seqs, dtype=np.float32) for name in columns}
        self._top_k = np.zeros(max_num_seqs, dtype=np.int64)
        self._counts: torch.Tensor | None = None
        """Times each token was generated, int32 [row, vocabulary]; there from the first penalty on."""
        self._prompted: torch.Tensor | None = None
        """Whether each token is in the prompt, bool [row, vocabulary]."""

    def admit(self, sequence: Sequence) -> None:
        """Note the settings of a sequence that was given a row."""
        params, row = sequence.params, sequence.row
        truncated = params.top_p < 1.0 or params.top_k > 0 or params.min_p > 0.0
        penalized = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (
            1,
            0,
            0,
        )
        random = params.temperature > 0.0
        self._flags[row] = (
            RANDOM * random
            | TRUNCATED * (truncated and random)
            | PENALIZED * penalized
            | LOGPROBS * (params.logprobs is not None)
            | MIN_TOKENS * (params.min_tokens > 0)
        )
        self._keys[row] = sequence.noise_key
        for name, value in (
            ("temperature", params.temperature),
            ("top_p", params.top_p),
            ("min_p", params.min_p),
            ("repetition", params.repetition_penalty),
            ("presence", params.presence_penalty),
            ("frequency", params.frequency_penalty),
        ):
            self._settings[name][row] = value
        self._top_k[row] = min(params.top_k, self.vocab_size) if params.top_k > 0 else self.vocab_size
        if penalized:
            self._recount(sequence)

    def sample(self, logits: torch.Tensor, sequences: Rows[Sequence]) -> Draw:
        """Choose the next token of each sequence from its row of logits [len(sequences), vocabulary].

        The logits are float32 and may be overwritten.
        """
        rows = np.array([sequence.row for sequence in sequences])
        flags = self._flags[rows]
        needs = int(np.bitwise_or.reduce(flags))
        if needs == 0:
            return Draw(greedy(logits).tolist(), {})
        raw = None
        if needs & LOGPROBS:
            asking = np.flatnonzero(flags & LOGPROBS)
            raw = logits[self._to_device(asking)]
        if needs & MIN_TOKENS:
            self._forbid_stopping(logits, sequences, np.flatnonzero(flags & MIN_TOKENS))
        if needs & PENALIZED:
            self._penalize(logits, rows, np.flatnonzero(flags & PENALIZED))
        tokens = self._choose(logits, rows, flags, sequences) if needs & RANDOM else greedy(logits)
        if needs & PENALIZED:
            self._count(rows, tokens, np.flatnonzero(flags & PENALIZED))
        chosen = tokens.tolist()
        if raw is None:
            return Draw(chosen, {})
        return Draw(chosen, report(raw, chosen, sequences, asking.tolist()))

    def _choose(
        self,
        logits: torch.Tensor,
        rows: npt.NDArray[np.int64],
        flags: npt.NDArray[np.int64],
        sequences: Rows[Sequence],
    ) -> torch.Tensor:
        positions = np.array([len(sequence.tokens) for sequence in sequences], dtype=np.uint64)
        noise = uniforms(self._keys[rows], positions)
        settings, cuts = self._settings, None
        if np.bitwise_or.reduce(flags) & TRUNCATED:
            cuts = Cuts(self._top_k[rows], settings["top_p"][rows], settings["min_p"][rows])
        return self._kernels.draw(logits, Choice(settings["temperature"][rows], noise, cuts))

    def _penalize(
        self, logits: torch.Tensor, rows: npt.NDArray[np.int64], where: npt.NDArray[np.int64]
    ) -> None:
        """Repetition over prompt and output, presence and frequency over the output, as vLLM does it."""
        assert self._counts is not None and self._prompted is not None
        at, of = self._to_device(where), self._to_device(rows[where])
        penalized, counts = logits[at], self._counts[of]
        used = self._prompted[of] | (counts > 0)
        repetition = self._column("repetition", rows[where])
        scaled = torch.where(penalized > 0, penalized / repetition, penalized * repetition)
        penalized = torch.where(used, scaled, penalized)
        penalized -= self._column("frequency", rows[where]) * counts
        penalized -= self._column("presence", rows[where]) * (counts > 0)
        logits[at] = penalized

    def _count(self, rows: npt.NDArray[np.int64], tokens: torch.Tensor, where: npt.NDArray[np.int64]) -> None:
        assert self._counts is not None
        self._counts[self._to_device(rows[where]), tokens[self._to_device(where)]] += 1

    def _recount(self, sequence: Sequence) -> None:
        """Set the counts of a newly admitted sequence, which may have generated tokens before."""
        if self._counts is None or self._prompted is None:
            self._counts = torch.zeros(self._shape, dtype=torch.int32, device=self.device)
            self._prompted = torch.zeros(self._shape, dtype=torch.bool, device=self.device)
        prompt = torch.tensor(sequence.tokens[: sequence.num_prompt], device=self.device)
        output = torch.tensor(sequence.tokens[sequence.num_prompt :], dtype=torch.int64, device=self.device)
        self._prompted[sequence.row].zero_()[prompt] = True
        self._counts[sequence.row] = torch.bincount(output, minlength=self.vocab_size)

    def _forbid_stopping(
        self, logits: torch.Tensor, sequences: Rows[Sequence], where: npt.NDArray[np.int64]
    ) -> None:
        for row in where.tolist():
            sequence = sequences[row]
            if len(sequence.tokens) - sequence.num_prompt < sequence.params.min_tokens:
                logits[row, list(sequence.stop_ids)] = -torch.inf

    def _column(self, name: str, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        """A setting of the given rows, [len(rows), 1]."""
        return self._to_device(self._settings[name][rows])[:, None]

    def _to_device(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """The index of each row's largest logit. On CPU numpy finds it several times faster than torch."""
    if logits.device.type == "cpu":
        return torch.from_numpy(logits.numpy().argmax(-1))
    return logits.argmax(-1)


def report(
    logits: torch.Tensor, tokens: Rows[int], sequences: Rows[Sequence], asking: list[int]
) -> dict[int, TokenLogprobs]:
    """The logprobs of the rows in `asking`; `logits` holds only theirs, untouched."""
    logprobs = logits.log_softmax(-1)
    chosen = torch.tensor([tokens[row] for row in asking], device=logits.device)
    own = logprobs.gather(1, chosen[:, None])[:, 0].tolist()
    wanted = [sequences[row].params.logprobs or 0 for row in asking]
    width = min(max(wanted), logits.shape[-1])
    if width == 0:
        return {row: TokenLogprobs(logprob, []) for row, logprob in zip(asking, own, strict=True)}
    values, ids = logprobs.topk(width)
    table = zip(asking, own, wanted, ids.tolist(), values.tolist(), strict=True)
    return {
        row: TokenLogprobs(logprob, list(zip(top[:count], best[:count], strict=True)))
        for row, logprob, count, top, best in table
    }
