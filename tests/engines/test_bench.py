"""`penstock bench` brings up each real engine, measures every layer of it, and takes it down."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from penstock.cli.bench import main
from penstock.loadtest.files import load
from penstock.models import ARITHMETIC
from tests.engines.engines import CONTEXT, Engine

pytestmark = pytest.mark.engines

PROMPTS, TOKENS = 32, 96
"""Enough that the fastest engine takes longer than the time between two looks at what it uses."""


def words(extra: Mapping[str, object]) -> list[str]:
    """Flags as --engine-args takes them."""
    return [name if value is True else f"{name}={value}" for name, value in extra.items()]


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_every_layer_of_an_engine_is_measured(
    engine: Engine, api: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if api == "completions" and engine.name != "embedded":
        pytest.skip("one start of an engine that takes long is enough")
    made = engine.make()
    for name, value in made.spec.env.items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "out.json"
    command = ["--engine", engine.name, "--model", str(ARITHMETIC), "--layers", "engine,router,client"]
    command += ["--concurrency", "2", "--num-prompts", str(PROMPTS), "--processes", "1", "--api", api]
    command += ["--input-len", "8", "--output-len", str(TOKENS), "--ignore-eos", "--temperature", "1"]
    command += ["--max-model-len", str(CONTEXT), "--engine-args", *words(made.spec.extra_args)]
    assert main([*command, "--out", str(out), "--fail-if", "errors>0", f"completed<{PROMPTS}"]) == 0
    points = load(out).points
    assert [point.layer for point in points] == ["engine", "router", "client"]
    for point in points:
        assert point.output_tokens == PROMPTS * TOKENS
        assert {"ttft", "itl", "tpot", "e2el"} == set(point.latency)
        assert point.engines[0].requests == PROMPTS, "by its own metrics"
        assert point.account is None, "no real engine keeps one"
        assert {"engine"} <= set(point.usage)
