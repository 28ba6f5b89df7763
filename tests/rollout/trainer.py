"""A trainer in a process of its own, for tests that kill it: URLS LEDGER CHECKPOINT, then to the end.

Its checkpoint holds the step and all it has trained on; it is replaced as a whole, after `trained`.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import uvloop

from penstock.errors import ControlFailed
from penstock.models import ARITHMETIC
from penstock.prompt import Prompt
from penstock.rollout.rollouts import Rollouts
from penstock.rollout.selection import Selection
from penstock.sample import Sample, SamplingParams

PROMPTS = 24
BATCH = 2
CHECKPOINT_EVERY = 2
"""Steps."""


async def reward(prompt: Prompt, sample: Sample) -> float:
    await asyncio.sleep(0.01)
    return len(sample.text) / 100


async def update(r: Rollouts) -> None:
    """The same weights under a new version; again and again while no engine takes them."""
    while True:
        try:
            await r.update(ARITHMETIC)
            return
        except ControlFailed:
            await asyncio.sleep(0.1)


def load(checkpoint: Path) -> tuple[int, list[int]]:
    if not checkpoint.exists():
        return 0, []
    step, trained = json.loads(checkpoint.read_text())
    return step, trained


def save(checkpoint: Path, step: int, trained: list[int]) -> None:
    new = checkpoint.with_suffix(".new")
    new.write_text(json.dumps([step, trained]))
    new.replace(checkpoint)


async def main(urls: list[str], ledger: Path, checkpoint: Path) -> None:
    step, trained = load(checkpoint)
    async with Rollouts(
        urls,
        reward=reward,
        prompts=[f"What is {number} + {number}?" for number in range(PROMPTS)],
        group_size=2,
        batch_groups=BATCH,
        async_steps=2,
        params=SamplingParams(max_tokens=24, temperature=1.0),
        ledger=ledger,
        step=step,
        selection=Selection(attempts=100),
    ) as r:
        await update(r)  # the engines may have those of another run, or of one that is undone
        while batch := await r.batch(timeout=60.0):
            await asyncio.sleep(0.05)
            step = await r.trained(batch)
            trained += [group.position for group in batch]
            if step % CHECKPOINT_EVERY == 0:
                save(checkpoint, step, trained)
            await update(r)
        save(checkpoint, r.step, trained)


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1].split(","), Path(sys.argv[2]), Path(sys.argv[3])))
    os._exit(0)
