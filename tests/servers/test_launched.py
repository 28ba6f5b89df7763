"""The life of a server: ready only when it is ours that answers, given up for a reason, gone afterwards."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, cast

import pytest

from penstock.errors import ConfigError, EngineError
from penstock.servers import launched
from penstock.servers.diagnosis import EngineDied, StartFailed
from penstock.servers.launched import LifeCycle
from penstock.servers.patterns import Kind
from tests.scripted import run, until
from tests.servers.fakes import FakeServer, nothing_left, processes

LOGS = Path(__file__).parent / "logs"


def start_failure(tag: str, life: LifeCycle | None = None, **behaviour: Any) -> StartFailed:
    """The error of a start that has to fail."""
    failure: list[StartFailed] = []

    async def scenario() -> None:
        with pytest.raises(StartFailed) as caught:
            async with FakeServer(tag, life=life, **behaviour):
                raise AssertionError("it cannot have become ready")
        failure.append(caught.value)
        assert processes(tag) == []

    run(scenario())
    return failure[0]


def test_ready_asked_stopped() -> None:
    stages: list[str] = []

    async def scenario(tag: str) -> None:
        life = LifeCycle(on_stage=stages.append)
        lines = ["Starting to load model x", "Capturing CUDA graphs (mixed, FULL)", "noise"]
        async with FakeServer(tag, life=life, lines=lines, daemons=2, bind_after=0.1) as server:
            assert await server.is_ready()
            response = await server.make_request("POST", "/v1/models", {"a": 1})
            assert (response.status, b'"path": "/v1/models"' in response.body) == (200, True)
            async with server.client() as client:
                assert await client.models() == ["fake"]
            assert server.log_tail[-1].endswith("startup complete.")
            assert server.pid in processes(tag)
            assert server.log_file is not None
            assert "noise" in server.log_file.read_text()
        assert processes(tag) == []
        assert not await server.is_ready()
        with pytest.raises(ConfigError, match="async with"):
            await server.make_request("GET", "/health")

    with nothing_left() as tag:
        run(scenario(tag))
    assert stages == ["starting", "loading weights", "capturing graphs", "ready"]


def test_twenty_at_once_have_twenty_ports() -> None:
    async def scenario(tag: str) -> None:
        servers = [FakeServer(tag, bind_after=0.05) for _ in range(20)]
        async with asyncio.timeout(25):
            await asyncio.gather(*(server.__aenter__() for server in servers))
            assert len({server.base_url for server in servers}) == 20
            assert all(await asyncio.gather(*(server.is_ready() for server in servers)))
            await asyncio.gather(*(server.__aexit__(None, None, None) for server in servers))

    with nothing_left() as tag:
        run(scenario(tag))


def test_a_server_of_somebody_else_on_the_port_is_not_taken_for_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launched, "TICK", 0.05)

    async def scenario(tag: str) -> None:
        life = LifeCycle(quiet_timeout=1.0)
        server = FakeServer(tag, life=life, lines=["Application startup complete."], silent=True)
        entering = asyncio.ensure_future(server.__aenter__())
        await until(lambda: server.base_url)
        port = int(server.base_url.rpartition(":")[2])

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            asked.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            writer.close()

        asked: list[bytes] = []
        other = await asyncio.start_server(answer, "127.0.0.1", port, reuse_address=True)
        with pytest.raises(StartFailed, match="has logged nothing for 1 s"):
            await entering
        other.close()
        await other.wait_closed()
        assert asked == []

    with nothing_left() as tag:
        run(scenario(tag))


def test_a_port_in_use_is_refused_at_once_and_its_holder_named() -> None:
    async def scenario(tag: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            with pytest.raises(ConfigError, match=rf"Port {port} .* by .*\(process {os.getpid()}\)"):
                async with FakeServer(tag, port=port):
                    pass

    with nothing_left() as tag:
        run(scenario(tag))


def test_a_named_port_is_used_again_at_once() -> None:
    async def scenario(tag: str) -> None:
        port = 0
        for _ in range(3):
            async with FakeServer(tag, port=port) as server:
                await server.make_request("GET", "/health")
                assert port in (0, int(server.base_url.rpartition(":")[2]))
                port = int(server.base_url.rpartition(":")[2])

    with nothing_left() as tag:
        run(scenario(tag))


def test_an_end_before_ready_is_explained_by_the_log() -> None:
    with nothing_left() as tag:
        error = start_failure(tag, daemons=1, log=str(LOGS / "vllm-kv_cache-small.log"), exit=1)
    assert error.diagnosis is not None and error.status == 1
    assert error.diagnosis.kind is Kind.KV_CACHE
    assert "no room for one sequence of 2048 tokens; 384 would fit" in str(error)
    assert "Lower max_model_len" in str(error)
    assert any("See root cause above" in line for line in error.log_tail)
    assert error.log_file is not None and str(error.log_file) in str(error)


def test_a_log_that_says_lost_is_believed_though_the_process_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launched, "FATAL_GRACE", 0.2)
    with nothing_left() as tag:
        error = start_failure(tag, log=str(LOGS / "sglang-port_in_use.log"), silent=True, daemons=1)
    assert error.diagnosis is not None and error.status is None
    assert error.diagnosis.kind is Kind.PORT_IN_USE


def test_a_start_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launched, "TICK", 0.05)
    with nothing_left() as tag:
        error = start_failure(tag, LifeCycle(quiet_timeout=1.5), lines=["hello"], silent=True)
    assert error.diagnosis is not None
    assert error.diagnosis.kind is Kind.STALLED
    assert error.log_tail == ("hello",)


def test_the_whole_start_can_be_bounded() -> None:
    with nothing_left() as tag:
        error = start_failure(tag, LifeCycle(start_timeout=0.4), ignore_term=True, daemons=1, silent=True)
    assert "was not ready after 0.4 s" in str(error)


def test_a_process_killed_without_a_word() -> None:
    with nothing_left() as tag:
        error = start_failure(tag, kill=9)
    assert error.diagnosis is not None
    assert (error.diagnosis.kind, error.status) == (Kind.KILLED, -9)


async def failure_of(request: Coroutine[Any, Any, Any]) -> BaseException | None:
    try:
        await request
    except Exception as error:
        return error
    return None


def test_a_death_cancels_the_block_and_what_is_asked_ends_at_once() -> None:
    left: list[int] = []
    failures: list[BaseException | None] = []
    ready: list[bool] = []

    async def scenario(tag: str) -> None:
        server = FakeServer(tag, daemons=2, ignore_term=True)
        with pytest.raises(EngineDied, match=r"The engine died \(exit -9\)") as caught:
            async with server:
                asking = asyncio.ensure_future(server.make_request("GET", "/hang"))
                await asyncio.sleep(0.05)
                assert server.pid is not None
                os.kill(server.pid, signal.SIGKILL)
                try:
                    await asyncio.sleep(30)
                finally:
                    left.extend(processes(tag))
                    await asyncio.wait([asking], timeout=1.0)
                    failures.append(asking.exception())
                    failures.append(await failure_of(server.make_request("GET", "/health")))
                    ready.append(await server.is_ready())
        assert (left, ready) == ([], [False])
        assert all(failure is caught.value for failure in [*failures, server.died.result()])

    with nothing_left() as tag:
        run(scenario(tag))


def test_an_error_of_the_block_that_comes_of_the_death_is_told_as_the_death() -> None:
    async def scenario(tag: str) -> None:
        with pytest.raises(EngineDied):
            async with FakeServer(tag) as server:
                assert server.pid is not None
                os.kill(server.pid, signal.SIGKILL)
                await asyncio.shield(server.died)
                raise RuntimeError("no answer")
        task = asyncio.current_task()
        assert task is not None and task.cancelling() == 0
        await asyncio.sleep(0.01)  # no cancellation is left over

    with nothing_left() as tag:
        run(scenario(tag))


def test_a_fleet_is_told_instead_of_cancelled() -> None:
    deaths: list[EngineDied] = []

    async def scenario(tag: str) -> None:
        async with FakeServer(tag, life=LifeCycle(on_death=deaths.append)) as server:
            assert server.pid is not None
            os.kill(server.pid, signal.SIGTERM)
            error = await asyncio.shield(server.died)
            await asyncio.sleep(0.05)
            assert deaths == [error]
            assert error.status == -signal.SIGTERM

    with nothing_left() as tag:
        run(scenario(tag))


def test_a_cancellation_from_outside_goes_before_the_death() -> None:
    async def scenario(tag: str) -> None:
        async def block() -> None:
            async with FakeServer(tag) as server:
                assert server.pid is not None
                os.kill(server.pid, signal.SIGKILL)
                try:
                    await asyncio.sleep(30)
                finally:
                    task = asyncio.current_task()
                    assert task is not None
                    task.cancel()

        with pytest.raises(asyncio.CancelledError):
            await asyncio.create_task(block())

    with nothing_left() as tag:
        run(scenario(tag))


def test_a_line_that_speaks_of_an_end_counts_only_when_the_server_is_sick(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launched, "LAST_WORDS", 0.05)
    line = "/say/ERROR+08-01+12:00:00+[core.py:1]+EngineCore+encountered+a+fatal+error."

    async def scenario(tag: str) -> None:
        async with FakeServer(tag) as server:
            await server.make_request("GET", line)
            await asyncio.sleep(0.2)
            assert not server.died.done(), "a prompt may say such a thing"
        with pytest.raises(EngineDied) as caught:
            async with FakeServer(tag, daemons=1, ignore_term=True) as server:
                await server.make_request("GET", "/sick")
                await server.make_request("GET", line)
                await asyncio.sleep(10)
        assert caught.value.diagnosis is not None
        assert caught.value.diagnosis.kind is Kind.ENGINE_DIED

    with nothing_left() as tag:
        run(scenario(tag))


def test_closed_output_is_no_death() -> None:
    async def scenario(tag: str) -> None:
        async with FakeServer(tag, close_output=True) as server:
            await asyncio.sleep(0.1)
            assert await server.is_ready()

    with nothing_left() as tag:
        run(scenario(tag))


def test_an_error_of_the_block_passes_and_leaves_nothing() -> None:
    async def scenario(tag: str) -> None:
        with pytest.raises(ZeroDivisionError):
            async with FakeServer(tag, daemons=1):
                raise ZeroDivisionError

    with nothing_left() as tag:
        run(scenario(tag))


@pytest.mark.parametrize("wait", [0.0, 0.05, 0.2])
def test_a_start_that_is_cancelled_leaves_nothing(wait: float) -> None:
    async def scenario(tag: str) -> None:
        entering = asyncio.create_task(FakeServer(tag, daemons=1, silent=True).__aenter__())
        await asyncio.sleep(wait)
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entering

    with nothing_left() as tag:
        run(scenario(tag))


def test_a_second_cancellation_hurries_the_stop() -> None:
    async def scenario(tag: str) -> None:
        inside = asyncio.Event()

        async def block() -> None:
            async with FakeServer(tag, ignore_term=True, life=LifeCycle(stop_grace=20.0)):
                inside.set()
                await asyncio.sleep(30)

        task = asyncio.create_task(block())
        await inside.wait()
        for _ in range(2):
            task.cancel()
            await asyncio.sleep(0.1)
        await asyncio.wait([task], timeout=3.0)
        assert task.done() and task.cancelled()

    with nothing_left() as tag:
        run(scenario(tag))


def test_secrets_reach_neither_file_nor_caller() -> None:
    async def scenario(tag: str) -> None:
        lines = [
            "key is wonderful-key",
            "HF_TOKEN=hf_abcdefghijklmnopqrstuv",
            "authorization: Bearer abc.def",
        ]
        env = {"WANDB_API_KEY": "w4ndb-secret", "TOKENIZERS_PARALLELISM": "false"}
        async with FakeServer(
            tag, api_key="wonderful-key", env=env, lines=[*lines, "w4ndb-secret false"]
        ) as server:
            assert server.log_file is not None
            for text in (server.log_file.read_text(), "\n".join(server.log_tail), repr(server.spec)):
                for secret in ("wonderful-key", "abcdefghijklmnop", "abc.def", "w4ndb-secret"):
                    assert secret not in text.replace("'WANDB_API_KEY': 'w4ndb-secret'", "")
            assert "*** false" in "\n".join(server.log_tail)

    with nothing_left() as tag:
        run(scenario(tag))


@pytest.mark.parametrize("field", ["start_timeout", "quiet_timeout"])
def test_times_that_cannot_be(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        LifeCycle(**cast(Any, {field: 0.0}))


def test_a_log_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    async def scenario(tag: str) -> None:
        with pytest.raises(ConfigError, match="log folder"):
            async with FakeServer(tag, life=LifeCycle(log_folder=tmp_path / "file")):
                pass

    with nothing_left() as tag:
        run(scenario(tag))


def test_errors_of_a_server_are_engine_errors() -> None:
    assert issubclass(StartFailed, EngineError) and issubclass(EngineDied, EngineError)
