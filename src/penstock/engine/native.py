"""`attention.Kernels` in C (native.c) for float32 on CPU.

The C file is compiled for one model's head shape at first use and kept in a cache folder under a name that
changes with the source, the shape, the compiler and the CPU; it is put there in one rename, so processes
that start at once do no harm. The kernels run in the calling thread, whatever `threads` says.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from penstock.engine.attention import Batch, TorchKernels
from penstock.engine.config import ModelConfig
from penstock.engine.draw import Choice
from penstock.engine.weights import LayerWeights
from penstock.errors import EngineError

SOURCE: Final = Path(__file__).with_name("native.c")

FLAGS: Final = (
    "-std=gnu11",
    "-O3",
    "-march=native",
    "-shared",
    "-fPIC",
    "-fno-math-errno",
    "-Wall",
    "-Wno-psabi",
)

LANES: Final = 8
"""Floats computed side by side; sizes that are no multiple of it are left to torch."""

COMPILE_TIMEOUT: Final = 120.0
"""Seconds a compiler may take."""

_Pointer = ctypes.c_void_p
_Size = ctypes.c_int64


class StepStruct(ctypes.Structure):
    """`Step` of native.c."""

    _fields_ = (
        *((name, _Pointer) for name in ("tables", "rows", "starts", "offsets", "rotary", "scratch")),
        *((name, _Size) for name in ("table_width", "scratch_width", "sequences")),
        ("eps", ctypes.c_float),
    )


class LayerStruct(ctypes.Structure):
    """`Layer` of native.c."""

    _fields_ = tuple((name, _Pointer) for name in ("cache", "q_norm", "k_norm"))


def unsupported(config: ModelConfig, block_size: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the C kernels do not apply, None when they do."""
    if device.type != "cpu" or dtype != torch.float32:
        return f"they compute float32 on CPU, not {dtype} on {device}".replace("torch.", "")
    for name, size in (
        ("head_dim", config.head_dim),
        ("hidden_size", config.hidden_size),
        ("intermediate_size", config.intermediate_size),
        ("block_size", block_size),
    ):
        if size % LANES:
            return f"{name} {size} is not a multiple of {LANES}"
    return None


def compiled_library(config: ModelConfig, block_size: int) -> Path:
    """The shared library for a model's shape, compiled if it is not cached. Raises EngineError."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise EngineError("No C compiler was found (cc, gcc or clang).")
    shape = (
        f"-DHEADS={config.num_heads}",
        f"-DKV_HEADS={config.num_kv_heads}",
        f"-DHEAD_DIM={config.head_dim}",
        f"-DBLOCK={block_size}",
    )
    identity = "\0".join((*FLAGS, *shape, compiler_version(compiler), cpu_identity()))
    digest = hashlib.sha256(SOURCE.read_bytes() + identity.encode()).hexdigest()[:24]
    folder = cache_folder()
    library = folder / f"native-{digest}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            fresh = Path(scratch) / library.name
            run([compiler, *FLAGS, *shape, str(SOURCE), "-o", str(fresh), "-lm"])
            fresh.replace(library)
    return library


def run(command: list[str]) -> str:
    """A compiler's output. Raises EngineError when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT, check=True)
    except subprocess.CalledProcessError as error:
        raise EngineError(f"{command[0]} failed: {error.stderr.strip()[-500:]}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"{command[0]} could not be run: {error}") from None
    return done.stdout


def compiler_version(compiler: str) -> str:
    """First line of `cc --version`."""
    return run([compiler, "--version"]).partition("\n")[0]


def cpu_identity() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    kept = {line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))}
    return "\n".join(sorted(kept))


