"""Tensors as safetensors files in a folder that engines can read, there only while an engine needs them.

It guarantees:
- a file is whole before an engine is told of it, and is removed when the last one has done with it;
- what a process that was killed has left is removed by the next one that writes into the folder, and nothing
  of one that still runs is.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final
from uuid import uuid4

from penstock.control.checksums import vectors_of
from penstock.control.dialect import Ask
from penstock.control.engine import Engine
from penstock.control.staged import Given, Staged
from penstock.control.tensors import Tensors, write_safetensors
from penstock.control.transport import DiskReload
from penstock.errors import ConfigError, WriteFailed

PREFIX: Final = "penstock-weights-"
"""Of the folders that are written."""
LOCK: Final = ".lock"
"""In each such folder: locked (flock(2)) while its writer runs."""
WEIGHTS: Final = "model.safetensors"
NOT_COPIED: Final = (".safetensors", ".bin", ".index.json", ".pt", ".pth", ".gguf")
"""Endings of the files of a checkpoint that hold its weights, or say where they are."""
SETTLED: Final = 5.0
"""Seconds after which a folder that is not locked was left by a process that is gone."""


class TensorFiles(Staged):
    """All tensors, or those that have changed, in a safetensors file of a folder that every engine can read.

    Embedded engines take the tensors in beside those in use. vLLM and SGLang reload a whole checkpoint, for
    which `model` gives the other files: config.json, the tokenizer. Raises ConfigError.
    """

    backend = "disk"

    def __init__(
        self,
        tensors: Given,
        folder: str | Path,
        *,
        model: str | Path | None = None,
        verify: bool = True,
        since: Staged | None = None,
    ) -> None:
        super().__init__(tensors, since=since)
        self.folder = Path(folder).absolute()
        self._model = None if model is None else Path(model)
        self._verify = verify
        self._scratch: dict[bool, Scratch] = {}
        """By whether it holds all tensors or the changes."""
        self._reloads: dict[Engine, DiskReload] = {}
        """Engines that take a checkpoint, not tensors."""
        self._vectors: dict[str, frozenset[str]] | None = None
        sweep(self.folder)

    async def prepare(self, engine: Engine, version: int) -> None:
        """See WeightTransport. Raises ConfigError for vLLM and SGLang where no `model` was given."""
        self._reloads.pop(engine, None)
        if await self._stages(engine):
            await self._begin(engine, version)
        elif self._model is None:
            raise ConfigError(f"{engine.name} reloads a whole checkpoint: TensorFiles needs `model` for it")
        else:
            await engine.ask(*(await engine.dialect()).presence())
            self._reloads[engine] = DiskReload(self.folder, verify=False)  # until it is written

    async def transfer(self, engine: Engine, version: int) -> None:
        """See WeightTransport. Raises WriteFailed."""
        if engine not in self._reloads:
            await super().transfer(engine, version)
            return
        path = await self._written(whole=True).enter(engine)
        if self._verify and self._vectors is None:
            self._vectors = await asyncio.to_thread(vectors_of, self.tensors)
        self._reloads[engine] = DiskReload(path, verify=self._verify, vectors=self._vectors)

    async def commit(self, engine: Engine, version: int) -> str | None:
        """See WeightTransport."""
        reload = self._reloads.pop(engine, None)
        if reload is None:
            return await super().commit(engine, version)
        try:
            said = await reload.commit(engine, version)
            self.placed = True
            return said
        finally:
            await self._written(whole=True).leave(engine)

    async def abort(self, engine: Engine) -> None:
        """See WeightTransport."""
        if self._reloads.pop(engine, None) is None:
            await super().abort(engine)
        else:
            await self._written(whole=True).leave(engine)

    async def _send(self, engine: Engine, tensors: Tensors) -> None:
        scratch = self._written(whole=tensors is self.tensors)
        path = await scratch.enter(engine)
        try:
            ask = Ask("/update_weights", {"update_info": {"path": str(path / WEIGHTS)}})
            await engine.ask(ask, timeout=engine.update_timeout)
        finally:
            await scratch.leave(engine)

    def _written(self, *, whole: bool) -> Scratch:
        if whole not in self._scratch:
            tensors = self.tensors if whole else self._changed or {}
            model = self._model if whole else None
            self._scratch[whole] = Scratch(self.folder, lambda path: write_checkpoint(path, tensors, model))
        return self._scratch[whole]


class Scratch:
    """A folder in `root` that is there while somebody uses it, filled by `write`."""

    def __init__(self, root: Path, write: Callable[[Path], None]) -> None:
        self._root = root
        self._write = write
        self._users: set[object] = set()
        self._lock = asyncio.Lock()
        self._made: Made | None = None

    async def enter(self, user: object) -> Path:
        """Its path; it stays until `leave`. Raises WriteFailed."""
        async with self._lock:
            self._users.add(user)
            try:
                if self._made is None:
                    self._made = made = Made(self._root)
                    await asyncio.to_thread(made.fill, self._write)
                return self._made.path
            except BaseException:
                await self._gone(user)
                raise

    async def leave(self, user: object) -> None:
        """Who has not entered may leave as well."""
        async with self._lock:
            await self._gone(user)

    async def _gone(self, user: object) -> None:
        self._users.discard(user)
        if not self._users and self._made is not None:
            made, self._made = self._made, None
            await asyncio.to_thread(made.remove)


class Made:
    """One folder, locked by this process, removed when this is let go of.

    `fill` and `remove` run in threads, which a cancelled task leaves to themselves: whichever comes first, no
    folder stays.
    """

    def __init__(self, root: Path) -> None:
        self.path = root / f"{PREFIX}{uuid4().hex}"
        self._lock: list[int] = []
        self._turn = threading.Lock()
        self._removed = threading.Event()
        self.remove = weakref.finalize(self, _remove, self.path, self._lock, self._turn, self._removed)

    def fill(self, write: Callable[[Path], None]) -> None:
        """Raises WriteFailed. Nothing is written once it was removed."""
        with self._turn:
            if self._removed.is_set():
                return
            try:
                self.path.mkdir(parents=True)
                self._lock.append(os.open(self.path / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
                fcntl.flock(self._lock[0], fcntl.LOCK_EX)
                write(self.path)
            except OSError as error:
                raise WriteFailed(f"The weights cannot be written to {self.path}: {error}") from error


def _remove(path: Path, lock: list[int], turn: threading.Lock, removed: threading.Event) -> None:
    with turn:
        removed.set()
        shutil.rmtree(path, ignore_errors=True)
        for file in lock:
            os.close(file)


def write_checkpoint(path: Path, tensors: Tensors, model: Path | None) -> None:
    """The tensors, and the files of a checkpoint that are no weights. Raises OSError."""
    if model is not None:
        for file in model.iterdir():
            if file.is_file() and not file.name.endswith(NOT_COPIED):
                shutil.copyfile(file, path / file.name)
    with (path / WEIGHTS).open("wb") as opened:
        write_safetensors(opened, tensors)


def sweep(folder: Path) -> None:
    """Removes what was left by processes that run no longer."""
    for path in folder.glob(f"{PREFIX}*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime < SETTLED:
                continue  # it may be about to be locked
            file = os.open(path / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(file)
