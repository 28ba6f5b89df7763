"""New weights on their way into an engine: read from a folder, or brought in parts by a trainer.

- An update is put in place as a whole or not at all. Until `commit` has returned, and whenever anything is
  refused, the engine goes on with the weights it has.
- What is sent goes by the checkpoint's names; every tensor is checked when it is declared, and again when it
  comes. A part that is refused leaves nothing behind, so it can be sent again.
- An update of some tensors that names its base is put in place only over that very content.
- One update at a time: a `WeightTransfer` is used from one thread, which may wait for the engine.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from hashlib import blake2b, sha256
from math import prod
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file

from penstock.engine.config import ModelConfig, read_json
from penstock.engine.weights import Weights, is_redundant
from penstock.errors import ConfigError

DTYPES: Final = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""What a tensor may be sent in, under the names of safetensors and of torch; it is cast to the engine's."""

SHORT_NAMES: Final = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

SHARED_MEMORY: Final = Path("/dev/shm")
"""Folder of the files that backend `shm` reads."""
DESCRIPTOR: Final = re.compile(r"/proc/[1-9][0-9]*/fd/[0-9]+")
"""Memory without a name (memfd_create(2)), as another process can open it."""
NAMELESS: Final = "/memfd:"
"""What such a descriptor leads to begins with this."""

UNCOMPARED: Final = frozenset({"dtype", "eos_token_ids", "max_position_embeddings", "sliding_window"})
"""Parts of a checkpoint's configuration that may differ in one whose weights are taken over."""

Backend = Literal["http", "shm", "disk"]
Extent = Annotated[int, msgspec.Meta(ge=0)]


class TensorInfo(msgspec.Struct, kw_only=True):
    """One tensor that is to be sent."""

    name: str
    """As in the checkpoint."""
    dtype: str
    """One of DTYPES."""
    shape: list[Extent]

    def torch_dtype(self) -> torch.dtype:
        """Raises ConfigError."""
        dtype = DTYPES.get(self.dtype.removeprefix("torch."))
        if dtype is None:
            raise ConfigError(f"{self.name} has dtype {self.dtype!r}; supported: {', '.join(DTYPES)}.")
        return dtype


class SharedTensor(TensorInfo, kw_only=True):
    """One tensor that lies in shared memory, little-endian and without gaps."""

    offset: Extent
    """Of its first byte in the file."""


