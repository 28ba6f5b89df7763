"""Engines of a policy on virtual time, token by token, with vLLM's control routes.

A token is a pure function of the sampling seed and its place behind it, so that a completion is the same in
however many requests it is made; its logprob tells the version of the weights that made it (`logprob_of`).
Ids below 256 are bytes of text, and EOS ends a text.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from hashlib import blake2b
from itertools import count
from typing import Any
from urllib.parse import parse_qs, urlsplit

import orjson

from penstock.client import Client
from penstock.control.dialect import VLLM
from penstock.control.engine import Engine
from penstock.errors import ConnectFailed, ConnectionLost
from penstock.fleet.transport import ByteStream
from penstock.wire.address import Address
from penstock.wire.connection import Response
from penstock.wire.pool import PoolStatistics
from tests.virtual import VirtualLoop

EOS = 256
OPEN, CLOSE = 257, 258
"""Of a turn, as in <|im_start|> and <|im_end|>; the EOS of a chat closes its turn."""
UNSEEDED = count(10**12, 10**6)
"""In place of the seeds of requests that have none."""
LETTERS = b"abcdefghijklmnopqrstuvwxyz"


def logprob_of(version: int, token: int) -> float:
    """What weights of a version give a token."""
    return -(version + 1) - token / 1024


def number(seed: int) -> int:
    return int.from_bytes(blake2b(b"%d" % seed, digest_size=8).digest(), "big")


def text_of(ids: list[int]) -> str:
    return bytes(one for one in ids if one < EOS).decode("utf-8", "replace")


class Job:
    """One request."""

    def __init__(self, fields: dict[str, Any], prompt: list[int]) -> None:
        self.prompt = prompt
        self.seed = int(fields.get("seed", next(UNSEEDED)))
        self.most = int(fields["max_tokens"])
        self.versions_wanted = bool(fields.get("return_weight_versions"))
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.versions: list[tuple[int, int]] = []
        self.finish: str | None = None


class PolicyEngine:
    """One engine, as a transport.

    mean: tokens of a completion, on average; every: seconds a token takes. slots: completions at a time.
    """

    def __init__(
        self, loop: VirtualLoop, *, slots: int = 16, mean: float = 20.0, every: float = 0.01
    ) -> None:
        self.loop = loop
        self.mean = mean
        self.every = every
        self.version = 0
        self.tells_versions = True
        self.label: str = "0"
        self.down = False
        self.jobs: dict[Job, asyncio.Task[Any]] = {}
        self.paths: list[str] = []
        self.generated = 0
        """Tokens."""
        self.busy = 0.0
        """Seconds times slots."""
        self.fault: Callable[[Job], None] | None = None
        """Called with each new job; what it raises is the answer."""
        self._slots = asyncio.Semaphore(slots)
        self._running = asyncio.Event()
        self._running.set()
        self._idle = asyncio.Event()
        self._closed = False

    # -- as a transport ---------------------------------------------------------------------------

    async def request(self, head: bytes, body: bytes = b"") -> Response:
        if self.down:
            raise ConnectFailed("refused")
        method, target = head.split(b" ", 2)[:2]
        url = urlsplit(target.decode())
        fields = orjson.loads(body) if body else {}
        if url.path.endswith("/completions"):
            return await self._complete(url.path, fields)
        self.paths.append(target.decode())
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        answer = await self._answer(url.path, query, fields)
        return Response(404 if answer is None else 200, {}, orjson.dumps(answer or {}))

    async def stream(self, head: bytes, body: bytes = b"") -> ByteStream:
        raise AssertionError("simulated engines do not stream")

    def drop_silent(self, seconds: float) -> int:
        return 0

    def statistics(self) -> PoolStatistics:
        return PoolStatistics(len(self.jobs), 0, 0, 0)

    async def close(self) -> None:
        self.die()

    def die(self) -> None:
        """Everything in flight is lost."""
        self.down = True
        for task in list(self.jobs.values()):
            task.cancel()

    def restart(self) -> None:
        """A new process, with the first weights."""
        self.down, self.version, self.label = False, 0, "0"
        self._running.set()

    # -- generation -------------------------------------------------------------------------------

    async def _complete(self, path: str, fields: dict[str, Any]) -> Response:
        chat = path.endswith("/chat/completions")
        job = Job(fields, self.render(fields["messages"]) if chat else list(fields["prompt"]))
        if self.fault is not None:
            self.fault(job)
        task = asyncio.ensure_future(self._work(job))
        self.jobs[job] = task
        try:
            await task
        except asyncio.CancelledError:
            if self.down:
                raise ConnectionLost("cut off", response_started=True) from None
            if job.finish != "abort":
                raise
        finally:
            task.cancel()
            del self.jobs[job]
            if not self.jobs:
                self._idle.set()
        return Response(200, {}, orjson.dumps(self._body(job, chat=chat)))

    async def _work(self, job: Job) -> None:
        async with self._slots:
            while job.finish is None:
                await self._running.wait()
                await asyncio.sleep(self.every)
                self.busy += self.every
                if not self._running.is_set():
                    continue  # frozen within the step: it is made anew
                if job.finish is None:
                    self._token(job)

    def _token(self, job: Job) -> None:
        drawn = number(job.seed + len(job.ids))
        token = EOS if drawn % 1000 < 1000 / self.mean else LETTERS[drawn // 1000 % len(LETTERS)]
        if not job.versions or job.versions[-1][1] != self.version:
            job.versions.append((len(job.ids), self.version))
        job.ids.append(token)
        job.logprobs.append(logprob_of(self.version, token))
        self.generated += 1
        if token == EOS:
            job.finish = "stop"
        elif len(job.ids) >= job.most:
            job.finish = "length"

    def _body(self, job: Job, *, chat: bool) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "finish_reason": job.finish, "token_ids": job.ids}
        if job.versions_wanted and self.tells_versions:
            choice["weight_versions"] = job.versions
        body: dict[str, Any] = {"id": "x", "choices": [choice]}
        text = text_of(job.ids)
        if chat:
            choice["message"] = {"content": text}
            choice["logprobs"] = {"content": [{"logprob": one} for one in job.logprobs]}
            body["prompt_token_ids"] = job.prompt
        else:
            choice["text"] = text
            choice["logprobs"] = {"token_logprobs": job.logprobs}
            choice["prompt_token_ids"] = job.prompt
        body["usage"] = {"prompt_tokens": len(job.prompt), "completion_tokens": len(job.ids)}
        return body

    def render(self, messages: list[dict[str, Any]]) -> list[int]:
        ids = []
        for message in messages:
            ids += [OPEN, *message["role"].encode(), *b"\n", *message["content"].encode(), EOS, *b"\n"]
        return [*ids, OPEN, *b"assistant\n"]

    # -- control ----------------------------------------------------------------------------------

    async def _answer(self, path: str, query: dict[str, str], fields: dict[str, Any]) -> Any:
        match path:
            case "/version":
                return {"version": "0.32.0"}
            case "/health":
                return {"ok": True}
            case "/v1/models":
                return {"data": [{"id": "m"}]}
            case "/tokenize":
                messages = fields.get("messages")
                return {"tokens": self.render(messages) if messages else list(fields["prompt"].encode())}
            case "/detokenize":
                return {"prompt": text_of(fields["tokens"])}
            case "/weight_info":
                return {"weight_version": self.label}
            case "/pause":
                await self._pause(query["mode"])
                return {"status": "paused"}
            case "/resume":
                self._running.set()
                return {"status": "resumed"}
            case "/reset_prefix_cache":
                return {"success": True}
            case "/collective_rpc":
                self.version = int(fields["kwargs"]["weights_path"].rsplit("/", 1)[-1])
                return {"results": [None]}
            case "/update_weight_version":
                self.label = str(fields["new_version"])
                return {"success": True}
        return None

    async def _pause(self, mode: str) -> None:
        if mode == "wait":
            while self.jobs:
                self._idle.clear()
                await self._idle.wait()
        self._running.clear()
        if mode == "abort":
            for job, task in self.jobs.items():
                if job.finish is None:
                    job.finish = "abort"
                    task.cancel()


class World:
    """Engines by address, and a client of them."""

    def __init__(self, loop: VirtualLoop, engines: int = 1, **plan: Any) -> None:
        self.loop = loop
        self.engines = [PolicyEngine(loop, **plan) for _ in range(engines)]
        self.urls = [f"http://engine{number}:8000" for number in range(engines)]

    def transport(self, address: Address) -> PolicyEngine:
        return self.engines[self.urls.index(str(address))]

    def client(self, *, engines: int | None = None, **options: Any) -> Client:
        """Of the first so many engines, by default of all."""
        return Client(
            self.urls[:engines], transport=self.transport, clock=self.loop.time, random=lambda: 0.5, **options
        )


class Weights:
    """A transport of weights of one version, for simulated engines. seconds: a commit takes so long."""

    def __init__(self, version: int, *, seconds: float = 0.02, fails: bool = False) -> None:
        self.version = version
        self.seconds = seconds
        self.fails = fails

    async def prepare(self, engine: Engine, version: int) -> None:
        assert version == self.version
        if self.fails:
            raise ConnectFailed("no way")

    async def transfer(self, engine: Engine, version: int) -> None:
        await asyncio.sleep(self.seconds)

    async def commit(self, engine: Engine, version: int) -> None:
        await asyncio.sleep(self.seconds)
        await engine.ask(*VLLM().reload(f"/weights/{self.version}", version))

    async def abort(self, engine: Engine) -> None:
        """Nothing was done."""
