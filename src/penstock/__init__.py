"""penstock: high-concurrency LLM inference, batch generation and RL rollouts."""

__version__ = "0.1.0"

from penstock.client import Client, ClientStatistics, Retry, Timeouts
from penstock.errors import ConfigError, EngineError, PenstockError, ResponseError, TransportError
from penstock.sample import Sample, SamplingParams, Usage, split_reasoning

__all__ = [
    "Client",
    "ClientStatistics",
    "ConfigError",
    "EngineError",
    "PenstockError",
    "ResponseError",
    "Retry",
    "Sample",
    "SamplingParams",
    "split_reasoning",
    "Timeouts",
    "TransportError",
    "Usage",
]
