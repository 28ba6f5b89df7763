"""Rollouts of several turns: exact tokens across turns, masked observations, rewards, what goes wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from penstock.client import Client
from penstock.errors import ConfigError
from penstock.prompt import Message, Prompt
from penstock.rollout.environment import Renderer, Step
from penstock.rollout.rollouts import Rollouts
from penstock.rollout.sampling import Bounds
from penstock.rollout.score import Score
from penstock.sample import Sample, SamplingParams
from tests.engine_server.running import Running
from tests.rollout.simulated import CLOSE, EOS, LETTERS, OPEN, Weights, World
from tests.rollout.test_embedded import run as run_real
from tests.rollout.test_rollouts import check, prompts
from tests.virtual import VirtualLoop, run

PARAMS = SamplingParams(max_tokens=64, temperature=1.0)


OPENED: list[Any] = []
"""Environments that are not closed."""


class Echo:
    """Says what it was told, `turns` times; then it is done."""

    def __init__(self, turns: int = 3) -> None:
        self.turns = turns
        self.seen: list[str] = []
        OPENED.append(self)

    async def close(self) -> None:
        OPENED.remove(self)

    async def reset(self, prompt: Prompt) -> Sequence[Message]:
        return [{"role": "system", "content": "echo"}, *prompt.messages]

    async def step(self, sample: Sample) -> Step:
        self.seen.append(sample.text)
        if len(self.seen) == self.turns:
            return Step(done=True, reward=Score(1.0, {"end": 1.0}))
        return Step(observation=[{"role": "tool", "content": f"you said {sample.text}"}], reward=0.25)


def rendered(role: str, content: str) -> list[int]:
    return [OPEN, *role.encode(), *b"\n", *content.encode(), EOS, *b"\n"]


def scenario(main: Any, **options: Any) -> Any:
    async def inside(loop: VirtualLoop) -> Any:
        world = World(loop)
        asked: list[list[int]] = []
        world.engines[0].fault = lambda job: asked.append(job.prompt)
        settings: dict[str, Any] = {
            "params": PARAMS,
            "group_size": 2,
            "batch_groups": 2,
            "environment": Echo,
            "prompts": prompts(4),
        }
        async with world.client() as client, Rollouts(client, **(settings | options)) as r:
            return await main(r, world, asked)

    result = run(inside)
    assert not OPENED, "each is closed, also of rollouts that failed or were left"
    return result


def test_tokens_are_those_the_engine_read_and_wrote_and_observations_are_masked() -> None:
    async def main(r: Rollouts, world: World, asked: list[list[int]]) -> None:
        groups = [group async for group in r.groups()]
        check(groups)
        for group in groups:
            question = group.prompt.messages[0]["content"]
            for one in group.rollouts:
                assert one.turns == 3 and one.reward == Score(1.5, {"end": 1.0})
                sampled: list[list[int]] = [[]]
                for token, mine, before in zip(one.token_ids, one.mask, (True, *one.mask), strict=False):
                    if mine and not before:
                        sampled.append([])
                    if mine:
                        sampled[-1].append(token)
                expected = [*rendered("system", "echo"), *rendered("user", question), OPEN, *b"assistant\n"]
                assert list(one.prompt_ids) == expected
                for turn, ids in enumerate(sampled):
                    assert expected in asked, "each turn's prompt is what has been so far"
                    assert set(ids) <= {*LETTERS, EOS} and ids[-1] == EOS
                    expected = [*expected, *ids]
                    if turn < 2:
                        observed = rendered("tool", f"you said {bytes(ids[:-1]).decode()}")
                        expected += [*b"\n", *observed, OPEN, *b"assistant\n"]
                assert expected == [*one.prompt_ids, *one.token_ids]
        assert len({one.token_ids[:12] for group in groups for one in group.rollouts}) > 4

    scenario(main, params=SamplingParams(max_tokens=400, temperature=1.0))


@pytest.mark.parametrize("in_flight", ["keep", "abort"])
def test_turns_in_flight_across_updates_go_on(in_flight: str) -> None:
    async def main(r: Rollouts, world: World, asked: list[list[int]]) -> int:
        seen = []
        while batch := await r.batch(1):
            check(batch)
            seen += batch
            await r.trained(batch)
            await r.update(Weights(r.version + 1))
        assert sorted(group.position for group in seen) == list(range(8))
        return sum(len(one.versions) > 1 for group in seen for one in group.rollouts)

    assert scenario(main, prompts=prompts(8), async_steps=8, in_flight=in_flight, batch_groups=1) > 4


def test_a_turn_that_is_too_long_ends_the_rollout_and_so_does_the_bound_of_turns() -> None:
    async def main(r: Rollouts, world: World, asked: list[list[int]]) -> None:
        turns = {one.turns: one.finish_reason async for group in r.groups() for one in group.rollouts}
        assert turns.keys() <= {1, 2} and turns[1] == "length" and 2 in turns

    scenario(
        main, max_turns=2, params=SamplingParams(max_tokens=20, temperature=1.0), prompts=prompts(10), seed=1
    )


def test_environments_that_fail_hang_or_say_nothing() -> None:
    class Bad(Echo):
        async def step(self, sample: Sample) -> Step:
            if "e" in sample.text:
                raise KeyError("tool")
            await asyncio.sleep(100.0)
            raise AssertionError

    async def main(r: Rollouts, world: World, asked: list[list[int]]) -> None:
        assert [group async for group in r.groups()] == []
        (reason, *_) = sorted(r.dropped())
        assert "DeadlineExceeded: the environment took longer than 2 s" in reason or "KeyError" in reason
        assert r.counts().dropped == 4

    scenario(main, environment=Bad, bounds=Bounds(environment=2.0))

    class Silent(Echo):
        async def step(self, sample: Sample) -> Step:
            return Step()

    async def silent(r: Rollouts, world: World, asked: list[list[int]]) -> None:
        with pytest.raises(ConfigError, match="has to say something"):
            await r.batch()

    scenario(silent, environment=Silent)


def test_a_reward_function_adds_to_what_the_environment_gives() -> None:
    async def reward(prompt: Prompt, sample: Sample) -> Score:
        assert sample.prompt_token_ids and EOS in sample.prompt_token_ids[12:]
        return Score(2.0, {"style": 2.0})

    async def main(r: Rollouts, world: World, asked: list[list[int]]) -> None:
        group = (await r.batch(1))[0]
        assert OPENED, "others are under way when the block is left"
        assert group.rollouts[0].reward == Score(3.5, {"end": 1.0, "style": 2.0, "environment": 1.5})

    scenario(main, reward=reward)


def test_observations_are_rendered_as_the_chat_template_of_an_engine_does(engine: Running) -> None:
    """A conversation rendered as a whole is the turns so far and the observation behind them."""

    async def main() -> None:
        async with Client(f"http://{engine.host}:{engine.port}") as client:
            renderer = Renderer(client)
            said: list[Message] = [
                {"role": "user", "content": "1 + 2"},
                {"role": "assistant", "content": "3"},
            ]
            told: list[Message] = [{"role": "user", "content": "and 4?"}]
            whole = await client.tokenize([*said, *told])
            before = await client.tokenize(said[:1])
            answer = await client.tokenize("3")
            end = whole[len(before) + len(answer)]
            for last in (end, answer[-1]):
                ids = await renderer.observation(told, last)
                turn = (*before, *answer, *((end,) if last == end else ()))
                assert turn + ids == whole

    run_real(main())


def test_a_turn_that_ended_without_its_closing_token_is_closed() -> None:
    """As one that ended at a stop string; here the template closes turns with another token."""

    async def inside(loop: VirtualLoop) -> None:
        world = World(loop)
        plain = world.engines[0].render
        world.engines[0].render = lambda messages: [  # type: ignore[method-assign]
            CLOSE if one == EOS else one for one in plain(messages)
        ]
        async with world.client() as client:
            ids = await Renderer(client).observation([{"role": "tool", "content": "x"}], EOS)
            assert ids[0] == CLOSE, "the turn ended otherwise: it is closed"

    run(inside)
