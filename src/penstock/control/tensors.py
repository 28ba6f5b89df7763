"""Tensors as bytes: copied from a trainer, cut into parts, written as safetensors files, summed up.

What is here is independent of torch but for `copied`, which takes its tensors.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import IO, TYPE_CHECKING, Any

import msgspec
import orjson

from penstock.errors import ConfigError

if TYPE_CHECKING:
    import torch


class Tensor(msgspec.Struct, frozen=True):
    """One tensor, as it lies in a safetensors file."""

    dtype: str
    """F32, BF16 or F16."""
    shape: tuple[int, ...]
    data: bytes | memoryview
    """Row-major, little-endian."""


Tensors = Mapping[str, Tensor]
"""By the checkpoint's names."""
Allocate = Callable[[int], memoryview]
"""Gives so many bytes that can be written."""


def in_memory(size: int) -> memoryview:
    return memoryview(bytearray(size))


def copied(tensors: Mapping[str, torch.Tensor | Tensor], allocate: Allocate = in_memory) -> dict[str, Tensor]:
    """Copies in one memory, one after the other without gaps.

    Raises ConfigError where there are none, or one has a dtype that engines do not take.
    """
    check_some(tensors)
    for name, one in tensors.items():
        if not isinstance(one, Tensor):
            _dtype_of(name, one)
    memory = allocate(sum(_size(one) for one in tensors.values()))
    copies, offset = {}, 0
    for name, one in tensors.items():
        size = _size(one)
        place = memory[offset : offset + size]
        offset += size
        if isinstance(one, Tensor):
            dtype, place[:] = one.dtype, one.data
        else:
            dtype = _dtype_of(name, one)
            _copy(one, place)
        copies[name] = Tensor(dtype, tuple(one.shape), place.toreadonly())
    return copies


def check_some(tensors: Mapping[str, Any]) -> None:
    """Raises ConfigError."""
    if not tensors:
        raise ConfigError("there are no tensors to send")


def _size(one: torch.Tensor | Tensor) -> int:
    return len(one.data) if isinstance(one, Tensor) else one.numel() * one.element_size()


def _dtype_of(name: str, tensor: torch.Tensor) -> str:
    """As safetensors names it. Raises ConfigError."""
    import torch

    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    if tensor.dtype not in names:
        raise ConfigError(f"{name} has dtype {tensor.dtype}; engines take {', '.join(map(str, names))}")
    return names[tensor.dtype]


def _copy(tensor: torch.Tensor, place: memoryview) -> None:
    """Its bytes, wherever it lies. As an array of numpy its memory could not be resized any longer."""
    flat = tensor.detach().cpu().contiguous()
    content = (ctypes.c_ubyte * len(place)).from_address(flat.data_ptr()) if len(place) else b""
    place[:] = memoryview(content).cast("B")


def parts(tensors: Tensors, chunk: int) -> list[dict[str, Tensor]]:
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


def safetensors_file(tensors: Tensors) -> bytes:
    """Source of the format: https://github.com/huggingface/safetensors#format"""
    return b"".join([_head(tensors), *(tensor.data for tensor in tensors.values())])


def write_safetensors(file: IO[bytes], tensors: Tensors) -> None:
    """The same into a file that is open."""
    file.write(_head(tensors))
    for tensor in tensors.values():
        file.write(tensor.data)


def _head(tensors: Tensors) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # without it transformers refuses the file
    offset = 0
    for name, tensor in tensors.items():
        end = offset + len(tensor.data)
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (offset, end)}
        offset = end
    head = orjson.dumps(header)
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head


def checksum(tensors: Tensors) -> str:
    """As the embedded engine computes it (docs/engine.md)."""
    digest = blake2b(digest_size=32)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}\0{tensor.dtype}\0{_commas(tensor.shape)}\0".encode())
        digest.update(tensor.data)
    return digest.hexdigest()


def described(tensors: Tensors) -> list[dict[str, Any]]:
    """Each tensor's name, dtype and shape, as engines want an update declared."""
    return [{"name": name, "dtype": one.dtype, "shape": one.shape} for name, one in tensors.items()]


def changed(tensors: Tensors, before: Tensors) -> dict[str, Tensor] | None:
    """Those whose content is another than it was; None where the two are not of the same model."""
    if tensors.keys() != before.keys():
        return None
    return {name: one for name, one in tensors.items() if one != before[name]}


def _commas(shape: Sequence[int]) -> str:
    return ",".join(map(str, shape))
