"""Figures of a training run: always a JSONL file, and what else is asked for.

It guarantees:
- a step that was written is a whole line on disk, flushed before the next step begins;
- a run that goes on from an earlier step has each step once: later lines and a torn last one are cut off.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Protocol, Self

import orjson

from penstock.errors import ConfigError, WriteFailed

Figures = Mapping[str, int | float | None]


class Writer(Protocol):
    """Takes the figures of a step. Raises PenstockError."""

    def write(self, step: int, figures: Figures) -> None: ...

    def close(self) -> None: ...


class JsonlWriter:
    """A line a step: {"step": …, name: figure, …}; a figure that is no number is null.

    after: the step the run goes on from; lines of later steps are removed. Raises WriteFailed.
    """

    def __init__(self, path: Path, *, after: int | None = None) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = [] if after is None else [line for line in _whole_lines(path) if _step(line) <= after]
            unfinished = path.with_name(path.name + ".unfinished")
            unfinished.write_bytes(b"".join(kept))
            unfinished.replace(path)
            self._file = path.open("ab")
        except OSError as error:
            raise WriteFailed(f"{path} cannot be written: {error}") from error

    def write(self, step: int, figures: Figures) -> None:
        """See Writer."""
        try:
            self._file.write(orjson.dumps({"step": step, **figures}) + b"\n")
            self._file.flush()
        except OSError as error:
            raise WriteFailed(f"{self._path} cannot be written: {error}") from error

    def close(self) -> None:
        """See Writer."""
        self._file.close()


class TensorBoardWriter:
    """Event files in a folder. Raises ConfigError where the package `tensorboard` is not installed."""

    def __init__(self, folder: Path) -> None:
        needed("tensorboard", "tensorboard")
        self._writer: Any = needed("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(folder))

    def write(self, step: int, figures: Figures) -> None:
        """See Writer."""
        for name, figure in figures.items():
            if figure is not None:
                self._writer.add_scalar(name, figure, step)
        self._writer.flush()

    def close(self) -> None:
        """See Writer."""
        self._writer.close()


class WandbWriter:
    """A run of Weights & Biases, whose own environment variables (WANDB_MODE, …) apply. Raises ConfigError
    where the package `wandb` is not installed.

    settings: of the run, shown beside it.
    """

    def __init__(self, project: str, folder: Path, settings: Mapping[str, Any]) -> None:
        self._run: Any = needed("wandb", "wandb").init(
            project=project, dir=str(folder), config=dict(settings)
        )

    def write(self, step: int, figures: Figures) -> None:
        """See Writer."""
        self._run.log({name: figure for name, figure in figures.items() if figure is not None}, step=step)

    def close(self) -> None:
        """See Writer."""
        self._run.finish()


class Metrics:
    """Several writers as one; `with` closes them."""

    def __init__(self, writers: Sequence[Writer]) -> None:
        self._writers = writers

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self._writers:
            writer.close()

    def write(self, step: int, figures: Figures) -> None:
        """To each writer."""
        for writer in self._writers:
            writer.write(step, figures)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file, without a torn last one; [] when there is no file."""
    return [orjson.loads(line) for line in _whole_lines(path)]


def needed(module: str, extra: str) -> ModuleType:
    """A module of an optional package. Raises ConfigError that names the extra to install."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(
            f"The package {extra} is not installed: pip install 'penstock[{extra}]', or leave it out."
        ) from None


def _whole_lines(path: Path) -> list[bytes]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    return [line for line in content.splitlines(keepends=True) if line.endswith(b"\n")]


def _step(line: bytes) -> int:
    return int(orjson.loads(line)["step"])
