"""`penstock serve`: engines started, watched and restarted, with the router in front of them if asked for."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import tyro
from rich.console import Console
from tyro.conf import OmitArgPrefixes

from penstock.cli.launching import Display, EngineName, LaunchArgs
from penstock.cluster.session import connected
from penstock.errors import ConfigError
from penstock.router.args import RouterArgs
from penstock.router.router import Router
from penstock.router.server import serving
from penstock.servers.installation import find
from penstock.servers.launched import LifeCycle
from penstock.servers.nodes import INIT_PORT, Nodes
from penstock.servers.ray import RayNode
from penstock.servers.replicas import Replicas
from penstock.servers.restart import Restart
from penstock.servers.spec import LOOPBACK, ServerSpec
from penstock.servers.vllm import VLLMServer
from penstock.wire.loop import run

SLURM: Final = "slurm"
"""In place of hosts: those of the Slurm job."""

INTERRUPTED: Final = 130
"""Exit status after a signal before the first engine was ready."""


@dataclass(frozen=True)
class ServeArgs:
    """Start engines and serve a model on one address, until Ctrl-C or SIGTERM.

    An engine that dies is restarted. With --route the router is in front: one address for all replicas, and
    requests of an engine that dies are tried again on another.
    """

    model: str | None = None
    """A checkpoint folder or a hub's id (embedded: a folder, default the shipped model)."""
    engine: EngineName = "vllm"
    """The engine to start."""
    launch: OmitArgPrefixes[LaunchArgs] = field(default_factory=LaunchArgs)
    route: bool = False
    """Put the router in front. More than one replica needs it."""
    served_model_name: str | None = None
    """What requests call the model. Default: its folder's name, or its id."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8000
    """0: any free one; the line that says ready has it."""
    api_key: str | None = None
    """Key that clients must send. Default: the environment's PENSTOCK_API_KEY; without it none is needed."""
    hosts: tuple[str, ...] = ()
    """The machines of one engine on several nodes, the head first (node[1-4] stands for four), or `slurm`.
    Run the same command on each. vLLM runs over Ray, SGLang by itself."""
    node_rank: int | None = None
    """Place of this machine among the hosts. Default: found by its name."""
    node_port: int = INIT_PORT
    """Port of the head at which the nodes meet."""
    ray: bool = False
    """Start the engines on the nodes of a Ray cluster, each where there is room; see docs/cluster.md."""
    ray_address: str | None = None
    """HOST:PORT of a Ray cluster that runs already: with --ray, by default the one of this machine or of
    RAY_ADDRESS; without, for vLLM on several nodes."""
    ray_name: str = "penstock"
    """With --ray: what the engines are registered as."""
    ray_cpus: float = 1.0
    """With --ray: CPUs each engine takes, beside its GPUs."""
    log_folder: Path | None = None
    """Where the engines' logs go. Default: ~/.cache/penstock/logs."""


def main(argv: list[str]) -> int:
    """Run the command. Returns 0 when it was told to stop, 130 when that was before anything served."""
    args = tyro.cli(ServeArgs, prog="penstock serve", args=argv)
    _check_ray(args)
    try:
        if args.ray:
            with connected(args.ray_address):
                return run(_serve_on_ray(args, _spec(args)))
        spec, nodes = _spec(args), _nodes(args)
        if nodes is not None and not nodes.is_head and spec.engine == "vllm":
            return run(_join(args, spec, nodes))
        return run(_serve(args, spec))
    except (KeyboardInterrupt, asyncio.CancelledError):
        return INTERRUPTED


async def _serve(args: ServeArgs, spec: ServerSpec) -> int:
    console = Console(stderr=True)
    display = Display(console, spec, args.launch.replicas)
    members = Members()
    replicas = Replicas(
        spec,
        members,
        replicas=args.launch.replicas,
        devices=args.launch.dealt,
        ready=1,
        # One part of an engine on several nodes cannot come back alone.
        restart=args.launch.restart if spec.nodes is None else Restart(limit=0),
        life=LifeCycle(log_folder=args.log_folder),
        on_change=display.on_change,
    )
    async with AsyncExitStack() as stack:
        with stopped_by_signals() as stop:
            with display.starting():
                await stack.enter_async_context(replicas)
            if args.route:
                await _routed(args, spec, members, stop)
            else:
                # A restart is at the address that has been told.
                replicas.spec = replace(spec, port=int(members.first.rpartition(":")[2]))
                _say_ready(members.first, spec)
                await stop.wait()
            stop.hurried.set()  # from here on another signal shortens the engines' grace
            await stack.aclose()
    return 0


