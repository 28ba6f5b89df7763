"""Rollouts over simulated engines on virtual time: batches, versions, staleness, updates, faults."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from operator import le
from typing import Any
from zlib import crc32

import pytest

from penstock.client import Client
from penstock.errors import ConfigError, ControlFailed, DeadlineExceeded, MalformedResponse
from penstock.prompt import Prompt
from penstock.rollout.group import Group, versions_of_tokens
from penstock.rollout.ledger import Counts
from penstock.rollout.rollouts import Rollouts
from penstock.rollout.sampling import Bounds, seed_of
from penstock.rollout.score import Score
from penstock.rollout.selection import Selection
from penstock.sample import Sample, SamplingParams
from tests.rollout.simulated import EOS, Job, Weights, World, logprob_of
from tests.virtual import VirtualLoop, run

PARAMS = SamplingParams(max_tokens=64, temperature=1.0)


def prompts(count: int) -> list[str]:
    return [f"question {number}" for number in range(count)]


async def length(prompt: Prompt, sample: Sample) -> Score:
    """A reward that has spread."""
    return Score(len(sample.text) / 64, {"letters": float(len(sample.text))})


Main = Callable[[Rollouts, World], Awaitable[Any]]


def rollouts(main: Main, *, plan: dict[str, Any] | None = None, **options: Any) -> Any:
    """Runs `main` with rollouts over simulated engines."""

    async def scenario(loop: VirtualLoop) -> Any:
        world = World(loop, **(plan or {}))
        settings: dict[str, Any] = {"params": PARAMS, "reward": length, "group_size": 2, "batch_groups": 3}
        async with world.client() as client, Rollouts(client, **(settings | options)) as r:
            return await main(r, world)

    return run(scenario)


async def train(r: Rollouts, seconds: float = 0.1, steps: int = 10**9) -> list[list[Group]]:
    """A trainer: batches to the end, each trained on for a time and followed by an update."""
    batches: list[list[Group]] = []
    while len(batches) < steps and (batch := await r.batch(timeout=1000.0)):
        batches.append(batch)
        await asyncio.sleep(seconds)
        await r.trained(batch)
        await r.update(Weights(r.version + 1))
    return batches


def check(groups: Iterable[Group]) -> None:
    """What holds of every rollout of a simulated engine."""
    for group in groups:
        for one in group.rollouts:
            versions = versions_of_tokens(one.versions)
            assert len(one.token_ids) == len(one.logprobs) == len(one.mask) == len(versions)
            assert one.versions_exact
            for token, logprob, kept, version in zip(
                one.token_ids, one.logprobs, one.mask, versions, strict=True
            ):
                assert logprob == (pytest.approx(logprob_of(version, token)) if kept else 0.0)
            assert one.prompt_ids and (one.turns > 1 or EOS not in one.token_ids[:-1])


def test_groups_stream_out_as_they_finish() -> None:
    async def main(r: Rollouts, world: World) -> None:
        seen = [group async for group in r.groups(prompts(10))]
        assert sorted(group.position for group in seen) == list(range(10))
        assert [group.position for group in seen] != list(range(10)), "short ones are first"
        check(seen)
        (one, _) = seen[0].rollouts
        assert one.text and one.reward.parts == {"letters": float(len(one.text))}
        assert one.timings.generation > 0 and one.finish_reason == "stop"
        assert await r.trained(seen) == 1
        assert r.counts() == Counts(trained=10) and not r.waiting()[1:]

    rollouts(main)


@pytest.mark.parametrize("in_flight", ["keep", "abort", "wait"])
@pytest.mark.parametrize("async_steps", [0, 1, 2])
def test_tokens_carry_their_versions_and_none_is_too_old(in_flight: str, async_steps: int) -> None:
    """Updates in the midst of completions, in each mode; the logprobs tell which weights made which token."""

    async def main(r: Rollouts, world: World) -> None:
        batches = await train(r)
        assert [len(batch) for batch in batches] == [3] * 8
        for step, batch in enumerate(batches):
            check(batch)
            for group in batch:
                assert group.staleness is not None and group.oldest is not None
                assert 0 <= group.staleness == step - group.oldest <= async_steps
        crossed = sum(len(one.versions) > 1 for batch in batches for g in batch for one in g.rollouts)
        assert (crossed > 0) == (async_steps > 0 and in_flight != "wait")
        assert max(r.balance().staleness) == async_steps
        assert r.counts() == Counts(trained=24)

    rollouts(main, prompts=prompts(24), async_steps=async_steps, in_flight=in_flight)


@pytest.mark.parametrize("in_flight", ["keep", "abort", "wait"])
def test_versions_that_no_engine_tells_are_exact_or_said_not_to_be(in_flight: str) -> None:
    """And never newer than they are."""

    async def main(r: Rollouts, world: World) -> list[tuple[int, ...]]:
        for engine in world.engines:
            engine.tells_versions = False
        groups = [group for batch in await train(r) for group in batch]
        inexact = [0, 0]
        for one in [one for group in groups for one in group.rollouts]:
            made_by = [
                round(-p - token / 1024) - 1 for p, token in zip(one.logprobs, one.token_ids, strict=True)
            ]
            told = versions_of_tokens(one.versions)
            assert made_by == told if one.versions_exact else all(map(le, told, made_by))
            inexact[len(one.versions) > 1] += not one.versions_exact
        assert {group.staleness for group in groups} <= {0, 1, 2}
        return [(len(groups), *inexact)]

    ((count, *inexact),) = rollouts(
        main, prompts=prompts(24), async_steps=2, in_flight=in_flight, plan={"engines": 2}
    )
    assert count == 24 and sum(inexact) < 24
    assert (sum(inexact) > 4) == (in_flight == "keep")


def test_a_completion_is_the_same_however_often_it_is_cut_off() -> None:
    async def main(r: Rollouts, world: World) -> list[tuple[int, ...]]:
        batches = await train(r, seconds=0.03)
        return [one.token_ids for batch in batches for group in batch for one in group.rollouts]

    def sampled(in_flight: str, plan: dict[str, Any]) -> list[tuple[int, ...]]:
        options: dict[str, Any] = {"prompts": prompts(12), "in_flight": in_flight, "async_steps": 2}
        return sorted(rollouts(main, plan=plan, **options))

    whole = sampled("wait", {})
    assert sampled("abort", {}) == whole == sampled("keep", {}) == sampled("abort", {"slots": 2})


def test_a_turn_that_is_cut_off_within_a_character_has_it_whole() -> None:
    accent = "é".encode()

    async def main(r: Rollouts, world: World) -> None:
        engine = world.engines[0]
        start = len(engine.render([{"role": "user", "content": "question 0"}]))

        def token(job: Job) -> None:
            place = len(job.prompt) + len(job.ids) - start
            job.versions = job.versions or [(0, engine.version)]
            job.ids.append(accent[place % 2])
            job.logprobs.append(logprob_of(engine.version, accent[place % 2]))
            if len(job.ids) == job.most:
                job.finish = "length"

        engine._token = token  # type: ignore[method-assign]
        asked: list[int] = []
        engine.fault = lambda job: asked.append(len(job.prompt) - start)
        for version in range(1, 10):
            await asyncio.sleep(0.055)
            await r.update(Weights(version, seconds=0.0))
        (one,) = (await r.batch(1))[0].rollouts
        assert one.text == "é" * 32 and bytes(one.token_ids) == accent * 32
        assert len(asked) > 4 and not any(place % 2 for place in asked), "asked behind whole characters"

    rollouts(main, prompts=prompts(1), group_size=1, in_flight="abort", async_steps=20)


def test_without_a_seed_none_is_sent() -> None:
    async def main(r: Rollouts, world: World) -> list[tuple[int, ...]]:
        groups = [group async for group in r.groups(prompts(3))]
        check(groups)
        return [one.token_ids for group in groups for one in group.rollouts]

    assert rollouts(main, seed=None) != rollouts(main, seed=None)
    assert rollouts(main, seed=4) == rollouts(main, seed=4) != rollouts(main, seed=5)


def test_async_steps_0_is_exactly_the_synchronous_run() -> None:
    """A plain loop that asks for a batch, waits for all of it, trains and updates."""
    count, size, per_batch = 12, 2, 3

    async def synchronous(loop: VirtualLoop) -> list[list[tuple[int, ...]]]:
        world, found = World(loop), []
        async with world.client() as client:
            for start in range(0, count, per_batch):
                asked = []
                for position in range(start, start + per_batch):
                    for index in range(size):
                        params = SamplingParams(
                            max_tokens=64, temperature=1.0, logprobs=0, seed=seed_of(7, position, index)
                        )
                        messages = [{"role": "user", "content": f"question {position}"}]
                        asked.append(client.chat(messages, params, return_token_ids=True))
                found.append([sample.token_ids or () for sample in await asyncio.gather(*asked)])
        return found

    async def main(r: Rollouts, world: World) -> list[list[tuple[int, ...]]]:
        batches = await train(r)
        return [[one.token_ids for group in batch for one in group.rollouts] for batch in batches]

    assert rollouts(main, prompts=prompts(count), async_steps=0, seed=7) == run(synchronous)


def test_an_update_waits_for_the_trainer_to_say_what_it_has_trained_on() -> None:
    async def main(r: Rollouts, world: World) -> None:
        batch = await r.batch()
        with pytest.raises(ConfigError, match="3 groups are with the trainer"):
            await r.update(Weights(1))
        await r.trained(batch)
        with pytest.raises(ConfigError, match="was not handed out"):
            await r.trained(batch)
        assert (await r.update(Weights(1))).version == r.version == 1

    rollouts(main, prompts=prompts(9))


@pytest.mark.parametrize("overflow", ["requeue", "mask", "train"])
def test_what_is_too_old_goes_the_way_that_was_chosen(overflow: str) -> None:
    """A trainer that updates twice after half a batch: what it left has become too old."""

    async def main(r: Rollouts, world: World) -> Counter[int]:
        first = await r.batch(1)
        await r.trained(first)
        for version in (1, 2):
            await asyncio.sleep(0.1)
            await r.update(Weights(version))
        groups = [*first]
        while batch := await r.batch(timeout=100.0):
            groups += batch
            await r.trained(batch)
        assert sorted(group.position for group in groups) == list(range(6)), "the same prompts"
        for group in groups[1:]:
            assert group.staleness is not None
            if overflow != "train":
                assert group.staleness <= 1
                assert min(one.oldest for one in group.rollouts if one.oldest is not None) >= 1
        check(groups)
        masked = sum(not kept for group in groups for one in group.rollouts for kept in one.mask)
        assert (masked > 0) == (overflow == "mask")
        again = max(group.attempt for group in groups) > 1
        assert again == (overflow != "train"), "also a group of which masking would leave nothing"
        return Counter(group.staleness or 0 for group in groups)

    ages = rollouts(main, prompts=prompts(6), async_steps=1, overflow=overflow, plan={"mean": 40})
    assert (max(ages) > 1) == (overflow == "train")


def test_groups_without_spread_are_made_up_for_and_solved_prompts_are_retired() -> None:
    """Three prompts are always right, in each of two epochs; the others have spread."""

    async def reward(prompt: Prompt, sample: Sample) -> float:
        return 1.0 if prompt.messages[0]["content"] in prompts(3) else crc32(sample.text.encode()) / 2**32

    async def main(r: Rollouts, world: World) -> None:
        seen = []
        while batch := await r.batch():
            assert len(batch) == 3, "batches are full all the same"
            seen += [group.position for group in batch]
            await r.trained(batch)
        assert seen == [*range(3, 9), *range(12, 18)]
        assert r.dropped() == {"zero spread": 3, "solved before": 3}
        assert r.counts() == Counts(trained=12, dropped=6)

    selection = Selection(drop_zero_spread=True, solved_at=1.0)
    plan = {"mean": 10.0}
    rollouts(
        main, prompts=prompts(9) * 2, async_steps=0, reward=reward, selection=selection, plan=plan, seed=3
    )


def test_a_group_takes_the_first_of_more_samples() -> None:
    async def main(r: Rollouts, world: World) -> float:
        batch = await r.batch()
        assert all(len(group.rollouts) == 2 for group in batch)
        check(batch)
        return sum(group.seconds for group in batch)

    def seconds(oversample: int) -> float:
        return float(rollouts(main, prompts=prompts(3), selection=Selection(oversample=oversample)))

    assert seconds(4) < 0.7 * seconds(0)


def test_a_failed_reward_is_no_reward_of_0() -> None:
    async def reward(prompt: Prompt, sample: Sample) -> float:
        if sample.text.count("e") % 3 == 1:
            raise ValueError("boom")
        if sample.text.count("e") % 3 == 2:
            await asyncio.sleep(1000)
        return 1.0

    async def main(r: Rollouts, world: World) -> None:
        groups = [group async for group in r.groups(prompts(12))]
        failed = [one.reward.failed for group in groups for one in group.rollouts if one.reward.failed]
        assert {"the reward failed: ValueError: boom", "the reward took longer than 5 s"} == set(failed)
        assert all(group.rewards == (1.0,) * len(group.scored) for group in groups)
        assert {len(group.scored) for group in groups} > {4}
        assert all(len(group.scored) >= 2 for group in groups)

    rollouts(main, reward=reward, group_size=4, bounds=Bounds(reward=5.0))


def test_an_engine_that_dies_costs_no_prompt() -> None:
    async def main(r: Rollouts, world: World) -> None:
        dies = asyncio.get_running_loop().call_later(0.15, world.engines[0].die)
        batches = await train(r)
        dies.cancel()
        assert sorted(g.position for batch in batches for g in batch) == list(range(18))
        for batch in batches:
            check(batch)

    rollouts(main, prompts=prompts(18), plan={"engines": 2}, async_steps=1)


def test_a_prompt_whose_samples_fail_is_begun_again_and_then_dropped_with_the_reason() -> None:
    async def main(r: Rollouts, world: World) -> None:
        def fault(job: Any) -> None:
            if bytes(one for one in job.prompt if one < EOS).count(b"question 1\n"):
                raise MalformedResponse("no")

        world.engines[0].fault = fault
        groups = [group async for group in r.groups(prompts(4))]
        assert sorted(group.position for group in groups) == [0, 2, 3]
        assert r.dropped() == {"2 samples failed: MalformedResponse: no": 1}

    rollouts(main)


def test_what_ends_the_run_is_raised_at_the_trainer() -> None:
    async def reward(prompt: Prompt, sample: Sample) -> str:
        return "good"

    async def main(r: Rollouts, world: World) -> None:
        with pytest.raises(ConfigError, match="a reward is a Score or a number, not str"):
            await r.batch()

    rollouts(main, reward=reward, prompts=prompts(3))


def test_engines_left_by_another_run_are_not_taken_for_the_first_weights() -> None:
    async def main(r: Rollouts, world: World) -> None:
        engine = world.engines[0]
        engine.version, engine.label = 7, "7"
        with pytest.raises(ConfigError, match="weights of another run and the trainer is at version 0"):
            await r.batch()
        assert engine.generated == 0
        assert (await r.update(Weights(1))).version == 1
        check(batch := await r.batch())
        assert {group.oldest for group in batch} == {1}
        await r.trained(batch)

    rollouts(main, prompts=prompts(6))

    async def unseen(r: Rollouts, world: World) -> None:
        world.engines[0].version = 7  # it has said otherwise when it was asked
        with pytest.raises(ConfigError, match="version 7, the trainer is at version 0"):
            await r.batch()

    rollouts(unseen, prompts=prompts(3))


def test_waits_are_bounded_or_named() -> None:
    async def main(r: Rollouts, world: World) -> None:
        await asyncio.sleep(0.05)
        names = {(one.who, one.what): one.count for one in r.waiting()}
        assert names == {("generation", "the trainer"): 1, ("samples", "engines"): 12}
        with pytest.raises(DeadlineExceeded, match="12 samples wait for engines"):
            await r.batch(timeout=0.01)
        world.engines[0]._running.clear()  # for ever
        with pytest.raises(DeadlineExceeded):
            await r.batch(6, timeout=5.0)

    rollouts(main, prompts=prompts(9), async_steps=1, bounds=Bounds(turn=2.0), plan={"mean": 1000.0})


def test_a_failed_update_is_told_and_tried_again_with_the_same_version() -> None:
    async def main(r: Rollouts, world: World) -> None:
        await r.trained(await r.batch())
        with pytest.raises(ControlFailed):
            await r.update(Weights(1, fails=True))
        with pytest.raises(ConfigError, match="version 0 and the trainer is at version 1"):
            await r.batch()
        assert (await r.update(Weights(1))).version == 1
        batch = await r.batch()
        assert {group.oldest for group in batch} == {1}

    rollouts(main, prompts=prompts(9), async_steps=0)


def test_a_batch_may_be_asked_for_while_weights_are_updated() -> None:
    async def main(r: Rollouts, world: World) -> None:
        await r.trained(await r.batch())
        updating = asyncio.ensure_future(r.update(Weights(1, seconds=3.0)))
        await asyncio.sleep(0)
        with pytest.raises(ConfigError, match="one at a time"):
            await r.update(Weights(2))
        batch = await r.batch()
        assert updating.done() and {group.oldest for group in batch} == {1}

    rollouts(main, prompts=prompts(9), async_steps=0)


def test_a_run_that_was_left_goes_on_where_it_was(tmp_path: Any) -> None:
    path = tmp_path / "ledger.db"
    seen: list[int] = []

    async def begin(r: Rollouts, world: World) -> None:
        for _ in range(2):
            batch = await r.batch()
            seen.extend(group.position for group in batch)
            await r.trained(batch)
            await r.update(Weights(r.version + 1))
        await r.batch()  # and is never trained on

    async def go_on(r: Rollouts, world: World) -> None:
        assert (r.resumed.step, r.resumed.version) == (2, 2)
        if not r.counts().generated:
            with pytest.raises(ConfigError, match="call update"):
                await r.batch()
        kept = r.counts().generated
        before = world.engines[0].generated
        assert (await r.update(Weights(2))).version == 2
        while batch := await r.batch():
            assert all((group.newest or 0) <= r.version for group in batch)
            seen.extend(group.position for group in batch)
            await r.trained(batch)
            await r.update(Weights(r.version + 1))
        assert kept and before == 0
        assert r.counts() == Counts(trained=18)

    options: dict[str, Any] = {"prompts": prompts(18), "ledger": path, "async_steps": 1}
    rollouts(begin, **options)
    rollouts(go_on, **options)
    assert sorted(seen) == list(range(18))

    async def finished(r: Rollouts, world: World) -> None:
        await r.update(Weights(r.version))
        assert await r.batch() == []

    rollouts(finished, **options)
    with pytest.raises(ConfigError, match="prompt 4 was"):
        rollouts(
            finished, **(options | {"prompts": ["question 0", *prompts(20)[1:4], "another", *prompts(13)]})
        )


def test_settings_that_cannot_be_are_refused() -> None:
    for options, message in (
        ({"group_size": 0}, "group_size must be at least 1"),
        ({"params": SamplingParams()}, "set max_tokens"),
        ({"params": SamplingParams(max_tokens=1, seed=1)}, "give the seed to the rollouts"),
        ({"reward": None}, "give a reward"),
        ({"overflow": "drop"}, "overflow must be"),
        ({"in_flight": "stop"}, "pause mode"),
        ({"async_steps": -1}, "async_steps"),
        ({"bounds": Bounds(turn=0)}, "the bound of a turn"),
        ({"selection": Selection(drop_zero_spread=True), "group_size": 1}, "no spread"),
    ):
        with pytest.raises(ConfigError, match=message):
            Rollouts("http://x:1", **({"reward": length, "params": PARAMS} | options))  # type: ignore[arg-type]


def test_the_client_must_be_open() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        client: Client = World(loop).client()
        r = Rollouts(client, reward=length, params=PARAMS, prompts=prompts(2), group_size=1)
        async with r:
            with pytest.raises(ConfigError, match="not open"):
                await r.batch()
        with pytest.raises(ConfigError, match="not open: use them inside"):
            await r.batch()
        with pytest.raises(ConfigError, match="opened once"):
            await r.__aenter__()

    run(scenario)
