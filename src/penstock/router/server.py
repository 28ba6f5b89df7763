"""The life of a router process: listen, say so, relay until told to stop, drain.

`launch_router` prints one line to standard output when requests can be sent, and returns the exit status.
After SIGTERM or SIGINT nothing new is accepted and /readiness says so; what is in flight may end within
`shutdown_grace_period_secs`; then, or at a second signal, it is cut off.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from penstock.control.control import Control
from penstock.errors import ConfigError, PenstockError
from penstock.router.access_log import AccessLogFile
from penstock.router.admin import Admin
from penstock.router.args import RouterArgs
from penstock.router.dashboard import PAGE
from penstock.router.metrics import CONTENT_TYPE, exposition
from penstock.router.router import Router
from penstock.router.tracing import tracing
from penstock.wire.address import Address
from penstock.wire.exchange import Exchange, error_body
from penstock.wire.loop import Stop, run
from penstock.wire.server import Handler, HttpServer

if TYPE_CHECKING:
    from penstock.router.process import Sharing

FILE_TICK: Final = 1.0
"""Seconds between two looks at the worker file."""
KEEP_ALIVE: Final = 75.0
"""Seconds an idle client connection is kept."""
SLOW_HEAD: Final = 20.0
"""Seconds a client may take to send the head of a request, and to begin its first one."""

logger = logging.getLogger(__name__)


def launch_router(args: RouterArgs) -> int:
    """Relay until told to stop; the exit status. Raises ConfigError when it cannot start."""
    args.check()
    if args.processes > 1:
        from penstock.router.processes import run_processes

        return run(run_processes(args))
    return run(_serve(args))


async def _serve(args: RouterArgs) -> int:
    stop = Stop()
    async with serving(args) as server:
        host = f"[{args.host}]" if ":" in args.host else args.host
        scheme = "https" if args.tls_cert_path is not None else "http"
        print(f"penstock router ready on {scheme}://{host}:{server.port}", flush=True)  # noqa: T201
        await ending(server, stop)
    return 0


async def ending(server: RouterServer, stop: Stop) -> None:
    """Serves until told to stop, and until what was in flight then has ended."""
    await stop.wished
    server.router.draining = True
    grace = server.router.args.shutdown_grace_period_secs
    closing = asyncio.ensure_future(server.listener.close(grace))
    await asyncio.wait((closing, stop.hurried), return_when=asyncio.FIRST_COMPLETED)
    if not closing.done():
        server.listener.abort()
    await closing


class RouterServer:
    """A router and what it listens with."""

    def __init__(self, router: Router, listener: HttpServer) -> None:
        self.router = router
        self.listener = listener

    @property
    def port(self) -> int:
        return self.listener.port

    @property
    def url(self) -> str:
        return f"http://{self.listener.host}:{self.listener.port}"


@asynccontextmanager
async def serving(args: RouterArgs, sharing: Sharing | None = None) -> AsyncIterator[RouterServer]:
    """A router that listens; for use in an event loop of the caller's. Raises ConfigError.

    sharing: this is one of several processes, which `launch_router` starts.
    """
    if sharing is None and args.processes > 1:
        raise ConfigError("one event loop is one process: use launch_router for several")
    async with AsyncExitStack() as stack:
        router = await stack.enter_async_context(Router(args, sharing))
        control = await stack.enter_async_context(Control(router.fleet))
        if args.access_log is not None:
            router.access_log = stack.enter_context(AccessLogFile(args.access_log, router))
        if args.worker_file is not None and sharing is None:
            watch = WorkerFile(args.worker_file, router)
            watch.look()
            router.spawn(watch.run())
        tls = _listening_context(args)
        inlet = await stack.enter_async_context(tracing(router))
        listener = HttpServer(
            lambda exchange: handle(exchange),
            args.host,
            args.port,
            max_body=args.max_payload_size,
            keep_alive=KEEP_ALIVE,
            request_timeout=SLOW_HEAD,
            ssl_context=tls,
            reuse_port=sharing is not None,
            protocol=lambda server: inlet(server, router),
        )

        def in_flight() -> int:
            elsewhere = 0 if sharing is None else sharing.in_flight_elsewhere
            return listener.in_flight + elsewhere

        def shared(handler: Handler) -> Handler:
            return handler if sharing is None else sharing.handler(handler)

        handle = shared(Admin(router, control, in_flight, shared=args.admin_port is None).handle)
        if args.admin_port is not None and (sharing is None or sharing.first):
            handler = Guarded(router, shared(Admin(router, control, in_flight).handle))
            await stack.enter_async_context(
                HttpServer(handler, args.admin_host, args.admin_port, ssl_context=tls)
            )
        if args.prometheus_port is not None and (sharing is None or sharing.first):
            metrics = HttpServer(
                shared(lambda exchange: _metrics(exchange, router, in_flight)),
                args.prometheus_host,
                args.prometheus_port,
            )
            await stack.enter_async_context(metrics)
        if sharing is not None:
            sharing.in_flight = lambda: listener.in_flight
        await stack.enter_async_context(listener)
        yield RouterServer(router, listener)


class Guarded:
    """A handler behind the admin key, but for the dashboard's page, which asks for it."""

    def __init__(self, router: Router, handler: Handler) -> None:
        self._router = router
        self._handler = handler

    def __call__(self, exchange: Exchange) -> None:
        request = exchange.request
        if request.path == PAGE or self._router.admits_admin(request.headers.get("authorization", "")):
            self._handler(exchange)
        else:
            exchange.respond(401, error_body(401, "a valid admin API key is needed"))


