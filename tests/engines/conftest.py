"""Real engines run only where they are asked for (`-m engines`), and what is skipped then is said loudly."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.servers.launched import LifeCycle
from tests.engines.engines import ENGINES, Engine
from tests.engines.live import Live

PYTHONS = {"vllm": "PENSTOCK_VLLM_PYTHON", "sglang": "PENSTOCK_SGLANG_PYTHON"}
"""What names the interpreter of each engine that is not ours."""


def available(name: str) -> bool:
    return name not in PYTHONS or bool(os.environ.get(PYTHONS[name]))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "engines" in str(config.option.markexpr):
        return
    kept = [item for item in items if item.get_closest_marker("engines") is None]
    if len(kept) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if "engines" not in str(config.option.markexpr):
        return
    for name, variable in PYTHONS.items():
        if not available(name):
            line = f"NOT TESTED: {name}. Set {variable} to the interpreter of an environment that has it."
            terminalreporter.write_line(line, red=True, bold=True)


@pytest.fixture(scope="session", params=sorted(ENGINES))
def engine(request: pytest.FixtureRequest) -> Engine:
    if not available(request.param):
        pytest.skip(f"{PYTHONS[request.param]} is not set")
    return ENGINES[request.param]


@pytest.fixture(scope="session")
def live(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """The server that most tests of an engine share."""
    deaths: list[BaseException] = []
    folder = tmp_path_factory.mktemp("logs")
    life = LifeCycle(log_folder=folder, on_death=deaths.append)
    with Live(engine, engine.make(life=life)) as running:
        yield running
    assert deaths == []


@pytest.fixture
def life(tmp_path: Path) -> LifeCycle:
    return LifeCycle(log_folder=tmp_path / "logs", start_timeout=300.0, quiet_timeout=120.0)
