"""vLLM as a server of its own: `async with VLLMServer(model, tp=2) as server`.

Guarantees as `penstock.servers.launched`. The command line is a pure function of the spec. The key goes to
vLLM by its environment, where other users of the machine do not see it. On several nodes vLLM runs over Ray,
whose head is started before it and ends after it, see `penstock.servers.ray`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from penstock.errors import ConfigError
from penstock.servers.installation import Package, find
from penstock.servers.installed import InstalledServer, argument
from penstock.servers.machine import cache_folder
from penstock.servers.ray import RayNode
from penstock.servers.spec import ServerSpec, flags

TAKEN: Final = {
    "model": "model",
    "served-model-name": "name",
    "host": "host",
    "port": "port",
    "tensor-parallel-size": "tp",
    "data-parallel-size": "dp",
    "pipeline-parallel-size": "pp",
    "max-model-len": "max_model_len",
    "api-key": "api_key",
}
"""Flags the command has from the spec."""


def command(spec: ServerSpec, python: str) -> list[str]:
    """The command that serves a spec with an interpreter that has vLLM."""
    words = [
        *(python, "-m", "vllm.entrypoints.cli.main", "serve", spec.model),
        *("--served-model-name", spec.name, "--host", spec.host, "--port", str(spec.port)),
    ]
    for flag, value in (
        ("--tensor-parallel-size", spec.tp),
        ("--data-parallel-size", spec.dp),
        ("--pipeline-parallel-size", spec.pp),
    ):
        if value > 1:
            words += [flag, str(value)]
    if spec.max_model_len is not None:
        words += ["--max-model-len", str(spec.max_model_len)]
    taken = TAKEN
    if spec.nodes is not None:
        words += ["--distributed-executor-backend", "ray"]
        taken = {**TAKEN, "distributed-executor-backend": "nodes"}
    return words + flags(spec.extra_args, taken=taken, negative=lambda name: f"--no-{name}")


class VLLMServer(InstalledServer):
    """A vLLM server. The interpreter is looked for in PENSTOCK_VLLM_PYTHON."""

    kind = "vllm"
    ready_line = "Application startup complete."
    package = Package("vllm", title="vLLM", script="vllm", variable="PENSTOCK_VLLM_PYTHON")
    compile_variables = ("VLLM_", "TORCH", "CUDA_", "TRITON_")
    command_for = staticmethod(command)

    _ray: RayNode | None = None

    def _environment(self, spec: ServerSpec) -> dict[str, str]:
        # "": no key is needed, whatever the environment of this process says.
        asked = spec.api_key or spec.env.get("VLLM_API_KEY", "")
        key = {"VLLM_API_KEY": asked}
        nodes = spec.nodes
        ray = {} if nodes is None else {"RAY_ADDRESS": nodes.ray_address or nodes.head}
        return {**super()._environment(spec), **key, **ray}

    async def _start(self) -> None:
        nodes = self.spec.nodes
        if nodes is not None:
            if not nodes.is_head:
                raise ConfigError("vLLM's server runs on the first node; the others run a RayNode.")
            environment = self._environment(self.spec)
            installed = await find(self.package, self.spec.python, environment)
            self._ray = RayNode(nodes, installed.python, env=self.spec.env, life=self.life)
            await self._ray.__aenter__()
        await super()._start()

    async def _finish(self, grace: float) -> None:
        try:
            await super()._finish(grace)
        finally:
            ray, self._ray = self._ray, None
            if ray is not None:
                await ray.__aexit__(None, None, None)

    def _compile_cache(self, spec: ServerSpec, environment: Mapping[str, str]) -> Path | None:
        if argument(spec, "enforce-eager") or environment.get("TORCH_COMPILE_DISABLE") == "1":
            return None
        root = environment.get("VLLM_CACHE_ROOT")
        return (Path(root).expanduser() if root else cache_folder(environment) / "vllm") / "penstock"
