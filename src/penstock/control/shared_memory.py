"""Tensors for embedded engines on the same machine: one copy in memory that all of them read.

It guarantees:
- the memory has no name: it is gone with the transport, and with the process however that ends.
"""

from __future__ import annotations

import mmap
import os
import weakref

from penstock.control.dialect import Ask
from penstock.control.engine import Engine
from penstock.control.staged import Given, Staged
from penstock.control.tensors import Tensor, Tensors, copied, described
from penstock.errors import ConfigError


class SharedMemory(Staged):
    """Tensors in memory without a name (memfd_create(2)), which engines open through /proc.

    They have to run on this machine, as the same user, and see this process: not in a container of their own.
    Raises ConfigError.
    """

    backend = "shm"

    async def _send(self, engine: Engine, tensors: Tensors) -> None:
        infos = [info | {"offset": self._offsets[info["name"]]} for info in described(tensors)]
        name = f"/proc/{os.getpid()}/fd/{self._file}"
        ask = Ask("/update_weights", {"update_info": {"name": name, "tensors": infos}})
        await engine.ask(ask, timeout=engine.update_timeout)

    def _copied(self, tensors: Given) -> dict[str, Tensor]:
        copies = copied(tensors, self._allocate)
        self._offsets: dict[str, int] = {}
        """Of each tensor's first byte in the memory."""
        end = 0
        for name, one in copies.items():
            self._offsets[name] = end
            end += len(one.data)
        return copies

    def _allocate(self, size: int) -> memoryview:
        if not hasattr(os, "memfd_create"):
            raise ConfigError("shared memory without a name needs Linux: use HttpChunks")
        try:
            self._file = os.memfd_create("penstock-weights", os.MFD_CLOEXEC)
            weakref.finalize(self, os.close, self._file)
            os.ftruncate(self._file, size)
            return memoryview(mmap.mmap(self._file, size)) if size else memoryview(bytearray())
        except OSError as error:
            raise ConfigError(f"{size} bytes of shared memory cannot be had: {error}") from None
