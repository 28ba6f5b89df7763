"""The logprobs a trainer gets are those of the weights each token was made with, across updates in flight."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from penstock.client import Client
from penstock.control.control import Control
from penstock.control.staged import HttpChunks
from penstock.fleet.fleet import Fleet
from penstock.learner.checkpoint import save_checkpoint
from penstock.learner.grpo import Objective
from penstock.learner.learner import Learner, Optimization
from penstock.models import ARITHMETIC
from penstock.sample import Sample, SamplingParams
from penstock.servers.embedded import EmbeddedServer
from tests.learner.groups import random_groups
from tests.scripted import run

UPDATES = 3
EVERY = 120
"""Tokens between two updates."""
PROMPTS = [list(f"<What is {a} + {b}?".encode()) for a, b in itertools.product((7, 81, 460), (5, 923))]
PARAMS = SamplingParams(temperature=1.0, max_tokens=700, ignore_eos=True, logprobs=0)


def rescored(saved: Path, prompt: list[int], sample: Sample) -> torch.Tensor:
    """The logprob of each token of the sample under the weights of one version, by transformers."""
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(saved, dtype=torch.float32)
    assert sample.token_ids is not None
    ids = torch.tensor([[*prompt, *sample.token_ids]])
    with torch.inference_mode():
        logps = model(ids).logits[0].float().log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
    found: torch.Tensor = logps[len(prompt) - 1 :]
    return found


def versions(folder: Path) -> list[HttpChunks]:
    """The weights of UPDATES versions a learner makes; version 0 and each of them is saved to `folder`."""
    learner = Learner(ARITHMETIC, Objective(), Optimization(learning_rate=1e-3))
    save_checkpoint(folder, learner, keep=UPDATES + 1)
    made = []
    for number in range(UPDATES):
        learner.step(random_groups(number, 4))
        save_checkpoint(folder, learner, keep=UPDATES + 1)
        made.append(HttpChunks(learner.weights()))
    return made


async def generate(weights: list[HttpChunks]) -> list[Sample]:
    """Samples during which the weights are replaced, each time another one has EVERY tokens more."""
    async with (
        EmbeddedServer(ARITHMETIC, ["--threads", "1"]) as server,
        Fleet([server.base_url]) as fleet,
        Control(fleet) as control,
        Client(fleet) as client,
        asyncio.TaskGroup() as tasks,
    ):
        options: Any = {"return_token_ids": True, "extra_body": {"return_weight_versions": True}}
        asked = [tasks.create_task(client.complete(prompt, PARAMS, **options)) for prompt in PROMPTS]
        async with client.stream(PROMPTS[0], PARAMS, return_token_ids=True) as clock:
            tokens, left = 0, list(weights)
            async for delta in clock:
                tokens += len(delta.token_ids)
                if left and tokens >= EVERY * (UPDATES + 1 - len(left)):
                    await control.update_weights(left.pop(0))
    return [task.result() for task in asked]


def test_every_span_scored_under_its_version_gives_the_engines_logprobs(tmp_path: Path) -> None:
    samples = run(generate(versions(tmp_path)), bound=120)
    seen, mistaken = set(), []
    for prompt, sample in zip(PROMPTS, samples, strict=True):
        assert sample.token_ids and sample.logprobs and sample.weight_versions
        engine = torch.tensor(sample.logprobs)
        ends = [*(first for first, _ in sample.weight_versions[1:]), len(sample.token_ids)]
        for (first, version), end in zip(sample.weight_versions, ends, strict=True):
            seen.add(version)
            for scored_as in {version, 0 if version else UPDATES}:
                found = rescored(tmp_path / f"step-{scored_as:08}", prompt, sample)
                apart = (found - engine)[first:end].abs().max()
                if scored_as == version:
                    assert apart < 1e-3, (first, end, version, apart)
                else:
                    mistaken.append(float(apart))
    assert seen == set(range(UPDATES + 1))
    assert max(mistaken) > 0.1, "other weights would have shown"
