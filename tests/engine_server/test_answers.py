"""Every answer is the one vLLM gave to the same request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.engine_server.cases import CASES, Case
from tests.engine_server.conformity import ALLOWED, differences, observe
from tests.engine_server.running import Running

RECORDING = Path(__file__).parent / "vllm_answers.json"
"""What vLLM 0.32 answered, by the name of the case; written by tests/engines/test_vllm.py."""


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    """All recorded answers."""
    answers: dict[str, Any] = json.loads(RECORDING.read_text(encoding="utf-8"))
    return answers


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_answer_is_vllms(server: Running, recorded: dict[str, Any], case: Case) -> None:
    assert differences(case, recorded[case.name], observe(server.host, server.port, case)) == []


def test_case_names_are_distinct_and_allowances_are_of_cases() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert {name for cases in ALLOWED.values() for name in cases} <= set(names)
