"""Two engines in processes of their own, what weights they have, and how a transport for them is made."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from http.client import HTTPConnection
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import torch
from safetensors.torch import save_file

from penstock.control.broadcast import Broadcast
from penstock.control.dialect import Meeting
from penstock.control.engine import Engine
from penstock.control.files import TensorFiles
from penstock.control.groups import TorchGroup
from penstock.control.shared_memory import SharedMemory
from penstock.control.staged import ChangedOnly, HttpChunks
from penstock.control.transport import DiskReload, WeightTransport
from penstock.errors import EngineError

START = 240.0
"""Seconds an engine may take to start."""
WEIGHTS = "model.safetensors"

Weights = dict[str, torch.Tensor]


def digest(tensor: torch.Tensor) -> str:
    array: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return sha256(memoryview(array)).hexdigest()


def noisy(weights: Weights, seed: int, only: str = "") -> Weights:
    """Other weights; `only`: where this is in the name."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: one + 0.01 * torch.randn(one.shape, generator=generator) if only in name else one
        for name, one in weights.items()
    }


class Process:
    """One engine; it can be killed, and started again at the same port. words: the command, with a PORT."""

    def __init__(self, words: list[str], checksums: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = int(free.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self._words = [str(self.port) if word == "PORT" else word for word in words]
        self._checksums = checksums
        self.start()

    def start(self) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-m", *self._words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            response = connection.getresponse()
            content = response.read()
            assert response.status == 200, content
            return json.loads(content or b"null")
        finally:
            connection.close()

    def ready(self) -> None:
        deadline = monotonic() + START
        while monotonic() < deadline and self._child.poll() is None:
            try:
                self.ask("GET", "/health")
            except OSError:
                sleep(0.05)
            else:
                return
        raise AssertionError("the engine did not start")

    def digests(self) -> dict[str, str]:
        """SHA-256 of each tensor that is in place."""
        answer = self.ask("POST", self._checksums, {"action": "checksum"})
        found = answer["checksums"] if "checksums" in answer else answer["ranks"][0]["checksums"]
        return {name.rpartition(":")[2]: one for name, one in found.items()}

    def kill(self) -> None:
        self._child.kill()
        self._child.wait(10)


@contextmanager
def two_engines(kind: str, checkpoint: Path) -> Iterator[list[Process]]:
    """kind: embedded, vllm or sglang; the latter are receivers of broadcasts."""
    if kind == "embedded":
        words = ["penstock.engine", "--model", str(checkpoint), "--port", "PORT", "--threads", "1"]
        words += ["--kv-cache-memory-bytes", "8M"]
    else:
        words = ["tests.transports.receiver", kind, "PORT", str(checkpoint / WEIGHTS)]
    route = "/weights_checker" if kind == "sglang" else "/weight_checker"
    engines = [Process(words, route) for _ in range(2)]
    try:
        for engine in engines:
            engine.ready()
        yield engines
    finally:
        for engine in engines:
            engine.kill()


Make = Callable[[Weights], WeightTransport]


@dataclass(frozen=True)
class Way:
    """One transport under test."""

    engines: str
    make: Callable[[Path, Path], Make]
    """Given a folder and a checkpoint, what makes the transport of each version."""
    staged: bool = True
    """Weights that arrive broken are refused before anything has changed."""
    changes: bool = False
    """Engines get what has changed."""


class Reloads:
    """Writes each version to a checkpoint folder of its own, and removes the one before."""

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        self._folder, self._checkpoint = folder, checkpoint
        self._count = 0

    def __call__(self, weights: Weights) -> DiskReload:
        self._count += 1
        path = self._folder / str(self._count)
        path.mkdir(parents=True)
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            (path / name).write_bytes((self._checkpoint / name).read_bytes())
        save_file(weights, path / WEIGHTS, metadata={"format": "pt"})
        return DiskReload(path)


def _named(meeting: Meeting, device: torch.device, timeout: float) -> TorchGroup:
    """vLLM has no names for groups, nor torch.distributed: the receiver that stands for it has."""
    known = Meeting(meeting.address, meeting.port, 2, f"port {meeting.port}", "gloo")
    return TorchGroup(known, device, timeout)


def _broadcast(folder: Path, checkpoint: Path) -> Make:
    return partial(Broadcast, address="127.0.0.1", backend="gloo")


WAYS: dict[str, Way] = {
    "http": Way("embedded", lambda folder, checkpoint: HttpChunks),
    "shared memory": Way("embedded", lambda folder, checkpoint: SharedMemory),
    "disk": Way("embedded", lambda folder, checkpoint: partial(TensorFiles, folder=folder)),
    "http, changes": Way("embedded", lambda folder, checkpoint: ChangedOnly(HttpChunks), changes=True),
    "shared memory, changes": Way(
        "embedded", lambda folder, checkpoint: ChangedOnly(SharedMemory), changes=True
    ),
    "disk, changes": Way(
        "embedded",
        lambda folder, checkpoint: ChangedOnly(partial(TensorFiles, folder=folder)),
        changes=True,
    ),
    "reload": Way("embedded", Reloads, staged=False),
    "broadcast, SGLang": Way("sglang", _broadcast, staged=False),
    "broadcast, vLLM": Way(
        "vllm",
        lambda folder, checkpoint: partial(Broadcast, address="127.0.0.1", open_group=_named),
        staged=False,
    ),
}


class Interfering:
    """A transport in which `before` happens ahead of a phase on the engine at `url`, once."""

    def __init__(
        self, inner: WeightTransport, url: str, phase: str, before: Callable[[], Any] | None = None
    ) -> None:
        self.inner = inner
        self._url, self._phase = url, phase
        self._before = before
        self.happened = False

    async def prepare(self, engine: Engine, version: int) -> None:
        await self._interfere("prepare", engine)
        await self.inner.prepare(engine, version)

    async def transfer(self, engine: Engine, version: int) -> None:
        await self._interfere("transfer", engine)
        await self.inner.transfer(engine, version)

    async def commit(self, engine: Engine, version: int) -> str | None:
        await self._interfere("commit", engine)
        return await self.inner.commit(engine, version)

    async def abort(self, engine: Engine) -> None:
        await self.inner.abort(engine)

    async def _interfere(self, phase: str, engine: Engine) -> None:
        if self.happened or (phase, engine.name) != (self._phase, self._url):
            return
        self.happened = True
        if self._before is None:
            raise EngineError("it fails as it was told to")
        done = self._before()
        if asyncio.iscoroutine(done):
            await done


def left_behind(folder: Path) -> list[str]:
    """Files, named shared memory and nameless memory of this process that belong to a transport."""
    found = [str(path) for path in folder.glob("penstock-weights-*")]
    found += [str(path) for path in Path("/dev/shm").glob("penstock*")]
    for link in Path("/proc/self/fd").iterdir():
        try:
            target = str(link.readlink())
        except OSError:
            continue
        if "memfd:penstock-weights" in target:
            found.append(target)
    return found
