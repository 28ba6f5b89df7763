"""The ledger: states, what a resume keeps and owes, and that a killed process loses nothing."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.errors import ConfigError, ResumeRefused
from penstock.rollout.group import Rollout, VersionSpan
from penstock.rollout.ledger import Counts, Ledger
from penstock.rollout.score import Score

SETTINGS: dict[str, Any] = {"group_size": 2}


def rollout(version: int = 0) -> Rollout:
    return Rollout(
        prompt_ids=(1, 2),
        token_ids=(3, 4),
        logprobs=(-0.25, -1.5),
        mask=(True, True),
        versions=(VersionSpan(version, 2),),
        finish_reason="stop",
        reward=Score(1.0, {"exact": 1.0}),
        text="yes",
    )


def generate(ledger: Ledger, position: int, version: int = 0) -> None:
    ledger.lease(position, f"k{position}")
    ledger.generated(position, (rollout(version), rollout(version)), 1.5, version)


def test_what_was_generated_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    ledger = Ledger(path, SETTINGS)
    generate(ledger, 0)
    ledger.lease(1, "k1")
    generate(ledger, 2)
    ledger.trained([(2, True)], step=1, version=0)
    ledger.lease(3, "k3")
    ledger.dropped(3, "zero spread")
    ledger.passed_over(4, "k2", "solved before")
    assert ledger.counts() == Counts(leased=1, generated=1, trained=1, dropped=2)
    ledger.close()
    ledger = Ledger(path, SETTINGS)
    assert (ledger.resumed.step, ledger.resumed.version, ledger.resumed.owed) == (1, 0, 1)
    (kept,) = ledger.kept()
    assert kept.rollouts == (rollout(), rollout()) and (kept.position, kept.seconds) == (0, 1.5)
    assert ledger.state(1) == ("leased", "k1") and ledger.state(9) is None
    assert ledger.lease(1, "k1") == 2
    assert ledger.solved() == {"k2"}
    assert ledger.reasons() == {"zero spread": 1, "solved before": 1}
    assert ledger.steps() == {1: [2]}
    ledger.close()


def test_a_resume_at_a_step_undoes_what_came_after_it(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    ledger = Ledger(path, SETTINGS)
    for step in (1, 2, 3):
        generate(ledger, step, version=step - 1)
        ledger.trained([(step, step == 3)], step, version=step - 1)
        ledger.published(step)
        ledger.lease(10 + step, f"k{10 + step}")
        ledger.dropped(10 + step, "zero spread", solved=True)
        generate(ledger, 20 + step, version=step)
    ledger.close()
    ledger = Ledger(path, SETTINGS, step=2)
    assert (ledger.resumed.step, ledger.resumed.version) == (2, 2)
    assert ledger.steps() == {1: [1], 2: [2]}
    assert [kept.position for kept in ledger.kept()] == [21, 22], "version 3 came after step 2"
    assert [ledger.state(at) for at in (3, 13, 23)] == [("leased", f"k{at}") for at in (3, 13, 23)]
    assert ledger.resumed.owed == 3
    assert ledger.solved() == {"k11", "k12"}
    generate(ledger, 3, version=2)
    ledger.trained([(3, False)], 3, version=2)
    ledger.close()
    ledger = Ledger(path, SETTINGS)
    assert ledger.steps() == {1: [1], 2: [2], 3: [3]}
    assert ledger.resumed.version == 3, "no version was published after step 3: its weights get the next one"
    ledger.close()


def test_engines_that_may_have_weights_that_are_undone_need_new_ones_first(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    ledger = Ledger(path, SETTINGS)
    generate(ledger, 0)
    ledger.trained([(0, False)], 1, version=0)
    ledger.close()
    ledger = Ledger(path, SETTINGS)
    assert ledger.resumed.version == 0, "the engines were never updated"
    ledger.published(1)
    ledger.close()
    for _ in range(2):
        ledger = Ledger(path, SETTINGS, step=0)
        assert ledger.resumed.version == 1
        ledger.close()


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    ledger = Ledger(path, SETTINGS)
    with pytest.raises(ConfigError, match="in use"):
        Ledger(path, SETTINGS)
    generate(ledger, 0)
    ledger.trained([(0, False)], 2, version=0)
    with pytest.raises(ConfigError, match="step 1 cannot be trained after step 2"):
        ledger.trained([], 1, version=0)
    with pytest.raises(ConfigError, match="cannot go on from 'generated'"):
        ledger.trained([(0, False)], 3, version=0)
    assert ledger.step == 2
    ledger.close()
    with pytest.raises(ResumeRefused, match="group_size was 2 and is now 3"):
        Ledger(path, {"group_size": 3})
    with pytest.raises(ResumeRefused, match="the trainer is at step 4"):
        Ledger(path, SETTINGS, step=4)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_every_position_is_trained_once_whatever_is_undone(
    seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A trainer with checkpoints every few steps, killed and resumed at random; its own record goes with its
    checkpoint, and in the end it holds every position once."""
    dice, path = random.Random(seed), tmp_path_factory.mktemp("ledger") / "l.db"
    saved: tuple[int, tuple[int, ...]] = (0, ())
    while True:
        ledger = Ledger(path, SETTINGS, step=saved[0])
        step, record = saved
        version = ledger.resumed.version
        life = dice.randrange(1, 30)
        while life:
            life -= 1
            ready = [kept.position for kept in ledger.kept()]
            owed = [at for at in range(12) if (found := ledger.state(at)) is None or found[0] == "leased"]
            if not ready and not owed:
                break
            if ready and dice.random() < 0.4:
                step += 1
                ledger.trained([(at, False) for at in ready[:3]], step, version)
                record = (*record, *ready[:3])
                if dice.random() < 0.5:
                    saved = (step, record)
                version += 1
                ledger.published(version)
            elif owed:
                generate(ledger, dice.choice(owed), version)
        ledger.close()
        if life:
            break
    assert sorted(record) == list(range(12))


WRITER = """
import sys
import time
from pathlib import Path
from tests.rollout.test_ledger import SETTINGS, generate
from penstock.rollout.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]), SETTINGS)
owed = [at for at in range(60) if (found := ledger.state(at)) is None or found[0] == "leased"]
step = ledger.step
for kept in list(ledger.kept()):
    step += 1
    ledger.trained([(kept.position, False)], step, 0)
    print(kept.position, flush=True)
for at in owed:
    time.sleep(0.01)
    generate(ledger, at)
    step += 1
    ledger.trained([(at, False)], step, 0)
    print(at, flush=True)
print("end", flush=True)
"""


def test_a_process_killed_at_any_moment_loses_and_doubles_nothing(tmp_path: Path) -> None:
    told: Counter[str] = Counter()
    dice = random.Random(5)
    for kills in range(200):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path / "ledger.db")], stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout is not None
            first = child.stdout.readline()
            if kills < 2:
                time.sleep(dice.random() * 0.05)
                os.kill(child.pid, signal.SIGKILL)
            told.update([first.strip(), *child.stdout.read().split()])
        if told["end"]:
            break
    assert kills >= 1 and set(told.values()) == {1}
    ledger = Ledger(tmp_path / "ledger.db", SETTINGS)
    assert ledger.counts() == Counts(trained=60)
    assert set(told) - {"end"} <= {str(at) for at in range(60)}
    ledger.close()
