"""Weight updates of embedded engines in processes of their own: what they generate, what a kill -9 does."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from time import monotonic, sleep

import pytest
import torch
from safetensors.torch import load_file, save_file

from penstock.client import Client
from penstock.control.control import Control
from penstock.control.engine import Engine
from penstock.control.staged import HttpChunks
from penstock.control.tensors import checksum, copied, safetensors_file
from penstock.control.transport import DiskReload
from penstock.engine.weight_update import tensor_checksum
from penstock.errors import ConfigError, ControlFailed, EngineError, RequestRejected
from penstock.fleet.fleet import Fleet
from penstock.models import ARITHMETIC
from penstock.sample import SamplingParams
from tests.scripted import run, until

START = 240.0
"""Seconds an engine may take to start."""
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, seed=1)
PROMPT = "What is 12 + 30?"


class Process:
    """One engine; it can be killed, and started again at the same port."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = int(free.getsockname()[1])
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        words = ["--model", str(self.folder), "--host", "127.0.0.1", "--port", str(self.port)]
        self._child = subprocess.Popen(
            [sys.executable, "-m", "penstock.engine", *words, "--threads", "1"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def ready(self) -> None:
        deadline = monotonic() + START
        while monotonic() < deadline and self._child.poll() is None:
            try:
                connection = HTTPConnection("127.0.0.1", self.port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                sleep(0.05)
            finally:
                connection.close()
        raise AssertionError("the engine did not start")

    def kill(self) -> None:
        self._child.kill()
        self._child.wait(10)


@contextmanager
def processes(*folders: Path) -> Iterator[list[Process]]:
    engines = [Process(folder) for folder in folders]
    try:
        for engine in engines:
            engine.ready()
        yield engines
    finally:
        for engine in engines:
            engine.kill()


def perturbed(folder: Path, seed: int) -> Path:
    """The arithmetic model with noise on every tensor."""
    shutil.copytree(ARITHMETIC, folder)
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(ARITHMETIC / "model.safetensors")
    noisy = {
        name: (
            one.float() + 1.0 * one.float().std(correction=0) * torch.randn(one.shape, generator=generator)
        ).to(one.dtype)
        for name, one in tensors.items()
    }
    save_file(noisy, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_bytes_and_checksum_are_those_of_the_engine(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 5), "a": torch.randn(7).bfloat16(), "c": torch.randn(2, 2).t().half()}
    copies = copied(tensors)
    assert checksum(copies) == tensor_checksum(tensors)
    (tmp_path / "x").write_bytes(safetensors_file(copies))
    read = load_file(tmp_path / "x")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    with pytest.raises(ConfigError, match="x has dtype torch.int8"):
        HttpChunks({"x": torch.zeros(2, dtype=torch.int8)})
    with pytest.raises(ConfigError, match="no tensors"):
        HttpChunks({})


@pytest.mark.slow
def test_engines_get_new_weights_from_disk_and_over_http_and_survive_what_is_wrong(tmp_path: Path) -> None:
    """Two engines from the shipped model, and one started with each set of other weights to compare with."""
    second, third = perturbed(tmp_path / "second", 2), perturbed(tmp_path / "third", 3)
    with processes(ARITHMETIC, ARITHMETIC, second, third) as (one, two, fresh_second, fresh_third):

        async def greedy(url: str) -> str:
            async with Client(url) as client:
                return (await client.chat([{"role": "user", "content": PROMPT}], GREEDY)).text

        async def main() -> None:
            begin, by_disk, by_http = [
                await greedy(engine.url) for engine in (one, fresh_second, fresh_third)
            ]
            assert len({begin, by_disk, by_http}) == 3
            async with Fleet([one.url, two.url]) as fleet, Control(fleet) as control:

                async def said() -> list[str]:
                    return [await greedy(engine.url) for engine in (one, two)]

                assert await said() == [begin, begin]
                update = await control.reload_weights(second)
                assert update.version == 1 and await said() == [by_disk, by_disk]
                tensors = load_file(third / "model.safetensors")
                transport = HttpChunks(tensors, chunk=1 << 20)
                tensors["model.norm.weight"].zero_()  # the trainer goes on: what is sent is a copy
                update = await control.update_weights(transport)
                assert update.version == 2 and await said() == [by_http, by_http]
                labels = await control.weight_versions()
                assert [label.value for label in labels.values()] == [2, 2]
                with pytest.raises(ControlFailed) as failed:
                    await control.reload_weights(tmp_path / "nowhere")
                assert all(isinstance(o.error, RequestRejected) for o in failed.value.outcomes.values())
                transport.checksum = "0" * 64
                with pytest.raises(ControlFailed, match="checksum"):
                    await control.update_weights(transport)
                assert fleet.policy_version == 2 and await said() == [by_http, by_http]
                assert [endpoint.current for endpoint in fleet.endpoints] == [True, True]
                assert (await control.reload_weights(ARITHMETIC)).version == 3
                assert await said() == [begin, begin]

        run(main())


class KillsOne(DiskReload):
    """The engine at a URL dies as its commit begins."""

    def __init__(self, path: Path, victim: Process) -> None:
        super().__init__(path)
        self._victim = victim
        self.kills = 1

    async def commit(self, engine: Engine, version: int) -> None:
        if engine.name == self._victim.url and self.kills:
            self.kills -= 1
            asyncio.get_running_loop().call_later(0.001, self._victim.kill)
            await engine.ask(*(await engine.dialect()).reload(self.path, version))
            raise EngineError("it was not killed in time")
        await super().commit(engine, version)


@pytest.mark.slow
def test_an_engine_killed_in_an_update_and_restarted_with_old_weights_catches_up(tmp_path: Path) -> None:
    folder = perturbed(tmp_path / "second", 2)
    with processes(ARITHMETIC, ARITHMETIC, folder) as (one, two, fresh):

        async def main() -> None:
            async with Client(fresh.url) as client:
                expected = (await client.chat([{"role": "user", "content": PROMPT}], GREEDY)).text
            async with Fleet([one.url, two.url]) as fleet, Control(fleet) as control, Client(fleet) as client:

                async def answers(count: int) -> set[tuple[str | None, str]]:
                    asked = [client.chat([{"role": "user", "content": PROMPT}], GREEDY) for _ in range(count)]
                    return {(sample.endpoint, sample.text) for sample in await asyncio.gather(*asked)}

                update = await control.update_weights(KillsOne(folder, two))
                assert (update.outcomes[one.url].ok, update.outcomes[two.url].ok) == (True, False)
                assert [end.policy_version for end in fleet.endpoints] == [1, None]
                assert await answers(16) == {(one.url, expected)}
                two.start()
                seen: set[tuple[str | None, str]] = set()
                while not fleet.endpoints[1].current:
                    seen |= await answers(4)
                assert seen <= {(one.url, expected)}
                assert await answers(16) == {(one.url, expected), (two.url, expected)}
                two.kill()  # and once more, when nothing is going on
                await answers(16)
                await until(lambda: not fleet.endpoints[1].up)
                two.start()
                while not (fleet.endpoints[1].up and fleet.endpoints[1].current):
                    assert {text for _, text in await answers(4)} == {expected}
                assert await answers(16) == {(one.url, expected), (two.url, expected)}

        run(main())
