"""kill -9 of a trainer, and of engines, in processes of their own: no prompt skipped, none trained twice."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from penstock.models import ARITHMETIC
from tests.engine_server.running import Running
from tests.rollout.trainer import PROMPTS, load
from tests.test_control_embedded import Process, processes

BOUND = 120.0
"""Seconds the last life of a trainer may take."""


def start(folder: Path, urls: list[str]) -> subprocess.Popen[bytes]:
    words = [",".join(urls), str(folder / "l.db"), str(folder / "checkpoint")]
    return subprocess.Popen([sys.executable, "-m", "tests.rollout.trainer", *words])


def killed_at_random(
    folder: Path, urls: list[str], dice: random.Random, *, kills: int, mortal: list[Process]
) -> None:
    """Lives of a trainer, each killed but the last; in one of them one of the mortal engines is killed, too,
    and started again."""
    unlucky = dice.randrange(kills + 1)
    for life in range(kills + 1):
        trainer = start(folder, urls)
        try:
            if life == unlucky and mortal:
                time.sleep(dice.uniform(0.5, 1.5))
                engine = dice.choice(mortal)
                engine.kill()
                time.sleep(dice.uniform(0.0, 0.5))
                engine.start()
            if life < kills:
                deadline = time.monotonic() + dice.uniform(0.8, 2.5)
                while trainer.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.01)
                trainer.kill()
                trainer.wait(10)
            else:
                assert trainer.wait(BOUND) == 0
        finally:
            trainer.kill()
            trainer.wait(10)
    _, trained = load(folder / "checkpoint")
    assert sorted(trained) == list(range(PROMPTS)), Counter(trained)


def test_a_trainer_that_is_killed_loses_and_doubles_nothing(engine: Running, tmp_path: Path) -> None:
    urls = [f"http://{engine.host}:{engine.port}"]
    killed_at_random(tmp_path, urls, random.Random(1), kills=2, mortal=[])


@pytest.mark.slow
def test_trainers_and_engines_that_are_killed_again_and_again(tmp_path: Path) -> None:
    with processes(ARITHMETIC, ARITHMETIC) as engines:
        urls = [engine.url for engine in engines]
        for seed in range(10):
            (folder := tmp_path / str(seed)).mkdir()
            killed_at_random(folder, urls, random.Random(seed), kills=4, mortal=engines)
            for engine in engines:
                engine.ready()
