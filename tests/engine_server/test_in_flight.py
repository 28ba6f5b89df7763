"""What happens to requests while they are generated: streams, aborts, clients that go away, counts."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine_server.cases import HELLO
from tests.engine_server.running import Running, engine_of, running

LONG = {"prompt": "The quick brown", "max_tokens": 400, "ignore_eos": True, "temperature": 0}
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


@pytest.fixture
def narrow(checkpoint: Path) -> Iterator[Running]:
    """A server with two slots."""
    with running(engine_of(checkpoint, max_num_seqs=2, max_num_batched_tokens=64)) as server:
        yield server


def busy(server: Running) -> int:
    """Sequences the engine runs or keeps waiting."""
    return int(server.metric("num_requests_running") + server.metric("num_requests_waiting"))


class Posted(threading.Thread):
    """A request under way in a thread."""

    def __init__(self, server: Running, path: str, body: Any, headers: dict[str, str] | None = None) -> None:
        super().__init__()
        self._server, self._path, self._body, self._headers = server, path, body, headers
        self.start()

    def run(self) -> None:
        self.status, self.content = self._server.send("POST", self._path, self._body, self._headers)

    def answer(self) -> Any:
        """The JSON answer, when it is there."""
        self.join(30)
        assert not self.is_alive()
        assert self.status == 200, self.content
        return json.loads(self.content)


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_goes_away_frees_its_slots(narrow: Running, stream: bool) -> None:
    body = LONG | {"stream": stream, "n": 2, "temperature": 1.0, "prompt": ["a", "b"]}
    client = narrow.raw(COMPLETIONS, body)
    narrow.wait_until(lambda: busy(narrow) == 4, "four sequences at work")
    client.close()
    narrow.wait_until(lambda: busy(narrow) == 0, "all given up")
    assert narrow.metric("request_success_total", 'finished_reason="abort"') == 4
    assert narrow.metric("generation_tokens_total") < 4 * 400
    assert narrow.post(COMPLETIONS, LONG | {"max_tokens": 3})["usage"]["completion_tokens"] == 3


def test_queued_request_of_a_client_that_goes_away_is_never_begun(narrow: Running) -> None:
    working = [Posted(narrow, COMPLETIONS, LONG) for _ in range(2)]
    narrow.wait_until(lambda: busy(narrow) == 2, "both slots taken")
    waiting = narrow.raw(COMPLETIONS, LONG | {"max_tokens": 50})
    narrow.wait_until(lambda: busy(narrow) == 3, "one waiting")
    waiting.close()
    narrow.wait_until(lambda: busy(narrow) == 2, "nobody waiting")
    assert [one.answer()["usage"]["completion_tokens"] for one in working] == [400, 400]
    assert narrow.metric("generation_tokens_total") == 800


@pytest.mark.parametrize(
    ("path", "abort"),
    [
        ("/abort_requests", {"request_ids": ["chatcmpl-mine"]}),
        ("/abort_requests", {"request_ids": ["nobody", "mine"]}),
        ("/abort", {"request_id": "chatcmpl-mine"}),
        ("/abort_requests", {}),
    ],
)
def test_aborted_request_is_answered_with_what_there_is(server: Running, path: str, abort: Any) -> None:
    body = {"messages": HELLO, "ignore_eos": True, "temperature": 0, "return_token_ids": True}
    request = Posted(server, CHAT, body, {"x-request-id": "mine"})
    before = server.metric("generation_tokens_total")
    server.wait_until(lambda: server.metric("generation_tokens_total") > before + 5, "a few tokens")
    assert server.post(path, abort)["status"] == "aborted"
    answer = request.answer()
    choice = answer["choices"][0]
    assert answer["id"] == "chatcmpl-mine"
    assert choice["finish_reason"] == "abort"
    assert 5 < len(choice["token_ids"]) == answer["usage"]["completion_tokens"] < 400
    whole = server.post(CHAT, body)["choices"][0]
    assert whole["token_ids"][: len(choice["token_ids"])] == choice["token_ids"]
    assert whole["message"]["content"].startswith(choice["message"]["content"])
    assert choice["message"]["content"]


def test_aborted_stream_ends_in_form(server: Running) -> None:
    body = {"messages": HELLO, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    request = Posted(server, CHAT, body, {"x-request-id": "streamed"})
    server.wait_until(lambda: busy(server) == 1, "begun")
    server.post("/abort", {"request_id": "streamed"})
    request.join(30)
    events = request.content.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    last, usage = (json.loads(event.removeprefix("data: ")) for event in events[-4:-2])
    assert last["choices"][0]["finish_reason"] == "abort"
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] < 480


def test_aborting_one_request_leaves_the_others(server: Running) -> None:
    others = [Posted(server, COMPLETIONS, LONG, {"x-request-id": f"other-{i}"}) for i in range(3)]
    doomed = Posted(server, COMPLETIONS, LONG, {"x-request-id": "doomed"})
    server.wait_until(lambda: busy(server) == 4, "all begun")
    server.post("/abort_requests", {"request_ids": ["cmpl-doomed-0"]})
    assert doomed.answer()["choices"][0]["finish_reason"] == "abort"
    texts = {one.answer()["choices"][0]["text"] for one in others}
    assert len(texts) == 1


def test_streamed_pieces_are_the_whole_text(server: Running) -> None:
    body = {"prompt": "brown", "max_tokens": 300, "ignore_eos": True, "temperature": 1.5, "seed": 5, "n": 3}
    whole = server.post(COMPLETIONS, body | {"return_token_ids": True})["choices"]
    status, content = server.send("POST", COMPLETIONS, body | {"stream": True, "return_token_ids": True})
    assert status == 200
    texts, ids = ["", "", ""], [[], [], []]  # type: tuple[list[str], list[list[int]]]
    for event in content.decode().split("\n\n")[:-2]:
        (choice,) = json.loads(event.removeprefix("data: "))["choices"]
        texts[choice["index"]] += choice["text"]
        ids[choice["index"]] += choice["token_ids"]
    assert ids == [choice["token_ids"] for choice in whole]
    assert texts == [choice["text"] for choice in whole]
    assert len(set(texts)) == 3
    assert any("\N{REPLACEMENT CHARACTER}" in text for text in texts), "the sample has no odd bytes"


def test_stop_string_frees_the_slot_at_once(narrow: Running) -> None:
    before = narrow.metric("generation_tokens_total")
    choice = narrow.post(CHAT, {"messages": HELLO, "temperature": 0, "stop": ["ju"]})["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "ju")
    assert choice["message"]["content"] == "d\t"
    assert narrow.metric("generation_tokens_total") - before == 3
    assert busy(narrow) == 0


def test_metrics_count_what_was_done(narrow: Running) -> None:
    for _ in range(2):
        narrow.post(COMPLETIONS, LONG | {"prompt": list(range(40, 104)), "max_tokens": 10})
    assert narrow.metric("prompt_tokens_total") == 128
    assert narrow.metric("generation_tokens_total") == 20
    assert narrow.metric("prefix_cache_queries_total") == 128
    assert 0 < narrow.metric("prefix_cache_hits_total") < 64
    assert narrow.metric("request_success_total", 'finished_reason="length"') == 2
    assert narrow.metric("num_preemptions_total") == 0
    assert narrow.metric("kv_cache_usage_perc") == 0.0
    assert narrow.metric("e2e_request_latency_seconds_count") == 2
    assert narrow.metric("time_to_first_token_seconds_count") == 2
    assert narrow.metric("inter_token_latency_seconds_count") == 18
    assert all('engine="0"' in name and 'model_name="tiny"' in name for name in narrow.metrics())


def test_reset_prefix_cache_forgets(narrow: Running) -> None:
    body = LONG | {"prompt": list(range(40, 104)), "max_tokens": 1}
    narrow.post(COMPLETIONS, body)
    narrow.post("/reset_prefix_cache", None)
    narrow.post(COMPLETIONS, body)
    assert narrow.metric("prefix_cache_hits_total") == 0


def test_cached_prompt_tokens_are_in_usage_where_asked_for(checkpoint: Path) -> None:
    with running(engine_of(checkpoint), prompt_tokens_details=True) as server:
        body = LONG | {"prompt": list(range(40, 104)), "max_tokens": 1}
        first, second = (server.post(COMPLETIONS, body)["usage"] for _ in range(2))
        assert first["prompt_tokens_details"]["cached_tokens"] == 0
        assert 0 < second["prompt_tokens_details"]["cached_tokens"] < 64


def test_many_at_once_get_their_own_answers(server: Running) -> None:
    bodies = [LONG | {"prompt": [40 + i, 41, 42], "max_tokens": 5 + i % 7} for i in range(60)]
    alone = [server.post(COMPLETIONS, body)["choices"][0]["text"] for body in bodies]
    together = [Posted(server, COMPLETIONS, body) for body in bodies]
    assert [one.answer()["choices"][0]["text"] for one in together] == alone
