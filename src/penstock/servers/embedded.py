"""The embedded engine as a server of its own: `async with EmbeddedServer(model) as server`.

Guarantees as `penstock.servers.launched`: inside the block the engine has said that it is ready; after it,
whatever happened, its process is gone.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Self

from penstock.errors import ConfigError
from penstock.servers.launched import LaunchedServer, LifeCycle
from penstock.servers.spec import ServerSpec, Value, flags, served_name

TAKEN: Final = {
    "model": "model",
    "served-model-name": "name",
    "host": "host",
    "port": "port",
    "max-model-len": "max_model_len",
}
"""Flags the command has from the spec."""


def command(spec: ServerSpec, arguments: Sequence[str] = ()) -> list[str]:
    """The command that serves a spec; `arguments` are further words of it."""
    words = [
        *(sys.executable, "-m", "penstock.engine", "--model", spec.model),
        *("--served-model-name", spec.name, "--host", spec.host, "--port", str(spec.port)),
    ]
    if spec.max_model_len is not None:
        words += ["--max-model-len", str(spec.max_model_len)]
    return [*words, *flags(spec.extra_args, taken=TAKEN, negative=lambda name: f"--no-{name}"), *arguments]


class EmbeddedServer(LaunchedServer):
    """The embedded engine in a process of its own.

    arguments: further words of the command line of `penstock engine`. Otherwise as `VLLMServer`.
    """

    kind = "embedded"
    ready_line = "penstock engine ready on "

    def __init__(
        self,
        model: str | Path,
        arguments: Sequence[str] = (),
        *,
        max_model_len: int | None = None,
        extra_args: Mapping[str, Value] | None = None,
        env: Mapping[str, str] | None = None,
        name: str | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        api_key: str | None = None,
        life: LifeCycle | None = None,
    ) -> None:
        spec = ServerSpec(
            engine=self.kind,
            model=str(model),
            name=served_name(model, name),
            host=host,
            port=port,
            max_model_len=max_model_len,
            extra_args=dict(extra_args or {}),
            env=dict(env or {}),
            api_key=api_key,
        )
        command(spec)  # refuses what cannot be said
        super().__init__(spec, life)
        self._arguments = tuple(arguments)

    @classmethod
    def of(cls, spec: ServerSpec, life: LifeCycle | None = None) -> Self:
        """The server a spec describes. Raises ConfigError for what this engine cannot do."""
        if spec.gpus > 1 or spec.nodes is not None:
            raise ConfigError("The embedded engine runs on one device: tp, dp and pp are 1, and no nodes.")
        if spec.python is not None:
            raise ConfigError("The embedded engine runs with this interpreter: python is not for it.")
        names = ("max_model_len", "extra_args", "env", "name", "host", "port", "api_key")
        return cls(spec.model, **{name: getattr(spec, name) for name in names}, life=life)

    def _environment(self, spec: ServerSpec) -> dict[str, str]:
        # "": no key is needed, whatever the environment says.
        return {**super()._environment(spec), "VLLM_API_KEY": spec.api_key or ""}

    async def _command(self, spec: ServerSpec, environment: Mapping[str, str]) -> list[str]:
        return command(spec, self._arguments)
