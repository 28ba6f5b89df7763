"""Workers: what a reward may do to them, and what its owner sees of it. Real processes, real signals."""

from __future__ import annotations

import asyncio
import errno
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from penstock.errors import ConfigError
from penstock.rollout.rewards.worker import as_score
from penstock.rollout.rewards.workers import Workers
from penstock.rollout.score import Score
from tests.rollout import misbehaving
from tests.scripted import run, until

LIMIT = 20.0
"""Seconds for what is not to run into its limit."""


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"Z"
    except OSError:
        return True


@pytest.mark.parametrize(
    ("value", "score"),
    [(1, 1.0), (0.5, 0.5), (True, 1.0), (False, 0.0), (Score(2.0, {"a": 1.0}), Score(2.0, {"a": 1.0}))],
)
def test_values(value: object, score: float | Score) -> None:
    assert as_score(value) == (score if isinstance(score, Score) else Score(score))


@pytest.mark.parametrize("value", [None, "1.0x", [1.0], math.nan, math.inf, 10**400, Score(math.nan)])
def test_values_that_are_no_score(value: object) -> None:
    score = as_score(value)
    assert score.failed is not None
    assert math.isnan(score.value)


def test_one_worker_survives_whatever_a_reward_does(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Workers(1, memory=1 << 30) as workers:
            assert workers.statistics().processes == 0, "they are started when there is work"
            assert (await workers.score(misbehaving.same, 0.25, limit=LIMIT)).value == 0.25
            assert (await workers.score(misbehaving.heavy, limit=LIMIT)).value == 0.0
            first = (await workers.score(misbehaving.pid, limit=LIMIT)).value

            raised = await workers.score(misbehaving.wrong, limit=LIMIT)
            assert raised.failed == "the reward raised KeyError: 'x'"
            assert (await workers.score(misbehaving.loud, limit=LIMIT)).value == 1.0
            assert (await workers.score(misbehaving.pid, limit=LIMIT)).value == first

            hog = await workers.score(misbehaving.eat_memory, limit=LIMIT)
            assert hog.failed == "the reward ran out of memory"
            second = (await workers.score(misbehaving.pid, limit=LIMIT)).value
            assert second != first, "what held the memory is gone"

            crashed = await workers.score(misbehaving.segfault, limit=LIMIT)
            assert crashed.failed is not None and "SIGSEGV" in crashed.failed
            left = await workers.score(misbehaving.leave, limit=LIMIT)
            assert left.failed is not None and "status 7" in left.failed
            strange = await workers.score(misbehaving.babble, limit=LIMIT)
            assert strange.failed == "the worker's reply makes no sense"
            assert (await workers.score(misbehaving.same, 0.5, limit=LIMIT)).value == 0.5
            counts = workers.statistics()
            assert (counts.processes, counts.deaths, counts.timeouts) == (1, 2, 0)
        assert workers.statistics().processes == 0

    run(scenario(), bound=60.0)


def test_a_timeout_is_a_failed_score_and_kills_all_it_started(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Workers(2) as workers:
            pids = tmp_path / "pids"
            await asyncio.gather(*(workers.score(misbehaving.slow, 0.3, limit=LIMIT) for _ in range(2)))
            before = time.monotonic()
            hung, other = await asyncio.gather(
                workers.score(misbehaving.hang_with_child, str(pids), limit=1.0),
                workers.score(misbehaving.slow, 0.2, limit=LIMIT),
            )
            assert time.monotonic() - before < 10.0
            assert hung.failed == "timeout: the reward took more than 1 s"
            assert math.isnan(hung.value)
            assert other == Score(1.0)
            worker, child = map(int, pids.read_text().split())
            await until(lambda: gone(worker) and gone(child))
            deaf = await workers.score(misbehaving.hang_deaf, limit=0.2)
            assert deaf.failed == "timeout: the reward took more than 0.2 s"
            assert workers.statistics().timeouts == 2

    run(scenario(), bound=60.0)


def test_a_job_that_is_done_is_not_late_because_its_owner_is() -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()

        def be_busy() -> None:
            ours.recv(1)
            time.sleep(0.5)  # called for a socket: next the loop looks at its timers, and then at others

        with ours, theirs:
            loop.add_reader(ours, be_busy)
            async with Workers(1) as workers:
                await workers.score(misbehaving.same, 1, limit=LIMIT)
                job = asyncio.ensure_future(workers.score(misbehaving.slow, 0.05, limit=0.3))
                await asyncio.sleep(0.02)
                theirs.send(b"x")
                assert await job == Score(1.0)
            loop.remove_reader(ours)

    run(scenario())


def test_what_a_function_prints_goes_to_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    async def scenario() -> None:
        async with Workers(1) as workers:
            assert await workers.score(misbehaving.loud, limit=LIMIT) == Score(1.0)
            await workers.score(misbehaving.leave_politely, limit=LIMIT)

    run(scenario())
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "between the frames" in printed.err


def test_jobs_wait_for_a_worker_and_cancelled_ones_are_passed_over() -> None:
    async def scenario() -> None:
        async with Workers(1) as workers:
            await workers.score(misbehaving.same, 1, limit=LIMIT)
            jobs = [
                asyncio.ensure_future(workers.score(misbehaving.slow, 0.1, limit=LIMIT)) for _ in range(4)
            ]
            await asyncio.sleep(0.02)
            assert (workers.statistics().busy, workers.statistics().waiting) == (1, 3)
            jobs[0].cancel()
            jobs[2].cancel()
            done = await asyncio.gather(*jobs, return_exceptions=True)
            assert [type(one) for one in done] == [
                asyncio.CancelledError,
                Score,
                asyncio.CancelledError,
                Score,
            ]
            assert workers.statistics().started == 1

    run(scenario())


def test_closing_ends_what_runs_and_what_waits() -> None:
    async def scenario() -> None:
        async with Workers(1) as workers:
            pid = int((await workers.score(misbehaving.pid, limit=LIMIT)).value)
            jobs = [asyncio.ensure_future(workers.score(misbehaving.hang, limit=LIMIT)) for _ in range(2)]
            await asyncio.sleep(0.1)
            scratch = workers.scratch
            assert scratch is not None and scratch.is_dir()
        assert gone(pid)
        assert not scratch.exists()
        for score in await asyncio.gather(*jobs):
            assert score.failed is not None and "closed" in score.failed
        with pytest.raises(ConfigError, match="not open"):
            await workers.score(misbehaving.same, 1, limit=1.0)

    run(scenario())


def test_functions_that_cannot_be_used() -> None:
    async def scenario() -> None:
        async with Workers(1) as workers:
            for name in ("nothing", "a b:c", ":f", "m:"):
                with pytest.raises(ConfigError):
                    await workers.score(name, limit=LIMIT)
            with pytest.raises(ConfigError, match="cannot be sent"):
                await workers.score(lambda: 1.0, limit=LIMIT)
            with pytest.raises(ConfigError, match=r"no_such.*ModuleNotFoundError"):
                await workers.score("no_such_module:f", limit=LIMIT)
            with pytest.raises(ConfigError, match="AttributeError"):
                await workers.score("tests.rollout.misbehaving:nothing", limit=LIMIT)
            score = await workers.score("tests.rollout.misbehaving:same", 1, limit=LIMIT)
            assert score == Score(1.0)
            assert workers.statistics().started == 1

    run(scenario())


def test_workers_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    async def scenario() -> None:
        async with Workers(2) as workers:
            with monkeypatch.context() as patch:
                patch.setattr(subprocess, "Popen", refuse)
                score = await workers.score(misbehaving.same, 1, limit=LIMIT)
                assert score.failed is not None and "no worker can be started" in score.failed
            assert await workers.score(misbehaving.same, 1, limit=LIMIT) == Score(1.0)

    run(scenario())


OWNER = """
import asyncio, sys
from pathlib import Path
from penstock.rollout.rewards.workers import Workers
from tests.rollout import misbehaving
async def main():
    async with Workers(1) as workers:
        print(int((await workers.score(misbehaving.pid, limit=20)).value), flush=True)
        await workers.score(misbehaving.hang, limit=1000)
asyncio.run(main())
"""


def test_workers_die_with_their_owner(tmp_path: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert owner.stdout is not None
    with owner.stdout:
        worker = int(owner.stdout.readline())
        assert not gone(worker)
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait(timeout=10)
    deadline = time.monotonic() + 5.0
    while not gone(worker):
        assert time.monotonic() < deadline, "the worker outlived its owner"
        time.sleep(0.01)


def test_cheap_scores_by_the_thousand() -> None:
    async def scenario() -> None:
        async with Workers(2) as workers:
            await workers.score("math:sqrt", 4, limit=LIMIT)

            async def score(count: int) -> None:
                for _ in range(count):
                    assert (await workers.score("math:sqrt", 4, limit=LIMIT)).value == 2.0

            before = time.process_time()
            await asyncio.gather(*(score(125) for _ in range(16)))
            spent = (time.process_time() - before) / 2000
            assert spent < 500e-6, f"{spent * 1e6:.0f} µs of CPU time a score; usually 15"

    run(scenario())
