"""Figures on disk, and the extras that may be missing."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from penstock.errors import ConfigError, WriteFailed
from penstock.learner.metrics import JsonlWriter, Metrics, TensorBoardWriter, WandbWriter, read_metrics


def test_a_line_a_step(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    with Metrics([JsonlWriter(path)]) as metrics:
        metrics.write(1, {"reward": 0.5, "tokens": 7})
        assert read_metrics(path) == [{"step": 1, "reward": 0.5, "tokens": 7}]
        metrics.write(2, {"reward": float("nan"), "tokens": None})
    assert read_metrics(path)[1] == {"step": 2, "reward": None, "tokens": None}


def test_a_run_that_goes_on_has_each_step_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = JsonlWriter(path)
    for step in (1, 2, 3):
        first.write(step, {"reward": 0.1})
    first.close()
    with path.open("ab") as file:
        file.write(b'{"step": 4, "rew')
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    second = JsonlWriter(path, after=2)
    second.write(3, {"reward": 0.9})
    second.close()
    assert [(line["step"], line["reward"]) for line in read_metrics(path)] == [(1, 0.1), (2, 0.1), (3, 0.9)]
    JsonlWriter(path).close()
    assert read_metrics(path) == []
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteFailed):
        JsonlWriter(tmp_path / "file" / "metrics.jsonl")


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_extra_is_named(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"penstock\[{name}\]"):
        if name == "wandb":
            WandbWriter("project", tmp_path, {})
        else:
            TensorBoardWriter(tmp_path)


def test_tensorboard(tmp_path: Path) -> None:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with Metrics([TensorBoardWriter(tmp_path)]) as metrics:
        metrics.write(3, {"reward": 0.5, "accuracy": None})
    events = reading.EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(one.step, one.value) for one in events.Scalars("reward")] == [(3, 0.5)]
    assert events.Tags()["scalars"] == ["reward"]


def test_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Any] = []
    run = SimpleNamespace(
        log=lambda figures, step: seen.append((step, figures)), finish=lambda: seen.append("finished")
    )
    module = ModuleType("wandb")

    def init(**settings: Any) -> SimpleNamespace:
        seen.append(settings)
        return run

    monkeypatch.setattr(module, "init", init, raising=False)
    monkeypatch.setitem(sys.modules, "wandb", module)
    with Metrics([WandbWriter("arithmetic", tmp_path, {"seed": 1})]) as metrics:
        metrics.write(2, {"reward": 0.5, "accuracy": None})
    assert seen == [
        {"project": "arithmetic", "dir": str(tmp_path), "config": {"seed": 1}},
        (2, {"reward": 0.5}),
        "finished",
    ]
