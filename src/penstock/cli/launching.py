"""Engines that a command starts: their flags, and what is shown of them as they start, die and come back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Literal

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from penstock.errors import ConfigError
from penstock.models import ARITHMETIC
from penstock.servers.engines import ENGINES
from penstock.servers.keeper import Replica, State
from penstock.servers.nodes import Nodes
from penstock.servers.replicas import Devices
from penstock.servers.restart import Restart
from penstock.servers.spec import ServerSpec, Value

EngineName = Literal["vllm", "sglang", "embedded"]


@dataclass(frozen=True, kw_only=True)
class LaunchArgs:
    """How engines are started. With servers that run already none of it is used."""

    replicas: int = 1
    """Engines to start, each with its own GPUs; one that dies is restarted."""
    tp: int = 1
    """Tensor parallel size of each engine."""
    dp: int = 1
    """Data parallel size of each engine."""
    pp: int = 1
    """Pipeline parallel size of each engine."""
    max_model_len: int | None = None
    """Longest prompt plus completion, in tokens. Default: the engine decides."""
    engine_args: tuple[str, ...] = ()
    """Further flags of the engine, without their dashes: --engine-args enforce-eager max-num-seqs=64."""
    devices: tuple[str, ...] = ()
    """GPUs to deal out, by index or UUID. Default: all this process may use."""
    max_restarts: int = 3
    """Deaths in a row after which an engine is given up."""

    def changed(self) -> list[str]:
        """Flags that were given."""
        return [
            f"--{field.name.replace('_', '-')}"
            for field in fields(self)
            if getattr(self, field.name) != field.default
        ]

    @property
    def restart(self) -> Restart:
        return Restart(limit=self.max_restarts)

    @property
    def dealt(self) -> Devices | None:
        """What `Replicas` takes as devices."""
        return self.devices or None

    def spec(
        self,
        engine: str,
        model: str | None,
        *,
        name: str | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        api_key: str | None = None,
        nodes: Nodes | None = None,
    ) -> ServerSpec:
        """What to start. The embedded engine has a model of its own. Raises ConfigError."""
        if model is None:
            if engine != "embedded":
                raise ConfigError(f"Which model is {engine} to serve? Give --model a folder or a hub's id.")
            model = str(ARITHMETIC)
        extra = engine_flags(self.engine_args)
        if engine == "sglang":
            extra.setdefault("enable-metrics", True)  # the limits of requests in flight are steered by them
        return ServerSpec(
            engine=engine, model=model, name=name or "", host=host, port=port, api_key=api_key, nodes=nodes,
            tp=self.tp, dp=self.dp, pp=self.pp, max_model_len=self.max_model_len, extra_args=extra,
        )  # fmt: skip


def engine_flags(words: Sequence[str]) -> dict[str, Value]:
    """`name=value` and `name`, as `ServerSpec.extra_args` has them. Raises ConfigError."""
    found: dict[str, Value] = {}
    for word in words:
        name, equals, value = word.lstrip("-").partition("=")
        name = name.replace("_", "-")
        if not name or " " in name:
            raise ConfigError(f"--engine-args: {word!r} is neither NAME nor NAME=VALUE.")
        if name in found:
            raise ConfigError(f"--engine-args: {name} is given twice.")
        found[name] = value if equals else True
    return found


class Display:
    """What a person sees of engines: a line each while they start, afterwards a line for what happens."""

    def __init__(self, console: Console, spec: ServerSpec, replicas: int) -> None:
        self._console = console
        self._spec = spec
        self._several = replicas > 1
        self._progress: Progress | None = None
        self._lines: dict[int, TaskID] = {}
        self._said: dict[int, str] = {}

    @contextmanager
    def starting(self) -> Iterator[None]:
        """While the block runs the engines start; use `on_change` of this object as theirs."""
        if not self._console.is_terminal:
            yield
            return
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=self._console, transient=True) as progress:
            self._progress = progress
            try:
                yield
            finally:
                self._progress = None
                self._lines.clear()

    def on_change(self, replica: Replica) -> None:
        """Takes what `Replicas` tells."""
        said = told(replica)
        if said is None or self._said.get(replica.index) == said:
            return
        self._said[replica.index] = said
        line = f"{self._who(replica)}: {said}"
        progress = self._progress
        if progress is None:
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)
        elif replica.index in self._lines:
            progress.update(self._lines[replica.index], description=line)
        else:
            self._lines[replica.index] = progress.add_task(line, total=None)

    def _who(self, replica: Replica) -> str:
        number = f" {replica.index}" if self._several else ""
        return f"{self._spec.engine}{number} ({self._spec.name})"


def told(replica: Replica) -> str | None:
    """A replica's news in a few words; None: nothing worth telling."""
    match replica.state:
        case State.STARTING:
            return replica.stage or None
        case State.READY:
            again = f" again, restart {replica.restarts.total}" if replica.restarts.total else ""
            return f"ready{again}"
        case State.DIED:
            return f"{_why(replica)} Restart {replica.restarts.total} in {replica.retry_in:.0f} s."
        case State.GIVEN_UP:
            return f"{_why(replica)} It is given up."
    return None


def _why(replica: Replica) -> str:
    """The first line of what it ended with; the rest is its log."""
    return str(replica.error).partition("\n")[0]


__all__ = ["ENGINES", "Display", "EngineName", "LaunchArgs", "engine_flags", "told"]
