"""A sample that was cut off at `max_tokens`, continued: what to ask for, and how the two parts join.

Pure functions. They guarantee: where the engine gives token ids it goes on from exactly these; else from the
text, which is tokenized anew. A stop string across the seam is found. What cannot be continued rightly
(tools, a grammar, reasoning without token ids) is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypeVar

import msgspec

from penstock.continuation import (
    CHAT,
    Request,
    Seam,
    Splice,
    by_text,
    by_token_ids,
    count_tokens,
    may_continue,
    stop_strings,
)
from penstock.sample import Sample, Usage
from penstock.wire.openai import reasoning_of
from penstock.wire.openai_stream import Partial

T = TypeVar("T")

LENGTH: Final = "length"
"""The finish reason of what was cut off."""


def continuation(request: Request, sample: Sample, budget: int) -> Request | None:
    """What to ask for to have `budget` more tokens of `sample`, the answer to `request` so far.

    None where it cannot be continued.
    """
    if sample.finish_reason != LENGTH or not may_continue(request):
        return None
    partial = _partial(sample)
    count = count_tokens(partial)
    if not count:
        return None
    limit = "max_completion_tokens" if "max_completion_tokens" in request.fields else "max_tokens"
    whole = Request(request.route, {**request.fields, limit: count + budget})
    return by_token_ids(whole, partial, None) or by_text(whole, partial)


def joined(request: Request, sample: Sample, more: Sample) -> Sample:
    """`sample` and the answer to its continuation, as one sample."""
    stops = stop_strings(request.fields)
    include_stop = bool(request.fields.get("include_stop_str_in_output"))
    reasoning, text = _own_reasoning(sample) or "", sample.text
    thinks = bool(reasoning) and not text
    before = reasoning if thinks else text
    reach = max(map(len, stops), default=1) - 1
    cut = max(0, len(before) - reach)
    kept, held = before[:cut], before[cut:]
    seam = Seam(held, stops, include_stop=include_stop) if held else None
    ended_by = more.stop_reason if isinstance(more.stop_reason, str) else ""
    added, thought, stop = Splice(seam, in_reasoning=thinks)(more.text, True, ended_by)
    reasoning, text = (kept + thought, added) if thinks else (reasoning, kept + added)
    return msgspec.structs.replace(
        sample,
        text=text,
        reasoning=reasoning or reasoning_of(text),
        finish_reason=more.finish_reason if stop is None else "stop",
        stop_reason=more.stop_reason if stop is None else stop,
        token_ids=_both(sample.token_ids, more.token_ids),
        logprobs=_both(sample.logprobs, more.logprobs),
        weight_versions=_versions(sample, more),
        usage=Usage(
            sample.usage.prompt_tokens,
            sample.usage.completion_tokens + more.usage.completion_tokens,
            sample.usage.cached_tokens,
        ),
        endpoint=more.endpoint,
        attempts=sample.attempts + more.attempts,
        latency=sample.latency + more.latency,
    )


def asked_for(route: str, content: Any, fields: Mapping[str, Any]) -> Request:
    """A request as `continuation` takes it."""
    return Request(route, {("messages" if route == CHAT else "prompt"): content, **fields})


def _partial(sample: Sample) -> Partial:
    """The sample as a completion that has come so far."""
    partial = Partial()
    partial.text = [sample.text]
    partial.reasoning = [_own_reasoning(sample) or ""]
    partial.token_ids = list(sample.token_ids or ())
    partial.has_token_ids = bool(sample.token_ids)
    partial.prompt_token_ids = sample.prompt_token_ids
    partial.usage = sample.usage
    return partial


def _own_reasoning(sample: Sample) -> str | None:
    """The reasoning that stands in a field of its own, and not between tags in the text."""
    return None if sample.reasoning == reasoning_of(sample.text) else sample.reasoning


def _both(first: tuple[T, ...] | None, second: tuple[T, ...] | None) -> tuple[T, ...] | None:
    return None if first is None or second is None else first + second


def _versions(sample: Sample, more: Sample) -> tuple[tuple[int, int], ...] | None:
    if sample.weight_versions is None or more.weight_versions is None:
        return None
    before = sample.usage.completion_tokens
    return sample.weight_versions + tuple(
        (first + before, version) for first, version in more.weight_versions
    )
