"""How new weights get into an engine: one small protocol, and its first two implementations.

Until `commit` is called an engine computes with the weights it had; a `commit` that has returned means that
it has the new ones, as a whole, and that no cache holds what the old ones computed. A transport brings an
engine of any version, also one that has just started, to its weights, and may be used for one engine after
the other: it serves an update and, later, whoever missed it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

import msgspec
import orjson

from penstock.control.dialect import Ask, SGLang
from penstock.control.engine import Engine, lacks_route
from penstock.errors import ConfigError, EngineError, PenstockError

if TYPE_CHECKING:
    import torch

CHUNK: Final = 32 << 20
"""Bytes of tensors in a part; a larger tensor is a part of its own. The embedded engine takes 64 MiB."""


class WeightTransport(Protocol):
    """Raises PenstockError where an engine fails; RequestRejected from `commit` only when the engine still
    has the weights it had."""

    async def prepare(self, engine: Engine, version: int) -> None:
        """Makes ready. What an earlier update has left unfinished there is given up."""
        ...

    async def transfer(self, engine: Engine, version: int) -> None:
        """Brings the weights to the engine, which goes on with those it has."""
        ...

    async def commit(self, engine: Engine, version: int) -> None:
        """Puts them in place, and has the engine say that it is at this version."""
        ...

    async def abort(self, engine: Engine) -> None:
        """Gives up before `commit`."""
        ...


class DiskReload:
    """A checkpoint folder that every engine can read under the same path.

    vLLM and the embedded engine: /collective_rpc reload_weights; SGLang: /update_weights_from_disk. A folder
    that changes while it is used is not noticed: give each version its own.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)

    def __repr__(self) -> str:
        return f"DiskReload({self.path!r})"

    async def prepare(self, engine: Engine, version: int) -> None:
        """Asks whether it is there: the folder is read no earlier than at the commit."""
        await engine.ask(*(await engine.dialect()).presence())

    async def transfer(self, engine: Engine, version: int) -> None:
        """Nothing: the engines read their weights while they replace them."""

    async def commit(self, engine: Engine, version: int) -> None:
        first, *rest = (await engine.dialect()).reload(self.path, version)
        await engine.ask(first, timeout=engine.update_timeout)
        for one in rest:
            try:
                await engine.ask(one, timeout=engine.update_timeout)
            except PenstockError as error:
                if not (lacks_route(error) and one.path == "/update_weight_version"):
                    raise EngineError(
                        f"{engine.name} has new weights, but {one.path} failed: {error}"
                    ) from error

    async def abort(self, engine: Engine) -> None:
        """Nothing has been done."""


class Tensor(msgspec.Struct, frozen=True):
    """One tensor, as it lies in a safetensors file."""

    dtype: str
    """F32, BF16 or F16."""
    shape: tuple[int, ...]
    data: bytes
    """Row-major, little-endian."""


class HttpChunks:
    """Tensors sent over HTTP to embedded engines (their backend `http`), checked by a checksum at commit.

    tensors: all of a checkpoint's, by name; torch tensors or `Tensor`. They are copied, so that what a
    trainer does to its own later does not get into a version that has a number already. Raises ConfigError.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor | Tensor], *, chunk: int = CHUNK) -> None:
        if not tensors:
            raise ConfigError("there are no tensors to send")
        copies = {
            name: one if isinstance(one, Tensor) else copied(name, one) for name, one in tensors.items()
        }
        self.checksum = checksum(copies)
        self._parts = [safetensors_file(part) for part in parts(copies, chunk)]

    def __repr__(self) -> str:
        return f"<HttpChunks {len(self._parts)} parts, {sum(map(len, self._parts))} bytes>"

    async def prepare(self, engine: Engine, version: int) -> None:
        if isinstance(await engine.dialect(), SGLang):
            raise ConfigError(
                f"{engine.name} is SGLang, which does not take tensors over HTTP: use DiskReload"
            )
        await engine.ask(
            Ask("/abort_weight_update"),
            Ask("/init_weight_transfer_engine", {"init_info": {"backend": "http"}}),
            Ask("/start_weight_update", {"version": version}),
            timeout=engine.update_timeout,
        )

    async def transfer(self, engine: Engine, version: int) -> None:
        for part in self._parts:
            await engine.send("/update_weights", part)

    async def commit(self, engine: Engine, version: int) -> None:
        fields = {"weight_version": version, "checksum": self.checksum}
        answer = await engine.ask(Ask("/finish_weight_update", fields), timeout=engine.update_timeout)
        said = (answer.get("weight_version"), answer.get("checksum")) if isinstance(answer, dict) else None
        if said != (str(version), self.checksum):
            raise EngineError(f"{engine.name} committed {said} instead of {(str(version), self.checksum)}")

    async def abort(self, engine: Engine) -> None:
        await engine.ask(Ask("/abort_weight_update"))


def copied(name: str, tensor: torch.Tensor) -> Tensor:
    """Raises ConfigError unless its dtype is one that engines take."""
    import torch

    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    if tensor.dtype not in names:
        raise ConfigError(f"{name} has dtype {tensor.dtype}; engines take {', '.join(map(str, names))}")
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return Tensor(names[tensor.dtype], tuple(tensor.shape), flat.numpy().tobytes())


def parts(tensors: Mapping[str, Tensor], chunk: int) -> list[dict[str, Tensor]]:
    """The tensors in their order, as many together as have `chunk` bytes at most."""
    found: list[dict[str, Tensor]] = []
    size = chunk
    for name, tensor in tensors.items():
        size += len(tensor.data)
        if not found or size > chunk:
            found.append({})
            size = len(tensor.data)
        found[-1][name] = tensor
    return found


def safetensors_file(tensors: Mapping[str, Tensor]) -> bytes:
    """Source of the format: https://github.com/huggingface/safetensors#format"""
    header, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + len(tensor.data)
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (offset, end)}
        offset = end
    head = orjson.dumps(header)
    head += b" " * (-len(head) % 8)
    return b"".join([len(head).to_bytes(8, "little"), head, *(tensor.data for tensor in tensors.values())])


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """As the embedded engine computes it (docs/engine.md)."""
    digest = blake2b(digest_size=32)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}\0{tensor.dtype}\0{_commas(tensor.shape)}\0".encode())
        digest.update(tensor.data)
    return digest.hexdigest()


def _commas(shape: Sequence[int]) -> str:
    return ",".join(map(str, shape))
