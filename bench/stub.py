"""A chat completions server that answers at once, always the same: what is measured is who asks.

python bench/stub.py        prints its port, serves until its standard input ends
"""

from __future__ import annotations

import asyncio
import sys

import orjson
import uvloop

from penstock.wire.exchange import Exchange
from penstock.wire.server import HttpServer

TEXT = "Seven times eight is fifty-six. " * 10

ANSWER = orjson.dumps(
    {
        "id": "chatcmpl-0",
        "object": "chat.completion",
        "created": 1700000000,
        "model": "stub",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": TEXT, "reasoning": None, "tool_calls": []},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": {"prompt_tokens": 64, "completion_tokens": 80, "total_tokens": 144},
    }
)
MODELS = orjson.dumps({"object": "list", "data": [{"id": "stub", "object": "model"}]})


def answer(exchange: Exchange) -> None:
    exchange.respond(200, MODELS if exchange.request.path == "/v1/models" else ANSWER)


async def main() -> None:
    async with HttpServer(answer, keep_alive=3600.0) as server:
        print(server.port, flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    uvloop.run(main())
