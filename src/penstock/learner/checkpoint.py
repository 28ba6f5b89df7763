"""A learner on disk: weights as an ordinary checkpoint folder, the optimizer, and how far it has come.

It guarantees:
- a folder named `step-…` is complete: it was written under another name, brought to disk and renamed. A
  process that is killed at any moment leaves the checkpoints there were, or those and the new one;
- a learner that goes on from one computes the same numbers as one that did not stop;
- one that was saved under other settings is refused, and what differs is named.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import orjson
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from penstock.errors import ConfigError, ResumeRefused, WriteFailed
from penstock.learner.learner import Learner

PREFIX: Final = "step-"
UNFINISHED: Final = ".unfinished-"
WEIGHTS: Final = "model.safetensors"
OPTIMIZER: Final = "optimizer.safetensors"
STATE: Final = "learner.json"

MOMENTS: Final = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps of a parameter that has had a gradient."""

DIGITS: Final = 8
"""Of the step in a folder's name."""


def save_checkpoint(
    folder: Path, learner: Learner, state: Mapping[str, Any] | None = None, *, keep: int = 2
) -> Path:
    """Write `folder`/step-…, and remove all but the last `keep` of them. Returns its path.

    state: what the caller needs to go on, given back by `load_checkpoint`; whatever JSON holds. Raises
    WriteFailed, and what was there before is still there.
    """
    if keep < 1:
        raise ConfigError(f"keep must be at least 1, not {keep}.")
    target = folder / f"{PREFIX}{learner.version:0{DIGITS}}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f"{UNFINISHED}*"):
            shutil.rmtree(leftover)
        unfinished = folder / f"{UNFINISHED}{target.name}"
        unfinished.mkdir()
        for name, content in _files(learner, state or {}).items():
            _write(unfinished / name, content)
        _sync(unfinished)
        if target.exists():
            target.rename(folder / f"{UNFINISHED}replaced-{target.name}")
        unfinished.rename(target)
        _sync(folder)
        for old in (*checkpoints(folder)[:-keep], *folder.glob(f"{UNFINISHED}*")):
            # Under its own name it would be taken for complete when this is killed half-way.
            doomed = (
                old if old.name.startswith(UNFINISHED) else old.rename(folder / f"{UNFINISHED}{old.name}")
            )
            shutil.rmtree(doomed)
    except OSError as error:
        raise WriteFailed(f"The checkpoint {target} cannot be written: {error}") from error
    return target


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints, the latest last."""
    return sorted(path for path in folder.glob(f"{PREFIX}{'[0-9]' * DIGITS}") if path.is_dir())


def load_checkpoint(path: Path, learner: Learner) -> dict[str, Any]:
    """Bring a learner of the same settings to where the saved one was. Returns the caller's state.

    Raises ResumeRefused when the settings differ, ConfigError when the folder is damaged or of another model.
    """
    try:
        saved = orjson.loads((path / STATE).read_bytes())
        differences = _differences(saved["settings"], settings(learner))
        weights, optimizer = load_file(path / WEIGHTS), load_file(path / OPTIMIZER)
        version, state = int(saved["version"]), dict(saved["state"])
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ConfigError(f"{path} is no checkpoint of a learner: {error}") from error
    if differences:
        raise ResumeRefused(
            f"{path} was saved under other settings: {'; '.join(differences)}. Go on with the same, or "
            f"begin in another folder.",
            differences,
        )
    try:
        learner.policy.load_state_dict(weights)
    except RuntimeError as error:
        raise ConfigError(f"{path} is of another model: {error}") from None
    _restore_optimizer(learner, optimizer)
    learner.version = version
    return state


def settings(learner: Learner) -> dict[str, Any]:
    """What has to be the same when a run goes on."""
    return {"objective": asdict(learner.objective), "optimization": asdict(learner.optimization)}


def _differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    now = orjson.loads(orjson.dumps(now))
    return [
        f"{name} was {before.get(name)!r} and is {after.get(name)!r}"
        for before, after in ((saved.get(part, {}), now[part]) for part in now)
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]


def _files(learner: Learner, state: Mapping[str, Any]) -> dict[str, bytes]:
    """The folder's content. What is not weights comes from the model that training began with."""
    files = {path.name: path.read_bytes() for path in learner.model.iterdir() if _describes(path)}
    cpu = {name: tensor.detach().cpu() for name, tensor in learner.weights().items()}
    files[WEIGHTS] = save(cpu, metadata={"format": "pt"})
    files[OPTIMIZER] = save(_optimizer_tensors(learner))
    content = {"version": learner.version, "settings": settings(learner), "state": state}
    files[STATE] = orjson.dumps(content, option=orjson.OPT_INDENT_2)
    return files


def _describes(path: Path) -> bool:
    """Whether a model's file is its configuration, tokenizer or template."""
    return (
        path.is_file()
        and path.suffix in {".json", ".jinja", ".txt", ".model"}
        and not path.name.endswith(".index.json")
        and path.name != STATE
    )


def _optimizer_tensors(learner: Learner) -> dict[str, torch.Tensor]:
    """AdamW's state of each parameter as `name/step`, `name/exp_avg` and `name/exp_avg_sq`."""
    return {
        f"{name}/{key}": tensor.detach().cpu().contiguous()
        for name, parameter in learner.policy.named_parameters()
        for key, tensor in learner.optimizer.state[parameter].items()
    }


def _restore_optimizer(learner: Learner, tensors: Mapping[str, torch.Tensor]) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for place, (name, _) in enumerate(learner.policy.named_parameters()):
        found = {key: tensors[f"{name}/{key}"] for key in MOMENTS if f"{name}/{key}" in tensors}
        if found:
            state[place] = found
    groups = learner.optimizer.state_dict()["param_groups"]
    learner.optimizer.load_state_dict({"state": state, "param_groups": groups})


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Brings the names in a folder to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
