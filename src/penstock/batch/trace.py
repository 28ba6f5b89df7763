"""What is kept of a sample, and the row that is written of n of them.

A row's own columns are copied byte for byte; the result's columns follow them. `generations[i]`,
`finish_reasons[i]`, `api_metadata[i]`, `reasonings[i]` and the columns a rollout adds belong to the same
sample. The journal holds more of a sample than the row: where it comes from, to the seed (`Provenance`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from penstock.errors import PenstockError, ResponseError, RolloutFailed
from penstock.prompt import Prompt
from penstock.sample import Sample


class Metadata(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """Where a sample came from: the `usage` fields of the OpenAI API, and how it was made.

    Of a sample that took several requests: the sums of tokens and attempts, the rest as the last one said.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    model: str | None = None
    id: str | None = None
    endpoint: str | None = None
    attempts: int = 1
    latency: float = 0.0
    """Seconds from the first send to the last byte; of several requests that of all of them."""
    requests: int = 1
    """Answers it is made of: the turns of a rollout, continuations."""


class Provenance(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """What else can be said of how a sample was made. What all samples of a run share stands in the journal's
    header and notes."""

    finished: float = 0.0
    """Unix time in seconds; it was started `Metadata.latency` before."""
    seed: int | None = None
    max_tokens: int | None = None
    """Asked for, where that was less than the job's: the context held no more."""
    cached_tokens: int = 0
    tries: int = 1
    """Samples made until one was accepted, itself included."""


class Trace(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A finished sample as the journal holds it."""

    text: str
    finish_reason: str | None = None
    reasoning: str | None = None
    columns: dict[str, Any] | None = None
    """What a rollout returned besides."""
    dropped: bool = False
    """Done, but left out of the row's lists: it was cut off, and the job drops such samples."""
    metadata: Metadata
    provenance: Provenance = Provenance()

    @classmethod
    def of(cls, sample: Sample, provenance: Provenance | None = None, *, dropped: bool = False) -> Trace:
        usage = sample.usage
        return cls(
            text=sample.text,
            finish_reason=sample.finish_reason,
            reasoning=sample.reasoning,
            dropped=dropped,
            metadata=Metadata(
                prompt_tokens=usage.prompt_tokens,
                completion_tokens=usage.completion_tokens,
                total_tokens=usage.prompt_tokens + usage.completion_tokens,
                model=sample.model,
                id=sample.request_id,
                endpoint=sample.endpoint,
                attempts=sample.attempts,
                latency=round(sample.latency, 4),
            ),
            provenance=provenance or Provenance(),
        )


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """A sample that was given up: one line of the failures file."""

    row: int
    key: str
    index: int
    error: str
    """The class of the error, as in `penstock.errors`, or of the exception that a rollout raised."""
    message: str
    status: int | None = None
    attempts: int = 1
    """How often the last request was sent."""
    fields: msgspec.Raw
    """The row itself."""

    @classmethod
    def of(cls, prompt: Prompt, index: int, error: PenstockError) -> Failure:
        return cls(
            row=prompt.position,
            key=prompt.key,
            index=index,
            error=failure_class(error),
            message=str(error),
            status=error.status if isinstance(error, ResponseError) else None,
            attempts=error.attempts,
            fields=msgspec.Raw(prompt.fields),
        )


def failure_class(error: PenstockError) -> str:
    """The name under which a failure is counted and listed."""
    return error.name if isinstance(error, RolloutFailed) else type(error).__name__


class _Results(msgspec.Struct, kw_only=True, omit_defaults=True):
    generations: list[str]
    finish_reasons: list[str | None]
    api_metadata: list[Metadata]
    reasonings: list[str | None] | None = None


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Trace).decode


def encode_trace(trace: Trace) -> bytes:
    return _encode(trace)


def decode_trace(payload: bytes) -> Trace:
    return _decode(payload)


def encode_failure(failure: Failure) -> bytes:
    return _encode(failure)


def row_line(fields: bytes, traces: Sequence[Trace]) -> bytes:
    """One row of the output: `fields`, a JSON object, with the results of `traces` added to it."""
    kept = [trace for trace in traces if not trace.dropped]
    reasonings = [trace.reasoning for trace in kept]
    results = _Results(
        generations=[trace.text for trace in kept],
        finish_reasons=[trace.finish_reason for trace in kept],
        api_metadata=[trace.metadata for trace in kept],
        reasonings=reasonings if any(reason is not None for reason in reasonings) else None,
    )
    own = fields[:-1].rstrip()
    line = b"%b%b%b" % (own, b"" if own == b"{" else b",", _encode(results)[1:])
    if not any(trace.columns for trace in kept):
        return line
    names = dict.fromkeys(name for trace in kept if trace.columns for name in trace.columns)
    columns = {name: [(trace.columns or {}).get(name) for trace in kept] for name in names}
    return b"%b,%b" % (line[:-1], _encode(columns)[1:])
