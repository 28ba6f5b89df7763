"""Pause, sleep, caches and keys: answers as vLLM 0.32 gave them, and what becomes of requests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.engine.async_engine import AsyncEngine
from penstock.engine.generation import Generation
from penstock.engine.sampling import SamplingParams
from penstock.errors import EngineError
from tests.engine_server.cases import HELLO
from tests.engine_server.running import TIMEOUT, Running, engine_of, running
from tests.engine_server.test_in_flight import CHAT, COMPLETIONS, LONG, Posted, busy

PAUSED = {"status": "paused"}
RESUMED = {"status": "resumed"}


@pytest.fixture
def idle(server: Running) -> Iterator[Running]:
    """The common server, running again at the end."""
    yield server
    server.send("POST", "/wake_up")
    server.wait_until(lambda: busy(server) == 0, "nothing in flight")


def state(server: Running) -> tuple[bool, bool]:
    """(is_paused, is_sleeping)."""
    paused, sleeping = (server.send("GET", path) for path in ("/is_paused", "/is_sleeping"))
    return json.loads(paused[1])["is_paused"], json.loads(sleeping[1])["is_sleeping"]


def tokens(server: Running) -> float:
    return server.metric("generation_tokens_total")


def begin(server: Running, **more: Any) -> Posted:
    """A long request that has some tokens."""
    before = tokens(server)
    request = Posted(server, COMPLETIONS, LONG | {"return_token_ids": True} | more)
    server.wait_until(lambda: tokens(server) > before + 5, "a few tokens")
    return request


def streamed(request: Posted) -> tuple[list[int], str | None]:
    """Token ids and finish reason of a stream that has ended in form."""
    request.join(30)
    assert not request.is_alive()
    *events, last, end = request.content.decode().split("\n\n")
    assert (last, end) == ("data: [DONE]", "")
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    return [id for choice in choices for id in choice["token_ids"]], choices[-1]["finish_reason"]


def outcome(request: Posted, stream: bool) -> tuple[list[int], str | None]:
    if stream:
        return streamed(request)
    choice = request.answer()["choices"][0]
    return choice["token_ids"], choice["finish_reason"]


def whole(server: Running) -> list[int]:
    ids: list[int] = server.post(COMPLETIONS, LONG | {"return_token_ids": True})["choices"][0]["token_ids"]
    return ids


@pytest.mark.parametrize("stream", [False, True])
def test_pause_aborts_and_holds_what_comes_later(idle: Running, stream: bool) -> None:
    expected = whole(idle)
    request = begin(idle, stream=stream)
    assert idle.post("/pause", None) == PAUSED
    ids, reason = outcome(request, stream)
    assert reason == "abort"
    assert 5 < len(ids) < 400 and ids == expected[: len(ids)]
    assert state(idle) == (True, True)
    count = tokens(idle)
    later = Posted(idle, COMPLETIONS, LONG | {"max_tokens": 3})
    idle.wait_until(lambda: idle.metric("num_requests_waiting") == 1, "held back")
    assert tokens(idle) == count
    assert idle.send("GET", "/health")[0] == 200
    assert idle.post("/resume", None) == RESUMED
    assert later.answer()["usage"]["completion_tokens"] == 3
    assert state(idle) == (False, False)


@pytest.mark.parametrize("stream", [False, True])
def test_pause_that_waits_lets_requests_finish(idle: Running, stream: bool) -> None:
    expected = whole(idle)
    request = begin(idle, stream=stream)
    pause = Posted(idle, "/pause?mode=wait", None)
    idle.wait_until(lambda: state(idle)[0], "paused")
    later = Posted(idle, COMPLETIONS, LONG | {"max_tokens": 3})
    assert pause.answer() == PAUSED
    assert busy(idle) == 1 and later.is_alive(), "only what came later is there, and is held"
    assert outcome(request, stream) == (expected, "length")
    assert idle.post("/resume", None) == RESUMED
    assert later.answer()["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("clear_cache", ["true", "off"])
def test_pause_that_keeps_freezes_requests_in_place(idle: Running, stream: bool, clear_cache: str) -> None:
    expected = whole(idle)
    request = begin(idle, stream=stream)
    assert idle.post(f"/pause?mode=keep&clear_cache={clear_cache}", None) == PAUSED
    count = tokens(idle)
    running = idle.metric("num_requests_running")
    assert running == (clear_cache == "off"), "with its cache a sequence gives up its place"
    later = Posted(idle, COMPLETIONS, LONG | {"max_tokens": 3})
    idle.wait_until(lambda: busy(idle) == 2, "both are there")
    assert tokens(idle) == count and request.is_alive()
    assert idle.post("/resume", None) == RESUMED
    assert outcome(request, stream) == (expected, "length")
    assert later.answer()["usage"]["completion_tokens"] == 3


def test_samples_of_one_prompt_are_frozen_together(idle: Running) -> None:
    body = LONG | {"n": 3, "temperature": 1.0, "seed": 3, "return_token_ids": True, "max_tokens": 200}
    expected = [choice["token_ids"] for choice in idle.post(COMPLETIONS, body)["choices"]]
    request = begin(idle, **body)
    for _ in range(3):
        idle.post("/pause?mode=keep", None)
        idle.post("/resume", None)
    assert [choice["token_ids"] for choice in request.answer()["choices"]] == expected


def test_begun_request_without_a_place_is_waited_for(checkpoint: Path) -> None:
    """Frozen with its cache cleared it is in the queue, and still one of those that have begun."""
    with running(engine_of(checkpoint)) as server:
        request = begin(server)
        server.post("/pause?mode=keep", None)
        assert server.metric("num_requests_running") == 0
        later = Posted(server, COMPLETIONS, LONG | {"max_tokens": 3})
        server.wait_until(lambda: busy(server) == 2, "both are there")
        assert server.post("/pause?mode=wait", None) == PAUSED
        assert request.answer()["choices"][0]["finish_reason"] == "length"
        assert later.is_alive() and server.metric("num_requests_waiting") == 1
        server.post("/resume", None)
        later.answer()


@pytest.mark.parametrize("command", ["/resume", "/pause?mode=keep", "/wake_up"])
def test_waiting_pause_ends_with_another_command(idle: Running, command: str) -> None:
    request = begin(idle, max_tokens=480)
    pause = Posted(idle, "/pause?mode=wait", None)
    idle.wait_until(lambda: state(idle)[0], "paused")
    idle.post(command, None)
    pause.join(30)
    assert pause.status == 400 and b"Not waited for to the end" in pause.content
    assert request.is_alive()
    idle.post("/pause", None)
    request.answer()


def test_held_requests_can_be_aborted_and_given_up(idle: Running) -> None:
    idle.post("/pause", None)
    aborted = Posted(idle, CHAT, {"messages": HELLO}, {"x-request-id": "held"})
    client = idle.raw(COMPLETIONS, LONG)
    idle.wait_until(lambda: busy(idle) == 2, "both held")
    client.close()
    idle.wait_until(lambda: busy(idle) == 1, "one given up")
    idle.post("/abort_requests", {"request_ids": ["held"]})
    choice = aborted.answer()["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("abort", "")
    swept = Posted(idle, COMPLETIONS, LONG)
    idle.wait_until(lambda: busy(idle) == 1, "held")
    idle.post("/pause", None)
    assert swept.answer()["choices"][0]["finish_reason"] == "abort"


def test_what_a_pause_ends_is_told_before_the_pause_is(checkpoint: Path) -> None:
    async def run() -> list[str]:
        told: list[str] = []
        engine = AsyncEngine(engine_of(checkpoint))
        engine.start()
        params = SamplingParams(max_tokens=400, ignore_eos=True)
        for number in range(20):
            generation = Generation(
                str(number),
                [40 + number],
                params,
                lambda deltas, done, error: told.append("ended"),
                detokenizers=[None],
                streamed=False,
                include_stop_token=False,
            )
            engine.submit(generation)
        await asyncio.sleep(0.05)
        for mode in ("abort", "wait"):
            paused = asyncio.wrap_future(engine.pause(mode, True))
            paused.add_done_callback(lambda _: told.append("paused"))
            await asyncio.wait_for(paused, TIMEOUT)
        await engine.close()
        with pytest.raises(EngineError, match="shutting down"):
            await asyncio.wait_for(asyncio.wrap_future(engine.resume()), TIMEOUT)
        return told

    assert asyncio.run(run()) == ["ended"] * 20 + ["paused"] * 2


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("/pause?mode=nonsense", "query.mode"),
        ("/pause?mode=", "query.mode"),
        ("/pause?clear_cache=maybe", "query.clear_cache"),
        ("/sleep?level=5", "query.level"),
        ("/sleep?level=x", "query.level"),
        ("/sleep?level=0&mode=nope", "query.mode"),
        ("/reset_prefix_cache?reset_running_requests=maybe", "query.reset_running_requests"),
        ("/reset_prefix_cache?reset_external=maybe", "query.reset_external"),
    ],
)
def test_wrong_parameter_is_refused_by_name(idle: Running, path: str, param: str) -> None:
    status, content = idle.send("POST", path)
    error = json.loads(content)["error"]
    assert (status, error["type"], error["param"], error["code"]) == (400, "Bad Request", param, 400)
    assert state(idle) == (False, False)


def test_sleep_and_wake_up_answer_as_vllm(idle: Running) -> None:
    def post(path: str) -> Any:
        return idle.post(path, None)

    assert post("/sleep") == {"status": "sleeping", "level": 1}
    assert state(idle) == (True, True)
    assert post("/wake_up?tags=nonsense") == {"status": "sleeping", "tags": ["nonsense"]}
    assert post("/wake_up?tags=weights") == {"status": "sleeping", "tags": ["weights"]}
    assert state(idle) == (True, True)
    both = ["kv_cache", "weights"]
    assert post("/wake_up?tags=kv_cache&tags=weights") == {"status": "sleeping", "tags": both}
    assert post("/wake_up?tags=kv_cache") == {"status": "awake", "tags": ["kv_cache"]}
    assert state(idle) == (False, False)
    assert post("/wake_up") == {"status": "awake", "tags": None}
    assert post("/sleep?level=0") == {"status": "sleeping", "level": 0}
    assert state(idle) == (True, True)
    assert post("/wake_up?tags=scheduling") == {"status": "awake", "tags": ["scheduling"]}
    assert state(idle) == (False, False)
    assert post("/sleep?level=0") and post("/resume") == RESUMED


@pytest.mark.parametrize("mode", ["abort", "wait", "keep"])
@pytest.mark.parametrize("level", [0, 1])
def test_requests_outlast_sleep(idle: Running, mode: str, level: int) -> None:
    expected = whole(idle)
    request = begin(idle)
    assert idle.post(f"/sleep?level={level}&mode={mode}", None) == {"status": "sleeping", "level": level}
    later = Posted(idle, COMPLETIONS, LONG | {"return_token_ids": True})
    idle.wait_until(lambda: busy(idle) == 1 + (mode == "keep"), "held back")
    assert idle.post("/wake_up", None)["status"] == "awake"
    ids, reason = outcome(request, False)
    assert reason == ("abort" if mode == "abort" else "length")
    assert ids == (expected[: len(ids)] if mode == "abort" else expected)
    assert later.answer()["choices"][0]["token_ids"] == expected


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_sleep_gives_the_cache_s_memory_back(checkpoint: Path) -> None:
    with running(engine_of(checkpoint, max_model_len=2048, num_gpu_blocks_override=1 << 14)) as server:
        prompts = [[40 + i] * 1900 for i in range(10)]
        body = {"prompt": prompts, "max_tokens": 1, "temperature": 0}
        expected = server.post(COMPLETIONS, body)["choices"][0]
        held = 10 * 1900 * 2 * 2 * 2 * 32 * 4
        before = resident_bytes()
        server.post("/sleep", None)
        assert before - resident_bytes() > 0.8 * held
        assert server.send("POST", "/resume")[0] == 400
        assert state(server) == (True, True)
        server.post("/wake_up", None)
        again = body | {"prompt": prompts[0]}
        assert server.post(COMPLETIONS, again)["choices"][0] == expected


def test_prefix_cache_is_reset_as_vllm_does(idle: Running) -> None:
    expected = whole(idle)
    assert idle.post("/reset_prefix_cache", None) == {"success": True}
    request = begin(idle)
    assert idle.post("/reset_prefix_cache", None) == {"success": False}
    again = "/reset_prefix_cache?reset_running_requests=true&reset_external=true"
    assert idle.post(again, None) == {"success": True}
    assert outcome(request, False) == (expected, "length")


def test_world_size_and_server_info(idle: Running) -> None:
    for path in ("/get_world_size", "/get_world_size?include_dp=false"):
        assert json.loads(idle.send("GET", path)[1]) == {"world_size": 1}
    text, as_json = (
        json.loads(idle.send("GET", f"/server_info{query}")[1])["vllm_config"]
        for query in ("", "?config_format=json")
    )
    assert "max_num_seqs=256" in text and as_json["max_num_seqs"] == 256


@pytest.mark.parametrize("keys", [("sesame",), ("other", "sesame", "schlüssel")])
def test_api_key_guards_what_vllm_guards(checkpoint: Path, keys: tuple[str, ...]) -> None:
    with running(engine_of(checkpoint), api_keys=keys) as server:

        def status(path: str, key: str | None, method: str = "GET") -> int:
            headers = {} if key is None else {"authorization": key}
            status, content = server.send(method, path, headers=headers)
            assert status != 401 or content == b'{"error":"Unauthorized"}'
            return status

        for key in (None, "", "sesame", "Bearer", "Bearer ", "Bearer no", "Basic sesame", "Bearer  sesame"):
            assert status("/v1/models", key) == 401
            assert status("/v1/nothing", key) == 401
        assert status("/v1models", None) == 401
        for path in ("/health", "/metrics", "/version", "/is_paused", "/get_world_size"):
            assert status(path, None) == 200
        assert status("/v1/models", None, "OPTIONS") == 405
        for word in ("Bearer", "bearer"):
            assert [status("/v1/models", f"{word} {key}") for key in keys if key.isascii()] == [
                200 for key in keys if key.isascii()
            ]
        if "schlüssel" in keys:
            sent = "Bearer schlüssel".encode().decode("latin-1")
            assert status("/v1/models", sent) == 200
