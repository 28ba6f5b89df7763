"""What every way for weights into an engine has to hold to, with engines that fail, die and come back."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from safetensors.torch import load_file

from penstock.control import readmission
from penstock.control.control import Control
from penstock.control.files import Scratch, sweep
from penstock.control.shared_memory import SharedMemory
from penstock.control.staged import Staged
from penstock.control.tensors import Tensor
from penstock.control.transport import DiskReload
from penstock.errors import ConfigError, ControlFailed
from penstock.fleet.fleet import Fleet
from penstock.fleet.retry import Retry
from tests.engine_server.checkpoint import make_checkpoint
from tests.scripted import run
from tests.transports.site import (
    WAYS,
    WEIGHTS,
    Interfering,
    Make,
    Process,
    Way,
    Weights,
    digest,
    left_behind,
    noisy,
    two_engines,
)

BOUND = 300.0
"""Seconds a test may take."""
ROOT = Path(__file__).parents[2]
QUICK = Retry(base=0.02, cap=0.1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("transports") / "model")


@pytest.fixture(scope="module")
def engines_of(checkpoint: Path) -> Iterator[Callable[[str], list[Process]]]:
    """The two engines of each kind, started when they are asked for first."""
    started: dict[str, list[Process]] = {}
    with ExitStack() as stack:

        def of(kind: str) -> list[Process]:
            if kind not in started:
                started[kind] = stack.enter_context(two_engines(kind, checkpoint))
            return started[kind]

        yield of


class Site:
    """A way under test, its two engines, and a fleet of them."""

    def __init__(
        self, way: Way, engines: list[Process], first: Weights, make: Make, folder: Path, control: Control
    ) -> None:
        self.way = way
        self.one, self.two = engines
        self.engines = engines
        self.first = first
        self.make = make
        self.folder = folder
        self.control = control
        self.fleet = control.fleet

    def current(self) -> list[bool]:
        return [end.current for end in self.fleet.endpoints]

    def versions(self) -> list[int | None]:
        return [end.policy_version for end in self.fleet.endpoints]

    async def has(self, engine: Process, weights: Weights) -> bool:
        """Bit by bit, each tensor."""
        found = await asyncio.to_thread(engine.digests)
        return found == {name: digest(one) for name, one in weights.items()}

    async def all_have(self, weights: Weights) -> bool:
        return all([await self.has(engine, weights) for engine in self.engines])

    async def caught_up(self, engine: Process, weights: Weights) -> None:
        """Not before it has these weights may it be sent requests."""
        number = self.engines.index(engine)
        for _ in range(50_000):
            if self.current()[number]:
                break
            await asyncio.sleep(0.005)
        assert await self.has(engine, weights)


@pytest.fixture
def site(
    way: str,
    engines_of: Callable[[str], list[Process]],
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[[], Any]]:
    monkeypatch.setattr(readmission, "BACKOFF", QUICK)
    kind = WAYS[way]
    engines = engines_of(kind.engines)
    folder = tmp_path / "weights"

    @asynccontextmanager
    async def opened() -> AsyncIterator[Site]:
        """All engines have the checkpoint's weights, by the way under test."""
        first = noisy(load_file(checkpoint / WEIGHTS), 1)
        make = kind.make(folder, checkpoint)
        fleet = Fleet([engine.url for engine in engines], retry=QUICK)
        async with fleet, Control(fleet, update_timeout=20.0) as control:
            here = Site(kind, engines, first, make, folder, control)
            await control.update_weights(make(first))
            assert await here.all_have(first)
            yield here

    yield opened
    for _ in range(100):
        gc.collect()
        if not left_behind(folder):
            break
        time.sleep(0.05)  # a thread may not be done with it
    assert left_behind(folder) == []


Open = Callable[[], Any]
TRAINER = """
import asyncio, os, signal, sys
from pathlib import Path
from safetensors.torch import load_file
from penstock.control.control import Control
from penstock.control.engine import Engine
from penstock.fleet.fleet import Fleet
from tests.transports.site import WAYS
way, folder, checkpoint, *urls = sys.argv[1:]
ask = Engine.ask
async def killed(self, *asks, **options):
    if asks[0].path == "/update_weights":
        os.kill(os.getpid(), signal.SIGKILL)
    return await ask(self, *asks, **options)
Engine.ask = killed
async def main():
    weights = load_file(Path(checkpoint, "model.safetensors"))
    transport = WAYS[way].make(Path(folder), Path(checkpoint))(weights)
    async with Fleet(urls) as fleet, Control(fleet) as control:
        await control.update_weights(transport)
asyncio.run(main())
"""
"""A process that is killed when everything is there for the engines to take."""


def ways(*fast: str, which: Callable[[str], object] = lambda name: True) -> pytest.MarkDecorator:
    """Those that a check is about; the fast suite has some of them."""
    values = [
        name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in WAYS if which(name)
    ]
    return pytest.mark.parametrize("way", values)


