"""Checkpoints the tests train, made once per test process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.engine_core import checkpoints

FAMILIES = ("llama", "qwen2", "qwen3", "llama-linear")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tests run beside each other; more threads only make them wait."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint folder of each family; Qwen2's has tied embeddings, Qwen3's several shards."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: checkpoints.write(family, root / family) for family in FAMILIES}


@pytest.fixture(scope="session")
def folder(folders: dict[str, Path]) -> Path:
    """The checkpoint most tests use."""
    return folders["qwen3"]
