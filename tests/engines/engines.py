"""The engines under test, on a machine without a GPU: how each is started, what its control routes are.

What a CPU needs is said here, in `env` and `extra_args`, and nowhere in the product.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from penstock.models import ARITHMETIC
from penstock.servers.embedded import EmbeddedServer
from penstock.servers.launched import LaunchedServer
from penstock.servers.sglang import SGLangServer
from penstock.servers.vllm import VLLMServer

CONTEXT = 2048
"""Tokens of prompt and completion; the model's own length."""

START_LIMIT = 300.0
"""Seconds a start may take; twenty to fifty on two cores."""

VLLM_ENV = {
    "TORCH_COMPILE_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "1",
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
}
"""Without these it compiles for half a minute, takes all cores, or looks for a network."""

SGLANG_ENV = {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Engine:
    """One engine. A route is a method, a path and a body; None: the engine has nothing of the kind."""

    name: str
    make: Callable[..., LaunchedServer]
    routes: Mapping[str, tuple[str, str, Any]]
    running: str
    """Metric: requests that are being computed."""
    core: str
    """Part of the command line of the child that computes; "" when the server computes itself."""
    missing: frozenset[str] = field(default_factory=frozenset)
    """What it cannot do here, and nobody expects of it."""


def embedded(model: Path = ARITHMETIC, **settings: Any) -> LaunchedServer:
    settings.setdefault("max_model_len", CONTEXT)
    extra = {"threads": 1, "kv_cache_memory_bytes": "64M", **settings.pop("extra_args", {})}
    return EmbeddedServer(model, extra_args=extra, **settings)


def vllm(model: Path = ARITHMETIC, **settings: Any) -> LaunchedServer:
    settings.setdefault("max_model_len", CONTEXT)
    extra: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": "64M"}
    extra |= settings.pop("extra_args", {})
    return VLLMServer(model, extra_args=extra, env=VLLM_ENV, **settings)


def sglang(model: Path = ARITHMETIC, **settings: Any) -> LaunchedServer:
    settings.setdefault("max_model_len", CONTEXT)
    extra: dict[str, Any] = {
        "device": "cpu",
        "attention_backend": "torch_native",
        "sampling_backend": "pytorch",
        "disable_overlap_schedule": True,
        "mem_fraction_static": 0.2,
        "max_total_tokens": 65536,
        "enable_metrics": True,
    }
    extra |= settings.pop("extra_args", {})
    stub = Path(os.environ.get("PENSTOCK_SGLANG_PYTHON", "")).parents[1] / "stub"
    env = (
        {**SGLANG_ENV, "PYTHONPATH": str(stub), "STUB": "torchvision,sgl_kernel"}
        if stub.exists()
        else SGLANG_ENV
    )
    return SGLangServer(model, extra_args=extra, env=env, **settings)


VLLM_ROUTES: Mapping[str, tuple[str, str, Any]] = {
    "abort": ("POST", "/abort_requests", {"request_ids": []}),
    "pause": ("POST", "/pause?mode=abort", None),
    "pause keep": ("POST", "/pause?mode=keep", None),
    "resume": ("POST", "/resume", None),
    "sleep": ("POST", "/sleep?level=1", None),
    "wake": ("POST", "/wake_up", None),
    "reset": ("POST", "/reset_prefix_cache", None),
    "reload": (
        "POST",
        "/collective_rpc",
        {"method": "reload_weights", "kwargs": {"weights_path": "{folder}"}},
    ),
}

SGLANG_ROUTES: Mapping[str, tuple[str, str, Any]] = {
    "abort": ("POST", "/abort_request", {"abort_all": True}),
    "pause": ("POST", "/pause_generation", {"mode": "abort"}),
    "pause keep": ("POST", "/pause_generation", {"mode": "in_place"}),
    "resume": ("POST", "/continue_generation", {}),
    "reset": ("POST", "/flush_cache", None),
    "reload": ("POST", "/update_weights_from_disk", {"model_path": "{folder}"}),
}

ENGINES = {
    "embedded": Engine("embedded", embedded, VLLM_ROUTES, "vllm:num_requests_running", core=""),
    "vllm": Engine("vllm", vllm, VLLM_ROUTES, "vllm:num_requests_running", core="EngineCore"),
    "sglang": Engine(
        "sglang",
        sglang,
        SGLANG_ROUTES,
        "sglang:num_running_reqs",
        core="sglang::scheduler",
        # Memory can be released only with CUDA's memory saver; ids of tokens are given by its own route only.
        missing=frozenset({"sleep", "wake", "completion token ids"}),
    ),
}
