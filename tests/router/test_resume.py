"""Streams that are to survive their engine, with engines that do what is scripted."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from penstock.router.relay import Relay
from penstock.router.requests import RequestHead
from penstock.router.resume import resumable
from penstock.router.server import RouterServer
from tests.router.front import Peer, engine, scenario, settled, sse
from tests.scripted import Step, answer, refuse, reset, until

ASKED = b"X-Penstock-Resume: 1\r\n"
BODY: dict[str, Any] = {
    "model": "m",
    "messages": [{"role": "user", "content": "hi"}],
    "stream": True,
    "max_tokens": 6,
}


def event(text: str, *, ids: list[int] | None = None, finish: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish, "x_new": 1}
    if ids is not None:
        choice["token_ids"] = ids
    chunk = {"id": "c1", "object": "chat.completion.chunk", "model": "m", "choices": [choice], **more}
    return b"data: %s\n\n" % orjson.dumps(chunk)


DONE = b"data: [DONE]\n\n"


async def stream(peer: Peer, body: dict[str, Any], fields: bytes = ASKED) -> tuple[list[Any], bool]:
    """The events of a stream, and whether it ended as it should."""
    peer.post(orjson.dumps(body), fields=fields)
    status, headers = await peer.head()
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    data, whole = b"", False
    try:
        while piece := await peer.chunk():
            data += piece
        whole = True
    except (ValueError, EOFError):
        pass
    found = [line[6:] for line in data.split(b"\n") if line.startswith(b"data: ")]
    return [orjson.loads(one) if one != b"[DONE]" else "DONE" for one in found], whole


def test_an_undisturbed_stream_passes_as_it_is() -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        found, whole = await stream(peer, BODY)
        assert whole and found[-1] == "DONE" and len(found) == 3
        assert found[0] == orjson.loads(event("a", unknown=[1])[6:])
        sent = one.calls[0].json
        assert sent["return_token_ids"] is True and sent["messages"] == BODY["messages"]
        assert one.calls[0].headers["x-request-id"]

    one = engine(
        sse(
            event("a", ids=[1], unknown=[1], usage={"prompt_tokens": 1, "completion_tokens": 1}),
            event("b", ids=[2], finish="stop"),
            b'data: {"choices":[],"usage":{}}\n\n',
            DONE,
        )
    )
    scenario(body, one)


def test_text_is_continued_where_there_are_no_token_ids() -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        found, whole = await stream(peer, BODY)
        assert whole and found[-1] == "DONE"
        text = "".join(one["choices"][0]["delta"].get("content", "") for one in found[:-1])
        assert text == "one two three"
        assert {one["id"] for one in found[:-1]} == {"c1"}
        second = two.calls[0] if two.calls else one.calls[1]
        assert second.json["messages"][-1] == {"role": "assistant", "content": "one two"}
        assert second.json["max_tokens"] == 4
        assert server.router.statistics.resumed == 1 and server.router.statistics.broken == 0

    rest = sse(event(" three", finish="stop"), DONE)
    one, two = engine(sse(event("one"), event(" two"), gap=0.02, then=reset()), rest), engine(default=rest)
    scenario(body, one, two)


@pytest.mark.parametrize("then", [refuse(400), refuse(500)])
def test_what_cannot_go_on_ends_with_an_error_event(then: Step) -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        found, whole = await stream(peer, BODY)
        assert not whole and "DONE" not in found and found[-1]["error"]["type"] == "engine_lost"
        assert server.router.statistics.broken == 1
        await settled(server)

    scenario(body, engine(sse(event("one"), gap=0.02, then=reset()), default=then), retry_max_retries=1)


def test_an_error_before_the_stream_is_the_engines() -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        status, _, said = await peer.ask(orjson.dumps(BODY), fields=ASKED)
        assert status == 400
        assert orjson.loads(said)["error"]["message"] == "too long"
        one.default = answer()
        status, headers, _ = await peer.ask(orjson.dumps(BODY), fields=b"X-Penstock-Resume: 0\r\n")
        assert status == 200 and headers["content-type"] == "application/json"
        assert one.calls[-1].json == BODY

    one = engine(default=refuse(400, "too long"))
    scenario(body, one, resume_streams=True)


def test_a_client_that_leaves_frees_the_slot() -> None:
    async def body(server: RouterServer, peer: Peer) -> None:
        leaver = await Peer.to(server)
        leaver.post(orjson.dumps(BODY), fields=ASKED)
        await leaver.head()
        await leaver.chunk()
        assert server.router.fleet.dispatch.in_flight == 1
        leaver.close()
        await settled(server)
        await until(lambda: one._in_flight == 0)
        assert server.router.statistics.cancelled == 1

    one = engine(sse(*[event("x")] * 500, gap=0.02))
    scenario(body, one)


@pytest.mark.parametrize(
    "change",
    [{"n": 2}, {"stream": False}, {"logprobs": True}, {"tools": [{}]}, {"response_format": {"type": "json"}}],
)
def test_what_would_change_its_meaning_is_only_relayed(change: dict[str, Any]) -> None:
    relay = Relay.__new__(Relay)
    relay.head = RequestHead(method=b"POST", path=b"/v1/chat/completions", resume=b"1")
    relay.complete = True
    relay.body = [orjson.dumps(BODY)]
    assert resumable(relay, always=False) is not None
    relay.body = [orjson.dumps({**BODY, **change})]
    assert resumable(relay, always=False) is None
    for broken in (b"", b"[]", b"{", b'{"stream":true}', b'{"stream":true,"messages":[]}'):
        relay.body = [broken]
        assert resumable(relay, always=True) is None
