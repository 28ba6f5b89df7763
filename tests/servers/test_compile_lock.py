"""The compile lock: one at a time until it is compiled; a dead holder does not block."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from penstock.servers import compile_lock
from penstock.servers.compile_lock import Absence, CompileLock, Holder, fingerprint
from tests.scripted import run

HOLD = """
import asyncio, sys
from pathlib import Path
from penstock.servers.compile_lock import CompileLock
async def main():
    async with CompileLock(Path(sys.argv[1]), "x", poll=0.01) as lock:
        print(lock.held, flush=True)
        await asyncio.sleep(60)
asyncio.run(main())
"""


def lock_of(folder: Path, **settings: float) -> CompileLock:
    return CompileLock(folder, "x", **{"poll": 0.01, **settings})


def holder(folder: Path) -> subprocess.Popen[str]:
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "True\n"
    return child


def end(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.communicate(timeout=10)


@pytest.mark.parametrize("compiles", [False, True])
def test_one_at_a_time_until_it_is_compiled(tmp_path: Path, compiles: bool) -> None:
    inside: list[int] = []
    together: list[int] = []

    async def server(number: int) -> None:
        async with lock_of(tmp_path) as lock:
            inside.append(number)
            together.append(len(inside))
            await asyncio.sleep(0.03)
            inside.remove(number)
            if compiles:
                lock.compiled()

    async def scenario() -> None:
        async with asyncio.timeout(20):
            await asyncio.gather(*(server(number) for number in range(8)))

    run(scenario())
    assert together[0] == 1
    assert (max(together) == 1) is not compiles, "with the cache there nobody waits"
    assert [path.name for path in tmp_path.iterdir()] == (["x.done"] if compiles else [])


def test_waiting_is_told_once_and_a_cancelled_wait_leaves_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        told: list[int] = []
        async with lock_of(tmp_path):
            waiter = lock_of(tmp_path)
            waiter.on_wait = lambda: told.append(1)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await waiter.__aenter__()
            assert told == [1]
            assert len(files()) == 2

    def files() -> list[Path]:
        return list(tmp_path.iterdir())

    run(scenario())
    assert files() == []


def test_a_holder_that_was_killed_does_not_block(tmp_path: Path) -> None:
    async def scenario() -> float:
        started = time.monotonic()
        async with asyncio.timeout(5), lock_of(tmp_path) as lock:
            assert lock.held
            return time.monotonic() - started

    child = holder(tmp_path)
    end(child)
    assert (tmp_path / "x.lock").exists()
    assert run(scenario()) < 1.0


def test_a_holder_elsewhere_is_believed_while_its_heart_beats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        far = lock_of(tmp_path, heartbeat=0.05)
        await far.__aenter__()
        monkeypatch.setattr(compile_lock, "machine", lambda: "another machine")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.6):
                await lock_of(tmp_path, stale=0.3).__aenter__()
        assert far._beating is not None
        far._beating.cancel()  # its machine has lost its power
        started = time.monotonic()
        async with asyncio.timeout(5), lock_of(tmp_path, stale=0.3) as lock:
            assert lock.held
            assert time.monotonic() - started > 0.3
            await far.__aexit__(None, None, None)
            assert (tmp_path / "x.lock").exists(), (
                "a holder that was given up does not release its successor's"
            )

    run(scenario())


def test_a_live_lock_is_put_back_when_it_was_broken_by_mistake(tmp_path: Path) -> None:
    """Two waiters find the holder dead; the slower one must not break the lock the faster one has taken."""
    slow = lock_of(tmp_path)
    fresh = Holder("fresh", "another machine", 1)
    (tmp_path / "x.lock").write_bytes(msgspec.json.encode(Holder("dead", slow._me.machine, 2**22 + 5)))
    real = compile_lock._content

    def swapped(path: Path) -> bytes | None:
        content = real(path)
        if path.name == "x.lock":  # between the look and the act the faster waiter takes the lock
            path.write_bytes(msgspec.json.encode(fresh))
        return content

    compile_lock._content = swapped
    try:
        slow._break_if_dead(Absence())
    finally:
        compile_lock._content = real
    assert msgspec.json.decode((tmp_path / "x.lock").read_bytes(), type=Holder) == fresh
    assert [path.name for path in tmp_path.iterdir()] == ["x.lock"]


def test_a_folder_that_cannot_be_written_blocks_nobody(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    async def scenario() -> None:
        async with CompileLock(tmp_path / "file" / "cache", "x") as lock:
            assert not lock.held
            lock.compiled()

    run(scenario())


def test_absence_is_judged_by_the_waiters_clock() -> None:
    absence = Absence(stale=10.0)
    assert not absence.noted(b"beat 1", 100.0)
    assert not absence.noted(b"beat 1", 109.0)
    assert not absence.noted(b"beat 2", 111.0)
    assert not absence.noted(b"beat 2", 121.0)
    assert absence.noted(b"beat 2", 121.5)


def test_fingerprints_differ_by_every_fact() -> None:
    facts: dict[str, object] = {"engine": "vllm", "version": "1", "sizes": [1, 2, 1, None]}
    changed = [{**facts, "version": "2"}, {**facts, "sizes": [2, 1, 1, None]}, {**facts, "more": 1}]
    names = {fingerprint(each) for each in [facts, *changed]}
    assert len(names) == 4
    assert fingerprint(dict(reversed(facts.items()))) == fingerprint(facts)
