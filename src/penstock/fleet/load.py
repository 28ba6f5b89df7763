"""What an engine says of its own load, read from its /metrics page (Prometheus' text form).

`parse_load` knows vLLM's and SGLang's names, looks only for the few lines it wants, and is linear in the
page. It never raises: a page of another server is None, a sample that is no number is skipped.

Both engines write one series per data-parallel rank, which are added up. SGLang writes further series that
would count a request twice: one per tensor- or pipeline-parallel rank of the same requests, of which the
highest counts, and one per priority beside the total (`priority=""`), which are left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Final

import msgspec


class EngineLoad(msgspec.Struct, frozen=True):
    """What an engine says of itself at one moment, all its data-parallel ranks together."""

    running: float
    """Requests that each step computes."""
    waiting: float
    """Requests in its queue. Those its HTTP server still holds are in neither number."""
    kv_usage: float | None = None
    """Share of the KV cache that is held, 0 to 1, the highest of the ranks."""
    preemptions: float | None = None
    """Requests thrown out of the KV cache since it started (SGLang: retracted)."""
    generation_tokens: float | None = None
    """Tokens generated since it started."""


_Names = tuple[bytes, ...]


class _Dialect(msgspec.Struct, frozen=True):
    """The names of one engine; of several the first that is on the page counts."""

    running: _Names
    waiting: _Names
    kv_usage: _Names
    preemptions: _Names
    generation_tokens: _Names
    rank: bytes
    """The label of the data-parallel rank."""


VLLM: Final = _Dialect(
    running=(b"vllm:num_requests_running",),
    waiting=(b"vllm:num_requests_waiting",),
    kv_usage=(b"vllm:kv_cache_usage_perc", b"vllm:gpu_cache_usage_perc"),
    preemptions=(b"vllm:num_preemptions_total",),
    generation_tokens=(b"vllm:generation_tokens_total",),
    rank=b"engine",
)
"""V1 calls the KV usage kv_cache_usage_perc, versions before 0.10 gpu_cache_usage_perc; some write both."""

SGLANG: Final = _Dialect(
    running=(b"sglang:num_running_reqs",),
    waiting=(b"sglang:num_queue_reqs",),
    kv_usage=(b"sglang:token_usage",),
    preemptions=(b"sglang:num_retracted_requests_total", b"sglang:num_retracted_reqs_total"),
    generation_tokens=(b"sglang:realtime_tokens_total", b"sglang:generation_tokens_total"),
    rank=b"dp_rank",
)
"""realtime_tokens_total{mode="decode"} counts at each step, generation_tokens_total only when a request ends.
The gauge num_retracted_reqs, without `_total`, is of the last batch only and of no use here."""

_LABEL: Final = re.compile(rb'[ \t]*+([^=,{}"\s]++)[ \t]*+="((?:[^"\\]++|\\.)*+)"[ \t]*+,?+[ \t]*+')
"""One `name="value",` of a label set; a quote inside a value has a backslash before it. Never goes back."""


def parse_load(text: bytes) -> EngineLoad | None:
    """The load an engine's metrics page tells; None when it is not the page of an engine known here."""
    for dialect in (VLLM, SGLANG):
        running = _total(text, dialect.running, dialect)
        if running is None:
            continue
        waiting = _total(text, dialect.waiting, dialect)
        if waiting is None:
            continue
        usage = _samples(text, dialect.kv_usage, dialect)
        return EngineLoad(
            running=running,
            waiting=waiting,
            kv_usage=min(max(usage.values()), 1.0) if usage else None,
            preemptions=_total(text, dialect.preemptions, dialect),
            generation_tokens=_total(text, dialect.generation_tokens, dialect),
        )
    return None


def _total(text: bytes, names: _Names, dialect: _Dialect) -> float | None:
    ranks = _samples(text, names, dialect)
    return sum(ranks.values()) if ranks else None


def _samples(text: bytes, names: _Names, dialect: _Dialect) -> dict[bytes, float]:
    """The values of the first of `names` that has any, by data-parallel rank."""
    for name in names:
        ranks: dict[bytes, float] = {}
        for line in _lines(text, name):
            sample = _sample(line, dialect.rank)
            if sample is None:
                continue
            rank, value = sample
            if rank in ranks:  # in vLLM two models, in SGLang the same requests on another device
                value = ranks[rank] + value if dialect is VLLM else max(ranks[rank], value)
            ranks[rank] = value
        if ranks:
            return ranks
    return {}


def _lines(text: bytes, name: bytes) -> Iterator[bytes]:
    """What follows `name` on each line that begins with it."""
    at = 0 if text.startswith(name) else text.find(b"\n" + name) + 1
    while at > 0 or text.startswith(name, at):
        end = text.find(b"\n", at)
        if end < 0:
            yield text[at + len(name) :]
            return
        yield text[at + len(name) : end]
        at = text.find(b"\n" + name, end) + 1
        if at == 0:
            return


def _sample(line: bytes, rank_label: bytes) -> tuple[bytes, float] | None:
    """(rank, value) of a line without its metric's name; None: another metric, or not to be counted."""
    rank = b""
    at = 0
    if line[:1] == b"{":
        labels: dict[bytes, bytes] = {}
        at = 1
        while match := _LABEL.match(line, at):
            labels[match[1]] = match[2]
            at = match.end()
        if line[at : at + 1] != b"}":
            return None
        if labels.get(b"priority") or labels.get(b"mode", b"decode") != b"decode":
            return None
        rank = labels.get(rank_label, b"")
        at += 1
    elif line[:1] not in (b" ", b"\t"):
        return None  # a longer name
    fields = line[at:].split(None, 1)
    if not fields:
        return None
    try:
        value = float(fields[0])
    except ValueError:
        return None
    return (rank, value) if math.isfinite(value) and value >= 0 else None
