"""Answers have the shape of those vLLM gave to the same requests: status, fields, types, events."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.engine_server.cases import CHAT, COMPLETIONS, CONTEXT, MODEL, OTHERS
from tests.engine_server.conformity import differences, observe
from tests.scripted import run
from tests.scripted_engine.serving import engine

RECORDING = Path(__file__).parents[1] / "engine_server" / "vllm_answers.json"

OF_THE_MODEL = {
    "chat no generation prompt": "the model said a token of its own that ends",
    "chat role the template refuses": "there is no template",
    "chat template in the request": "as above",
    "chat effort of a wrong value": "nothing thinks",
    "chat no tools": "nothing calls tools",
    "chat tools without a parser": "as above",
    "completion id outside the vocabulary": "the vocabulary is larger",
    "completion wrong stop ids": "no id ends a completion",
}
"""Cases whose answers differ, and why."""


def test_answers_have_vllms_shape() -> None:
    recorded: dict[str, Any] = json.loads(RECORDING.read_text(encoding="utf-8"))
    cases = [replace(case, compare="shape") for case in [*CHAT, *COMPLETIONS, *OTHERS]]

    async def main() -> None:
        found = {}
        async with engine(served_model_name=(MODEL,), max_model_len=CONTEXT, itl="200us") as one:
            for case in cases:
                seen = await asyncio.to_thread(observe, "127.0.0.1", one.server.port, case)
                found[case.name] = differences(case, recorded[case.name], seen)
        assert {
            name: differs for name, differs in found.items() if differs and name not in OF_THE_MODEL
        } == {}
        assert OF_THE_MODEL.keys() <= found.keys()

    run(main())
