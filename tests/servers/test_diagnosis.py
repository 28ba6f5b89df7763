"""What engines say, on logs of real ones, and on messages of GPUs in the form their sources give them."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.servers.diagnosis import diagnose, recognise, stage_of
from penstock.servers.patterns import PATTERNS, Kind, Stage

LOGS = Path(__file__).parent / "logs"
"""ENGINE-KIND.log or ENGINE-KIND-VARIANT.log: excerpts of logs of vLLM 0.32 and SGLang 0.5.23 on a CPU."""

FAILURES = sorted(path for path in LOGS.glob("*.log") if not path.stem.endswith("-ready"))

WORKER = "(Worker_TP0 pid=8688) ERROR 11-21 13:20:10 [multiproc_executor.py:953] "
CORE = "(EngineCore pid=8901) ERROR 11-21 13:21:36 [core.py:1510] "

GPU_MESSAGES = [
    (
        WORKER
        + "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 224.00 MiB. GPU 0 has a total "
        "capacity of 11.53 GiB of which 187.75 MiB is free. Including non-PyTorch memory, "
        "this process has 11.2 "
        "GiB memory in use.",
        Kind.GPU_MEMORY,
    ),
    ("torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 518.00 MiB.", Kind.GPU_MEMORY),
    ("[rank1]: RuntimeError: CUDA error: out of memory", Kind.GPU_MEMORY),
    (
        CORE + "RuntimeError: CUDA out of memory occurred when warming up sampler with 1024 dummy requests.",
        Kind.GPU_MEMORY,
    ),
    (
        CORE
        + "ValueError: Free memory on device cuda:0 (3.52/79.11 GiB) on startup is less than desired GPU "
        "memory utilization (0.9, 71.2 GiB). Decrease GPU memory utilization or reduce GPU "
        "memory used by other "
        "processes.",
        Kind.GPU_SHARED,
    ),
    (
        CORE + "ValueError: No available memory for the cache blocks. Try increasing "
        "`gpu_memory_utilization` when "
        "initializing the engine",
        Kind.KV_CACHE,
    ),
    (
        "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static. Current value: "
        "mem_fraction_static=0.5",
        Kind.KV_CACHE,
    ),
    (
        "  Value error, World size (8) is larger than the number of available GPUs (2) in "
        "this node. If this is",
        Kind.GPU_COUNT,
    ),
    ("RuntimeError: CUDA error: invalid device ordinal", Kind.GPU_COUNT),
    ("torch.AcceleratorError: CUDA error: invalid device ordinal", Kind.GPU_COUNT),
    (
        "RuntimeError: Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU",
        Kind.NO_GPU,
    ),
    ("RuntimeError: Failed to infer device type, please set the environment variable", Kind.NO_GPU),
    (
        "(VllmWorkerProcess pid=761) ERROR 07-24 08:26:01 [multiproc_worker_utils.py:226] "
        "RuntimeError: NCCL error: "
        "unhandled cuda error (run with NCCL_DEBUG=INFO for details)",
        Kind.NCCL,
    ),
    (
        "torch.distributed.DistBackendError: NCCL error in: "
        "../torch/csrc/distributed/c10d/NCCLUtils.hpp:268, "
        "unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version 2.21.5",
        Kind.NCCL,
    ),
    ("ncclSystemError: System call (e.g. socket, malloc) or external library call failed", Kind.NCCL),
    (
        "[rank0]:[E1121 12:00:00.000000000 ProcessGroupNCCL.cpp:632] [Rank 0] Watchdog "
        "caught collective operation "
        "timeout: WorkNCCL(SeqNum=1, OpType=ALLREDUCE)",
        Kind.NCCL,
    ),
    (
        "RuntimeError: Gloo connectFullMesh failed with [/__w/pytorch/pytorch/third_party/gloo/gloo/"
        "transport/tcp/pair.cc:152] timed out connecting: SO_ERROR: Connection refused, "
        "remote=[127.0.0.1]:15770$0",
        Kind.GLOO,
    ),
    (
        "torch.distributed.DistNetworkError: The server socket has failed to listen on any "
        "local network address. "
        "port: 29500, useIpv6: false, code: -98, name: EADDRINUSE, message: address already in use",
        Kind.PORT_IN_USE,
    ),
    (CORE + "RuntimeError: probability tensor contains either `inf`, `nan` or element < 0", Kind.SAMPLING),
    (
        "/pytorch/aten/src/ATen/native/cuda/Indexing.cu:1231: indexSelectSmallIndex: "
        "block: [31,0,0], thread: "
        "[116,0,0] Assertion `srcIndex < srcSelectDimSize` failed.",
        Kind.INDEX,
    ),
    (WORKER + "RuntimeError: CUDA error: device-side assert triggered", Kind.GPU_FAULT),
    (WORKER + "torch.AcceleratorError: CUDA error: an illegal memory access was encountered", Kind.GPU_FAULT),
    ("OSError: [Errno 28] No space left on device", Kind.DISK_FULL),
    (
        "huggingface_hub.errors.RepositoryNotFoundError: 401 Client Error. (Request ID: Root=1-x)",
        Kind.MODEL_MISSING,
    ),
    ("OSError: We couldn't connect to 'https://huggingface.co' to load the files", Kind.HUB_UNREACHABLE),
    (
        "  Value error, Model architectures ['FooForCausalLM'] are not supported for now. "
        "Supported architectures:",
        Kind.MODEL_UNKNOWN,
    ),
    ("/usr/bin/python: No module named vllm", Kind.NOT_INSTALLED),
    ("penstock engine: rope scaling 'x' is not supported", Kind.REFUSED),
]


@pytest.mark.parametrize("path", FAILURES, ids=lambda path: path.stem)
def test_real_logs_of_failures(path: Path) -> None:
    found = diagnose(path.read_text().splitlines())
    assert found is not None
    assert found.kind == path.stem.split("-")[1]
    assert found.sentence.endswith(".") and found.advice.endswith((".", "|1."))
    assert "{" not in found.sentence.replace('{"', "")


def test_there_is_a_log_of_each_way_to_die_on_a_cpu() -> None:
    assert {path.stem.split("-")[0] for path in FAILURES} == {"vllm", "sglang"}
    assert len(FAILURES) >= 24


@pytest.mark.parametrize(("line", "kind"), GPU_MESSAGES)
def test_messages_of_gpus(line: str, kind: Kind) -> None:
    found = diagnose(
        [
            "INFO 01-01 00:00:00 [x.py:1] hello",
            line,
            CORE + "RuntimeError: Engine core initialization failed.",
        ]
    )
    assert found is not None
    assert found.kind is kind


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_log_of_a_good_start_has_stages_and_no_cause(engine: str) -> None:
    lines = (LOGS / f"{engine}-ready.log").read_text().splitlines()
    assert [line for line in lines if recognise(line)] == []
    assert Stage.LOADING in map(stage_of, lines)


@pytest.mark.parametrize(
    ("line", "stage"),
    [
        (
            "(EngineCore pid=1) INFO 11-21 13:00:00 [backends.py:1105] Using cache "
            "directory: /c/x for vLLM's torch.compile",
            Stage.COMPILING,
        ),
        (
            "(Worker pid=1) INFO 11-21 13:00:00 [gpu_model_runner.py:5040] Starting to load model m...",
            Stage.LOADING,
        ),
        (
            "(Worker pid=9) INFO 11-21 14:29:56 [cpu.py:87] Warming up model for the compilation...",
            Stage.COMPILING,
        ),
        ("Capturing CUDA graphs (mixed prefill-decode, PIECEWISE):  10%|#  | 1/10", Stage.CAPTURING),
        (
            "[2026-11-21 13:24:22 TP0] Capture cuda graph begin. This can take up to several minutes.",
            Stage.CAPTURING,
        ),
        ("[2026-11-21 13:24:22 TP0] Load weight begin. avail mem=78.50 GB", Stage.LOADING),
        ("Loading safetensors checkpoint shards:  25% Completed | 1/4", Stage.LOADING),
    ],
)
def test_stages(line: str, stage: Stage) -> None:
    assert stage_of(line) is stage


@pytest.mark.parametrize(
    "line",
    [
        'INFO:     127.0.0.1:53412 - "POST /v1/chat/completions HTTP/1.1" 401 Unauthorized',
        "INFO 11-21 [logger.py:1] Received request: prompt: 'explain: CUDA out of memory. EngineDeadError'",
        "(APIServer pid=1) INFO 11-21 13:00:00 [x.py:1] prompt='RuntimeError: NCCL error'",
        "WARNING: Found ulimit of 20000; this can cause `OSError: [Errno 24] Too many open files`.",
    ],
)
def test_what_only_quotes_an_error_is_none(line: str) -> None:
    assert recognise(line) is None


def test_a_cause_goes_before_its_symptoms_wherever_they_stand() -> None:
    lines = [
        "(APIServer pid=1) ERROR 11-21 13:00:00 [core.py:1] EngineCore encountered a fatal error.",
        "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue.",
        WORKER + "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 MiB.",
    ]
    found = diagnose(lines)
    assert found is not None and found.kind is Kind.GPU_MEMORY


def test_an_unknown_error_is_quoted() -> None:
    lines = ["Traceback (most recent call last):", "  File x", "foo.BarError: the flux is off"]
    lines += [CORE + "RuntimeError: Engine core initialization failed.", "ValueError: consequence"]
    found = diagnose(lines)
    assert found is not None
    assert (found.kind, found.line) == (Kind.UNKNOWN, "foo.BarError: the flux is off")
    assert diagnose(["all is well"]) is None


def test_every_pattern_is_met_by_a_message() -> None:
    met = {
        id(found[1])
        for path in FAILURES
        for line in path.read_text().splitlines()
        if (found := recognise(line))
    }
    met |= {id(found[1]) for line, _ in GPU_MESSAGES if (found := recognise(line))}
    unmet = [pattern.regex for pattern in PATTERNS if id(pattern) not in met]
    assert len(unmet) <= 4, unmet
