"""SGLang as a server of its own: `async with SGLangServer(model, tp=2) as server`.

Guarantees as `penstock.servers.launched`. The command line is a pure function of the spec. SGLang takes its
key only as a flag: other users of the machine can see it in the list of processes. On several nodes each runs
this server; the head's serves the requests, the others' say by /health that their part is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from penstock.servers.installation import Package
from penstock.servers.installed import InstalledServer, argument
from penstock.servers.machine import cache_folder
from penstock.servers.spec import ServerSpec, flags

TAKEN: Final = {
    "model-path": "model",
    "model": "model",
    "served-model-name": "name",
    "host": "host",
    "port": "port",
    "tensor-parallel-size": "tp",
    "tp-size": "tp",
    "tp": "tp",
    "data-parallel-size": "dp",
    "dp-size": "dp",
    "dp": "dp",
    "pipeline-parallel-size": "pp",
    "pp-size": "pp",
    "pp": "pp",
    "context-length": "max_model_len",
    "api-key": "api_key",
    "nnodes": "nodes",
    "node-rank": "nodes",
    "dist-init-addr": "nodes",
    "nccl-init-addr": "nodes",
}
"""Flags the command has from the spec, under all their names."""


def command(spec: ServerSpec, python: str) -> list[str]:
    """The command that serves a spec with an interpreter that has SGLang."""
    words = [
        *(python, "-m", "sglang.launch_server", "--model-path", spec.model),
        *("--served-model-name", spec.name, "--host", spec.host, "--port", str(spec.port)),
    ]
    for flag, value in (("--tp-size", spec.tp), ("--dp-size", spec.dp), ("--pp-size", spec.pp)):
        if value > 1:
            words += [flag, str(value)]
    if spec.max_model_len is not None:
        words += ["--context-length", str(spec.max_model_len)]
    if spec.nodes is not None:
        nodes = spec.nodes
        words += ["--nnodes", str(nodes.count), "--node-rank", str(nodes.rank)]
        words += ["--dist-init-addr", nodes.head]
    if spec.api_key is not None:
        words += ["--api-key", spec.api_key]
    return words + flags(spec.extra_args, taken=TAKEN, negative=None)


class SGLangServer(InstalledServer):
    """An SGLang server. The interpreter is looked for in PENSTOCK_SGLANG_PYTHON."""

    kind = "sglang"
    ready_line = "The server is fired up and ready to roll!"
    package = Package("sglang", title="SGLang", script="sglang", variable="PENSTOCK_SGLANG_PYTHON")
    compile_variables = ("SGLANG_", "SGL_", "TORCH", "CUDA_", "TRITON_", "FLASHINFER_")
    command_for = staticmethod(command)

    def _compile_cache(self, spec: ServerSpec, environment: Mapping[str, str]) -> Path | None:
        """Its kernels are compiled into the caches of several packages, all in the user's cache folder."""
        if argument(spec, "device") == "cpu" and not argument(spec, "enable-torch-compile"):
            return None
        return cache_folder(environment) / "sglang" / "penstock"
