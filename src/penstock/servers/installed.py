"""Servers of engines that are installed as packages: what vLLM and SGLang have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Final, Self

from penstock.servers.compile_lock import CompileLock, fingerprint
from penstock.servers.installation import Installation, Package, find
from penstock.servers.launched import LaunchedServer, LifeCycle
from penstock.servers.machine import gpu_names
from penstock.servers.nodes import Nodes
from penstock.servers.spec import ServerSpec, Value, flags, served_name

_OF_SPEC: Final = (
    *("tp", "dp", "pp", "max_model_len", "extra_args", "env", "name", "host", "port"),
    *("api_key", "python", "nodes"),
)
"""Fields of a spec that are arguments of a server under the same name."""


class InstalledServer(LaunchedServer):
    """A server of an engine that some interpreter of this machine has.

    model: checkpoint folder, or id on the hub. tp, dp, pp: tensor, data and pipeline parallel sizes.
    extra_args: further flags, see `ServerSpec`. env: further environment variables. name: what requests call
    the model. python: an interpreter that has the engine; None: the one the engine's environment variable
    names, this one, or that of the engine's command on the PATH. nodes: see `penstock.servers.nodes`.
    Raises ConfigError for what cannot be, on entering StartFailed.
    """

    package: ClassVar[Package]
    compile_variables: ClassVar[tuple[str, ...]]
    """Beginnings of the environment variables that may decide what is compiled."""

    def __init__(
        self,
        model: str | Path,
        *,
        tp: int = 1,
        dp: int = 1,
        pp: int = 1,
        max_model_len: int | None = None,
        extra_args: Mapping[str, Value] | None = None,
        env: Mapping[str, str] | None = None,
        name: str | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        api_key: str | None = None,
        python: str | Path | None = None,
        nodes: Nodes | None = None,
        life: LifeCycle | None = None,
    ) -> None:
        spec = ServerSpec(
            engine=self.kind,
            model=str(model),
            name=served_name(model, name),
            host=host,
            port=port,
            tp=tp,
            dp=dp,
            pp=pp,
            max_model_len=max_model_len,
            extra_args=dict(extra_args or {}),
            env=dict(env or {}),
            api_key=api_key,
            python=python,
            nodes=nodes,
        )
        self.command_for(spec, "python")  # refuses what cannot be said
        super().__init__(spec, life)
        self._installed: Installation | None = None

    @classmethod
    def of(cls, spec: ServerSpec, life: LifeCycle | None = None) -> Self:
        """The server a spec describes."""
        return cls(
            spec.model,
            **{name: getattr(spec, name) for name in _OF_SPEC},
            life=life,
        )

    @staticmethod
    @abstractmethod
    def command_for(spec: ServerSpec, python: str) -> list[str]:
        """The command that serves a spec with an interpreter that has the engine."""

    @abstractmethod
    def _compile_cache(self, spec: ServerSpec, environment: Mapping[str, str]) -> Path | None:
        """Where the engine keeps what it compiles; None when nothing worth waiting for is compiled."""

    async def _command(self, spec: ServerSpec, environment: Mapping[str, str]) -> list[str]:
        if self._installed is None:
            self._installed = await find(self.package, spec.python, environment)
        return self.command_for(spec, self._installed.python)

    def _compile_lock(self, spec: ServerSpec, environment: Mapping[str, str]) -> CompileLock | None:
        cache = self._compile_cache(spec, environment)
        return None if cache is None else CompileLock(cache, fingerprint(self._facts(spec, environment)))

    def _facts(self, spec: ServerSpec, environment: Mapping[str, str]) -> dict[str, object]:
        """All that may decide what is compiled."""
        folder = Path(spec.model).expanduser()
        return {
            "engine": self.kind,
            "version": self._installed.version if self._installed is not None else None,
            "model": str(folder.resolve()) if folder.is_dir() else spec.model,
            "sizes": [spec.tp, spec.dp, spec.pp, spec.max_model_len],
            "arguments": sorted(
                " ".join(flags({name: value}, taken={}, negative=lambda name: f"--no-{name}"))
                for name, value in spec.extra_args.items()
            ),
            "environment": {
                name: value
                for name, value in environment.items()
                if name.startswith(self.compile_variables) and not name.endswith(("_KEY", "_DEVICES"))
            },
            "gpus": sorted(set(gpu_names())),
        }


def argument(spec: ServerSpec, name: str) -> Value:
    """What `extra_args` says of a flag, however it is written; None when it says nothing."""
    named = {given.lstrip("-").replace("_", "-"): value for given, value in spec.extra_args.items()}
    return named.get(name)
