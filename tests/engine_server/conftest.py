"""One checkpoint and one server for all tests that do not break them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine_server.checkpoint import make_checkpoint
from tests.engine_server.running import Running, engine_of, running


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small random checkpoint, always the same one."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def server(checkpoint: Path) -> Iterator[Running]:
    """A server of that checkpoint."""
    with running(engine_of(checkpoint)) as server:
        yield server
