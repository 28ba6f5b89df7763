"""What engines say of their weights, compared with a checkpoint."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from penstock.control.checksums import differing, read_said, vectors_in, vectors_of
from penstock.control.tensors import copied
from penstock.errors import ConfigError


def hashed(tensor: torch.Tensor) -> str:
    return sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()


def test_vectors_are_compared_in_each_dtype_and_on_each_rank() -> None:
    weights = {"norm": torch.randn(8), "matrix": torch.randn(4, 8), "none": torch.zeros(0)}
    expected = vectors_of(copied(weights))
    assert expected.keys() == {"norm", "none"}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        cast = hashed(weights["norm"].to(dtype))
        said = read_said({"checksums": {"dp0:tp0:norm": cast, "dp0:tp1:norm": cast, "tp0:matrix": "1"}})
        assert said is not None and differing(said, expected) == []
    wrong = hashed(weights["norm"] + 1)
    said = read_said({"checksums": {"tp0:norm": cast, "tp1:norm": wrong, "tp0:other": "2"}})
    assert said is not None and differing(said, expected) == ["norm"]


def test_one_digest_stands_for_all() -> None:
    one = read_said({"checksums": {"a": "1", "b": "2"}})
    same = read_said({"checksums": {"b": "2", "a": "1"}})
    other = read_said({"checksums": {"a": "2", "b": "1"}})
    assert one is not None and same is not None and other is not None
    assert one.checksum == same.checksum != other.checksum
    sglang = read_said({"success": True, "per_engine_checksum": "abc", "ranks": []})
    assert sglang is not None and (sglang.checksum, sglang.digests) == ("abc", {})
    silent: list[Any] = [None, [], {}, {"checksums": {}}, {"checksums": 3}]
    assert [read_said(one) for one in silent] == [None] * 5


def test_a_folder_is_read_and_a_broken_file_named(tmp_path: Path) -> None:
    weights = {"norm": torch.randn(8), "matrix": torch.randn(4, 8)}
    with pytest.raises(ConfigError, match="has no weights"):
        vectors_in(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(weights, file, metadata={"format": "pt"})
    assert vectors_in(tmp_path) == vectors_of(copied(weights))
    whole = file.read_bytes()
    scrambled = whole[:8] + b"x" * (len(whole) - 8)
    for broken in (b"", whole[:-1], whole + b"x", whole[:20], b"\xff" * 64, scrambled):
        file.write_bytes(broken)
        with pytest.raises(ConfigError, match=r"model\.safetensors is no safetensors file"):
            vectors_in(tmp_path)
