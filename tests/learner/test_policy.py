"""The policy's numbers are those of transformers and of the embedded engine."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from penstock.engine.weights import checkpoint_tensors
from penstock.errors import ConfigError
from penstock.learner.policy import Policy
from tests.engine_core.checkpoints import MAX_LEN, VOCAB, Reference
from tests.engine_core.conftest import FAMILIES

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_equal_transformers(folders: dict[str, Path], family: str) -> None:
    torch.manual_seed(1)
    rows = [torch.randint(VOCAB, (length,)).tolist() for length in (40, 3, 17)]
    tokens = torch.zeros(3, 40, dtype=torch.int64)
    wanted = torch.zeros(3, 40, dtype=torch.bool)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids)
        wanted[row, 1 : len(ids) : 2] = True
    policy, reference = Policy.load(folders[family], CPU), Reference(folders[family])
    expected = [
        reference.logits(ids)[place - 1].log_softmax(-1)[ids[place]]
        for ids in rows
        for place in range(1, len(ids), 2)
    ]
    found = policy(tokens, wanted)
    assert found.requires_grad
    assert (found - torch.stack(expected)).abs().max() < 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_have_the_checkpoints_names(folders: dict[str, Path], family: str) -> None:
    saved = dict(checkpoint_tensors(folders[family]))
    weights = Policy.load(folders[family], CPU).state_dict()
    assert weights.keys() == saved.keys()
    assert all(torch.equal(weights[name], saved[name]) for name in saved)


def test_checkpoints_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    for change, message in (
        ({"lm_head.weight": None}, "lacks 1 of"),
        ({"model.extra.weight": torch.zeros(2)}, "model.extra.weight"),
        ({"model.norm.weight": torch.zeros(3)}, "does not fit"),
    ):
        tensors = dict(checkpoint_tensors(folder))
        tensors.update({name: tensor for name, tensor in change.items() if tensor is not None})
        kept = {name: tensor for name, tensor in tensors.items() if change.get(name, tensor) is not None}
        save_file(kept, tmp_path / "model.safetensors")
        shutil.copy(folder / "config.json", tmp_path)
        with pytest.raises(ConfigError, match=message):
            Policy.load(tmp_path, CPU)


def test_sequences_longer_than_the_model_can_see(folder: Path) -> None:
    tokens = torch.zeros(1, MAX_LEN + 1, dtype=torch.int64)
    with pytest.raises(ConfigError, match=str(MAX_LEN)):
        Policy.load(folder, CPU)(tokens, tokens.bool())
