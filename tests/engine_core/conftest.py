"""Checkpoints and their reference results, made once per test process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.engine_core import checkpoints
from tests.engine_core.checkpoints import Reference

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
def references(folders: dict[str, Path]) -> dict[str, Reference]:
    """transformers' model of each checkpoint."""
    return {family: Reference(folder) for family, folder in folders.items()}


@pytest.fixture(scope="session")
def qwen3(folders: dict[str, Path]) -> Path:
    """The checkpoint most tests use."""
    return folders["qwen3"]


@pytest.fixture(scope="session")
def has_compiler() -> bool:
    """Whether the C kernels can be built here."""
    return any(
        os.access(Path(folder) / "cc", os.X_OK) for folder in os.environ.get("PATH", "").split(os.pathsep)
    )
