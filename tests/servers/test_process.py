"""A child process and all it starts: nothing is left of it, whoever is killed."""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.errors import EngineError
from penstock.servers.process import Process
from tests.scripted import run, until
from tests.servers.fakes import TAG, fake_command, nothing_left, processes, wait_until_gone

OWNER = """
import asyncio, sys
from tests.servers.fakes import FakeServer
async def main():
    async with FakeServer(sys.argv[1], daemons=2, ignore_term=True) as server:
        print("in", server._process._keeper.pid, flush=True)
        await asyncio.sleep(60)
asyncio.run(main())
"""
"""A process that owns a server."""


async def start(tag: str, output: list[bytes], **behaviour: object) -> Process:
    environment = {**os.environ, TAG: tag}
    return await Process.start(fake_command(0, **behaviour), environment=environment, on_output=output.append)


def test_all_that_was_started_ends_also_what_left_its_session_and_ignores_sigterm() -> None:
    async def scenario(tag: str) -> None:
        output: list[bytes] = []
        process = await start(tag, output, daemons=3, ignore_term=True, lines=["up"], silent=True)
        await until(lambda: b"up" in b"".join(output))
        assert len(process.tree) == 4, "the engine and its three daemons are known"
        assert len(processes(tag)) == 5, "and the supervisor"
        await process.stop(0.2)
        assert process.exited.result() == -signal.SIGKILL
        assert process.tree == []

    with nothing_left() as tag:
        run(scenario(tag))


def test_a_status_is_told_and_leftovers_end() -> None:
    async def scenario(tag: str) -> None:
        output: list[bytes] = []
        process = await start(tag, output, daemons=1, lines=["last words"], exit=7)
        assert await process.exited == 7
        await process.stop(1.0)
        assert b"".join(output) == b"last words\n"
        assert output[-1] == b""

    with nothing_left() as tag:
        run(scenario(tag))


def test_sigterm_comes_first() -> None:
    async def scenario(tag: str) -> None:
        output: list[bytes] = []
        process = await start(tag, output, lines=["up"], silent=True)
        await until(lambda: b"up" in b"".join(output))
        await process.stop(5.0)
        assert process.exited.result() == -signal.SIGTERM

    with nothing_left() as tag:
        run(scenario(tag))


def test_a_command_that_does_not_exist_is_named() -> None:
    async def scenario() -> None:
        with pytest.raises(EngineError, match="Cannot execute /no/such/engine: No such file"):
            await Process.start(["/no/such/engine"], environment=os.environ, on_output=lambda data: None)

    run(scenario())


def test_a_start_that_is_cancelled_leaves_nothing() -> None:
    async def scenario(tag: str) -> None:
        for wait in (0.0, 0.005, 0.02, 0.04):
            starting = asyncio.ensure_future(start(tag, [], daemons=1, silent=True))
            await asyncio.sleep(wait)
            if starting.done():
                await starting.result().stop(0.0)
                continue
            starting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await starting
            assert processes(tag) == []

    with nothing_left() as tag:
        run(scenario(tag))


@pytest.mark.slow
def test_fifty_starts_and_kills_leave_nothing() -> None:
    async def scenario(tag: str) -> None:
        generator = random.Random(1)
        for _ in range(50):
            process = await start(tag, [], daemons=1, silent=True)
            await asyncio.sleep(generator.uniform(0.0, 0.04))
            await process.stop(generator.choice([0.0, 0.0, 0.05]))
        assert processes(tag) == []

    with nothing_left() as tag:
        run(scenario(tag))


def owner(tag: str) -> tuple[subprocess.Popen[str], int]:
    """A process with a server in it, and the server's supervisor."""
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    child = subprocess.Popen(
        [sys.executable, "-c", OWNER, tag],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert child.stdout is not None
    words = child.stdout.readline().split()
    assert words[:1] == ["in"], child.communicate(timeout=10)
    return child, int(words[1])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_owner_that_is_killed_takes_everything_along(number: signal.Signals) -> None:
    tag = secrets.token_hex(8)
    child, _ = owner(tag)
    try:
        assert len(processes(tag)) == 4
        child.send_signal(number)
        assert wait_until_gone(tag) < 3.0
    finally:
        child.kill()
        child.communicate(timeout=10)


def test_a_supervisor_that_is_killed_leaves_nothing_either() -> None:
    tag = secrets.token_hex(8)
    child, keeper = owner(tag)
    try:
        os.kill(keeper, signal.SIGKILL)
        assert wait_until_gone(tag) < 3.0
        _, said = child.communicate(timeout=10)
        assert "The engine died" in said
    finally:
        child.kill()
        child.communicate(timeout=10)


def test_what_a_fork_of_the_owner_holds_open_keeps_nothing_alive() -> None:
    """A fork has a copy of the pipe whose end tells the supervisor that the owner is gone."""
    tag = secrets.token_hex(8)
    forking = OWNER.replace("print(", "import os, time; os.fork() or (time.sleep(8), os._exit(0)); print(")
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    child = subprocess.Popen(
        [sys.executable, "-c", forking, tag], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline().startswith("in")
        child.kill()
        assert wait_until_gone(tag) < 4.0
    finally:
        child.kill()
        child.wait(10)
        assert child.stdout is not None
        child.stdout.close()