async def _serve_on_ray(args: ServeArgs, spec: ServerSpec) -> int:
    from penstock.cluster.engines import Engines
    from penstock.cluster.follow import Follower

    display = Display(Console(stderr=True), spec, args.launch.replicas)
    members = Members()
    engines = Engines(
        spec,
        replicas=args.launch.replicas,
        name=args.ray_name,
        cpus=args.ray_cpus,
        ready=1,
        restart=args.launch.restart,
        log_folder=None if args.log_folder is None else str(args.log_folder),
        on_change=display.on_change,
    )
    async with AsyncExitStack() as stack:
        with stopped_by_signals() as stop:
            with display.starting():
                await stack.enter_async_context(engines)
            follower = await stack.enter_async_context(Follower(args.ray_name, members))
            await follower.until(1)
            if args.route:
                await _routed(args, spec, members, stop)
            else:
                line = f"penstock serves {spec.name} on Ray as {args.ray_name}: {', '.join(members.urls)}"
                print(line, flush=True)  # noqa: T201
                await stop.wait()
            stop.hurried.set()  # from here on another signal shortens the engines' grace
            await stack.aclose()
    return 0


async def _routed(args: ServeArgs, spec: ServerSpec, members: Members, stop: Stop) -> None:
    """The router in front, until it is to stop and what was in flight has ended."""
    router_args = RouterArgs(
        worker_urls=tuple(members.urls) or (members.first,),
        host=args.host,
        port=args.port,
        api_key=spec.api_key,
        prometheus_port=None,
    )
    async with serving(router_args) as server, members.shown_to(server.router, router_args.worker_urls):
        host = LOOPBACK.get(args.host, args.host)
        _say_ready(f"http://{f'[{host}]' if ':' in host else host}:{server.port}", spec)
        await stop.wait()
        server.router.draining = True
        closing = asyncio.ensure_future(server.listener.close(router_args.shutdown_grace_period_secs))
        hurried = asyncio.ensure_future(stop.hurried.wait())
        await asyncio.wait((closing, hurried), return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        if not closing.done():
            server.listener.abort()
        await closing


def _say_ready(url: str, spec: ServerSpec) -> None:
    line = f"penstock serves {spec.name} on {url}"
    if spec.nodes is not None and not spec.nodes.is_head:
        line = f"penstock node {spec.nodes.rank} of {spec.nodes.count} is ready; {spec.nodes.hosts[0]} serves"
    print(line, flush=True)  # noqa: T201


async def _join(args: ServeArgs, spec: ServerSpec, nodes: Nodes) -> int:
    """A worker of vLLM's Ray cluster, until the head has gone or it is told to stop."""
    console = Console(stderr=True)
    life = LifeCycle(
        log_folder=args.log_folder, on_stage=lambda stage: console.print(f"node {nodes.rank}: {stage}")
    )
    installed = await find(VLLMServer.package, spec.python, os.environ)
    with stopped_by_signals() as stop:
        async with RayNode(nodes, installed.python, env=spec.env, life=life) as node:
            wished = asyncio.ensure_future(stop.wait())
            ended = asyncio.ensure_future(node.ended())
            await asyncio.wait((wished, ended), return_when=asyncio.FIRST_COMPLETED)
            wished.cancel()
            if ended.done():
                raise ended.result()
            ended.cancel()
            stop.hurried.set()
    return 0


class Members:
    """The endpoints that are ready: kept here, and in the router once there is one."""

    def __init__(self) -> None:
        self.urls: dict[str, None] = {}
        self.first = ""
        """The one that was ready first."""
        self._router: Router | None = None

    def add(self, url: str) -> None:
        self.urls[url] = None
        self.first = self.first or url
        if self._router is not None:
            self._router.add(url)

    async def remove(self, url: str) -> None:
        self.urls.pop(url, None)
        if self._router is not None:
            await self._router.fleet.remove(url)

    async def drain(self, url: str, timeout: float | None = None) -> bool:
        """It gets no more requests, and leaves when it has none. Raises as `Fleet.drain`."""
        self.urls.pop(url, None)
        return True if self._router is None else await self._router.fleet.drain(url, timeout)

    @asynccontextmanager
    async def shown_to(self, router: Router, known: tuple[str, ...]) -> AsyncIterator[None]:
        """While the block runs the router, which was started with `known`, has those that are ready."""
        self._router = router
        for url in self.urls:
            if url not in known:
                router.add(url)
        for url in known:
            if url not in self.urls:
                await router.fleet.remove(url)
        try:
            yield
        finally:
            self._router = None


class Stop:
    """What signals ask for: before anything serves they cancel; then one is a wish, a second a hurry."""

    def __init__(self, task: asyncio.Task[object]) -> None:
        self.serving = False
        self.wished = asyncio.Event()
        self.hurried = asyncio.Event()
        """What is in flight need not be waited for."""
        self._task = task

    async def wait(self) -> None:
        """Serves until the wish to stop."""
        self.serving = True
        await self.wished.wait()

    def heard(self) -> None:
        """A signal."""
        if self.serving and not self.wished.is_set():
            self.wished.set()
        elif self.serving and not self.hurried.is_set():
            self.hurried.set()
        else:
            self._task.cancel()


@contextmanager
def stopped_by_signals() -> Iterator[Stop]:
    """SIGTERM and Ctrl-C are heard as `Stop` says."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    stop = Stop(task)
    numbers = (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        loop.add_signal_handler(number, stop.heard)
    try:
        yield stop
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def _check_ray(args: ServeArgs) -> None:
    """Raises ConfigError for flags that would mean nothing."""
    usual = ServeArgs()
    if not args.ray:
        if (args.ray_name, args.ray_cpus) != (usual.ray_name, usual.ray_cpus):
            raise ConfigError("--ray-name and --ray-cpus are for --ray.")
        return
    if args.hosts or args.node_rank is not None or args.launch.devices:
        raise ConfigError("--ray places the engines itself: leave out --hosts, --node-rank and --devices.")
    if not args.route and (args.host, args.port) != (usual.host, usual.port):
        raise ConfigError("With --ray the engines choose their ports; --host and --port are for --route.")


def _spec(args: ServeArgs) -> ServerSpec:
    if args.launch.replicas > 1 and not (args.route or args.ray):
        raise ConfigError("More than one replica needs --route: one address for all of them.")
    key = args.api_key or os.environ.get("PENSTOCK_API_KEY") or None
    behind = args.route or args.ray
    return args.launch.spec(
        args.engine,
        args.model,
        name=args.served_model_name,
        host="127.0.0.1" if behind else args.host,
        port=0 if behind else args.port,
        api_key=key,
        nodes=None if args.ray else _nodes(args),
    )


def _nodes(args: ServeArgs) -> Nodes | None:
    if args.ray_address is not None and args.engine != "vllm":
        raise ConfigError("--ray-address is for vllm: only that runs over Ray.")
    if not args.hosts:
        if args.ray_address is None:
            return None
        return Nodes(hosts=(socket.gethostname(),), rank=0, ray_address=args.ray_address)
    if args.engine == "embedded":
        raise ConfigError("The embedded engine runs on one machine: --hosts is for vllm and sglang.")
    if args.hosts == (SLURM,):
        nodes = Nodes.from_slurm(os.environ, port=args.node_port)
    else:
        here = [socket.gethostname(), socket.getfqdn(), "localhost", "127.0.0.1"]
        nodes = Nodes.from_hosts(args.hosts, here=here, rank=args.node_rank, port=args.node_port)
    return replace(nodes, ray_address=args.ray_address)