class WeightTransfer:
    """The update that a trainer is sending, if there is one."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._backend: Backend | None = None
        self._declared: dict[str, TensorInfo] | None = None
        """By name, where the update says what it holds; else every parameter is to come."""
        self._received: dict[str, torch.Tensor] | None = None
        """By name, while an update is under way, redundant ones included."""
        self.version: int | None = None
        """Of the update under way, where it was given at its start."""
        self._base: str | None = None
        """The content it is to be put over, where it names one."""
        self._checksum: str | None = None
        """Of all that has come, while nothing more does."""
        self.content: str | None = None
        """The name of what the weights in place are; None where they did not come by an update that says."""

    def open(self, backend: str) -> None:
        """Choose how tensors will come. Raises ConfigError."""
        if backend not in get_args(Backend):
            names = ", ".join(get_args(Backend))
            raise ConfigError(f"Weight transfer backend {backend!r} is not supported; supported: {names}.")
        if self._received is not None:
            raise ConfigError("A weight update is under way: finish or abort it first.")
        self._backend = backend  # type: ignore[assignment]

    def close(self) -> None:
        """Undo `open`. Raises ConfigError while an update is under way."""
        if self._received is not None:
            raise ConfigError("A weight update is under way: finish or abort it first.")
        self._backend = None

    def start(
        self, version: int | None, tensors: Sequence[TensorInfo] | None, base: str | None = None
    ) -> None:
        """Begin an update of these tensors, or of all; `base`: only over this content.

        Raises ConfigError, and nothing is begun.
        """
        if self._backend is None:
            raise ConfigError("Weight transfer is not initialized: POST /init_weight_transfer_engine first.")
        if self._received is not None:
            raise ConfigError("A weight update is under way: finish or abort it first.")
        self._check_base(base)
        declared: dict[str, TensorInfo] | None = None
        if tensors is not None:
            declared = {}
            for info in tensors:
                info.torch_dtype()
                self._weights.check("the update", info.name, info.shape)
                if info.name in declared:
                    raise ConfigError(f"The update holds {info.name} twice.")
                declared[info.name] = info
        self._declared = declared
        self._received = {}
        self.version, self._base = version, base

    def _check_base(self, base: str | None) -> None:
        if base is not None and base != self.content:
            raise ConfigError(
                f"The update is to be put over {base}, and the weights in place are "
                f"{self.content or 'not those of an update'}: send all tensors."
            )

    def receive(self, content: bytes) -> None:
        """Take in a part of the update as the content of a safetensors file. Raises ConfigError."""
        self._expect("http")
        try:
            tensors = load(content)
        except (SafetensorError, KeyError, ValueError) as error:
            raise ConfigError(f"The tensors sent cannot be read: {error}.") from None
        self._take(tensors)

    def receive_shared(self, name: str, tensors: Sequence[SharedTensor]) -> None:
        """Take in a part of the update from shared memory, whose content may change after this."""
        self._expect("shm")
        for info in tensors:  # before memory is allocated for what they say
            info.torch_dtype()
            self._weights.check("the update", info.name, info.shape)
        self._take(read_shared(name, tensors))

    def receive_file(self, path: Path) -> None:
        """Take in a part of the update from a safetensors file, which may be gone after this."""
        self._expect("disk")
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read: {error}.") from None
        self._take(tensors)

    def finish(self, checksum: str | None) -> tuple[dict[str, torch.Tensor], str]:
        """The tensors to put in place, and the checksum of all that came; the update stays under way.

        Raises ConfigError when something is missing, the checksum is not the one given, or the base is gone.
        """
        self._check_base(self._base)
        actual = self.check(checksum)
        received = self._under_way()
        return {name: tensor for name, tensor in received.items() if not self._superfluous(name)}, actual

    def finished(self, content: str | None) -> None:
        """The tensors are in place, and the weights have a new name."""
        self.content = content
        self.abort()

    def check(self, checksum: str | None) -> str:
        """The checksum of all that has come. Raises ConfigError as `finish`."""
        received = self._under_way()
        expected = self._weights.parameters.keys() if self._declared is None else self._declared.keys()
        if missing := expected - received.keys():
            raise ConfigError(
                f"The update lacks {len(missing)} of {len(expected)} tensors, {min(missing)} among them."
            )
        if self._checksum is None:
            self._checksum = tensor_checksum(received)
        if checksum is not None and checksum != self._checksum:
            raise ConfigError(
                f"What came has checksum {self._checksum}, not {checksum}: abort the update and send it anew."
            )
        return self._checksum

    def forget(self) -> None:
        """The weights in place are no longer those of an update."""
        self.content = None

    def abort(self) -> bool:
        """Forget the update under way; False when there is none."""
        under_way = self._received is not None
        self._received = self._declared = self.version = self._base = self._checksum = None
        return under_way

    def _under_way(self) -> dict[str, torch.Tensor]:
        if self._received is None:
            raise ConfigError("No weight update is under way: POST /start_weight_update first.")
        return self._received

    def _expect(self, backend: Backend) -> None:
        self._under_way()
        if self._backend != backend:
            raise ConfigError(f"Weight transfer was initialized for backend {self._backend}, not {backend}.")

    def _take(self, tensors: Mapping[str, torch.Tensor]) -> None:
        received = self._under_way()
        for name, tensor in tensors.items():
            self._weights.check("the update", name, tensor.shape)
            if tensor.dtype not in SHORT_NAMES:
                raise ConfigError(f"{name} has dtype {tensor.dtype}; supported: {', '.join(DTYPES)}.")
            if name in received:
                raise ConfigError(f"The update holds {name} twice.")
            if self._declared is not None:
                self._compare(name, tensor)
        received.update(tensors)
        self._checksum = None

    def _compare(self, name: str, tensor: torch.Tensor) -> None:
        """Raises ConfigError unless the tensor is as it was declared."""
        assert self._declared is not None
        info = self._declared.get(name)
        if info is None:
            raise ConfigError(f"{name} was not declared when the update was started.")
        if (info.torch_dtype(), info.shape) != (tensor.dtype, list(tensor.shape)):
            raise ConfigError(
                f"{name} was declared as {info.dtype} {info.shape}, but came as "
                f"{SHORT_NAMES[tensor.dtype]} {list(tensor.shape)}."
            )

    def _superfluous(self, name: str) -> bool:
        return name not in self._weights.parameters and is_redundant(name)


def tensor_checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """BLAKE2b of 32 bytes, in hexadecimal, over all tensors in the order of their names.

    Each adds `NAME\\0DTYPE\\0SHAPE\\0` in UTF-8 – the dtype as safetensors names it, the shape as decimal
    numbers with commas between – and then its bytes, little-endian, in row-major order.
    """
    digest = blake2b(digest_size=32)
    for name in sorted(tensors):
        tensor = tensors[name]
        shape = ",".join(map(str, tensor.shape))
        digest.update(f"{name}\0{SHORT_NAMES[tensor.dtype]}\0{shape}\0".encode())
        digest.update(memory_of(tensor.contiguous().view(-1).view(torch.uint8)))
    return digest.hexdigest()


def tensor_digests(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """SHA-256 of each tensor's bytes, little-endian, in row-major order, in hexadecimal.

    Raises ConfigError for one whose memory was given back.
    """
    digests = {}
    for name, tensor in tensors.items():
        if tensor.untyped_storage().nbytes() == 0 < tensor.numel():
            raise ConfigError("The weights are asleep: there is nothing to check.")
        # A copy: torch cannot give back memory that was an array of numpy.
        flat = tensor.detach().to("cpu", copy=True).contiguous().view(-1).view(torch.uint8)
        digests[name] = sha256(memory_of(flat)).hexdigest()
    return digests


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor of uint8 on CPU, not copied."""
    array: Any = tensor.numpy()
    return memoryview(array)


