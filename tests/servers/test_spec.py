"""Specs and the commands made of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from penstock.errors import ConfigError
from penstock.models import ARITHMETIC
from penstock.servers import embedded, sglang, vllm
from penstock.servers.embedded import EmbeddedServer
from penstock.servers.sglang import SGLangServer
from penstock.servers.spec import ServerSpec
from penstock.servers.vllm import VLLMServer
from tests.scripted import run


def spec(**fields: Any) -> ServerSpec:
    return ServerSpec(**{"model": "org/model", "name": "m", "port": 8000, **fields})


def test_vllm() -> None:
    extra = {
        "enforce_eager": True, "enable-prefix-caching": False, "seed": None, "stop_list": ["a", 1],
        "compilation_config": {"level": 3}, "dtype": "float32",
    }  # fmt: skip
    words = vllm.command(spec(tp=2, dp=3, pp=4, max_model_len=100, extra_args=extra, api_key="secret"), "py")
    assert words == [
        *("py", "-m", "vllm.entrypoints.cli.main", "serve", "org/model", "--served-model-name", "m"),
        *(
            "--host",
            "127.0.0.1",
            "--port",
            "8000",
            "--tensor-parallel-size",
            "2",
            "--data-parallel-size",
            "3",
        ),
        *("--pipeline-parallel-size", "4", "--max-model-len", "100", "--enforce-eager"),
        *("--no-enable-prefix-caching", "--stop-list", "a", "1", "--compilation-config", '{"level": 3}'),
        *("--dtype", "float32"),
    ]


def test_sglang() -> None:
    words = sglang.command(spec(tp=2, max_model_len=100, extra_args={"device": "cpu"}), "py")
    assert words == [
        *("py", "-m", "sglang.launch_server", "--model-path", "org/model", "--served-model-name", "m"),
        *(
            "--host",
            "127.0.0.1",
            "--port",
            "8000",
            "--tp-size",
            "2",
            "--context-length",
            "100",
            "--device",
            "cpu",
        ),
    ]


def test_embedded() -> None:
    words = embedded.command(spec(extra_args={"threads": 1}), ["--max-num-seqs=3"])
    assert words[:3] == [sys.executable, "-m", "penstock.engine"]
    assert words[-3:] == ["--threads", "1", "--max-num-seqs=3"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tp": 0}, "tp must be at least 1"),
        ({"max_model_len": 0}, "max_model_len must be at least 1"),
        ({"port": 70000}, "between 0 and 65535"),
        ({"extra_args": {"port": 1}}, "port is not for extra_args: give it as port"),
        ({"extra_args": {"tensor_parallel_size": 2}}, "give it as tp"),
        ({"env": {"A": 1}}, "environment variable A must be text"),
        ({"model": "/no/such/folder"}, "There is no model at /no/such/folder"),
        ({"api_key": "two words"}, "API key"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        VLLMServer(**{"model": "org/model", **fields})


def test_sglang_knows_no_negative_flags() -> None:
    with pytest.raises(ConfigError, match="cannot be negated"):
        SGLangServer("m", extra_args={"trust_remote_code": False})


def test_names() -> None:
    assert EmbeddedServer(ARITHMETIC).name == "arithmetic"
    assert VLLMServer("org/model").name == "org/model"
    assert VLLMServer("org/model", name="mine").name == "mine"


def test_an_address_for_all_is_reached_at_the_loopback() -> None:
    assert spec(host="0.0.0.0").base_url == "http://127.0.0.1:8000"
    assert spec(host="::").base_url == "http://[::1]:8000"


def test_keys_are_not_shown() -> None:
    assert "secret" not in repr(spec(api_key="secret"))
    assert "secret" not in repr(VLLMServer("m", api_key="secret"))


@pytest.mark.parametrize("kind", [VLLMServer, SGLangServer])
def test_an_engine_that_is_not_installed(kind: type[VLLMServer], monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("PENSTOCK_VLLM_PYTHON", "PENSTOCK_SGLANG_PYTHON"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", "/nowhere")

    async def scenario(python: str | None, said: str) -> None:
        with pytest.raises(ConfigError, match=said):
            async with kind("m", python=python):
                pass

    run(scenario(None, "is not installed here.*PENSTOCK_"))
    run(scenario(sys.executable, "has no"))
    run(scenario("/no/such/python", "cannot be run"))


def test_what_would_be_compiled_is_known_by_its_facts(tmp_path: Path) -> None:
    def lock(environment: dict[str, str] | None = None, **fields: Any) -> str | None:
        server = VLLMServer("org/model", **fields)
        made = server._compile_lock(server.spec, {"VLLM_CACHE_ROOT": str(tmp_path), **(environment or {})})
        return None if made is None else str(made._lock)

    assert lock() == lock()
    assert lock() != lock(tp=2) != lock(max_model_len=5)
    assert lock() != lock({"VLLM_USE_V9": "1"})
    assert lock() == lock({"CUDA_VISIBLE_DEVICES": "3", "VLLM_API_KEY": "x", "HOME": "/y"})
    assert lock() != lock(extra_args={"dtype": "half"})
    assert lock(extra_args={"enforce_eager": True}) is None
    assert lock({"TORCH_COMPILE_DISABLE": "1"}) is None
    assert str(lock()).startswith(str(tmp_path / "penstock"))
