"""What engines say of the weights they have, compared with what they were to read: pure functions.

vLLM's `/weight_checker`, which the embedded engine has too, and SGLang's `/weights_checker` give a digest of
each parameter as it lies in the engine. Matrices lie there fused, cut up among ranks, and on a CPU packed
anew, so that only vectors (norms, biases) can be told from a checkpoint everywhere; SGLang's digests differ
by device. One digest of all of it is reported: the same on engines of one kind, size and device with the same
weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import msgspec
import orjson

from penstock.control.tensors import Tensor, Tensors
from penstock.errors import ConfigError

LARGEST_HEADER: Final = 100 << 20
"""Bytes of a safetensors header; the format allows no more."""


class Said(msgspec.Struct, frozen=True):
    """What an engine says it has."""

    checksum: str
    """Of everything."""
    digests: dict[str, set[str]]
    """SHA-256 by the parameter's name, on each rank that has one; none where another function is used."""


def read_said(answer: Any) -> Said | None:
    """From what the engine answered; None when that says nothing."""
    if not isinstance(answer, dict):
        return None
    if isinstance(whole := answer.get("per_engine_checksum"), str):  # SGLang
        return Said(whole, {})
    digests = answer.get("checksums")
    if not isinstance(digests, dict) or not digests:
        return None
    by_name: dict[str, set[str]] = {}
    digest = sha256()
    for name, one in sorted(digests.items()):
        digest.update(f"{name}\0{one}\0".encode())
        by_name.setdefault(name.rpartition(":")[2], set()).add(one)
    return Said(digest.hexdigest(), by_name)


def differing(said: Said, expected: Mapping[str, frozenset[str]]) -> list[str]:
    """Vectors that the engine has and that are none of those expected."""
    return sorted(
        name for name, digests in said.digests.items() if name in expected and not digests <= expected[name]
    )


def vectors_of(tensors: Tensors) -> dict[str, frozenset[str]]:
    """The digests each vector may have in an engine: as it is, or in one of the dtypes engines cast to."""
    return {name: frozenset(_cast(one)) for name, one in tensors.items() if len(one.shape) == 1}


def vectors_in(folder: Path) -> dict[str, frozenset[str]]:
    """The same of a checkpoint folder. Raises ConfigError where it has no safetensors, or a broken one."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{folder} has no weights: no *.safetensors file is in it")
    return {name: digests for file in files for name, digests in vectors_of(dict(_vectors(file))).items()}


def _vectors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Checks that the file is whole, too."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > min(size, LARGEST_HEADER):
                raise ValueError("it ends within its header")
            header = orjson.loads(opened.read(length))
            header.pop("__metadata__", None)
            if 8 + length + max((one["data_offsets"][1] for one in header.values()), default=0) != size:
                raise ValueError("it has not the length its header says")
            for name, one in header.items():
                if len(one["shape"]) == 1 and one["dtype"] in ("F32", "BF16", "F16"):
                    begin, end = one["data_offsets"]
                    opened.seek(8 + length + begin)
                    yield name, Tensor(one["dtype"], tuple(one["shape"]), opened.read(end - begin))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file} is no safetensors file: {error}") from None


def _cast(tensor: Tensor) -> Iterator[str]:
    yield sha256(tensor.data).hexdigest()
    try:
        import torch
    except ImportError:  # then only what is not cast can be told
        return
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    if not len(tensor.data):
        return
    content = torch.frombuffer(bytearray(tensor.data), dtype=dtypes[tensor.dtype])
    for dtype in dtypes.values():
        array: Any = content.to(dtype).view(torch.uint8).numpy()
        yield sha256(memoryview(array)).hexdigest()
