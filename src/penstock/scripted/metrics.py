"""What the scripted engine says of itself at /metrics, under vLLM's names, in Prometheus' text form."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from penstock.scripted.batch import Batch

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
FINISH_REASONS: Final = ("stop", "length", "abort", "error")

FIRST_TOKEN_SECONDS: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
WHOLE_REQUEST_SECONDS: Final = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0),
    *(30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
"""Upper bounds of vLLM's buckets."""


class Histogram:
    """Counts of values by upper bound."""

    __slots__ = ("_bounds", "_counts", "_total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def observe(self, value: float) -> None:
        """Counts one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def lines(self, name: str, labels: str) -> Iterator[str]:
        """Its samples in Prometheus' text form."""
        count = 0
        for bound, here in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            count += here
            yield f'{name}_bucket{{{labels},le="{bound}"}} {count}'
        yield f"{name}_count{{{labels}}} {count}"
        yield f"{name}_sum{{{labels}}} {self._total}"


def render(batch: Batch) -> bytes:
    """The page."""
    schedule = batch.schedule
    model = batch.model.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    labels = f'engine="0",model_name="{model}"'
    lines: list[str] = []
    for name, kind, help_text, value in (
        ("vllm:num_requests_running", "gauge", "Samples that run.", len(schedule.running)),
        ("vllm:num_requests_waiting", "gauge", "Samples that have no place yet.", len(schedule.waiting)),
        (
            "vllm:kv_cache_usage_perc",
            "gauge",
            "Share of the KV blocks that are held, 0 to 1.",
            schedule.kv_usage,
        ),
        ("vllm:gpu_cache_usage_perc", "gauge", "The same under its older name.", schedule.kv_usage),
        ("vllm:num_preemptions_total", "counter", "Samples thrown out of the batch.", schedule.preemptions),
        ("vllm:prompt_tokens_total", "counter", "Tokens of prompts.", schedule.prompt_tokens),
        ("vllm:generation_tokens_total", "counter", "Tokens made.", schedule.generation_tokens),
        ("vllm:prefix_cache_queries_total", "counter", "Always 0: there is no prefix cache.", 0),
        ("vllm:prefix_cache_hits_total", "counter", "Always 0.", 0),
        (
            "penstock:slipped_seconds_total",
            "counter",
            "The script's delay for want of CPU.",
            schedule.slipped,
        ),
    ):
        family = name.removesuffix("_total")
        lines += [f"# HELP {family} {help_text}", f"# TYPE {family} {kind}", f"{name}{{{labels}}} {value}"]
    name = "vllm:request_success"
    lines += [f"# HELP {name} Samples that ended, by how.", f"# TYPE {name} counter"]
    for reason in FINISH_REASONS:
        count = batch.finish_reasons[reason]
        lines.append(f'{name}_total{{engine="0",finished_reason="{reason}",model_name="{model}"}} {count}')
    for name, help_text, histogram in (
        ("vllm:time_to_first_token_seconds", "From arrival to the first token.", batch.first_token),
        ("vllm:e2e_request_latency_seconds", "From arrival to the last token.", batch.whole_request),
    ):
        lines += [f"# HELP {name} {help_text}", f"# TYPE {name} histogram", *histogram.lines(name, labels)]
    return ("\n".join(lines) + "\n").encode()
