"""Flags of engines, and what a person is told of them."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from penstock.cli.launching import Display, LaunchArgs, engine_flags
from penstock.errors import ConfigError, EngineError
from penstock.models import ARITHMETIC
from penstock.servers.keeper import Replica, State
from penstock.servers.restart import Restart
from penstock.servers.spec import ServerSpec


def test_engine_flags() -> None:
    words = ["enforce-eager", "--dtype=float32", "max_num_seqs=64", 'override={"a": 1}', "empty="]
    assert engine_flags(words) == {
        "enforce-eager": True,
        "dtype": "float32",
        "max-num-seqs": "64",
        "override": '{"a": 1}',
        "empty": "",
    }


@pytest.mark.parametrize(
    ("words", "says"), [(["=3"], "neither"), (["a b"], "neither"), (["a=1", "a"], "twice")]
)
def test_bad_engine_flags(words: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        engine_flags(words)


def test_a_spec_of_the_flags() -> None:
    given = LaunchArgs(tp=2, max_model_len=4096, engine_args=("x=1",), max_restarts=7)
    spec = given.spec("vllm", "org/model", api_key="k")
    assert (spec.engine, spec.model, spec.name, spec.tp, spec.max_model_len) == (
        *("vllm", "org/model", "org/model", 2, 4096),
    )
    assert (spec.extra_args, spec.api_key, given.restart.limit) == ({"x": "1"}, "k", 7)
    assert LaunchArgs().spec("embedded", None).model == str(ARITHMETIC)
    assert LaunchArgs(engine_args=("no-x",)).spec("sglang", "m").extra_args == {
        "no-x": True,
        "enable-metrics": True,
    }
    with pytest.raises(ConfigError, match="--model"):
        LaunchArgs().spec("vllm", None)


def test_flags_that_were_given_are_known() -> None:
    assert LaunchArgs().changed() == []
    assert LaunchArgs(max_model_len=1, devices=("0",)).changed() == ["--max-model-len", "--devices"]


@pytest.mark.parametrize("terminal", [False, True])
def test_the_life_of_a_replica_as_it_is_told(terminal: bool) -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=terminal, width=200, no_color=True)
    display = Display(console, ServerSpec(model="m", engine="vllm"), 2)
    replica = Replica(1, (), Restart())

    def enter(state: State, stage: str = "") -> None:
        replica.state, replica.stage = state, stage
        display.on_change(replica)

    with display.starting():
        enter(State.STARTING)
        enter(State.STARTING, "loading weights")
        enter(State.STARTING, "loading weights")
    enter(State.READY)
    replica.error = EngineError("The engine died (exit -9).\n   its log")
    replica.retry_in = replica.restarts.failed(0.0, None) or 0.0
    enter(State.DIED)
    enter(State.READY)
    enter(State.STOPPED)
    replica.error = EngineError("Out of luck.")
    enter(State.GIVEN_UP)
    who = "vllm 1 (m): "
    told = [line.rpartition(who)[2].rstrip() for line in shown.getvalue().splitlines() if who in line]
    assert any(line.startswith("loading weights") for line in told)
    told = told[told.index("ready") :]
    assert told == [
        "ready",
        "The engine died (exit -9). Restart 1 in 1 s.",
        "ready again, restart 1",
        "Out of luck. It is given up.",
    ]
