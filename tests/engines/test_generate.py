"""A batch job on each engine, where the context is too small for what is asked: in the engines' own words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest

from penstock.batch.generate import GenerateReport, generate
from penstock.sample import SamplingParams
from tests.engines.engines import CONTEXT
from tests.engines.live import Live

pytestmark = pytest.mark.engines

QUESTION = "What is 12 + 30?"
TOO_LONG = "9 " * CONTEXT


def job(live: Live, out: Path, rows: list[str], **options: Any) -> tuple[GenerateReport, dict[str, Any]]:
    """The report, and the rows of the output by their prompts."""
    given = [{"prompt": row} for row in rows]
    running = generate(given, out, base_url=live.server.base_url, **options)
    report = live.call(running)
    found = [orjson.loads(line) for line in out.read_bytes().splitlines()]
    return report, {row["prompt"]: row for row in found}


def test_what_does_not_fit_is_asked_for_as_far_as_it_does(live: Live, tmp_path: Path) -> None:
    long = "1 + " * 400 + QUESTION
    report, rows = job(
        live, tmp_path / "out.jsonl", [QUESTION, long, TOO_LONG], sampling=SamplingParams(max_tokens=CONTEXT)
    )
    assert rows.keys() == {QUESTION, long} and "42" in rows[QUESTION]["generations"][0]
    assert (report.accounting.done, report.accounting.failed) == (2, 1)
    (failure,) = [orjson.loads(line) for line in report.failures_path.read_bytes().splitlines()]
    assert failure["status"] == 400 and str(CONTEXT) in failure["message"]
    for name, row in rows.items():
        (about,) = row["api_metadata"]
        assert about["prompt_tokens"] + about["completion_tokens"] <= CONTEXT, name


def test_what_is_cut_goes_on_as_if_it_had_not_been(live: Live, tmp_path: Path) -> None:
    _, whole = job(live, tmp_path / "whole.jsonl", [QUESTION], sampling=SamplingParams(temperature=0.0))
    report, pieces = job(
        live,
        tmp_path / "pieces.jsonl",
        [QUESTION],
        sampling=SamplingParams(temperature=0.0, max_tokens=8),
        length_policy="continue",
        max_continues=30,
    )
    assert report.complete
    assert pieces[QUESTION]["generations"] == whole[QUESTION]["generations"]
    assert pieces[QUESTION]["finish_reasons"] == ["stop"]
