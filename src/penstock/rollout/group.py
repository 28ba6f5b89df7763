"""What a trainer gets: groups of rollouts, each token with its logprob, mask and policy version.

It guarantees:
- `token_ids`, `logprobs` and `mask` of a rollout are equally long, and so are its version spans together;
- a token with mask False was not sampled by the policy as it is to be trained on (an observation, or too old
  a token): its logprob is 0.0;
- a rollout whose reward failed stays in its group and says why; it is no reward of 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec

from penstock.prompt import Prompt
from penstock.rollout.score import Score


class VersionSpan(NamedTuple):
    """Tokens in a row that weights of one policy version have made."""

    version: int
    tokens: int


class Timings(msgspec.Struct, frozen=True, gc=False):
    """Seconds of a rollout's life, or of a group's: of its slowest rollout."""

    generation: float = 0.0
    """All requests, waiting for a slot included."""
    environment: float = 0.0
    """Steps of the environment, where there is one."""
    reward: float = 0.0


class Rollout(msgspec.Struct, frozen=True, kw_only=True):
    """One completion of a prompt, of one or several turns, and its reward."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    """What came behind the prompt: sampled tokens, and those of observations between the turns."""
    logprobs: tuple[float, ...]
    """Of each token of `token_ids` as the engine sampled it (natural log); 0.0 where the mask is False."""
    mask: tuple[bool, ...]
    """Which of `token_ids` are to be trained on."""
    versions: tuple[VersionSpan, ...]
    """Which weights made `token_ids`, from the first to the last. Observed tokens count with the sampled
    ones before them, and mean nothing."""
    versions_exact: bool = True
    """False: the engine does not say them and weights changed meanwhile, so that tokens may be newer."""
    finish_reason: str | None
    reward: Score
    text: str
    """Of the last turn."""
    turns: int = 1
    timings: Timings = Timings()
    index: int = 0
    """Which of the samples asked for it is."""

    @property
    def oldest(self) -> int | None:
        """The lowest version of a token that is to be trained on; None where there is none."""
        return min(_masked_versions(self), default=None)

    @property
    def newest(self) -> int | None:
        return max(_masked_versions(self), default=None)


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """The rollouts of one prompt."""

    key: str
    """The prompt's own name: the same in each epoch."""
    position: int
    """Place of the prompt in the stream of prompts, from 0: what the ledger knows the group by."""
    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    attempt: int = 1
    """How often the prompt was begun to be generated."""
    staleness: int | None = None
    """Updates between its oldest token and the trainer's weights, when it was handed out."""
    seconds: float = 0.0
    """From its admission to its last reward."""

    @property
    def scored(self) -> tuple[Rollout, ...]:
        """Those whose reward did not fail: the group's statistics are about these."""
        return tuple(one for one in self.rollouts if one.reward.failed is None)

    @property
    def rewards(self) -> tuple[float, ...]:
        """Of those that are scored."""
        return tuple(one.reward.value for one in self.scored)

    @property
    def tokens(self) -> int:
        """That are to be trained on."""
        return sum(sum(one.mask) for one in self.rollouts)

    @property
    def oldest(self) -> int | None:
        """The lowest version of a token that is to be trained on; None where there is none."""
        return min((one.oldest for one in self.rollouts if one.oldest is not None), default=None)

    @property
    def newest(self) -> int | None:
        return max((one.newest for one in self.rollouts if one.newest is not None), default=None)


def join_spans(spans: Iterable[VersionSpan]) -> tuple[VersionSpan, ...]:
    """The same tokens in as few spans as can be."""
    joined: list[VersionSpan] = []
    for version, count in spans:
        if not count:
            continue
        if joined and joined[-1].version == version:
            joined[-1] = VersionSpan(version, joined[-1].tokens + count)
        else:
            joined.append(VersionSpan(version, count))
    return tuple(joined)


def versions_of_tokens(spans: Sequence[VersionSpan]) -> list[int]:
    """The version of each token."""
    return [version for version, count in spans for _ in range(count)]


def without_tokens_before(rollout: Rollout, version: int) -> Rollout:
    """The rollout with tokens of older versions masked."""
    versions = versions_of_tokens(rollout.versions)
    mask = tuple(kept and one >= version for kept, one in zip(rollout.mask, versions, strict=True))
    logprobs = tuple(p if kept else 0.0 for p, kept in zip(rollout.logprobs, mask, strict=True))
    return msgspec.structs.replace(rollout, mask=mask, logprobs=logprobs)


def _masked_versions(rollout: Rollout) -> Iterable[int]:
    start = 0
    for version, count in rollout.versions:
        if any(rollout.mask[start : start + count]):
            yield version
        start += count
