"""The client for threads: every call, many threads, interruptions, and nothing left behind."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import orjson
import pytest
import uvloop

from penstock.errors import ConfigError, DeadlineExceeded, PenstockError, RequestRejected
from penstock.fleet.retry import Retry
from penstock.sample import SamplingParams
from penstock.sync_client import SyncClient
from tests.chat_server import ChatServer, answer_to
from tests.scripted import ScriptedEngine, Step, chat_body, http, raw, refuse, stall
from tests.streaming import Model, side, stalled, stream

HELLO = [{"role": "user", "content": "hello"}]
MODEL = Model((b"one", b" two", b" three"))


class Engines:
    """A scripted engine on a loop in a thread of its own."""

    def __init__(self, default: Step) -> None:
        self.engine = ScriptedEngine(default=default, side=side(MODEL))
        self.engine.side["/v1/models"] = raw(http(200, b'{"data": [{"id": "m"}]}'))
        self.engine.side["/tokenize"] = raw(http(200, b'{"tokens": [1, 2]}'))
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> ScriptedEngine:
        self._thread.start()
        self._call(self.engine.listen())
        return self.engine

    def __exit__(self, *exception: object) -> None:
        self._call(self.engine.kill())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    def _call(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(5)


def until(condition: Callable[[], object], bound: float = 5.0) -> float:
    """Waits until it holds; the seconds it took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < bound, "it did not happen"
        time.sleep(0.002)
    return time.monotonic() - started


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def test_every_call() -> None:
    def step(body: bytes) -> Step:
        return raw(http(200, body))

    with Engines(step(chat_body("hi"))) as engine, SyncClient(engine.url, model="m") as client:
        assert client.chat(HELLO).text == "hi"
        choices = [{"index": index, "message": {"content": "ab"[index]}} for index in (0, 1)]
        engine.script.append(step(orjson.dumps({"choices": choices})))
        assert [sample.text for sample in client.chat(HELLO, n=2)] == ["a", "b"]
        engine.script.append(step(orjson.dumps({"choices": [{"text": "x"}]})))
        assert client.complete("p", SamplingParams(max_tokens=3)).text == "x"
        assert engine.calls[-1].json == {"model": "m", "prompt": "p", "max_tokens": 3}
        engine.script.append(step(orjson.dumps({"choices": [{"text": "x"}]})))
        assert [sample.text for sample in client.complete([1], n=1)] == ["x"]
        assert client.tokenize("p") == (1, 2)
        assert client.detokenize([0, 1]) == "one two"
        assert client.models() == ["m"]
        assert client.health() == {engine.url: None}
        assert client.statistics().in_flight == {engine.url: 0}
        assert engine.url in repr(client)


def test_a_stream() -> None:
    with Engines(stream(MODEL)) as engine, SyncClient(engine.url, resume_streams=True) as client:
        with client.stream(HELLO) as answer:
            assert [delta.text for delta in answer] == ["one", " two", " three", ""]
        assert answer.sample.text == "one two three"
        engine.script.append(stream(MODEL, cut=2))
        with client.stream("x|") as answer:
            assert "".join(delta.text for delta in answer) == "one two three"
        assert answer.sample.attempts == 2
        engine.default = stream(MODEL, cut=2, ending=stalled)
        with client.stream(HELLO) as answer:
            for _ in answer:
                break
            assert client.statistics().in_flight == {engine.url: 1}
            with pytest.raises(ConfigError):
                _ = answer.sample
        assert client.statistics().in_flight == {engine.url: 0}
        assert until(lambda: engine._in_flight == 0) < 1
        with pytest.raises(ConfigError):
            next(iter(answer))


def test_errors_are_those_of_the_client() -> None:
    with Engines(refuse(400, "bad")) as engine, SyncClient(engine.url) as client:
        with pytest.raises(RequestRejected, match="bad"):
            client.chat(HELLO)
        with pytest.raises(RequestRejected, match="bad"), client.stream(HELLO) as answer:
            list(answer)
        with pytest.raises(ConfigError):
            client.stream("")
        with pytest.raises(ConfigError):
            client.chat(HELLO, n=0)
        engine.default = stall()
        with pytest.raises(DeadlineExceeded):
            client.chat(HELLO, timeout=0.05)
        assert until(lambda: engine._in_flight == 0) < 1


def test_eight_threads_share_one_client() -> None:
    with ChatServer(latency=0.01) as server, SyncClient(server.url, model="echo") as client:
        wrong: list[object] = []

        def work(number: int) -> None:
            for turn in range(20):
                text = f"{number}.{turn}"
                sample = client.chat([{"role": "user", "content": text}])
                if sample.text != answer_to(text):
                    wrong.append(sample)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert not wrong and sum(server.asked.values()) == 160
        assert 2 <= server.peak <= 8, "each has one in flight"


@pytest.mark.parametrize("streamed", [False, True])
def test_ctrl_c_cancels_the_request(streamed: bool) -> None:
    step = stream(MODEL, cut=2, ending=stalled) if streamed else stall()
    with Engines(step) as engine, SyncClient(engine.url) as client:

        def interrupt() -> None:
            until(lambda: engine._in_flight)
            time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            if streamed:
                with client.stream(HELLO, timeout=20) as answer:
                    for _ in answer:
                        pass
            else:
                client.chat(HELLO, timeout=20)
        assert until(lambda: engine._in_flight == 0) < 1
        assert client.statistics().in_flight == {engine.url: 0}
        thread.join(5)


def test_use_outside_the_block() -> None:
    with Engines(raw(http(200, chat_body("hi")))) as engine:
        client = SyncClient(engine.url)
        for call in (
            lambda: client.chat(HELLO),
            lambda: client.stream(HELLO),
            client.models,
            client.statistics,
        ):
            with pytest.raises(ConfigError, match="inside `with`"):
                call()
        for _ in range(2):  # it may be opened again
            with client:
                assert client.chat(HELLO).text == "hi"
                with pytest.raises(ConfigError, match="already open"):
                    client.__enter__()
                assert client.chat(HELLO).text == "hi"
        with pytest.raises(ConfigError, match="inside `with`"):
            client.chat(HELLO)
        copy = pickle.loads(pickle.dumps(client))
        with copy:
            assert copy.chat(HELLO).text == "hi"
            inner = pickle.loads(pickle.dumps(copy))
            with inner:
                assert inner.chat(HELLO).text == "hi"


def test_one_that_cannot_be_opened_leaves_no_thread() -> None:
    with pytest.raises(ConfigError), SyncClient("http://127.0.0.1:1", max_in_flight=10_000_000):
        pass


@pytest.mark.parametrize(
    "step", [stall(), refuse(503, retry_after="60")], ids=["in flight", "waits for a retry"]
)
def test_closing_while_another_thread_waits(step: Step) -> None:
    with Engines(step) as engine:
        caught: list[BaseException] = []

        def work() -> None:
            try:
                client.chat(HELLO)
            except BaseException as error:
                caught.append(error)

        with SyncClient(engine.url, retry=Retry(base=30.0)) as client:
            thread = threading.Thread(target=work, daemon=True)
            thread.start()
            until(lambda: engine.calls)
            time.sleep(0.05)
        thread.join(5)
        assert not thread.is_alive()
        assert len(caught) == 1 and isinstance(caught[0], PenstockError)
