"""The router's settings: the flags of `penstock route`, with the names the field's routers have."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, Literal

from penstock.errors import ConfigError
from penstock.fleet.health import Breaker
from penstock.fleet.retry import Retry
from penstock.wire.address import Address
from penstock.wire.tls import TLS

MAX_PROCESSES: Final = 64

Policy = Literal["least_in_flight", "round_robin", "random", "power_of_two", "session", "prefix_aware"]


@dataclass(frozen=True, kw_only=True)
class RouterArgs:
    """One address for many engines."""

    worker_urls: tuple[str, ...] = ()
    """Base URLs of the engines: http(s)://host:port, host:port or unix:///path."""
    worker_file: Path | None = None
    """File with one such URL a line, watched: what is added joins, what is taken out drains and leaves."""
    policy: Policy = "least_in_flight"
    """Which engine gets a request. session: the one its X-Session-ID, session_id or user belongs to;
    prefix_aware: the one whose prefix cache knows the beginning of its prompt."""
    host: str = "127.0.0.1"
    port: int = 30000
    """0: any free port; the ready line says which."""
    processes: int = 1
    """Processes that listen on the port, a core for each. Limits, counts and workers are those of all."""
    request_timeout_secs: float | None = 1800.0
    """Seconds an engine may be silent, before its response and within it. Not a bound on the whole."""
    max_concurrent_requests: int | None = None
    """Requests in flight at most, on all engines together. None: no limit."""
    worker_max_in_flight: int | None = None
    """Requests in flight at most on each engine. None: no limit."""
    adaptive: bool = False
    """Find each engine's limit, below worker_max_in_flight, from its metrics or its throughput."""
    queue_size: int = 10_000
    """Requests that may wait for a slot; one more is answered 429."""
    queue_timeout_secs: float = 60.0
    """Seconds a request may wait for a slot; then 429, or 503 when no engine is up."""
    max_payload_size: int = 512 << 20
    """Bytes of a request's body at most."""
    retry_max_retries: int = 5
    """Times a request is sent again at most, each to another engine where there is one."""
    cb_failure_threshold: int = 10
    """Failures among the last twice as many outcomes that open an engine's circuit breaker."""
    cb_success_threshold: int = 1
    """Trials that must succeed, one after the other, to close it."""
    cb_timeout_duration_secs: float = 5.0
    """Seconds it stays open; longer each time it opens again, up to a minute."""
    health_check_interval_secs: float = 10.0
    """Seconds between two looks at an engine's /health and models."""
    health_failure_threshold: int = 3
    """Looks in a row that must fail before an engine is down."""
    resume_streams: bool = False
    """Continue a stream on another engine when its own dies; else only for requests with
    X-Penstock-Resume: 1."""
    api_key: str | None = None
    """Bearer token clients must send. None: none is needed."""
    admin_api_key: str | None = None
    """Bearer token for the admin routes. None: that of clients."""
    worker_api_key: str | None = None
    """Bearer token sent to the engines in place of what clients send. None: theirs is passed on."""
    admin_host: str = "127.0.0.1"
    admin_port: int | None = None
    """Serve the admin routes here and no longer on the main port. None: on the main port."""
    prometheus_host: str = "127.0.0.1"
    prometheus_port: int | None = 29000
    """Where /metrics is served, besides the main port. None: nowhere else."""
    tls_cert_path: str | None = None
    """PEM file of the certificate to listen with, with the chain behind it."""
    tls_key_path: str | None = None
    """PEM file of its private key, if that is not in the same file."""
    worker_ca_path: str | None = None
    """PEM file of the authorities to trust for https engines. None: the system's."""
    worker_cert_path: str | None = None
    """PEM file of the router's own certificate, for https engines that ask for one."""
    worker_key_path: str | None = None
    """PEM file of its private key, if that is not in the same file."""
    access_log: str | None = None
    """File that gets a line of JSON for each relayed request; - is standard output."""
    otlp_endpoint: str | None = None
    """Base URL of a collector that OpenTelemetry spans are sent to by OTLP over HTTP; needs penstock[otel].
    None: where OTEL_EXPORTER_OTLP_ENDPOINT says, if it does."""
    shutdown_grace_period_secs: float = 60.0
    """Seconds that requests in flight have to end after SIGTERM; a second signal ends them at once."""

    def check(self) -> None:
        """Raises ConfigError for what cannot work."""
        if not self.worker_urls and self.worker_file is None:
            raise ConfigError("a router needs --worker-urls or --worker-file")
        for url in self.worker_urls:
            Address.parse(url)
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
        for name in ("api_key", "admin_api_key", "worker_api_key"):
            key = getattr(self, name)
            if key is not None and not (key and key.isascii() and key.isprintable()):
                raise ConfigError(
                    f"--{name.replace('_', '-')} holds characters that cannot be sent in a header"
                )
        if self.otlp_endpoint is not None and not self.otlp_endpoint.startswith(("http://", "https://")):
            raise ConfigError(f"--otlp-endpoint must be an http or https URL, not {self.otlp_endpoint!r}")
        if self.processes > MAX_PROCESSES:
            raise ConfigError(f"--processes must be at most {MAX_PROCESSES}, not {self.processes}")
        for cert, key in (("tls_cert_path", "tls_key_path"), ("worker_cert_path", "worker_key_path")):
            if getattr(self, key) is not None and getattr(self, cert) is None:
                raise ConfigError(
                    f"--{key.replace('_', '-')} is of no use without --{cert.replace('_', '-')}"
                )

    @property
    def retry(self) -> Retry:
        """Backoff is short: a router has other engines, and a client of its own that waits."""
        return Retry(attempts=self.retry_max_retries + 1, base=0.05, cap=5.0, outage=self.queue_timeout_secs)

    @property
    def breaker(self) -> Breaker:
        timeout = self.cb_timeout_duration_secs
        return Breaker(
            failure_threshold=self.cb_failure_threshold,
            success_threshold=self.cb_success_threshold,
            timeout=timeout,
            max_timeout=max(60.0, timeout),
        )

    @property
    def worker_tls(self) -> TLS | None:
        """How TLS is spoken to https engines; None: as the system does."""
        if self.worker_ca_path is self.worker_cert_path is None:
            return None
        return TLS(ca=self.worker_ca_path, certificate=self.worker_cert_path, key=self.worker_key_path)

    def shown(self) -> dict[str, Any]:
        """The settings, without secrets."""
        hidden = {"api_key", "admin_api_key", "worker_api_key"}
        return {
            field.name: str(value) if isinstance(value := getattr(self, field.name), Path) else value
            for field in fields(self)
            if field.name not in hidden
        }


_LEAST = {
    "processes": 1,
    "port": 0,
    "admin_port": 0,
    "prometheus_port": 0,
    "max_concurrent_requests": 1,
    "worker_max_in_flight": 1,
    "queue_size": 0,
    "queue_timeout_secs": 0.001,
    "max_payload_size": 1,
    "retry_max_retries": 0,
    "cb_failure_threshold": 1,
    "cb_success_threshold": 1,
    "cb_timeout_duration_secs": 0.001,
    "health_check_interval_secs": 0.01,
    "health_failure_threshold": 1,
    "request_timeout_secs": 0.001,
    "shutdown_grace_period_secs": 0,
}
