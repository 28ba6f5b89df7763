"""Samples that are continued, and fitted to the context, by an engine that generates tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import orjson
import pytest
import uvloop

pytest.importorskip("torch")

import penstock
from penstock.batch.generation import GenerationSettings
from penstock.batch.steps import Steps
from penstock.batch.trace import Trace
from penstock.client import Client
from penstock.demo import arithmetic
from penstock.errors import RequestRejected
from penstock.models import ARITHMETIC
from penstock.prompt import PromptFormat
from penstock.sample import SamplingParams
from tests.engine_server.running import Running, engine_of, running

T = TypeVar("T")

CONTEXT = 256
FORM = PromptFormat(prompt_column="question")


def run(main: Coroutine[Any, Any, T]) -> T:
    async def bounded() -> T:
        async with asyncio.timeout(120):
            return await main

    return uvloop.run(bounded())


@pytest.fixture(scope="module")
def engine() -> Iterator[Running]:
    with running(engine_of(ARITHMETIC, max_model_len=CONTEXT)) as server:
        yield server


def traces(
    engine: Running, settings: GenerationSettings, rows: Sequence[Mapping[str, object]]
) -> list[Trace]:
    async def scenario() -> list[Trace]:
        async with Client(f"127.0.0.1:{engine.port}") as client:
            generation = settings.generation(client)
            prompts = [FORM.prompt(i, "here", orjson.dumps(row)) for i, row in enumerate(rows)]
            return [await generation(prompt, 0, Steps()) for prompt in prompts]

    return run(scenario())


def test_a_greedy_sample_in_pieces_is_the_one_of_a_single_request(engine: Running) -> None:
    rows = list(arithmetic.rows(3, 2))
    greedy = SamplingParams(temperature=0.0, max_tokens=90)
    whole = traces(engine, GenerationSettings(params=greedy), rows)
    pieces = GenerationSettings(
        params=SamplingParams(temperature=0.0, max_tokens=9), length_policy="continue", max_continues=9
    )
    for one, many in zip(whole, traces(engine, pieces, rows), strict=True):
        assert many.text == one.text
        assert many.reasoning == one.reasoning
        assert many.finish_reason == one.finish_reason
        assert many.metadata.completion_tokens == one.metadata.completion_tokens
        assert many.metadata.prompt_tokens == one.metadata.prompt_tokens
    assert max(trace.metadata.completion_tokens for trace in whole) > 27


def test_a_sample_that_fills_the_context_ends_there(engine: Running) -> None:
    endless = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
    settings = GenerationSettings(params=endless, length_policy="continue", max_continues=9)
    [trace] = traces(engine, settings, [{"question": "Add 2 and 3."}])
    assert trace.finish_reason == "length"
    assert trace.metadata.prompt_tokens + trace.metadata.completion_tokens == CONTEXT


def test_max_tokens_beyond_the_context_is_fitted(engine: Running) -> None:
    settings = GenerationSettings(params=SamplingParams(temperature=0.0, max_tokens=100_000))
    rows = [{"question": "Add 2 and 3."}, {"question": "Add 4 and 5."}]
    for trace in traces(engine, settings, rows):
        assert trace.finish_reason == "stop"
        assert trace.provenance.max_tokens == CONTEXT - trace.metadata.prompt_tokens


def test_a_prompt_beyond_the_context_fails_and_says_so(engine: Running, tmp_path: Path) -> None:
    settings = GenerationSettings(params=SamplingParams(max_tokens=20))
    with pytest.raises(RequestRejected, match="maximum context length is 256 tokens"):
        traces(engine, settings, [{"question": "1+" * 400}])

    async def job() -> penstock.GenerateReport:
        return await penstock.generate(
            [{"question": "1+" * 400}, {"question": "Add 2 and 3."}],
            tmp_path / "out.jsonl",
            base_url=f"127.0.0.1:{engine.port}",
            prompt_column="question",
            sampling=SamplingParams(max_tokens=100_000),
        )

    report = run(job())
    assert (report.accounting.done, report.accounting.failed) == (1, 1)
