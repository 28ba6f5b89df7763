"""One node of a Ray cluster for vLLM: the head or a worker, started here, watched and ended.

It guarantees, as a server does, that after the block no process of the node is left; inside the head's block
all nodes have joined. Nothing of Ray is imported: it is run by the interpreter that has vLLM.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from penstock.errors import ConfigError, EngineError
from penstock.servers.diagnosis import EngineDied, StartFailed, ending
from penstock.servers.launched import LINES_KEPT, TAIL, LifeCycle
from penstock.servers.log import EngineLog, LogFile, Mask
from penstock.servers.nodes import Nodes, is_address
from penstock.servers.process import Process

LOOK: Final = 2.0
"""Seconds between two looks at who has joined; each starts an interpreter."""

LOOK_LIMIT: Final = 60.0
"""Seconds a look may take."""

_COUNT: Final = (
    "import sys, ray; ray.init(address=sys.argv[1], log_to_driver=False, logging_level='ERROR');"
    "print('alive', sum(bool(node['Alive']) for node in ray.nodes()))"
)


def node_command(nodes: Nodes, python: str) -> list[str]:
    """The command that makes this machine the head or a worker of the cluster, until it is ended."""
    host = nodes.hosts[nodes.rank]
    words = [python, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    if is_address(host):  # of a name Ray finds the address itself
        words += ["--node-ip-address", host]
    if nodes.is_head:
        return [*words, "--head", "--port", str(nodes.port), "--include-dashboard=false"]
    return [*words, "--address", nodes.head]


def count_command(address: str, python: str) -> list[str]:
    """The command that prints `alive N`, the nodes of a cluster."""
    return [python, "-c", _COUNT, address]


def counted(output: bytes) -> int:
    """What `count_command` said; 0 when it could not say."""
    for line in reversed(output.decode(errors="replace").splitlines()):
        word, _, number = line.partition(" ")
        if word == "alive" and number.isdigit():
            return int(number)
    return 0


class RayNode:
    """`async with RayNode(nodes, python)`. With `nodes.ray_address` nothing is started: it is only waited
    until the cluster has as many nodes as there are hosts.

    Raises StartFailed on entering when the node ends, or when not all have joined within
    `life.start_timeout`.
    """

    def __init__(
        self,
        nodes: Nodes,
        python: str,
        *,
        env: Mapping[str, str] | None = None,
        life: LifeCycle | None = None,
    ) -> None:
        if nodes.ray_address is not None and not nodes.is_head:
            raise ConfigError("With a Ray cluster that runs already only the first node is started.")
        self.nodes = nodes
        self.python = python
        self.life = life or LifeCycle()
        self.joined = 0
        """Nodes that have been seen to be there."""
        self._environment = {**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})}
        self._log: EngineLog | None = None
        self._process: Process | None = None

    async def __aenter__(self) -> Self:
        try:
            async with asyncio.timeout(self.life.start_timeout):
                if self.nodes.ray_address is None:
                    await self._launch()
                if self.nodes.is_head:
                    await self._until_joined()
        except TimeoutError:
            await self._stop(0.0)
            raise self._failure(
                f"had {self.joined} of {self.nodes.count} nodes after {self.life.start_timeout:g} s."
            ) from None
        except BaseException:
            await self._stop(0.0)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop(self.life.stop_grace)

    async def ended(self) -> EngineDied:
        """Waits for the end of the node, as a worker does whose head has gone; says how it ended."""
        assert self._process is not None
        status = await asyncio.shield(self._process.exited)
        tail = () if self._log is None else tuple(self._log.tail)[-TAIL:]
        return EngineDied(f"Ray's node ended ({ending(status)}).", log_tail=tail, status=status)

    async def _launch(self) -> None:
        folder = self.life.log_folder
        file = None if folder is None else LogFile(Path(folder) / f"ray-{self.nodes.rank}.log")
        self._log = EngineLog(Mask.of(self._environment), file, lines=LINES_KEPT)
        if self.life.on_stage is not None:
            self.life.on_stage("starting Ray" if self.nodes.is_head else f"joining {self.nodes.head}")
        self._process = await Process.start(
            node_command(self.nodes, self.python), environment=self._environment, on_output=self._hear
        )

    def _hear(self, data: bytes) -> None:
        if self._log is not None:
            self._log.feed(data)

    async def _until_joined(self) -> None:
        while True:
            self.joined = await self._count()
            if self.joined >= self.nodes.count:
                return
            if self.life.on_stage is not None:
                self.life.on_stage(f"waiting for nodes ({self.joined} of {self.nodes.count} are there)")
            if self._process is None:
                await asyncio.sleep(LOOK)
                continue
            await asyncio.wait([self._process.exited], timeout=LOOK)
            if not self._process.alive:
                status = self._process.exited.result()
                raise self._failure(f"ended before all nodes had joined ({ending(status)}).", status)

    async def _count(self) -> int:
        address = self.nodes.ray_address or self.nodes.head
        asked = await asyncio.create_subprocess_exec(
            *count_command(address, self.python),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env=self._environment,
        )
        try:
            async with asyncio.timeout(LOOK_LIMIT):
                output, _ = await asked.communicate()
        except TimeoutError:
            return 0
        finally:
            if asked.returncode is None:
                asked.kill()
                await asked.wait()
        return counted(output)

    async def _stop(self, grace: float) -> None:
        process, self._process = self._process, None
        try:
            if process is not None:
                await process.stop(grace)
        finally:
            if self._log is not None:
                self._log.close()

    def _failure(self, what: str, status: int | None = None) -> EngineError:
        tail = () if self._log is None else tuple(self._log.tail)[-TAIL:]
        return StartFailed(f"The Ray cluster {what}", log_tail=tail, status=status)
