"""Whether requests are traced, and the life of what sends the spans.

Off unless an address to send spans to is given, by `otlp_endpoint` or by OpenTelemetry's own environment
variables; nothing of OpenTelemetry is then imported, and relays are the plain ones. The spans themselves are
made in `penstock.router.spans`.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from threading import Thread
from typing import TYPE_CHECKING, Final

from penstock.errors import ConfigError
from penstock.router.inlet import Inlet
from penstock.router.router import Router
from penstock.wire.server import HttpServer

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

LAST_SPANS: Final = 5.0
"""Seconds the last spans may take to be delivered when the router ends."""
PROTOCOL: Final = "http/protobuf"

_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS: Final = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")

MakeInlet = Callable[[HttpServer, Router], Inlet]

logger = logging.getLogger(__name__)


def asked_for(endpoint: str | None, environment: Mapping[str, str]) -> str | None:
    """By what name traces are asked for; None: they are not. Raises ConfigError for what cannot be done."""
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    name = "--otlp-endpoint" if endpoint is not None else None
    if name is None and environment.get("OTEL_TRACES_EXPORTER", "otlp") != "none":
        name = next((name for name in _ENDPOINTS if environment.get(name)), None)
    if name is not None:
        for variable in _PROTOCOLS:
            if environment.get(variable, PROTOCOL) != PROTOCOL:
                raise ConfigError(f"{variable} is {environment[variable]}: spans are sent by {PROTOCOL} only")
    return name


@asynccontextmanager
async def tracing(router: Router) -> AsyncIterator[MakeInlet]:
    """What makes the connections of a router's clients, so that requests are traced where that is asked for.

    At the end the last spans are delivered, within LAST_SPANS. Raises ConfigError when OpenTelemetry is not
    installed.
    """
    name = asked_for(router.args.otlp_endpoint, os.environ)
    if name is None:
        yield Inlet
        return
    try:
        from penstock.router import spans
    except ImportError as error:
        raise ConfigError(
            f"{name} asks for traces, which need OpenTelemetry: pip install 'penstock[otel]', "
            "or set OTEL_SDK_DISABLED=true"
        ) from error
    provider = spans.provider(router.args.otlp_endpoint)
    tracer = spans.Tracer(provider)
    router.make_resumed = tracer.resumed
    try:
        yield tracer.inlet
    finally:
        await _close(provider)


async def _close(provider: TracerProvider) -> None:
    """Gives the provider time for its last spans; a collector that is away holds nothing up."""
    thread = Thread(target=provider.shutdown, name="last spans", daemon=True)
    thread.start()
    await asyncio.to_thread(thread.join, LAST_SPANS)
    if thread.is_alive():
        logger.warning("the last spans could not be delivered within %.0f s", LAST_SPANS)
