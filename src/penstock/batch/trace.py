"""What is kept of a sample, and the row that is written of n of them.

A row's own columns are copied byte for byte; the result's columns follow them. `generations[i]`,
`finish_reasons[i]`, `api_metadata[i]` and `reasonings[i]` belong to the same sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from penstock.errors import PenstockError, ResponseError
from penstock.prompt import Prompt
from penstock.sample import Sample


class Metadata(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where a sample came from: the `usage` fields of the OpenAI API, and how it was made."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    model: str | None = None
    id: str | None = None
    endpoint: str | None = None
    attempts: int = 1
    latency: float = 0.0
    """Seconds from the first send to the last byte."""


class Trace(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A finished sample as the journal holds it."""

    text: str
    finish_reason: str | None = None
    reasoning: str | None = None
    metadata: Metadata

    @classmethod
    def of(cls, sample: Sample) -> Trace:
        usage = sample.usage
        return cls(
            text=sample.text,
            finish_reason=sample.finish_reason,
            reasoning=sample.reasoning,
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
        )


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """A sample that was given up: one line of the failures file."""

    row: int
    key: str
    index: int
    error: str
    """The class of the error, as in `penstock.errors`."""
    message: str
    status: int | None = None
    fields: msgspec.Raw
    """The row itself."""

    @classmethod
    def of(cls, prompt: Prompt, index: int, error: PenstockError) -> Failure:
        return cls(
            row=prompt.position,
            key=prompt.key,
            index=index,
            error=type(error).__name__,
            message=str(error),
            status=error.status if isinstance(error, ResponseError) else None,
            fields=msgspec.Raw(prompt.fields),
        )


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
    reasonings = [trace.reasoning for trace in traces]
    results = _Results(
        generations=[trace.text for trace in traces],
        finish_reasons=[trace.finish_reason for trace in traces],
        api_metadata=[trace.metadata for trace in traces],
        reasonings=reasonings if any(reason is not None for reason in reasonings) else None,
    )
    own = fields[:-1].rstrip()
    return b"%b%b%b" % (own, b"" if own == b"{" else b",", _encode(results)[1:])
