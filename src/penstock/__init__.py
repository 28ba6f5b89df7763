"""penstock: high-concurrency LLM inference, batch generation and RL rollouts."""

__version__ = "0.1.0"

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

__all__ = [
    "Breaker",
    "Client",
    "ConfigError",
    "DeadlineExceeded",
    "Delta",
    "EngineError",
    "Fleet",
    "FleetStatistics",
    "PenstockError",
    "ResponseError",
    "Retry",
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
