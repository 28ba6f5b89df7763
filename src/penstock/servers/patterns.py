"""The messages by which engines tell how far a start has come and why they could not start or died.

`PATTERNS` names for each message the source it comes from. Those that CPU runs give are tested on logs of the
real engines, those that need a GPU on messages in the form their sources give them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum
from typing import Final

import msgspec


class Stage(StrEnum):
    """How far a start has come."""

    WAITING = "waiting for another server to compile"
    STARTING = "starting"
    LOADING = "loading weights"
    COMPILING = "compiling"
    CAPTURING = "capturing graphs"
    WARMING_UP = "warming up"
    READY = "ready"


class Kind(StrEnum):
    """Why an engine could not start or died."""

    GPU_MEMORY = "gpu_memory"
    GPU_SHARED = "gpu_shared"
    """Other processes hold the memory the engine was to use."""
    KV_CACHE = "kv_cache"
    GPU_COUNT = "gpu_count"
    NO_GPU = "no_gpu"
    PARALLEL_SIZE = "parallel_size"
    NCCL = "nccl"
    GLOO = "gloo"
    PORT_IN_USE = "port_in_use"
    MODEL_MISSING = "model_missing"
    MODEL_GATED = "model_gated"
    HUB_UNREACHABLE = "hub_unreachable"
    MODEL_UNKNOWN = "model_unknown"
    WEIGHTS = "weights"
    TOO_LONG = "too_long"
    BAD_FLAG = "bad_flag"
    REFUSED = "refused"
    """The embedded engine says in a sentence of its own what it cannot do."""
    SAMPLING = "sampling"
    GPU_FAULT = "gpu_fault"
    INDEX = "index"
    DISK_FULL = "disk_full"
    OPEN_FILES = "open_files"
    NOT_INSTALLED = "not_installed"
    ENGINE_DIED = "engine_died"
    KILLED = "killed"
    STALLED = "stalled"
    UNKNOWN = "unknown"


class Pattern(msgspec.Struct, frozen=True):
    """A message and what it means. Named groups of `regex` fill the gaps of `sentence` and `advice`."""

    kind: Kind
    regex: str
    sentence: str
    advice: str
    symptom: bool = False
    """Only follows from a cause that is told elsewhere in the log."""
    fatal: bool = False
    """The engine cannot go on, whether its process ends or hangs."""


_MEMORY = (
    "Lower gpu_memory_utilization (SGLang: mem_fraction_static), max_model_len or max_num_seqs, or use "
    "more GPUs "
    "with a larger tp."
)
_KV = (
    "Lower max_model_len, give the cache more memory (vLLM: gpu_memory_utilization or kv_cache_memory_bytes; "
    "SGLang: mem_fraction_static), or use more GPUs with a larger tp."
)
_REPO = "Give the path of a checkpoint folder, or an id of the form owner/name that the hub has."
_FOLDER = "Copy the checkpoint again; compare the sizes and checksums of its files with the original's."

PATTERNS: Final[Sequence[Pattern]] = (
    # torch/csrc/cuda allocator (CUDACachingAllocator.cpp); vllm/v1/worker/gpu_model_runner.py
    Pattern(
        Kind.GPU_MEMORY,
        r"(?:torch\.)?(?:cuda\.)?(?:OutOfMemoryError|RuntimeError): (?:CUDA|HIP) (?:error: )?out of memory"
        r"(?:\. Tried to allocate (?P<size>[\d.]+ \w+))?",
        "The GPU has not enough memory.",
        _MEMORY,
    ),
    # vllm/v1/worker/utils.py
    Pattern(
        Kind.GPU_SHARED,
        r"ValueError: Free memory on device \S+ \((?P<free>[\d.]+)/(?P<total>[\d.]+) GiB\) on startup",
        "Only {free} of the GPU's {total} GiB are free.",
        "End the other processes on this GPU (see nvidia-smi), or lower gpu_memory_utilization.",
    ),
    # vllm/v1/core/kv_cache_utils.py
    Pattern(
        Kind.KV_CACHE,
        r"ValueError: To serve at least one request with the model's max seq len \((?P<asked>\d+)\)"
        r".*estimated maximum model length is (?P<fits>\d+)",
        "The KV cache has no room for one sequence of {asked} tokens; {fits} would fit.",
        _KV,
    ),
    Pattern(
        Kind.KV_CACHE,
        r"ValueError: (?:To serve at least one request with the model's max seq len"
        r"|The model's max seq len \(\d+\) is larger than the maximum number of tokens"
        r"|No available memory for the cache blocks|Cannot auto-fit max_model_len)",
        "There is no room for the KV cache.",
        _KV,
    ),
    # vllm/v1/worker/cpu_worker.py
    Pattern(
        Kind.KV_CACHE,
        r"ValueError: Available memory on node \d+ \((?P<free>[\d.]+)/\S+ GiB\) on kv cache allocation is "
        r"less than "
        r"requested memory for kv \((?P<asked>[\d.]+) GiB\)",
        "The KV cache asks for {asked} GiB, and {free} GiB of memory are free.",
        "Lower kv_cache_memory_bytes.",
    ),
    # sglang/srt/model_executor/pool_configurator.py
    Pattern(
        Kind.KV_CACHE,
        r"(?:(?:RuntimeError|ValueError): Not enough memory\. Please try to increase --mem-fraction-static"
        r"|ValueError: Loaded weights leave no GPU memory for the KV cache)",
        "There is no room for the KV cache beside the weights.",
        "Raise mem_fraction_static, or use more GPUs with a larger tp.",
    ),
    # sglang/srt/entrypoints/http_server.py: the warm-up request
    Pattern(
        Kind.KV_CACHE,
        r"AssertionError: .*Input length \(\d+ tokens\) exceeds the maximum allowed length "
        r"\((?P<most>-?\d+) tokens\)",
        "The KV cache has no room for the engine's own first request.",
        "Raise max_total_tokens or mem_fraction_static.",
    ),
    # vllm/config/parallel.py; older: vllm/v1/executor/ray_utils.py
    Pattern(
        Kind.GPU_COUNT,
        r"(?:Value error, |ValueError: )World size \((?P<asked>\d+)\) is larger than the number of "
        r"available GPUs "
        r"\((?P<found>\d+)\)",
        "tp × pp asks for {asked} GPUs, and this machine has {found}.",
        "Lower tp or pp, or run over several machines.",
    ),
    Pattern(
        Kind.GPU_COUNT,
        r"(?:ValueError: The number of required GPUs exceeds|(?:torch\.)?(?:Accelerator|Runtime)Error: "
        r"CUDA error: "
        r"invalid device ordinal)",
        "tp × pp × dp asks for more GPUs than there are.",
        "Lower tp, pp or dp, and look at CUDA_VISIBLE_DEVICES.",
    ),
    # torch/cuda/__init__.py; vllm/config/device.py
    Pattern(
        Kind.NO_GPU,
        r"RuntimeError: (?:Found no NVIDIA driver|No CUDA GPUs are available|Failed to infer device type"
        r"|Device string must not be empty|Unexpected error from cudaGetDeviceCount)",
        "The engine finds no GPU.",
        "Look at nvidia-smi and CUDA_VISIBLE_DEVICES, or install the engine's build for CPU.",
    ),
    # vllm/config/model.py
    Pattern(
        Kind.PARALLEL_SIZE,
        r"(?:Value error, |ValueError: )Total number of attention heads \((?P<heads>\d+)\) must be "
        r"divisible by tensor "
        r"parallel size \((?P<tp>\d+)\)",
        "The model's {heads} attention heads cannot be divided by tp={tp}.",
        "Choose a tp that divides {heads}.",
    ),
    # sglang/srt/utils: the binding of ranks to cores
    Pattern(
        Kind.PARALLEL_SIZE,
        r"AssertionError: SGLANG_CPU_OMP_THREADS_BIND is not set, .*pp_size = (?P<ranks>\d+)\).*on the "
        r"machine (?P<nodes>\d+)",
        "tp × pp × dp makes {ranks} processes, and this machine has {nodes} NUMA node(s) to bind them to.",
        "Name the cores of each process in env: SGLANG_CPU_OMP_THREADS_BIND=0|1.",
    ),
    # torch/csrc/distributed/c10d/NCCLUtils.cpp, ProcessGroupNCCL.cpp; vllm/distributed/…/pynccl_wrapper.py
    Pattern(
        Kind.NCCL,
        r"(?:[\w.]*(?:DistBackendError|RuntimeError): )?(?:NCCL "
        r"error\b|nccl(?:System|Internal|Remote|UnhandledCuda"
        r"|InvalidUsage)\w*Error|.*Watchdog caught collective operation timeout)",
        "The GPUs cannot talk to each other (NCCL).",
        "Start again with NCCL_DEBUG=INFO in env; look at shared memory (docker: --shm-size or --ipc=host), "
        "NCCL_SOCKET_IFNAME and NCCL_P2P_DISABLE.",
    ),
    # gloo/transport/tcp/pair.cc: each process tells the others the address of its machine's own name
    Pattern(
        Kind.GLOO,
        r"(?:[\w.]*RuntimeError: )?Gloo connectFullMesh failed with .*remote=\[(?P<remote>[^]]+)\]",
        "The processes cannot reach each other (Gloo, at {remote}).",
        "Set GLOO_SOCKET_IFNAME in env, on each machine to the network interface that the others reach.",
    ),
    # the operating system; uvicorn/server.py; torch TCPStore
    Pattern(
        Kind.PORT_IN_USE,
        r"(?:(?:ERROR:\s+)?(?:OSError: )?\[Errno (?:98|48)\]|penstock engine: cannot listen on) "
        r".*[aA]ddress already in use",
        "The port is in use by another process.",
        "Choose another port, or 0 for any free one.",
        fatal=True,
    ),
    Pattern(
        Kind.PORT_IN_USE,
        r"(?:(?:[\w.]*DistNetworkError|RuntimeError): .*EADDRINUSE|.{0,80}Port is already in use)",
        "A port for the traffic inside the engine was taken by another process.",
        "Start again.",
    ),
    # huggingface_hub/errors.py; transformers/utils/hub.py
    Pattern(
        Kind.MODEL_GATED,
        r"(?:[\w.]*GatedRepoError\b|OSError: You are trying to access a gated repo|Access to model \S+ is "
        r"restricted"
        r"|Cannot access gated repo)",
        "The model is gated: the hub gives it only to accounts that were granted access.",
        "Ask for access on the model's page, and set HF_TOKEN to a token of that account.",
    ),
    Pattern(
        Kind.MODEL_MISSING,
        r"(?:[\w.]*HFValidationError|OSError): Repo id must be in the form .*?: '(?P<model>[^']*)'",
        "There is no model {model!r}: neither a folder, nor an id of the hub.",
        _REPO,
    ),
    Pattern(
        Kind.MODEL_MISSING,
        r"(?:[\w.]*RepositoryNotFoundError\b|(?:OS|Environment)Error: (?P<model>\S+) is not a local "
        r"folder and is not a "
        r"valid model identifier)",
        "The hub has no such model, or hides it from this account.",
        _REPO + " For a private model set HF_TOKEN.",
    ),
    Pattern(
        Kind.HUB_UNREACHABLE,
        r"(?:[\w.]*(?:LocalEntryNotFoundError|OfflineModeIsEnabled)\b|OSError: We couldn't connect to )",
        "The model is not on this machine, and the hub cannot be reached.",
        "Download the model first, or allow the network (HF_HUB_OFFLINE, proxies).",
    ),
    # transformers/models/auto; vllm/model_executor/models/registry.py
    Pattern(
        Kind.MODEL_UNKNOWN,
        r"(?:Value error, |ValueError: )Unrecognized model in (?P<model>\S+?)\. Should have a",
        "{model} is no checkpoint folder: its config.json names no model_type.",
        "Give the folder that holds config.json, tokenizer and weights.",
    ),
    Pattern(
        Kind.MODEL_UNKNOWN,
        r"(?:Value error, |ValueError: )(?:Model architectures? (?P<what>\[.*?\]|\S+) (?:are|is) not "
        r"supported"
        r"|The checkpoint you are trying to load has model type (?P<type>\S+) but Transformers does not "
        r"recognize)",
        "The engine does not know this kind of model.",
        "Use a newer version of the engine, or another engine.",
    ),
    # vllm/model_executor/model_loader/default_loader.py; sglang/srt/model_loader/loader.py; safetensors
    Pattern(
        Kind.WEIGHTS,
        r"RuntimeError: Cannot find any (?:of the )?model weights with `(?P<model>[^`]*)`",
        "The folder {model} holds no weights.",
        _FOLDER,
    ),
    Pattern(
        Kind.WEIGHTS,
        r"(?:[\w.]*SafetensorError\b|[\w.]*UnpicklingError\b|RuntimeError: start \(\d+\) \+ length "
        r"\(\d+\) exceeds "
        r"dimension size|(?:RuntimeError|ValueError): .*(?:size mismatch|shape mismatch)"
        r"|RuntimeError: The size of tensor a|KeyError: '(?:model|lm_head)\."
        r"|AssertionError: (?:Attempted to load weight|loaded_weight|Tried to load weights of size))",
        "The weights are damaged, or do not fit the config.json beside them.",
        _FOLDER,
    ),
    # vllm/config/model.py; sglang/srt/configs/model_config.py
    Pattern(
        Kind.TOO_LONG,
        r"(?:Value error, |ValueError: )(?:Warning: )?User-specified (?:max_model_len|context_length) "
        r"\((?P<asked>\d+)\) is greater "
        r"than the derived \w+ \(?(?:\w+=)?(?P<most>\d+)",
        "max_model_len={asked} is more than the model's own {most}.",
        "Lower max_model_len to {most}.",
    ),
    # penstock/engine/args.py
    Pattern(
        Kind.REFUSED,
        r"penstock engine: (?P<what>.+)",
        "It says: {what}",
        "Mend what it names.",
    ),
    # argparse, tyro
    Pattern(
        Kind.BAD_FLAG,
        r"│ (?P<what>Unrecognized options: .*?)\s*│",
        "The engine refuses its command line: {what}.",
        "Mend extra_args; the engine's --help lists its flags.",
    ),
    Pattern(
        Kind.BAD_FLAG,
        r"[\w./ -]{1,60}: error: (?P<what>.+)",
        "The engine refuses its command line: {what}.",
        "Mend extra_args; the engine's --help lists its flags.",
    ),
    # torch/distributions; ATen/native/cuda
    Pattern(
        Kind.SAMPLING,
        r"(?:RuntimeError: )?(?:probability tensor contains either `?inf`?|.*Assertion `?.*probability)",
        "The model's output is not a number (inf or nan).",
        "The weights are damaged or the dtype does not suit them: compare the files with the original's, try "
        "dtype=bfloat16 or float32.",
    ),
    Pattern(
        Kind.INDEX,
        r"(?:IndexError: index .*out of "
        r"(?:bounds|range)|.*(?:indexSelect\w+Index|IndexKernel\.cu|ScatterGatherKernel\.cu)"
        r".*Assertion)",
        "A token id or position lies outside the model's tables.",
        "The tokenizer and the weights do not belong together, or max_model_len is more than the model "
        "was made for.",
    ),
    Pattern(
        Kind.GPU_FAULT,
        r"(?:[\w.]*(?:Accelerator|Runtime)Error: )?CUDA error: (?P<what>device-side assert triggered|an "
        r"illegal memory "
        r"access|unspecified launch failure|uncorrectable ECC error)",
        "The GPU failed: {what}.",
        "Start again with CUDA_LAUNCH_BLOCKING=1 in env to see where; if it comes back with other models "
        "too, "
        "the GPU is to be checked.",
    ),
    # the operating system
    Pattern(
        Kind.DISK_FULL,
        r"OSError: \[Errno 28\] No space left on device",
        "A file system is full.",
        "Make room in the cache folders and in /dev/shm (docker: --shm-size).",
    ),
    Pattern(
        Kind.OPEN_FILES,
        r"OSError: \[Errno 24\] Too many open files",
        "The engine has too many open files.",
        "Raise the limit: ulimit -n 65536.",
    ),
    Pattern(
        Kind.NOT_INSTALLED,
        r"(?:ModuleNotFoundError: No module named '(?P<what>[^']+)'|\S+: No module named (?P<module>[\w.]+))",
        "A package is missing in the engine's environment.",
        "Install it there, or name another interpreter.",
    ),
    # what follows from the above, or from a kill: vllm/v1/engine, vllm/v1/executor, sglang/srt/entrypoints
    Pattern(
        Kind.ENGINE_DIED,
        r"(?:RuntimeError: Engine core initialization failed|EngineCore failed to start"
        r"|Exception: WorkerProc initialization failed|Received sigquit from a child process"
        r"|Subprocess \S+ .*crashed with exit code|Scheduler hit an exception|\[shutdown\] MPClient: "
        r"engine core exited"
        r"|EngineCore encountered a fatal error|Worker proc \S+ died unexpectedly"
        r"|Initialization failed\. warmup error|Rank \d+ scheduler (?:is dead|died))",
        "A process of the engine died.",
        "Look in the log for the first error; a process killed without a word was most often out of memory.",
        symptom=True,
        fatal=True,
    ),
    Pattern(
        Kind.ENGINE_DIED,
        r"(?:[\w.]*EngineDeadError\b|EngineCore encountered an issue)",
        "The process that computes the tokens died.",
        "Look in the log for the first error; a process killed without a word was most often out of memory.",
        symptom=True,
        fatal=True,
    ),
)

STAGES: Final[Sequence[tuple[Stage, re.Pattern[str]]]] = (
    (
        Stage.LOADING,
        re.compile(r"Starting to load model|Loading (?:\w+ )*checkpoint shards|Load weight begin"),
    ),
    (
        Stage.COMPILING,
        re.compile(
            r"Using cache directory: .* for vLLM's torch\.compile|Dynamo bytecode transform|Compiling a graph"
            r"|Warming up model for the compilation"
        ),
    ),
    (
        Stage.CAPTURING,
        re.compile(r"Capturing \w*\s?(?:CUDA|cuda)\s?graphs?|Capture \w*\s?(?:cuda|CUDA) graph begin"),
    ),
    (
        Stage.WARMING_UP,
        re.compile(r"Warming up|Starting vLLM (?:API )?server|INFO:\s+Waiting for application startup"),
    ),
)
