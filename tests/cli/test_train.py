"""`penstock train --demo`: the whole loop in processes of its own."""

from __future__ import annotations

import asyncio
import io
import json
import sqlite3
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from rich.console import Console

from penstock.cli.train import TrainArgs, main
from penstock.cli.training_task import credit, prompts, reward
from penstock.cli.training_view import View, spark
from penstock.errors import ConfigError
from penstock.learner.checkpoint import checkpoints
from penstock.prompt import PromptFormat
from penstock.rollout.balance import Balance
from penstock.rollout.score import Score
from penstock.sample import Sample
from tests.learner.groups import group, rollout

SMALL = ["--engines", "1", "--groups", "2", "--group-size", "4", "--evaluate-on", "8", "--threads", "1"]


def command(out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "penstock", "train", "--demo", "--out", str(out), *SMALL, *more]


def lines(out: Path) -> list[dict[str, Any]]:
    path = out / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def trained(out: Path) -> list[tuple[int, int]]:
    """(position, step) of each group that was trained on."""
    with sqlite3.connect(out / "ledger.sqlite") as ledger:
        return ledger.execute("SELECT position, step FROM groups WHERE state = 'trained'").fetchall()


def scored(text: str, finish_reason: str = "stop") -> Score:
    row = next(prompts(0))
    prompt = PromptFormat().prompt(0, "prompt 0", json.dumps(row).encode())
    text = text.replace("SOLUTION", row["solution"]).replace("ANSWER", row["answer"])
    return asyncio.run(reward(prompt, Sample(text=text, finish_reason=finish_reason)))


def test_the_reward_is_the_answer_and_how_far_the_solution_is_right() -> None:
    assert scored("SOLUTION") == Score(1.0, {"answer": 1.0, "lines": 1.0})
    assert scored("SOLUTION0").parts["answer"] == 0
    assert 0.8 < scored("SOLUTION0").parts["lines"] < 1
    assert scored("<think>\n</think>\nANSWER").parts["answer"] == 1
    assert scored("SOLUTION", "length").parts["answer"] == 0
    assert scored("") == Score(0.0, {"answer": 0.0, "lines": 0.0})


def test_right_lines_have_the_credit_and_what_comes_behind_a_wrong_one_has_none() -> None:
    row = next(prompts(0))
    prompt = PromptFormat().prompt(0, "prompt 0", json.dumps(row).encode())
    first, *others = row["solution"].split("\n")
    end = "\x00"  # the token that ends a completion has no text
    texts = [
        row["solution"] + end,
        "\n".join((first, "x", *others[1:])) + end,
        "x\ny\nz" + end,
        row["solution"] + "\n" + row["answer"] + end,
    ]
    rollouts = []
    for text in texts:
        scored_ = asyncio.run(reward(prompt, Sample(text=text.rstrip(end), finish_reason="stop")))
        rollouts.append(msgspec.structs.replace(rollout(list(text.encode()), 0.0), reward=scored_))
    found = credit(msgspec.structs.replace(group(*rollouts), prompt=prompt))
    assert [len(one) for one in found] == [len(text) for text in texts]
    last = len(row["answer"] + end)
    begun, between = len(first) + 1, len(row["solution"]) - len(first) - len(row["answer"]) - 1
    # The first line is right in three of four, the others in two, the last in one.
    assert found[0] == pytest.approx([4 / 3] * begun + [2.0] * between + [4.0] * last)
    assert found[1] == pytest.approx([4 / 3] * begun + [0.0] * (len(texts[1]) - begun))
    assert found[2] == [0.0] * len(texts[2])
    assert found[3] == pytest.approx([4 / 3] * begun + [2.0] * between + [0.0] * (2 * last))


def test_prompts_depend_on_the_seed_alone() -> None:
    first, again, other = (next(prompts(seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_bad_settings_are_refused(tmp_path: Path) -> None:
    for words, message in (
        ([], "--demo"),
        (["--demo", "--steps", "0"], "--steps"),
        (["--demo", "--group-size", "1"], "--group-size"),
    ):
        with pytest.raises(ConfigError, match=message):
            main([*words, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    assert TrainArgs().async_steps == 1


def test_sparks() -> None:
    assert spark([0.0, 0.5, 1.0]) == "▁▅█"
    assert len(spark([0.5] * 100)) <= 40
    assert spark([]) == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_the_view_shows_each_measurement(terminal: bool) -> None:
    screen = io.StringIO()
    balance = Balance(
        generation_rate=9.0,
        required_rate=9.0,
        trainer_waits=0.0,
        engines_wait=0.5,
        updating=0.0,
        bottleneck="training",
        advice="Training is the bottleneck.",
        seconds=1.0,
        batches=2,
        engines=2,
    )
    rollouts: Any = SimpleNamespace(step=2, balance=lambda: balance)

    async def show() -> None:
        with View(3, rollouts, Console(file=screen, force_terminal=terminal, width=120)) as view:
            view.add(0, {"accuracy": 0.4})
            view.add(1, {"trained_reward": 0.25, "staleness": 0.5})
            view.add(2, {"trained_reward": 0.3, "staleness": 1.0, "accuracy": 0.5, "engines_wait": 0.5})

    asyncio.run(show())
    shown = screen.getvalue()
    assert "2/3" in shown and "40.0% → 50.0%" in shown and "1.00" in shown
    assert ("Training is the bottleneck." in shown) == terminal


@pytest.mark.slow
def test_a_killed_run_goes_on_and_trains_on_nothing_twice(tmp_path: Path) -> None:
    goal = 7
    words = command(tmp_path, "--save-every", "2", "--evaluate-every", "3", "--steps", str(goal))
    child = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not checkpoints(tmp_path / "checkpoints"):
            assert time.monotonic() < deadline and child.poll() is None
            time.sleep(0.05)
    finally:
        child.kill()
        child.wait(10)
    assert len(lines(tmp_path)) <= goal, "it was killed too late"
    done = subprocess.run(words, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    assert f"step {goal}/{goal}" in done.stdout
    found = lines(tmp_path)
    assert [line["step"] for line in found] == list(range(goal + 1))
    assert found[0].keys() == {"step", "accuracy", "accuracy_sampled"}
    assert [line["version"] for line in found[1:]] == list(range(1, goal + 1))
    assert all(line["staleness_max"] <= 1 for line in found[1:])
    assert found[-1]["accuracy"] is not None
    assert sorted(step for _, step in trained(tmp_path)) == sorted([*range(1, goal + 1)] * 2)
    ET.parse(tmp_path / "training.svg")
    assert "<svg" in (tmp_path / "training.html").read_text()
    assert checkpoints(tmp_path / "checkpoints")[-1].name == f"step-{goal:08}"
    other = subprocess.run(
        [*words, "--learning-rate", "1e-5"], capture_output=True, text=True, timeout=60, check=False
    )
    assert other.returncode == 2 and "learning_rate was 0.0004" in other.stderr


@pytest.mark.slow
def test_held_out_answers_get_better(tmp_path: Path) -> None:
    """Eighty steps with the demo's own settings, another seed: some two minutes on two cores."""
    words = [sys.executable, "-m", "penstock", "train", "--demo", "--out", str(tmp_path), "--seed", "1"]
    done = subprocess.run(
        [*words, "--steps", "80", "--evaluate-every", "80", "--evaluate-on", "768"],
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, *_, last = (line["accuracy_sampled"] for line in lines(tmp_path) if "accuracy_sampled" in line)
    assert last > first + 0.04, "0.11 as a rule, with a standard error of 0.02"
