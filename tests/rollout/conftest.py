"""One embedded engine with the shipped model, for tests that do not break it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("torch")

from penstock.models import ARITHMETIC
from tests.engine_server.running import Running, engine_of, running


@pytest.fixture
def engine() -> Iterator[Running]:
    with running(engine_of(ARITHMETIC, max_model_len=256)) as server:
        yield server
