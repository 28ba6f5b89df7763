"""A request on its way through the engine: the samples of one prompt, and what is told of them.

These belong to the engine's thread; the loop reads them when it is told. What has been said of a sample does
not change: tokens, logprobs and versions are only added to, until it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from time import perf_counter

from penstock.engine.detokenizer import Detokenizer
from penstock.engine.sampling import SamplingParams, TokenLogprobs


class Sample:
    """One completion while it grows."""

    __slots__ = (
        "detokenizer",
        "finish_reason",
        "index",
        "last_token",
        "logprobs",
        "num_cached_tokens",
        "stop_reason",
        "token_ids",
        "version_changes",
    )

    def __init__(self, index: int, detokenizer: Detokenizer | None) -> None:
        self.index = index
        self.detokenizer = detokenizer
        """There when text is wanted token by token, or decides where to stop."""
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.finish_reason: str | None = None
        """`stop`, `length` or `abort`."""
        self.stop_reason: int | str | None = None
        """The stop string or the id of the stop token that ended it; None for an end-of-text token."""
        self.num_cached_tokens = 0
        self.last_token = 0.0
        """When the last token came, by `perf_counter`; 0 before the first."""
        self.version_changes: tuple[tuple[int, int], ...] = ()
        """(tokens there were, weight version from there on) for each change while this one grew."""


class Delta:
    """What one step added to a sample that is streamed; the sample itself may be further on by now."""

    __slots__ = ("finish_reason", "sample", "start", "stop", "stop_reason", "text")

    def __init__(self, sample: Sample, start: int, text: str) -> None:
        self.sample = sample
        self.start = start
        self.stop = len(sample.token_ids)
        """The new tokens are `sample.token_ids[start:stop]`, and likewise its logprobs."""
        self.text = text
        self.finish_reason = sample.finish_reason
        self.stop_reason = sample.stop_reason


class Generation:
    """The samples of one prompt. `notify(deltas, done, error)` is called on the loop.

    Streamed: after each step that added something, with the deltas. Not streamed: once, at the end.
    """

    __slots__ = (
        "arrival",
        "discarded",
        "id",
        "include_stop_token",
        "notify",
        "params",
        "prompt_token_ids",
        "samples",
        "streamed",
        "unfinished",
        "weight_version",
    )

    def __init__(
        self,
        id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        notify: Callable[[list[Delta], bool, Exception | None], None],
        *,
        detokenizers: Iterable[Detokenizer | None],
        streamed: bool,
        include_stop_token: bool,
    ) -> None:
        self.id = id
        """Unique among all in flight."""
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        self.notify = notify
        self.samples = [Sample(index, detokenizer) for index, detokenizer in enumerate(detokenizers)]
        self.streamed = streamed
        self.include_stop_token = include_stop_token
        """Whether the token that ends a sample is part of its text."""
        self.unfinished = len(self.samples)
        self.arrival = perf_counter()
        self.discarded = False
        """Set on the loop: whatever is still on the way is not delivered."""
        self.weight_version = 0
        """Of the weights when it was begun."""

    def weight_versions(self, sample: Sample, start: int, stop: int) -> list[tuple[int, int]]:
        """(first token, version of the weights that made it) in turn, of a sample's tokens start:stop."""
        changes = ((0, self.weight_version), *sample.version_changes)
        spans: list[tuple[int, int]] = []
        for number, (since, version) in enumerate(changes, start=1):
            until = changes[number][0] if number < len(changes) else stop
            first = max(since, start)
            if first < min(until, stop) and not (spans and spans[-1][1] == version):
                spans.append((first, version))
        return spans
