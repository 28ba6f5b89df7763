"""Rollouts made beside one engine, with a queue in this process: a real engine, and no Ray."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
import uvloop

from penstock.cluster.queue import Queue, Request, Result, Taken
from penstock.cluster.rollout_worker import Made, NoAnswer, Work, Worker, decode
from penstock.models import ARITHMETIC
from penstock.prompt import Prompt
from penstock.sample import Sample, SamplingParams
from tests.engine_server.running import Running, engine_of, running

LIMIT = 60.0
"""Seconds anything here may take."""


@pytest.fixture
def engine() -> Iterator[Running]:
    with running(engine_of(ARITHMETIC, max_model_len=512)) as server:
        yield server


class LocalQueue:
    """The queue as a worker sees it; `away`: questions that get no answer."""

    def __init__(self) -> None:
        self.queue = Queue()
        self.away = 0

    async def take(
        self, worker: str, version: int | None, room: int, holding: list[int], timeout: float
    ) -> Taken:
        deadline = time.monotonic() + min(timeout, 0.2)
        while True:
            self._answer()
            taken = self.queue.take(worker, version, room, holding, time.monotonic())
            if taken.requests or taken.cancelled or time.monotonic() > deadline:
                return taken
            await asyncio.sleep(0.01)

    async def done(self, worker: str, result: Result) -> None:
        self._answer()
        self.queue.done(worker, result, time.monotonic())

    def _answer(self) -> None:
        if self.away:
            self.away -= 1
            raise NoAnswer("the queue is away")


def work(reward: Callable[[Prompt, Sample], float], tokens: int = 16) -> Work:
    return Work(
        run="1", reward=reward, params=SamplingParams(max_tokens=tokens, temperature=1.0), size=2,
        oversample=0, groups=4, environment=None, max_turns=1, bounds=None, seed=0, streamed=False,
    )  # fmt: skip


def request(number: int, version: int = 0) -> Request:
    prompt = Prompt(number, None, [{"role": "user", "content": f"{number} + 30?"}], b"{}")
    return Request(number, number, prompt, version)


def length(prompt: Prompt, sample: Sample) -> float:
    return float(len(sample.text))


def broken(prompt: Prompt, sample: Sample) -> Any:
    return "no number"


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT):
        while not holds():  # noqa: ASYNC110 -- the queue tells nobody
            await asyncio.sleep(0.005)


async def results(queue: LocalQueue, count: int) -> dict[int, Made]:
    await until(lambda: queue.queue.results >= count)
    return {one.id: decode(one.payload) for one in queue.queue.fetch(99)}


def run(
    engine: Running, given: Work, scenario: Callable[[Worker, LocalQueue], Coroutine[Any, Any, None]]
) -> None:
    async def main() -> None:
        queue = LocalQueue()
        worker = Worker(f"http://{engine.host}:{engine.port}", "w", given, queue)
        await worker.start()
        try:
            async with asyncio.timeout(LIMIT):
                await scenario(worker, queue)
        finally:
            await worker.close()

    uvloop.run(main())


def test_groups_are_generated_scored_and_delivered_though_the_queue_is_away_at_times(engine: Running) -> None:
    async def scenario(worker: Worker, queue: LocalQueue) -> None:
        queue.away = 2
        queue.queue.put(map(request, range(6)))
        made = await results(queue, 6)
        for one in made.values():
            assert len(one.rollouts) == 2 and not one.failures and one.refused is None
            assert all(rollout.reward.value == len(rollout.text) for rollout in one.rollouts)
        assert sum(one.tokens for one in made.values()) == sum(
            len(rollout.token_ids) for one in made.values() for rollout in one.rollouts
        )

    run(engine, work(length), scenario)


def test_a_function_that_gives_no_rewards_is_told_to_the_trainer(engine: Running) -> None:
    async def scenario(worker: Worker, queue: LocalQueue) -> None:
        queue.queue.put([request(0)])
        assert "a reward is a Score or a number" in str((await results(queue, 1))[0].refused)

    run(engine, work(broken), scenario)


def test_nothing_is_begun_while_weights_change_or_are_not_known(engine: Running) -> None:
    async def scenario(worker: Worker, queue: LocalQueue) -> None:
        def waiting(count: int) -> bool:
            return queue.queue.waiting == count and queue.queue.leased == 0

        worker.told("begun", 1)
        worker.told("changing", 1)
        queue.queue.put([request(0), request(1, version=1)])
        await asyncio.sleep(0.5)
        await until(lambda: waiting(2))
        worker.told("kept", 1)
        assert set(await results(queue, 1)) == {0}
        assert waiting(1), "it has not got the weights of version 1"

        worker.told("changing", 1)
        await asyncio.to_thread(engine.post, "/update_weight_version", {"new_version": "1"})
        worker.told("changed", 1)
        assert worker.policy_version == 1
        assert set(await results(queue, 2)) == {0, 1}

        queue.queue.put([request(2)])
        await until(lambda: queue.queue.leased == 1)
        worker.told("spoilt", 2)
        await until(lambda: waiting(1))
        await asyncio.sleep(0.5)
        assert waiting(1), "others may make it"

    run(engine, work(length, tokens=400), scenario)


def test_what_is_not_wanted_is_dropped_and_what_is_in_hand_is_finished(engine: Running) -> None:
    async def scenario(worker: Worker, queue: LocalQueue) -> None:
        queue.queue.put([request(0), request(1)])
        await until(lambda: queue.queue.leased == 2)
        queue.queue.cancel([0])
        await worker.finish()
        queue.queue.put([request(2)])
        await asyncio.sleep(0.3)
        assert set(await results(queue, 1)) == {1}
        assert queue.queue.waiting == 1

    run(engine, work(length, tokens=256), scenario)