@ways("http", "shared memory", "disk, changes", "reload")
def test_weights_arrive_bit_by_bit_and_each_phase_is_timed(site: Open) -> None:
    async def main() -> None:
        async with site() as here:
            for seed in (2, 3):
                weights = noisy(here.first, seed)
                transport = here.make(weights)
                expected = {name: one.clone() for name, one in weights.items()}
                if not isinstance(transport, DiskReload):
                    next(iter(weights.values())).zero_()  # what the trainer does meanwhile is no matter
                update = await here.control.update_weights(transport)
                assert await here.all_have(expected)
                assert {"prepare", "transfer", "commit"} <= update.seconds.keys()
                assert all(0 < seconds < 20 for seconds in update.seconds.values())
                assert update.checksums.keys() == {here.one.url, here.two.url}
                assert len(set(update.checksums.values())) == 1 and None not in update.checksums.values()
                labels = await here.control.weight_versions()
                assert {one.value for one in labels.values()} == {update.version}
            with pytest.raises(ConfigError, match="does not come after"):
                await here.control.update_weights(here.make(here.first), version=1)

    run(main(), bound=BOUND)


def spoil(transport: Any) -> None:
    """What is sent is not what was meant, on its way to every engine."""
    if isinstance(transport, DiskReload):
        file = Path(transport.path) / WEIGHTS
        file.write_bytes(file.read_bytes()[:-100])
        return
    assert isinstance(transport, Staged)
    sent = transport._changed or transport.tensors
    name, one = next(iter(sent.items()))
    flipped = bytes([one.data[0] ^ 1, *one.data[1:]])
    if isinstance(transport, SharedMemory):
        os.pwrite(transport._file, flipped[:1], transport._offsets[name])
    else:
        cast(dict[str, Tensor], sent)[name] = Tensor(one.dtype, one.shape, flipped)


@ways("shared memory", "disk, changes", "reload", which=lambda name: not name.startswith("broadcast"))
def test_what_arrives_broken_leaves_all_engines_as_they_were(site: Open) -> None:
    async def main() -> None:
        async with site() as here:
            version = here.fleet.policy_version
            broken = here.make(noisy(here.first, 2))
            spoil(broken)
            with pytest.raises(ControlFailed, match="keeps the weights it had") as failed:
                await here.control.update_weights(broken)
            phase = "transfer" if here.way.staged else "prepare"
            assert {one.phase for one in failed.value.outcomes.values()} == {phase}
            assert await here.all_have(here.first)
            assert here.versions() == [version] * 2 and here.current() == [True, True]
            whole = noisy(here.first, 3)
            await here.control.update_weights(here.make(whole))
            assert await here.all_have(whole)

    run(main(), bound=BOUND)


@ways("shared memory", "disk, changes", "reload")
@pytest.mark.parametrize("phase", ["prepare", "transfer", "commit"])
def test_an_engine_that_fails_is_left_out_and_caught_up(site: Open, phase: str) -> None:
    async def main() -> None:
        async with site() as here:
            weights = noisy(here.first, 2)
            transport = Interfering(here.make(weights), here.two.url, phase)
            update = await here.control.update_weights(transport)
            assert transport.happened
            assert (update.outcomes[here.one.url].ok, update.outcomes[here.two.url].phase) == (True, phase)
            assert await here.has(here.one, weights)
            await here.caught_up(here.two, weights)
            assert here.current() == [True, True]

    run(main(), bound=BOUND)


@ways()
@pytest.mark.parametrize("phase", ["transfer", "commit"])
def test_an_engine_killed_on_the_way_is_caught_up_when_it_is_back(site: Open, phase: str) -> None:
    async def main() -> None:
        async with site() as here:
            weights = noisy(here.first, 2)
            victim = here.two
            transport = Interfering(here.make(weights), victim.url, phase, victim.kill)
            try:
                update = await here.control.update_weights(transport)
                assert not update.outcomes[victim.url].ok and await here.has(here.one, weights)
            finally:
                victim.start()
            await here.caught_up(victim, weights)
            assert here.current() == [True, True]

    run(main(), bound=BOUND)


@ways("disk, changes")
def test_one_update_at_a_time(site: Open) -> None:
    async def main() -> None:
        async with site() as here:
            weights = noisy(here.first, 2)
            there, go_on = asyncio.Event(), asyncio.Event()

            async def wait() -> None:
                there.set()
                await go_on.wait()

            transport = Interfering(here.make(weights), here.one.url, "transfer", wait)
            updating = asyncio.create_task(here.control.update_weights(transport))
            await there.wait()
            with pytest.raises(ConfigError, match="one at a time"):
                await here.control.update_weights(here.make(noisy(here.first, 3)))
            assert await here.all_have(here.first)
            go_on.set()
            await updating
            assert await here.all_have(weights)

    run(main(), bound=BOUND)


