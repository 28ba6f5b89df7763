"""Jobs without an engine: their samples are made here, so that a test knows each of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvloop

from penstock.batch.job import Accounting, Job, JobSettings
from penstock.batch.steps import Steps
from penstock.batch.trace import Metadata, Provenance, Trace
from penstock.errors import RequestRejected
from penstock.inputs.opened import open_source
from penstock.prompt import Prompt, PromptFormat

FORM = PromptFormat(prompt_column="q")

Making = Callable[[str, int], Trace | None]
"""(message, index) → the sample; None: it fails."""


def sample(message: str, index: int, **changes: Any) -> Trace:
    fields: dict[str, Any] = {
        "text": f"{message} {index}",
        "finish_reason": "stop",
        "reasoning": "hm",
        "metadata": Metadata(prompt_tokens=2, completion_tokens=3, total_tokens=5),
        "provenance": Provenance(seed=index),
    }
    return Trace(**{**fields, **changes})


class Made:
    """A generation of samples that are made here."""

    def __init__(self, making: Making) -> None:
        self._making = making

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {"model": "made"}

    async def __call__(self, prompt: Prompt, index: int, steps: Steps) -> Trace:
        await asyncio.sleep(0)
        trace = self._making(prompt.messages[-1]["content"], index)
        if trace is None:
            raise RequestRejected(400, "too long")
        return trace


def finish(out: Path, rows: list[dict[str, Any]], making: Making, samples: int = 2) -> Accounting:
    """A job over `rows` that writes `out`; its input lies beside it."""
    path = out.with_name("in.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    async def main() -> Accounting:
        made = Made(making)
        settings = JobSettings(out=out, form=FORM, num_generations=samples, max_concurrent=4)
        with Job(open_source([path]), settings, made.fingerprint) as job:
            async with asyncio.timeout(30):
                return await job.run(made)

    return uvloop.run(main())
