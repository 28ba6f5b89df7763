"""penstock: high-concurrency LLM inference, batch generation and RL rollouts."""

__version__ = "0.1.0"

from typing import TYPE_CHECKING, Any

from penstock.client import Client
from penstock.errors import (
    ConfigError,
    DeadlineExceeded,
    EngineError,
    PenstockError,
    ResponseError,
    TransportError,
)
from penstock.fleet.fleet import Fleet, FleetStatistics
from penstock.fleet.health import Breaker
from penstock.fleet.retry import Retry
from penstock.sample import Delta, Sample, SamplingParams, Usage, split_reasoning
from penstock.stream import SampleStream
from penstock.sync_client import SyncClient
from penstock.wire.connection import Timeouts
from penstock.wire.tls import TLS

if TYPE_CHECKING:
    from penstock.batch.generate import GenerateReport, generate
    from penstock.batch.rollout import RolloutClient

__all__ = [
    "Breaker",
    "Client",
    "ConfigError",
    "DeadlineExceeded",
    "Delta",
    "EngineError",
    "Fleet",
    "FleetStatistics",
    "generate",
    "GenerateReport",
    "PenstockError",
    "ResponseError",
    "Retry",
    "RolloutClient",
    "Sample",
    "SampleStream",
    "SamplingParams",
    "split_reasoning",
    "SyncClient",
    "Timeouts",
    "TLS",
    "TransportError",
    "Usage",
]

_OF_BATCH = {"generate": "generate", "GenerateReport": "generate", "RolloutClient": "rollout"}
"""Names and their modules in `penstock.batch`, loaded when first asked for: the core stays light."""


def __getattr__(name: str) -> Any:
    if name not in _OF_BATCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(f"penstock.batch.{_OF_BATCH[name]}"), name)
    return value
