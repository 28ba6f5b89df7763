"""Reading checkpoints: what is understood, and one clear sentence for what is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from penstock.engine.attention import inverse_frequencies
from penstock.engine.config import ModelConfig, RopeConfig
from penstock.errors import ConfigError
from tests.engine_core.checkpoints import EOS, LLAMA3_ROPE
from tests.engine_core.runs import engine


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A Llama checkpoint in one file, free to be damaged."""
    return Path(shutil.copytree(folders["llama"], tmp_path / "copy"))


def edit(folder: Path, **changes: Any) -> None:
    """Change config.json; a value of None removes the key."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def refusal(folder: Path, **settings: Any) -> str:
    """The one sentence with which the engine refuses a checkpoint."""
    with pytest.raises(ConfigError) as caught:
        engine(folder, **settings)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    return message


def test_shards_are_read(folders: dict[str, Path]) -> None:
    assert len(list(folders["qwen3"].glob("*.safetensors"))) > 2
    assert not (folders["qwen3"] / "model.safetensors").exists()
    engine(folders["qwen3"])


def test_folders_that_are_no_checkpoint(copy: Path, tmp_path: Path) -> None:
    assert "nowhere does not exist" in refusal(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refusal(tmp_path / "empty")
    (copy / "model.safetensors").unlink()
    assert "has no weights" in refusal(copy)
    (copy / "config.json").write_text("{")
    assert "is not valid JSON" in refusal(copy)
    (copy / "config.json").write_text("[]")
    assert "must hold a JSON object" in refusal(copy)


def test_configurations_that_are_not_supported(copy: Path) -> None:
    for change, words in (
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "Rope scaling 'yarn' is not supported"),
        ({"hidden_act": "gelu"}, "Activation 'gelu'"),
        ({"quantization_config": {"quant_method": "awq"}}, "Quantized"),
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "lacks 'factor'"),
        ({"dtype": "float8_e4m3fn", "torch_dtype": None}, "'float8_e4m3fn' is not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
    ):
        path = copy / "config.json"
        original = path.read_text()
        edit(copy, **change)
        assert words in refusal(copy)
        path.write_text(original)
    engine(copy)


def test_weights_that_do_not_fit(copy: Path) -> None:
    path = copy / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.self_attn.q_proj.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, path)
    assert name in refusal(copy) and "lacks 1 of" in refusal(copy)
    save_file(tensors | {name: tensors[name][:-1].contiguous()}, path)
    assert f"{name} in" in refusal(copy) and "has shape [63, 64]" in refusal(copy)
    save_file(tensors | {"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}, path)
    assert "q_norm.weight, which this architecture does not have" in refusal(copy)
    path.write_bytes(path.read_bytes()[:1000])
    assert "cannot be read" in refusal(copy)
    path.unlink()
    index = {"weight_map": {name: "model-00001-of-00001.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00001-of-00001.safetensors is named in" in refusal(copy)


def test_devices_that_are_not_there(copy: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert "no CUDA device" in refusal(copy, device="cuda")


def test_sliding_windows_bound_the_context(folders: dict[str, Path], tmp_path: Path) -> None:
    """Up to its window, a model with sliding windows is like any other."""
    folder = Path(shutil.copytree(folders["qwen2"], tmp_path / "sliding"))
    edit(folder, use_sliding_window=True, sliding_window=64, max_window_layers=0)
    assert engine(folder).max_model_len == 64
    assert "sliding window (64)" in refusal(folder, max_model_len=65)
    edit(folder, max_window_layers=99)
    assert engine(folder).max_model_len == 256


def test_end_of_sequence_ids_come_from_both_files(copy: Path) -> None:
    assert ModelConfig.load(copy).eos_token_ids == (EOS,)
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, EOS]}))
    assert ModelConfig.load(copy).eos_token_ids == (3, EOS)
    (copy / "generation_config.json").unlink()
    edit(copy, eos_token_id=None)
    assert ModelConfig.load(copy).eos_token_ids == ()


def test_rope_settings_old_and_new() -> None:
    """`rope_theta` beside `rope_scaling` says the same as `rope_parameters`."""
    scaling = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    old = RopeConfig.parse({"rope_theta": 500_000.0, "rope_scaling": scaling})
    assert old == RopeConfig.parse({"rope_parameters": LLAMA3_ROPE})
    assert RopeConfig.parse({"rope_theta": 5.0, "rope_scaling": None}) == RopeConfig(theta=5.0)
    linear = RopeConfig.parse({"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert linear == RopeConfig(kind="linear", factor=2.0)


@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_frequencies_equal_transformers(kind: str) -> None:
    parameters = (
        LLAMA3_ROPE if kind == "llama3" else {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    )
    config = LlamaConfig(head_dim=128, rope_parameters=parameters)
    expected, _ = ROPE_INIT_FUNCTIONS[kind](config, device=torch.device("cpu"))
    found = inverse_frequencies(RopeConfig.parse({"rope_parameters": parameters}), 128)
    torch.testing.assert_close(found, expected)
