"""The flags of `penstock generate` that say where: servers that run, or engines started for the job."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal

from rich.console import Console
from tyro.conf import OmitArgPrefixes

from penstock.batch.engines import served_model
from penstock.batch.generate import Connect, outage_notice
from penstock.batch.progress import Progress
from penstock.cli.launching import Display, LaunchArgs
from penstock.client import Client
from penstock.errors import ConfigError
from penstock.fleet.fleet import FleetOptions
from penstock.fleet.retry import Retry
from penstock.servers.replicas import launch
from penstock.servers.spec import ServerSpec
from penstock.wire.limits import check_local_ports, check_open_files
from penstock.wire.tls import TLS

RESTART_LIMIT = 3600.0
"""Seconds rows wait for engines that are restarted: as long as a start may take. Engines that cannot be
restarted end the job before."""


@dataclass(frozen=True)
class EndpointArgs:
    """Where samples are generated, and how many at a time."""

    max_concurrent: int = 512
    """Samples being made at a time, and requests in flight per server at most."""
    concurrency: Literal["adaptive", "fixed"] = "adaptive"
    """adaptive: as many in flight per server as its engine can use, found from its metrics or its throughput;
    fixed: --max-concurrent."""
    engine: Literal["vllm", "sglang", "embedded", "endpoint"] | None = None
    """Start this engine for the job and stop it afterwards; endpoint, the default with --base-url: use
    servers that run already."""
    launch: OmitArgPrefixes[LaunchArgs] = field(default_factory=LaunchArgs)
    model: str | None = None
    """A checkpoint folder or a hub's id for an engine that is started (embedded: a folder, default the
    shipped model); else the served model's name (default: the only one there is)."""
    base_url: tuple[str, ...] = ()
    """Base URLs of running OpenAI-compatible servers, with or without /v1."""
    api_addr: tuple[str, ...] = ()
    """The same as HOST:PORT."""
    api_key: str | None = None
    """Sent as a bearer token. Default: the environment's OPENAI_API_KEY."""
    cacert: str | None = None
    """PEM file of the authorities to trust for https. Default: the system's."""
    cert: str | None = None
    """PEM file of a client certificate, for servers that ask for one."""
    key: str | None = None
    """PEM file of its private key, if that is not in the same file."""
    source_addresses: tuple[str, ...] = ()
    """Local addresses to connect from, in turn, where one has too few ports."""

    @property
    def urls(self) -> list[str]:
        return [*self.base_url, *(f"http://{address}" for address in self.api_addr)]

    @property
    def launches(self) -> bool:
        """Whether engines are started here."""
        return self.engine not in (None, "endpoint")

    def check(self) -> None:
        """Raises ConfigError for what cannot be done on this machine."""
        if self.max_concurrent < 1:
            raise ConfigError("--max-concurrent must be at least 1.")
        if self.launches == bool(self.urls):
            raise ConfigError(
                "Say where to generate: --engine vllm, sglang or embedded, or --base-url URL (or --api-addr)."
            )
        if not self.launches and (given := self.launch.changed()):
            raise ConfigError(f"{given[0]} is for an engine that is started: --base-url names one that runs.")
        check_open_files(self.max_concurrent, raised=True)
        if not self.source_addresses:
            check_local_ports(self.max_concurrent)

    async def connection(self, console: Console) -> tuple[Connect, str]:
        """How the client is opened, and the model its requests name. Raises ConfigError."""
        if self.engine is None or not self.launches:
            model = await served_model(self.urls, self.model, self._api_key(), self._tls())
            return lambda progress: self._running(progress, model), model
        spec = self.launch.spec(self.engine, self.model, api_key=self.api_key)
        return lambda progress: self._started(progress, spec, console), spec.name

    def _running(self, progress: Progress, model: str) -> Client:
        return Client(self.urls, model=model, **self._options(progress))

    @asynccontextmanager
    async def _started(self, progress: Progress, spec: ServerSpec, console: Console) -> AsyncIterator[Client]:
        given = self.launch
        display = Display(console, spec, given.replicas)
        async with AsyncExitStack() as stack:
            with display.starting():
                launched = await stack.enter_async_context(
                    launch(
                        spec,
                        replicas=given.replicas,
                        devices=given.dealt,
                        ready=1,
                        restart=given.restart,
                        on_change=display.on_change,
                        retry=Retry(outage=RESTART_LIMIT),
                        **self._options(progress),
                    )
                )
            yield await stack.enter_async_context(launched.client())

    def _options(self, progress: Progress) -> FleetOptions:
        options: FleetOptions = {
            "api_key": self._api_key(),
            "max_in_flight": self.max_concurrent,
            "adaptive": self.concurrency == "adaptive",
            "source_addresses": self.source_addresses,
            "on_outage": outage_notice(progress),
        }
        if (tls := self._tls()) is not None:
            options["tls"] = tls
        return options

    def _api_key(self) -> str | None:
        return self.api_key or (None if self.launches else os.environ.get("OPENAI_API_KEY"))

    def _tls(self) -> TLS | None:
        if self.cacert is None and self.cert is None and self.key is None:
            return None
        return TLS(ca=self.cacert, certificate=self.cert, key=self.key)
