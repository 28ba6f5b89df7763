"""Rollouts of the embedded engine: versions proved by scoring, synchronous runs, turns that are cut off."""

from __future__ import annotations

import asyncio
import itertools
import shutil
from collections.abc import Coroutine, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import uvloop
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from penstock.client import Client
from penstock.control.dialect import PauseMode
from penstock.control.staged import HttpChunks
from penstock.control.transport import DiskReload, WeightTransport
from penstock.demo.arithmetic import problems
from penstock.models import ARITHMETIC
from penstock.prompt import Prompt
from penstock.rollout import sampling
from penstock.rollout.group import Group, Rollout, versions_of_tokens
from penstock.rollout.rollouts import Rollouts
from penstock.rollout.sampling import seed_of
from penstock.sample import Sample, SamplingParams
from tests.engine_server.running import Running

T = TypeVar("T")

PARAMS = SamplingParams(max_tokens=48, temperature=1.0)
BOUND = 60.0
"""Seconds a scenario may take."""
TOLERANCE = 1e-3
QUESTIONS = [one.question for one in itertools.islice(problems(1, split="train", level="hard"), 64)]


def run(main: Coroutine[Any, Any, T]) -> T:
    """Not that of tests.scripted: the server's sockets are this process's, too."""

    async def bounded() -> T:
        async with asyncio.timeout(BOUND):
            return await main

    return uvloop.run(bounded())


async def long_ones(prompt: Prompt, sample: Sample) -> float:
    return len(sample.text) / 100


def checkpoints(folder: Path, count: int) -> list[Path]:
    """The shipped model, and the same with a little noise, more in each."""
    found = [ARITHMETIC]
    tensors = load_file(ARITHMETIC / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for version in range(1, count):
        found.append(folder / str(version))
        shutil.copytree(ARITHMETIC, found[-1])
        noisy = {
            name: (one + 0.1 * version * one.std(correction=0) * torch.randn(one.shape, generator=generator))
            for name, one in tensors.items()
        }
        save_file(noisy, found[-1] / "model.safetensors", metadata={"format": "pt"})
    return found


@cache
def reference(folder: Path) -> Any:
    auto: Any = AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.float32)


def scores(folder: Path, rollout: Rollout) -> list[float]:
    """What the weights in a folder give each token of a rollout, by transformers."""
    model = reference(folder)
    ids = torch.tensor([[*rollout.prompt_ids, *rollout.token_ids]])
    with torch.inference_mode():
        logprobs = model(ids).logits[0].log_softmax(-1)
    start = len(rollout.prompt_ids)
    return [float(logprobs[start + at - 1, token]) for at, token in enumerate(rollout.token_ids)]


def worst(rollouts: Sequence[Rollout], folders: Sequence[Path]) -> float:
    """The largest difference between the engine's logprob of a sampled token and that of its weights."""
    found = 0.0
    for one in rollouts:
        start = 0
        for version, tokens in one.versions:
            expected = scores(folders[version], one)
            for at in range(start, start + tokens):
                if one.mask[at]:
                    found = max(found, abs(one.logprobs[at] - expected[at]))
            start += tokens
    return found


def url(engine: Running) -> str:
    return f"http://{engine.host}:{engine.port}"


@pytest.mark.parametrize("in_flight", ["keep", "abort"])
def test_each_span_scored_with_its_versions_weights_gives_the_logprobs_back(
    engine: Running, tmp_path: Path, in_flight: PauseMode
) -> None:
    folders = checkpoints(tmp_path, 5)

    def weights(version: int) -> WeightTransport:
        folder = folders[version]
        return HttpChunks(load_file(folder / "model.safetensors")) if version % 2 else DiskReload(folder)

    async def main() -> list[Group]:
        seen = []
        async with Rollouts(
            url(engine),
            reward=long_ones,
            prompts=QUESTIONS[:12],
            group_size=2,
            batch_groups=4,
            async_steps=4,
            params=SamplingParams(max_tokens=96, temperature=1.0),
            in_flight=in_flight,
        ) as r:
            while batch := await r.batch(1, timeout=60.0):  # the first is there: the others are on their way
                seen += batch
                await r.trained(batch)
                if r.version < 4:
                    await r.update(weights(r.version + 1))
        return seen

    groups = run(main())
    assert len(groups) == 12
    crossed = [one for group in groups for one in group.rollouts if len(one.versions) > 1]
    assert len(crossed) > 2, "updates came in the midst of completions"
    others = [group.rollouts[0] for group in groups[:4]]
    assert worst([*crossed[:6], *others[:2]], folders) < TOLERANCE
    wrong = [folders[(at + 1) % len(folders)] for at in range(len(folders))]
    assert worst(crossed[:3], wrong) > 10 * TOLERANCE, "other weights do not"