class Members(Protocol):
    """What workers join and leave."""

    def add(self, url: str) -> None: ...

    async def leave(self, url: str, timeout: float | None) -> bool: ...

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]: ...


class WorkerFile:
    """A file of worker URLs, a line each; empty lines and those after # do not count.

    It is taken as a whole: one with a line that is no URL changes nothing. While the router runs it is taken
    once it has been the same twice in a row, so that a file that is being written is not taken half.
    """

    def __init__(self, path: Path, router: Members) -> None:
        self._path = path
        self._router = router
        self._seen: bytes | None = None
        self._taken: bytes | None = None
        self._listed: set[str] = set()

    def look(self) -> None:
        """Adds and drains what has changed. Raises ConfigError for a file that cannot be used."""
        try:
            content = self._path.read_bytes()
        except OSError as error:
            raise ConfigError(f"the worker file {self._path} cannot be read: {error.strerror}") from error
        settled = self._seen in (None, content)
        self._seen = content
        if content == self._taken or not settled:
            return
        self._taken = content
        listed = self._urls(content)
        for url in sorted(listed - self._listed):
            self._router.add(url)
        for url in self._listed - listed:
            self._router.spawn(self._router.leave(url, None))
        self._listed = listed

    def _urls(self, content: bytes) -> set[str]:
        urls = set()
        for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), 1):
            if url := line.partition("#")[0].strip():
                try:
                    Address.parse(url)
                except ConfigError as error:
                    raise ConfigError(f"the worker file {self._path}, line {number}: {error}") from None
                urls.add(url)
        return urls

    async def run(self) -> None:
        """Looks for ever. What cannot be used is told, and the rest stays as it was."""
        while True:
            await asyncio.sleep(FILE_TICK)
            try:
                self.look()
            except PenstockError as error:
                logger.warning("%s", error)


def _metrics(exchange: Exchange, router: Router, in_flight: Callable[[], int]) -> None:
    if exchange.request.path == "/metrics":
        exchange.respond(200, exposition(router, in_flight()), CONTENT_TYPE)
    else:
        exchange.respond(404, error_body(404, "there is only /metrics here"))


def _listening_context(args: RouterArgs) -> ssl.SSLContext | None:
    """Raises ConfigError when the certificate cannot be used."""
    if args.tls_cert_path is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(args.tls_cert_path, args.tls_key_path, lambda: "")
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"the TLS certificate {args.tls_cert_path} cannot be used: {error}") from error
    return context
