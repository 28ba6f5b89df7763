"""The engines by their names, and a server of a spec."""

from __future__ import annotations

from typing import Final

from penstock.errors import ConfigError
from penstock.servers.embedded import EmbeddedServer
from penstock.servers.installed import InstalledServer
from penstock.servers.launched import LaunchedServer, LifeCycle
from penstock.servers.sglang import SGLangServer
from penstock.servers.spec import ServerSpec
from penstock.servers.vllm import VLLMServer

INSTALLED: Final[dict[str, type[InstalledServer]]] = {"vllm": VLLMServer, "sglang": SGLangServer}
"""Engines that are packages of their own."""

ENGINES: Final = (*INSTALLED, "embedded")


def server_of(spec: ServerSpec, life: LifeCycle | None = None) -> LaunchedServer:
    """A server that is as the spec says, not started. Raises ConfigError."""
    if spec.engine == "embedded":
        return EmbeddedServer.of(spec, life)
    if spec.engine not in INSTALLED:
        raise ConfigError(f"There is no engine {spec.engine!r}; choose one of {', '.join(ENGINES)}.")
    return INSTALLED[spec.engine].of(spec, life)
