"""Checkpoints: what goes on from one goes on exactly, and a kill at any moment leaves a whole one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from penstock.errors import ConfigError, ResumeRefused, WriteFailed
from penstock.learner.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from penstock.learner.grpo import Objective
from penstock.learner.learner import Learner, Optimization
from tests.learner.groups import random_groups

FAST = Optimization(learning_rate=1e-3, warm_up=3)

SAVER = """
import sys
from pathlib import Path
from penstock.learner.checkpoint import save_checkpoint
from penstock.learner.grpo import Objective
from penstock.learner.learner import Learner, Optimization
learner = Learner(sys.argv[1], Objective(), Optimization(learning_rate=1e-3, warm_up=3))
print("ready", flush=True)
while True:
    learner.version += 1
    for parameter in learner.policy.parameters():
        parameter.data.fill_(learner.version)
    save_checkpoint(Path(sys.argv[2]), learner, {"version": learner.version})
"""


def learner(folder: Path, optimization: Optimization = FAST) -> Learner:
    return Learner(folder, Objective(), optimization)


def same(one: Learner, other: Learner) -> bool:
    weights = other.weights()
    return all(torch.equal(tensor, weights[name]) for name, tensor in one.weights().items())


def test_a_learner_that_goes_on_computes_the_same_numbers(folder: Path, tmp_path: Path) -> None:
    first = learner(folder)
    first.step(random_groups(1, 4))
    first.step(random_groups(2, 4))
    path = save_checkpoint(tmp_path, first, {"prompts": 8})
    second = learner(folder)
    assert load_checkpoint(path, second) == {"prompts": 8}
    assert second.version == 2
    figures = [one.step(random_groups(3, 4)) for one in (first, second)]
    assert replace(figures[0], seconds=0.0) == replace(figures[1], seconds=0.0)
    assert same(first, second)


def test_a_learner_without_a_step_can_be_saved(folder: Path, tmp_path: Path) -> None:
    first, second = learner(folder), learner(folder)
    load_checkpoint(save_checkpoint(tmp_path, first), second)
    for one in (first, second):
        one.step(random_groups(1, 4))
    assert same(first, second)


def test_a_checkpoint_is_an_ordinary_model_folder(folder: Path, tmp_path: Path) -> None:
    one = learner(folder)
    one.step(random_groups(1, 4))
    path = save_checkpoint(tmp_path, one)
    loaded = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    weights = one.weights()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.state_dict().items())
    assert same(Learner(path, Objective(), FAST), one)


def test_the_latest_are_kept(folder: Path, tmp_path: Path) -> None:
    one = learner(folder)
    for version in (1, 2, 10, 11):
        one.version = version
        save_checkpoint(tmp_path, one, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000010", "step-00000011"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000011"]
    save_checkpoint(tmp_path, one, {"again": True}, keep=2)
    assert load_checkpoint(checkpoints(tmp_path)[-1], one) == {"again": True}
    with pytest.raises(ConfigError, match="keep"):
        save_checkpoint(tmp_path, one, keep=0)


def test_other_settings_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, learner(folder))
    with pytest.raises(ResumeRefused, match=r"learning_rate was 0\.001 and is 0\.002") as refused:
        load_checkpoint(path, learner(folder, replace(FAST, learning_rate=2e-3)))
    assert len(refused.value.differences) == 1


def test_folders_that_are_no_checkpoint(folders: dict[str, Path], tmp_path: Path) -> None:
    one = learner(folders["qwen3"])
    with pytest.raises(ConfigError, match="no checkpoint of a learner"):
        load_checkpoint(folders["qwen3"], one)
    path = save_checkpoint(tmp_path, one)
    with pytest.raises(ConfigError, match="another model"):
        load_checkpoint(path, learner(folders["qwen2"]))
    (path / "optimizer.safetensors").write_bytes(b"torn")
    with pytest.raises(ConfigError, match="no checkpoint of a learner"):
        load_checkpoint(path, one)


def test_a_folder_that_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteFailed, match="file"):
        save_checkpoint(tmp_path / "file", learner(folder))


def test_a_kill_leaves_a_whole_checkpoint(folder: Path, tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", SAVER, str(folder), str(tmp_path)], stdout=subprocess.PIPE
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        deadline = time.monotonic() + 60
        one = learner(folder)
        for pause in (0.0, 0.005, 0.013):
            # Stopped anywhere in a save, the folder is what a kill there would leave.
            while not checkpoints(tmp_path):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            time.sleep(pause)
            os.kill(child.pid, signal.SIGSTOP)
            found = checkpoints(tmp_path)[-1]
            state = load_checkpoint(found, one)
            assert found.name == f"step-{state['version']:08}"
            assert all((tensor == one.version).all() for tensor in one.weights().values())
            os.kill(child.pid, signal.SIGCONT)
    finally:
        child.kill()
        child.communicate(timeout=10)
    load_checkpoint(checkpoints(tmp_path)[-1], one)
    one.version += 1
    save_checkpoint(tmp_path, one)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