@pytest.mark.parametrize("streamed", [True, False])
def test_versions_of_engines_that_do_not_say_them_are_told_from_the_updates(
    engine: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    """Streamed, a span ends where the first token came after an update; else all of a sample in flight across
    one has its oldest version. Never is a token said to be newer than it is."""
    folders = checkpoints(tmp_path, 3)
    monkeypatch.setattr(sampling, "ASKED", {})

    async def main() -> list[Rollout]:
        settings: dict[str, Any] = {"group_size": 2, "batch_groups": 4, "async_steps": 4}
        params = SamplingParams(max_tokens=96, temperature=1.0)
        async with Rollouts(
            url(engine),
            reward=long_ones,
            prompts=QUESTIONS[:8],
            params=params,
            streamed=streamed,
            **settings,
        ) as r:
            seen = []
            while batch := await r.batch(1, timeout=60.0):
                seen += [one for group in batch for one in group.rollouts]
                await r.trained(batch)
                if r.version < 2:
                    await r.update(folders[r.version + 1])
        return seen

    found = run(main())
    exact = [one for one in found if one.versions_exact]
    others = [one for one in found if not one.versions_exact]
    assert exact and others
    assert worst(exact[:3], folders) < TOLERANCE
    assert any(len(one.versions) > 1 for one in others) == streamed
    total = right = 0
    for one in others[:4]:
        by_version = [scores(folder, one) for folder in folders]
        for at, version in enumerate(versions_of_tokens(one.versions)):
            fits = [v for v in range(3) if abs(by_version[v][at] - one.logprobs[at]) < TOLERANCE]
            assert max(fits) >= version, "a token is newer than is said, or as old"
            total, right = total + 1, right + (version in fits)
    assert not streamed or right > 0.9 * total, (right, total)


def test_async_steps_0_agrees_with_a_plain_synchronous_loop(engine: Running) -> None:
    async def main() -> None:
        expected = {}
        async with Client(url(engine)) as client:
            for position, question in enumerate(QUESTIONS[:6]):
                for index in range(3):
                    params = SamplingParams(
                        max_tokens=48, temperature=1.0, logprobs=0, seed=seed_of(5, position, index)
                    )
                    messages = [{"role": "user", "content": question}]
                    expected[position, index] = await client.chat(messages, params, return_token_ids=True)
        settings: dict[str, Any] = {"group_size": 3, "batch_groups": 2, "async_steps": 0, "seed": 5}
        async with Rollouts(
            url(engine), reward=long_ones, prompts=QUESTIONS[:6], params=PARAMS, **settings
        ) as r:
            while batch := await r.batch(timeout=60.0):
                for group in batch:
                    for one in group.rollouts:
                        sample = expected[group.position, one.index]
                        assert one.token_ids == sample.token_ids and one.text == sample.text
                        assert one.logprobs == pytest.approx(sample.logprobs, abs=1e-4)
                        assert one.finish_reason == sample.finish_reason
                await r.trained(batch)
                await r.update(ARITHMETIC)
            assert r.counts().trained == 6

    run(main())


def test_aborted_turns_give_the_same_completion(engine: Running) -> None:
    """Pauses that cut everything off, again and again: the same weights, so the same tokens and text."""

    async def sampled(disturb: bool) -> dict[tuple[int, int], tuple[tuple[int, ...], str]]:
        found = {}
        async with (
            Client(url(engine)) as client,
            Rollouts(
                client,
                reward=long_ones,
                prompts=QUESTIONS[:6],
                group_size=2,
                params=SamplingParams(max_tokens=96, temperature=0.0, stop=("= 1",)),
                seed=2,
            ) as r,
        ):
            stopped = False

            async def cut_off() -> None:
                control = await r._steering()
                while not stopped:
                    await control.pause("abort")
                    await control.resume()
                    await asyncio.sleep(0.01)

            task = asyncio.ensure_future(cut_off()) if disturb else None
            async for group in r.groups():
                for one in group.rollouts:
                    found[group.position, one.index] = (one.token_ids, one.text)
            stopped = True
            if task is not None:
                await task
        return found

    async def main() -> None:
        calm, disturbed = await sampled(False), await sampled(True)
        assert calm == disturbed
        assert any("= 1" not in text and len(ids) < 96 for ids, text in calm.values())

    run(main())
