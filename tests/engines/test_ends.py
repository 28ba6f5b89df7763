"""How the engines start, fail and die, each time with nothing left of them."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.errors import ConfigError
from penstock.models import ARITHMETIC
from penstock.servers.diagnosis import EngineDied, StartFailed
from penstock.servers.launched import LaunchedServer, LifeCycle
from penstock.servers.patterns import Kind
from tests.engines.engines import Engine
from tests.engines.live import Live, core_pid
from tests.scripted import until
from tests.servers.fakes import TAG, processes, wait_until_gone

pytestmark = pytest.mark.engines

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tag(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """Marks every process of the test; afterwards none may be left."""
    name = tmp_path.name
    monkeypatch.setenv(TAG, name)
    yield name
    assert processes(name) == []


def start_failure(server: LaunchedServer) -> StartFailed:
    async def scenario() -> StartFailed:
        with pytest.raises(StartFailed) as caught:
            async with server:
                raise AssertionError("it cannot have become ready")
        return caught.value

    return asyncio.run(scenario())


def death(server: LaunchedServer, kill: Any) -> tuple[EngineDied, float]:
    """The error of a block in which `kill` is done to a server, and the seconds until it was noticed."""

    async def scenario() -> tuple[EngineDied, float]:
        killed = 0.0
        with pytest.raises(EngineDied) as caught:
            async with server:
                hanging = asyncio.ensure_future(
                    server.make_request(
                        "POST",
                        "/v1/completions",
                        {"model": server.name, "prompt": "1+1", "max_tokens": 1900, "ignore_eos": True},
                    )
                )
                await asyncio.sleep(0.5)
                kill(server)
                killed = time.monotonic()
                try:
                    await asyncio.sleep(60)
                finally:
                    noticed = time.monotonic() - killed
                    await asyncio.wait([hanging], timeout=5.0)
                    assert hanging.done(), "what was asked ends with the server"
                    if hanging.exception() is not None:
                        assert isinstance(hanging.exception(), Exception)
        return caught.value, noticed

    return asyncio.run(scenario())


def test_kill_9_of_the_server(engine: Engine, life: LifeCycle, tag: str) -> None:
    error, seconds = death(engine.make(life=life), lambda server: os.kill(server.pid, signal.SIGKILL))
    assert error.status == -9
    assert seconds < 5.0


def test_kill_9_of_the_child_that_computes(engine: Engine, life: LifeCycle, tag: str) -> None:
    if not engine.core:
        pytest.skip(f"{engine.name} computes in the server's own process")

    def kill(server: LaunchedServer) -> None:
        os.kill(core_pid(engine, server), signal.SIGKILL)

    error, seconds = death(engine.make(life=life), kill)
    assert error.diagnosis is not None and error.diagnosis.kind is Kind.ENGINE_DIED, error
    assert seconds < 15.0


def test_kill_9_of_the_owner(engine: Engine, tmp_path: Path, tag: str) -> None:
    program = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from penstock.servers.launched import LifeCycle\n"
        "from tests.engines.engines import ENGINES\n"
        "async def main():\n"
        "    life = LifeCycle(log_folder=Path(sys.argv[2]))\n"
        "    async with ENGINES[sys.argv[1]].make(life=life):\n"
        "        print('in', flush=True)\n"
        "        await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    owner = subprocess.Popen(
        [sys.executable, "-c", program, engine.name, str(tmp_path)],
        stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    try:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "in\n"
        assert len(processes(tag)) >= 2
        owner.kill()
        assert wait_until_gone(tag, 10.0) < 5.0
    finally:
        owner.kill()
        owner.communicate(timeout=10)


def test_a_port_in_use(engine: Engine, life: LifeCycle, tag: str) -> None:
    async def scenario(port: int) -> None:
        with pytest.raises(ConfigError, match=rf"Port {port} .* cannot be used by"):
            async with engine.make(life=life, port=port):
                pass

    with socket.create_server(("127.0.0.1", 0)) as other:
        started = time.monotonic()
        asyncio.run(scenario(other.getsockname()[1]))
        assert time.monotonic() - started < 5.0


def test_a_port_that_is_taken_while_the_engine_starts(engine: Engine, life: LifeCycle, tag: str) -> None:
    """Somebody else listens, with /health or not, before the engine comes to bind."""

    async def scenario() -> StartFailed:
        server = engine.make(life=life)
        entering = asyncio.ensure_future(server.__aenter__())
        await until(lambda: server.base_url)
        with socket.socket() as thief:
            thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            thief.bind(("127.0.0.1", int(server.base_url.rpartition(":")[2])))
            thief.listen()
            with pytest.raises(StartFailed) as caught:
                await entering
        return caught.value

    error = asyncio.run(scenario())
    assert error.diagnosis is not None and error.diagnosis.kind is Kind.PORT_IN_USE, error


def test_a_wrong_model_path(engine: Engine, life: LifeCycle, tag: str) -> None:
    with pytest.raises(ConfigError, match="There is no model at /no/such/folder"):
        engine.make(Path("/no/such/folder"), life=life)
    error = start_failure(engine.make(Path("no-such/model"), life=life))
    expected = Kind.REFUSED if engine.name == "embedded" else Kind.HUB_UNREACHABLE
    assert error.diagnosis is not None and error.diagnosis.kind is expected, error


def test_a_folder_without_weights(engine: Engine, life: LifeCycle, tag: str, tmp_path: Path) -> None:
    folder = shutil.copytree(ARITHMETIC, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    error = start_failure(engine.make(folder, life=life))
    expected = Kind.REFUSED if engine.name == "embedded" else Kind.WEIGHTS
    assert error.diagnosis is not None and error.diagnosis.kind is expected, error


def test_a_kv_cache_that_is_too_small(engine: Engine, life: LifeCycle, tag: str) -> None:
    small = {"max_total_tokens": 4} if engine.name == "sglang" else {"kv_cache_memory_bytes": "1M"}
    error = start_failure(engine.make(life=life, extra_args=small))
    expected = Kind.REFUSED if engine.name == "embedded" else Kind.KV_CACHE
    assert error.diagnosis is not None and error.diagnosis.kind is expected, error


def test_an_unknown_flag(engine: Engine, life: LifeCycle, tag: str) -> None:
    error = start_failure(engine.make(life=life, extra_args={"no_such_flag": 3}))
    assert error.diagnosis is not None and error.diagnosis.kind is Kind.BAD_FLAG, error
    assert "no-such-flag" in error.diagnosis.sentence


@pytest.mark.parametrize("size", [{"tp": 2}, {"dp": 2}], ids=str)
def test_two_workers(engine: Engine, life: LifeCycle, tag: str, size: dict[str, int]) -> None:
    if engine.name != "vllm":
        pytest.skip(f"{engine.name} does not run in parallel on a CPU")
    with Live(engine, engine.make(life=life, **size)) as live:
        chat = {"model": live.server.name, "messages": [{"role": "user", "content": "What is 12 + 30?"}]}
        path = "/v1/chat/completions"
        requests = [live.begin(live.server.make_request("POST", path, chat)) for _ in range(8)]
        answers = [json.loads(request.result(60).body) for request in requests]
        assert all("42" in answer["choices"][0]["message"]["content"] for answer in answers)
        assert live.server._process is not None
        assert len(live.server._process.tree) >= 4


def test_a_start_that_is_cancelled(engine: Engine, life: LifeCycle, tag: str) -> None:
    async def scenario() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(6.0):
                async with engine.make(life=life, extra_args={}):
                    await asyncio.sleep(60)

    asyncio.run(scenario())


def test_the_key_is_asked_for_and_not_shown(engine: Engine, life: LifeCycle, tag: str) -> None:
    with Live(engine, engine.make(life=life, api_key="a-very-secret-key")) as live:
        assert live.complete(prompt="1+1", max_tokens=2)["choices"]
        key, live.server.api_key = live.server.api_key, "wrong"
        assert live.call(live.completion(prompt="1+1", max_tokens=2)).status == 401
        live.server.api_key = key
        assert live.server.log_file is not None
        assert "a-very-secret-key" not in live.server.log_file.read_text()
