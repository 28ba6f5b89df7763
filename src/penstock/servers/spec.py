"""What an engine server is asked to be, in terms every engine knows.

A spec is plain data: `penstock.servers.vllm.command` and `penstock.servers.sglang.command` make a command
line of it, `penstock.servers.engines.server_of` a server. What the commands set themselves cannot be said a
second time in `extra_args`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from penstock.errors import ConfigError
from penstock.servers.nodes import Nodes

Value = bool | int | float | str | Path | Sequence[Any] | Mapping[str, Any] | None
"""Value of an engine's flag."""

LOOPBACK: Final = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}
"""Where a server that listens on all addresses is reached from here."""


@dataclass(frozen=True, kw_only=True)
class ServerSpec:
    """One engine server. Raises ConfigError for what no engine could do."""

    model: str
    """Checkpoint folder, or the id of a model on a hub."""
    name: str = ""
    """What requests call the model. "": as `served_name` says."""
    engine: str = "vllm"
    """One of `penstock.servers.engines.ENGINES`."""
    host: str = "127.0.0.1"
    port: int = 0
    """0: any free port."""
    tp: int = 1
    """Tensor parallel size."""
    dp: int = 1
    """Data parallel size: replicas of the model behind this server."""
    pp: int = 1
    """Pipeline parallel size."""
    max_model_len: int | None = None
    """Longest prompt plus completion, in tokens. None: the engine decides."""
    extra_args: Mapping[str, Value] = field(default_factory=dict)
    """Further flags of the engine by their names, without dashes in front. True: the flag alone. None: left
    out. A list: several values. A mapping: JSON."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Environment variables for the engine, beside those of this process."""
    api_key: str | None = field(default=None, repr=False)
    """Key that the server asks for."""
    python: str | Path | None = None
    """An interpreter that has the engine. None: see `penstock.servers.installation.find`."""
    nodes: Nodes | None = None
    """The machines the engine runs on, and which of them this is. None: this one alone."""

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", served_name(self.model, None))
        for name in ("tp", "dp", "pp"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.max_model_len is not None and self.max_model_len < 1:
            raise ConfigError(f"max_model_len must be at least 1, not {self.max_model_len}.")
        if not 0 <= self.port < 65536:
            raise ConfigError(f"The port must be between 0 and 65535, not {self.port}.")
        for name, value in self.env.items():
            if not isinstance(value, str):
                raise ConfigError(f"The environment variable {name} must be text, not {value!r}.")
        if _is_path(self.model) and not Path(self.model).expanduser().exists():
            raise ConfigError(f"There is no model at {self.model}.")

    @property
    def gpus(self) -> int:
        """GPUs that one server takes on all its nodes together."""
        spelled = {given.lstrip("-").replace("_", "-"): value for given, value in self.extra_args.items()}
        # SGLang's attention replicas lie within a tensor parallel group, which vLLM's lie beside.
        within = self.engine == "sglang" and spelled.get("enable-dp-attention")
        return self.tp * self.pp * (1 if within else self.dp)

    @property
    def reached_at(self) -> str:
        """The host under which the server is reached from this machine."""
        return LOOPBACK.get(self.host, self.host)

    @property
    def base_url(self) -> str:
        host = f"[{self.reached_at}]" if ":" in self.reached_at else self.reached_at
        return f"http://{host}:{self.port}"


def _is_path(model: str) -> bool:
    """Whether it can only be meant as a path: a hub's id is NAME or OWNER/NAME."""
    return model.startswith(("/", "./", "../", "~")) or model.count("/") > 1


def served_name(model: str | Path, name: str | None) -> str:
    """What a model is called: as asked for, else by its folder, else by its id on the hub."""
    if name is not None:
        return name
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else str(model)


def flags(
    arguments: Mapping[str, Value], *, taken: Mapping[str, str], negative: Callable[[str], str] | None
) -> list[str]:
    """The words of a command line.

    taken: flags that the command has already, and the field of the spec that sets each. negative: the word
    for a flag that is False, where the engine knows one. Raises ConfigError.
    """
    words: list[str] = []
    for given, value in arguments.items():
        name = given.lstrip("-").replace("_", "-")
        if name in taken:
            raise ConfigError(f"{given} is not for extra_args: give it as {taken[name]}.")
        if value is None:
            continue
        if value is False:
            if negative is None:
                raise ConfigError(f"{given}=False: this engine's flags cannot be negated; leave it out.")
            words.append(negative(name))
        elif value is True:
            words.append(f"--{name}")
        else:
            words += [f"--{name}", *_values(value)]
    return words


def _values(value: Value) -> list[str]:
    if isinstance(value, Mapping):
        return [json.dumps(value)]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [json.dumps(item) if isinstance(item, Mapping) else str(item) for item in value]
    return [str(value)]