def read_shared(name: str, tensors: Sequence[SharedTensor]) -> dict[str, torch.Tensor]:
    """Copies of tensors in the shared memory of this name. Raises ConfigError."""
    copies: dict[str, torch.Tensor] = {}
    file = open_shared(name)
    try:
        for info in tensors:
            if info.name in copies:
                raise ConfigError(f"The update holds {info.name} twice.")
            copies[info.name] = _read_tensor(file, name, info)
    finally:
        os.close(file)
    return copies


def open_shared(name: str) -> int:
    """A descriptor of POSIX shared memory, or of another process' memory without a name. Raises ConfigError.

    Such memory is named as /proc/PID/fd/N; nothing else that a process has open can be read by it.
    """
    nameless = DESCRIPTOR.fullmatch(name) is not None
    short = name.removeprefix("/")
    if not nameless and ("/" in short or short in ("", ".", "..")):
        raise ConfigError(f"{name!r} is no name of shared memory.")
    path = Path(name) if nameless else SHARED_MEMORY / short
    try:
        if nameless and not str(path.readlink()).startswith(NAMELESS):
            raise ConfigError(f"{name!r} is no shared memory.")
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"Shared memory {name} cannot be opened: {error.strerror}.") from None


def _read_tensor(file: int, source: str, info: SharedTensor) -> torch.Tensor:
    # Read, not mapped: a file that shrinks meanwhile is an error here, and would be a SIGBUS there.
    size, offset = prod(info.shape) * info.torch_dtype().itemsize, info.offset
    if offset + size > os.fstat(file).st_size:
        raise ConfigError(f"{info.name} lies beyond the end of shared memory {source}.")
    content = torch.empty(size, dtype=torch.uint8)
    buffer = memory_of(content)
    while len(buffer):
        count = os.preadv(file, [buffer], offset)
        if count == 0:
            raise ConfigError(f"{info.name} lies beyond the end of shared memory {source}.")
        buffer, offset = buffer[count:], offset + count
    return content.view(info.torch_dtype()).view(info.shape)


def read_checkpoint(weights: Weights, config: ModelConfig, folder: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's tensor for every parameter. Raises ConfigError unless it is the same model.

    A folder without config.json is taken for the same model if its tensors fit.
    """
    if not folder.is_dir():
        raise ConfigError(f"Weights folder {folder} does not exist.")
    if read_json(folder / "config.json") is not None:
        other = ModelConfig.load(folder)
        for name in ModelConfig.__dataclass_fields__.keys() - UNCOMPARED:
            if getattr(other, name) != getattr(config, name):
                raise ConfigError(
                    f"{folder} is another model: its {name} is {getattr(other, name)}, "
                    f"the engine's {getattr(config, name)}."
                )
    tensors = weights.read(folder)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise ConfigError(f"{name} in {folder} has dtype {tensor.dtype}; it cannot be taken over.")
    return tensors
