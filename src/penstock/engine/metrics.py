"""What the engine says of itself at /metrics, under vLLM's names.

Everything is counted where it happens, in plain integers, and put into Prometheus' text form only when asked.
One thread counts; the one that reads may see a request counted in one metric and not yet in the next.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from penstock.engine.engine import EngineStats

FINISH_REASONS: Final = ("stop", "length", "abort", "error")

FIRST_TOKEN_SECONDS: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
BETWEEN_TOKENS_SECONDS: Final = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
WHOLE_REQUEST_SECONDS: Final = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0),
    *(30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
"""Upper bounds of vLLM's buckets."""

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


class Histogram:
    """Counts of values by upper bound."""

    __slots__ = ("_bounds", "_counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Counts one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self.total += value

    def cumulative(self) -> list[tuple[str, float]]:
        """(upper bound, values up to it), the last bound +Inf."""
        count = 0
        buckets = []
        for bound, here in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            count += here
            buckets.append((bound, float(count)))
        return buckets


class Metrics:
    """Counts of one engine."""

    def __init__(self) -> None:
        self.finished: Counter[str] = Counter()
        """Samples by finish reason."""
        self.first_token = Histogram(FIRST_TOKEN_SECONDS)
        self.between_tokens = Histogram(BETWEEN_TOKENS_SECONDS)
        self.whole_request = Histogram(WHOLE_REQUEST_SECONDS)

    def render(self, stats: EngineStats, model_name: str) -> bytes:
        """Prometheus' text form of these counts and of the engine's."""
        from prometheus_client import CollectorRegistry, generate_latest

        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Snapshot(self._families(stats, model_name)))
        return generate_latest(registry)

    def _families(self, stats: EngineStats, model_name: str) -> Iterator[Metric]:
        from prometheus_client.core import (
            CounterMetricFamily,
            GaugeMetricFamily,
            HistogramMetricFamily,
        )

        labels, names = ["0", model_name], ["engine", "model_name"]
        usage = stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0
        for name, help_text, value in (
            ("vllm:num_requests_running", "Sequences that each step computes.", stats.running),
            ("vllm:num_requests_waiting", "Sequences that have no place yet.", stats.waiting),
            ("vllm:kv_cache_usage_perc", "Share of the KV blocks that are held, 0 to 1.", usage),
            ("penstock:kv_cache_slots", "Token slots of the KV blocks that are held.", stats.kv_slots_used),
            ("penstock:kv_cache_tokens", "Those of them that hold a token.", stats.kv_tokens_held),
            ("penstock:weight_version", "Version of the weights that sample.", stats.weight_version),
        ):
            gauge = GaugeMetricFamily(name, help_text, labels=names)
            gauge.add_metric(labels, value)
            yield gauge
        for name, help_text, value in (
            ("num_preemptions", "Sequences thrown out to be computed again.", stats.preemptions),
            ("prompt_tokens", "Tokens of prompts that were computed or found.", stats.prompt_tokens),
            ("generation_tokens", "Tokens sampled.", stats.generation_tokens),
            ("prefix_cache_queries", "Tokens looked up in the prefix cache.", stats.prefix_cache_queries),
            ("prefix_cache_hits", "Tokens found in the prefix cache.", stats.prefix_cache_hits),
        ):
            counter = CounterMetricFamily(f"vllm:{name}", help_text, labels=names)
            counter.add_metric(labels, value)
            yield counter
        success = CounterMetricFamily(
            "vllm:request_success",
            "Samples that ended, by how.",
            labels=["engine", "finished_reason", "model_name"],
        )
        for reason in FINISH_REASONS:
            success.add_metric(["0", reason, model_name], self.finished[reason])
        yield success
        for name, help_text, histogram in (
            ("time_to_first_token_seconds", "From arrival to the first token.", self.first_token),
            (
                "inter_token_latency_seconds",
                "Between two tokens of a sample.",
                self.between_tokens,
            ),
            (
                "e2e_request_latency_seconds",
                "From arrival to the end of a sample.",
                self.whole_request,
            ),
        ):
            family = HistogramMetricFamily(f"vllm:{name}", help_text, labels=names)
            family.add_metric(labels, histogram.cumulative(), histogram.total)
            yield family


class _Snapshot:
    """A Prometheus collector of families that are already made."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families
