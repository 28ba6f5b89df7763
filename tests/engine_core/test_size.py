from __future__ import annotations

import pytest

from penstock.engine.args import EngineArgs
from penstock.engine.size import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("64M", 64 << 20),
        ("64m", 64_000_000),
        ("1.5G", 3 << 29),
        ("2k", 2000),
        ("2K", 2048),
    ],
)
def test_sizes_are_read_as_vllm_reads_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "64MB", "1.5", "many"])
def test_what_is_no_size_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="is no size"):
        parse_size(text)


def test_the_flag_takes_a_size() -> None:
    import tyro

    args = tyro.cli(EngineArgs, args=["--model", "x", "--kv-cache-memory-bytes", "64M"])
    assert args.engine.kv_cache_memory_bytes == 64 << 20