def cache_folder() -> Path:
    """Where libraries are kept: $XDG_CACHE_HOME/penstock, or a temporary folder if that is read-only."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
    folder = Path(home) / "penstock"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="penstock-"))
    return folder if os.access(folder, os.W_OK) else Path(tempfile.mkdtemp(prefix="penstock-"))


class NativeKernels(TorchKernels):
    """`Kernels` that call C. Parameters must stay where they are: they are known by address."""

    def __init__(
        self, config: ModelConfig, layers: list[LayerWeights], cache: torch.Tensor, rotary: torch.Tensor
    ) -> None:
        super().__init__(config, layers, cache, rotary)
        path = str(compiled_library(config, self.block_size))
        # Attention takes long enough to let another thread have the interpreter; the others do not.
        self._attend = function(ctypes.CDLL(path), "attend", 4)
        library = ctypes.PyDLL(path)
        self._norm = function(library, "norm", 3, _Size, _Size, ctypes.c_float)
        self._add_norm = function(library, "add_norm", 3, _Size, _Size, ctypes.c_float)
        self._silu_mul = function(library, "silu_mul", 1, _Size, _Size)
        self._draw = function(library, "draw", 8, _Size, _Size)
        self._structs = [layer_struct(cache[i], layer) for i, layer in enumerate(layers)]
        self._layers = [ctypes.addressof(struct) for struct in self._structs]
        group = config.num_heads // config.num_kv_heads
        width = -(-len(rotary) // self.block_size) * self.block_size
        self._scratch = torch.empty(group, width)
        self._step = StepStruct(
            rotary=rotary.data_ptr(),
            scratch=self._scratch.data_ptr(),
            scratch_width=width,
            eps=config.rms_norm_eps,
        )
        self._step_address = ctypes.addressof(self._step)
        self._pairs: torch.Tensor | None = None
        self._tables: npt.NDArray[np.int32] | None = None
        self._queries = config.num_heads * config.head_dim
        self._eps = config.rms_norm_eps

    def begin(self, batch: Batch) -> None:
        """See Kernels."""
        count = len(batch.rows)
        if batch.tables is not self._tables:
            self._tables = batch.tables
            self._index = np.zeros((3, len(batch.tables) + 1), dtype=np.int32)
            rows, starts, offsets = (part.ctypes.data for part in self._index)
            step = self._step
            step.rows, step.starts, step.offsets = rows, starts, offsets
            step.tables, step.table_width = batch.tables.ctypes.data, batch.tables.shape[1]
        self._index[0, :count] = batch.rows
        self._index[1, :count] = batch.starts
        self._index[2, : count + 1] = batch.offsets
        self._step.sequences = count

    def norm(self, inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """See Kernels."""
        output = torch.empty_like(inputs)
        tokens, size = inputs.shape
        self._norm(output.data_ptr(), inputs.data_ptr(), weight.data_ptr(), tokens, size, self._eps)
        return output

    def add_norm(self, delta: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """See Kernels."""
        tokens, size = delta.shape
        self._add_norm(delta.data_ptr(), residual.data_ptr(), weight.data_ptr(), tokens, size, self._eps)
        return delta

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See Kernels."""
        tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
        self._silu_mul(gate_up.data_ptr(), tokens, size)
        return gate_up[:, :size]

    def attend(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """See Kernels."""
        output = torch.empty(len(qkv), self._queries)
        self._attend(self._step_address, self._layers[layer], qkv.data_ptr(), output.data_ptr())
        return output

    def draw(self, logits: torch.Tensor, choice: Choice) -> torch.Tensor:
        """See Kernels."""
        rows, size = logits.shape
        tokens = torch.empty(rows, dtype=torch.int64)
        if choice.cuts is None:
            cuts: tuple[int | None, ...] = (None, None, None, None)
        else:
            if self._pairs is None or self._pairs.shape[0] != size:
                self._pairs = torch.empty(size, 2)
            arrays = choice.cuts.top_k, choice.cuts.top_p, choice.cuts.min_p
            cuts = (*(array.ctypes.data for array in arrays), self._pairs.data_ptr())
        given = choice.temperatures.ctypes.data, choice.noise.ctypes.data
        self._draw(logits.data_ptr(), *given, *cuts, tokens.data_ptr(), rows, size)
        return tokens


def layer_struct(cache: torch.Tensor, layer: LayerWeights) -> LayerStruct:
    """The addresses of a layer's cache [blocks, …] and norms."""
    return LayerStruct(
        cache=cache.data_ptr(),
        q_norm=None if layer.q_norm is None else layer.q_norm.data_ptr(),
        k_norm=None if layer.k_norm is None else layer.k_norm.data_ptr(),
    )


def function(library: ctypes.CDLL, name: str, pointers: int, *others: type) -> ctypes._NamedFuncPointer:
    """A C function that takes `pointers` addresses, then `others`, and returns nothing."""
    found = library[name]
    found.argtypes = (*(_Pointer,) * pointers, *others)
    found.restype = None
    return found
