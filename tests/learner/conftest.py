"""Checkpoints the tests train, made once per test process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine_core.conftest import folders, one_thread

__all__ = ["folder", "folders", "one_thread"]


@pytest.fixture(scope="session")
def folder(folders: dict[str, Path]) -> Path:
    """The checkpoint most tests use."""
    return folders["qwen3"]
