"""Thousands in flight through every layer of a healthy stack: nothing is lost, nothing is done twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.cli.bench import main
from penstock.loadtest.files import load


@pytest.mark.slow
def test_thousands_in_flight_lose_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    words = ["--layers", "engine,router,client,client-engine", "--concurrency", "1000,4000"]
    words += ["--num-prompts", "4000", "--ramp", "2", "--warmup", "0", "--output-len", "6", "--drain", "120"]
    words += ["--num-engines", "2", "--engine-args", "itl=1s", "max-num-seqs=4000", "kv-tokens=2000000"]
    assert main([*words, "--out", str(out), "--fail-if", "errors>0", "lost>0", "duplicated>0"]) == 0
    points = load(out).points
    assert len(points) == 8
    for point in points:
        seen = point.account
        assert seen is not None and (seen.lost, seen.duplicated, seen.orphaned) == (0, 0, 0)
        assert point.completed == point.sent == 4000
        assert max(count for _, count in point.held) > 0.5 * (point.concurrency or 0)