@ways("shared memory", "disk", "broadcast, vLLM")
def test_an_update_that_is_cancelled_changes_nothing_and_another_succeeds(site: Open) -> None:
    async def main() -> None:
        async with site() as here:
            there = asyncio.Event()

            async def wait() -> None:
                there.set()
                await asyncio.Event().wait()

            transport = Interfering(here.make(noisy(here.first, 2)), here.one.url, "transfer", wait)
            updating = asyncio.create_task(here.control.update_weights(transport))
            await there.wait()
            updating.cancel()
            with pytest.raises(asyncio.CancelledError):
                await updating
            del transport, updating
            gc.collect()
            assert await here.all_have(here.first) and here.current() == [True, True]
            weights = noisy(here.first, 3)
            await here.control.update_weights(here.make(weights))
            assert await here.all_have(weights)

    run(main(), bound=BOUND)


@ways("disk, changes", which=lambda name: WAYS[name].changes)
def test_only_changes_are_sent_and_who_missed_one_gets_all(site: Open) -> None:
    async def main() -> None:
        async with site() as here:
            one, two = here.control._all()
            second = noisy(here.first, 2, only="layers.0.")
            transport = here.make(second)
            whole = sum(one.nbytes for one in second.values())
            part = sum(tensor.nbytes for name, tensor in second.items() if "layers.0." in name)
            failing = Interfering(transport, here.two.url, "prepare")
            here.control._readmission._held += 1  # it misses this one, and is not caught up either
            await here.control.update_weights(failing)
            assert here.current() == [True, False] and transport.bytes_for(one) == part
            here.control._readmission._held -= 1
            third = noisy(second, 3, only="norm")
            transport = here.make(third)
            await here.control.update_weights(transport)
            norms = sum(tensor.nbytes for name, tensor in third.items() if "norm" in name)
            assert (transport.bytes_for(one), transport.bytes_for(two)) == (norms, whole)
            assert await here.all_have(third)
            same = here.make({name: tensor.clone() for name, tensor in third.items()})
            await here.control.update_weights(same)
            assert same.bytes_for(one) == same.bytes_for(two) == 0 and await here.all_have(third)
            await asyncio.to_thread(here.two.ask, "POST", "/sleep?level=2")
            await asyncio.to_thread(here.two.ask, "POST", "/wake_up?tags=weights")
            fourth = noisy(third, 4, only="embed")
            transport = here.make(fourth)
            await here.control.update_weights(transport)
            assert transport.bytes_for(two) == whole, "what it had is gone"
            await asyncio.to_thread(here.two.ask, "POST", "/wake_up")
            await asyncio.to_thread(here.two.ask, "POST", "/resume")
            assert await here.all_have(fourth)

    run(main(), bound=BOUND)


@ways("disk", which=lambda name: WAYS[name].staged and not WAYS[name].changes)
def test_a_trainer_that_is_killed_leaves_nothing_that_stays(
    site: Open, way: str, checkpoint: Path, tmp_path: Path
) -> None:
    async def main() -> None:
        async with site() as here:
            words = [way, str(here.folder), str(checkpoint), here.one.url, here.two.url]
            trainer = await asyncio.create_subprocess_exec(sys.executable, "-c", TRAINER, *words, cwd=ROOT)
            assert await asyncio.wait_for(trainer.wait(), 60) == -signal.SIGKILL
            found = [one for one in left_behind(here.folder) if not one.startswith("/memfd")]  # not ours
            assert len(found) == (1 if way == "disk" else 0)
            for path in found:  # it is not removed before it is old
                os.utime(path, (0, 0))
            assert await here.all_have(here.first)
            weights = noisy(here.first, 2)
            await here.control.update_weights(here.make(weights))
            assert await here.all_have(weights)

    run(main(), bound=BOUND)


def test_files_of_a_trainer_that_runs_stay(tmp_path: Path) -> None:
    """Another one that writes to the same folder removes what is left of the dead, and no more."""

    async def main() -> None:
        scratch = Scratch(tmp_path, lambda path: (path / WEIGHTS).touch())
        path = await scratch.enter("one")
        assert await scratch.enter("two") == path
        dead = tmp_path / "penstock-weights-dead"
        dead.mkdir()
        for folder in (path, dead):
            os.utime(folder, (0, 0))
        sweep(tmp_path)
        assert left_behind(tmp_path) == [str(path)] and (path / WEIGHTS).exists()
        await scratch.leave("one")
        await scratch.leave("nobody")
        assert path.exists()
        await scratch.leave("two")
        assert left_behind(tmp_path) == []

    run(main())


def test_a_folder_whose_writing_is_cancelled_does_not_stay(tmp_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def write(path: Path) -> None:
        begun.set()
        assert go_on.wait(20)
        path.mkdir(exist_ok=True)  # as when it was only about to begin
        (path / WEIGHTS).touch()

    async def main() -> None:
        entering = asyncio.create_task(Scratch(tmp_path, write).enter("one"))
        await asyncio.to_thread(begun.wait, 20)
        entering.cancel()
        await asyncio.sleep(0.05)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await entering

    run(main())
    assert left_behind(tmp_path) == []
