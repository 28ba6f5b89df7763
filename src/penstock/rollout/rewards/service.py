"""Rewards from an HTTP service, such as a reward model, over the fleet's own connections and retries.

A request is `POST <base URL>/score` with `{"samples": [{"prompt": messages, "completion": text, "row": the
prompt's row}, …]}`; `completion` has the reasoning in <think> tags. The answer is `{"scores": […]}`, one for
each sample, in order: a number, or an object with `value` and, where it has them, `parts` (numbers by name),
or with `failed`, a reason.

It guarantees: a service that is down or does not answer in time is a failed score, with the reason, once the
time of the request is over; never 0. It is asked again as the fleet's `Retry` says.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from types import TracebackType
from typing import Final, Self

import msgspec
import orjson

from penstock.errors import ConfigError, MalformedResponse, PenstockError
from penstock.fleet.attempts import Attempts, within
from penstock.fleet.fleet import Fleet
from penstock.prompt import Prompt
from penstock.rollout.rewards.text import whole_text
from penstock.rollout.score import Score
from penstock.sample import Sample
from penstock.wire.openai import response_error

OK: Final = 200

TIMEOUT: Final = 60.0
"""Seconds for a request with all its attempts unless told otherwise."""


_GIVEN_UP: Final = "the reward service was closed before it had answered"


class _Given(msgspec.Struct, frozen=True):
    """A score as a service writes it."""

    value: float | None = None
    parts: dict[str, float] = {}
    failed: str | None = None


class _Answer(msgspec.Struct, frozen=True):
    scores: list[float | _Given]


_decoder: Final = msgspec.json.Decoder(_Answer)


class _Waiting(msgspec.Struct, eq=False):
    item: orjson.Fragment
    done: asyncio.Future[Score]


class Service:
    """A reward service behind the endpoints of a fleet, which has to be open.

    path: of the service, behind the base URL. batch: samples in a request at most; those that come while
    `in_flight` requests are out are put together. timeout: seconds for a request, with all attempts.
    """

    def __init__(
        self,
        fleet: Fleet,
        *,
        path: str = "/score",
        batch: int = 1,
        in_flight: int = 64,
        timeout: float = TIMEOUT,
    ) -> None:
        if batch < 1 or in_flight < 1:
            raise ConfigError(f"batch and in_flight must be at least 1, not {batch} and {in_flight}")
        if not timeout > 0:
            raise ConfigError(f"the timeout of a reward service must be positive, not {timeout}")
        if not (path.startswith("/") and path.isascii() and path.isprintable() and " " not in path):
            raise ConfigError(f"{path!r} is not the path of a service: write it as /score")
        self.fleet = fleet
        self.path = path
        self.batch = batch
        self.in_flight = in_flight
        self.timeout = timeout
        self._waiting: deque[_Waiting] = deque()
        self._senders: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"<Service {self.path} waiting={len(self._waiting)} in_flight={len(self._senders)}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Cuts off what is asked; its scores have failed."""
        for sender in self._senders:
            sender.cancel()
        if self._senders:
            await asyncio.wait(self._senders)
        while self._waiting:
            _settle(self._waiting.popleft(), Score.failure(_GIVEN_UP))

    async def __call__(self, prompt: Prompt, sample: Sample) -> Score:
        self.fleet.check_open()
        done: asyncio.Future[Score] = asyncio.get_running_loop().create_future()
        item = orjson.dumps(
            {
                "prompt": prompt.messages,
                "completion": whole_text(sample),
                "row": orjson.Fragment(prompt.fields),
            }
        )
        self._waiting.append(_Waiting(orjson.Fragment(item), done))
        if len(self._senders) < self.in_flight:
            # It begins in the next round of the loop: samples that come together go together.
            sender = asyncio.get_running_loop().create_task(self._send_all(), name="penstock reward service")
            self._senders.add(sender)
            sender.add_done_callback(self._senders.discard)
        return await done

    async def _send_all(self) -> None:
        while self._waiting:
            taken: list[_Waiting] = []
            while self._waiting and len(taken) < self.batch:
                one = self._waiting.popleft()
                if not one.done.done():
                    taken.append(one)
            if taken:
                await self._send(taken)

    async def _send(self, taken: list[_Waiting]) -> None:
        scores = [Score.failure(_GIVEN_UP)] * len(taken)
        try:
            body = orjson.dumps({"samples": [one.item for one in taken]})
            deadline = self.fleet.clock() + self.timeout
            attempts = Attempts(self.fleet, deadline=deadline)
            work = self._ask(attempts, body, len(taken))
            scores = await within(self.fleet.loop.time() + self.timeout, attempts, work)
        except PenstockError as error:
            reason = f"the reward service failed: {type(error).__name__}: {error}"
            scores = [Score.failure(reason)] * len(taken)
        finally:
            for one, score in zip(taken, scores, strict=True):
                _settle(one, score)

    async def _ask(self, attempts: Attempts, body: bytes, count: int) -> list[Score]:
        fleet = self.fleet
        while True:
            endpoint = attempts.take() or await attempts.begin()
            began = fleet.clock()
            try:
                head = fleet.head(endpoint, "POST", endpoint.address.root + self.path)
                named = b"%sx-request-id: %s\r\n" % (head, attempts.request_id.encode())
                response = await endpoint.transport.request(named, body)
                if response.status != OK:
                    raise response_error(response)
                scores = read_scores(response.body, count)
            except BaseException as error:
                if not attempts.failed(error):
                    raise
            else:
                attempts.succeeded(0, fleet.clock() - began)
                return scores


def _settle(one: _Waiting, score: Score) -> None:
    if not one.done.done():  # else the caller was cancelled
        one.done.set_result(score)


def read_scores(body: bytes, count: int) -> list[Score]:
    """The scores of an answer. Raises MalformedResponse unless they are `count`."""
    try:
        found = _decoder.decode(body).scores
    except msgspec.DecodeError as error:
        raise MalformedResponse(f"the reward service's answer cannot be read ({error})") from None
    if len(found) != count:
        raise MalformedResponse(f"the reward service gave {len(found)} scores for {count} samples")
    return [_score(one) for one in found]


def _score(given: float | _Given) -> Score:
    one = given if isinstance(given, _Given) else _Given(given)
    if one.failed is not None:
        return Score.failure(one.failed, one.parts)
    if one.value is None or not math.isfinite(one.value):
        return Score.failure("the reward service gave no value", one.parts)
    return Score(one.value, one.parts)
