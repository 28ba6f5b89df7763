"""The client: prompts in, samples out, over one endpoint or a fleet.

It guarantees:
- a request ends with its `Sample` or with one typed error; the only retry loop of the project is `_generate`;
- the slot on an endpoint is given back before a backoff is slept, and exactly once, also under cancellation;
- a cancelled request closes its connection, so that the engine stops generating;
- `async with` owns every socket and the one task; a client pickles without them and belongs, while open, to
  one event loop.
"""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from threading import get_ident
from types import TracebackType
from typing import Any, Final

import msgspec

from penstock import __version__
from penstock.errors import (
    ConfigError,
    PenstockError,
    PhaseTimeout,
    TransportError,
)
from penstock.fleet.dispatch import Dispatch
from penstock.fleet.endpoint import Endpoint
from penstock.fleet.outage import OnOutage, Watch
from penstock.fleet.retry import Attempts, Retry, classify
from penstock.sample import Sample, SamplingParams
from penstock.wire.address import Address
from penstock.wire.connection import Response, Timeouts
from penstock.wire.openai import (
    Origin,
    chat_request,
    chat_sample,
    model_names,
    response_error,
    text_request,
    text_sample,
)
from penstock.wire.pool import Pool

PROBE_TIMEOUT: Final = 10.0
"""Seconds a question that generates nothing (health, model list) may take."""

__all__ = ["Client", "ClientStatistics", "Retry", "Timeouts"]


class ClientStatistics(msgspec.Struct, frozen=True):
    """Counts of a client at one moment."""

    in_flight: dict[str, int]
    """Requests in flight per endpoint."""
    waiting: int
    """Requests that wait for a slot."""
    connections: int
    retries: int
    """Failed attempts that were followed by another."""
    resent: int
    """Requests resent because a reused connection had died; they count as one attempt."""


class Client:
    """Client of the OpenAI API of one server or several alike.

    base_url: one or several of `http://host:port`, with or without `/v1`, or `host:port`.
    model: sent with each request that names none. api_key: sent as a bearer token.
    max_in_flight: requests in flight per endpoint, None: no limit; more wait, first come, first served.
    on_outage: told while no endpoint accepts connections, see `penstock.fleet.outage.OnOutage`. It and
    `ssl_context` must pickle where the client is to be pickled.
    Raises ConfigError when a URL or the key cannot be used.
    """

    def __init__(
        self,
        base_url: str | Sequence[str],
        *,
        model: str | None = None,
        api_key: str | None = None,
        max_in_flight: int | None = None,
        timeouts: Timeouts | None = None,
        retry: Retry | None = None,
        ssl_context: ssl.SSLContext | None = None,
        on_outage: OnOutage | None = None,
    ) -> None:
        urls = [base_url] if isinstance(base_url, str) else list(base_url)
        if not urls:
            raise ConfigError("a client needs at least one base URL")
        if max_in_flight is not None and max_in_flight < 1:
            raise ConfigError(f"max_in_flight must be at least 1, not {max_in_flight}")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise ConfigError("the API key holds characters that cannot be sent in a header")
        self.addresses = tuple(dict.fromkeys(Address.parse(url) for url in urls))
        self.model = model
        self.api_key = api_key
        self.max_in_flight = max_in_flight
        self.timeouts = timeouts or Timeouts()
        self.retry = retry or Retry()
        self.ssl_context = ssl_context
        self.on_outage = on_outage
        self._session: _Session | None = None

    def __repr__(self) -> str:
        session = self._session
        state = "closed" if session is None else f"in_flight={session.in_flight()}"
        return f"<Client {', '.join(map(str, self.addresses))} {state}>"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_session": None}

    async def __aenter__(self) -> Client:
        if self._session is not None:
            raise ConfigError("the client is already open")
        self._session = _Session(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        model: str | None = None,
        extra_body: Mapping[str, Any] | None = None,
        request_id: str | None = None,
    ) -> Sample:
        """One completion of a conversation. `extra_body` is merged into the request's JSON.

        Raises TransportError or ResponseError once no retry is left, ConfigError when it cannot be sent.
        """
        body = chat_request(messages, params, model or self.model, extra_body)
        return await self._generate("/chat/completions", body, chat_sample, request_id)

    async def complete(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        model: str | None = None,
        extra_body: Mapping[str, Any] | None = None,
        request_id: str | None = None,
    ) -> Sample:
        """One completion of a text or of token ids. Otherwise as `chat`."""
        body = text_request(prompt, params, model or self.model, extra_body)
        return await self._generate("/completions", body, text_sample, request_id)

    async def models(self) -> list[str]:
        """The models the first endpoint that answers offers. Not retried."""
        session = self._here()
        failure: PenstockError | None = None
        for endpoint in session.dispatch.endpoints:
            try:
                response = await session.ask(endpoint, endpoint.address.api + "/models")
                if response.status == 200:
                    return model_names(response.body)
                failure = response_error(response)
            except TransportError as error:
                failure = error
        assert failure is not None
        raise failure

    async def health(self) -> dict[str, PenstockError | None]:
        """What each endpoint's /health says now: None when it is well, else what is wrong. Not retried.

        A server without that route counts as well: it has answered.
        """
        session = self._here()
        endpoints = session.dispatch.endpoints
        outcomes = await asyncio.gather(*map(session.probe, endpoints), return_exceptions=True)
        report: dict[str, PenstockError | None] = {}
        for endpoint, outcome in zip(endpoints, outcomes, strict=True):
            if outcome is not None and not isinstance(outcome, PenstockError):
                raise outcome
            report[endpoint.name] = outcome
        return report

    def statistics(self) -> ClientStatistics:
        session = self._here()
        pools = [pool.statistics() for pool in session.pools]
        return ClientStatistics(
            in_flight={endpoint.name: endpoint.in_flight for endpoint in session.dispatch.endpoints},
            waiting=session.dispatch.waiting,
            connections=sum(pool.connections for pool in pools),
            retries=session.retries,
            resent=sum(pool.resent for pool in pools),
        )

    def _here(self) -> _Session:
        session = self._session
        if session is None:
            raise ConfigError("the client is not open: use it inside `async with`")
        # get_running_loop costs a system call (getpid): it is asked only when the cheap signs are against us.
        if (get_ident() != session.thread or not session.loop.is_running()) and (
            session.loop is not asyncio.get_running_loop()
        ):
            raise ConfigError("the client is open in another event loop: open one of its own in each")
        return session

    async def _generate(
        self, route: str, body: bytes, decode: Callable[[bytes, Origin], Sample], request_id: str | None
    ) -> Sample:
        """Sends until there is a sample or a final error."""
        session = self._here()
        dispatch, clock = session.dispatch, time.monotonic  # the loop's own clock counts milliseconds
        attempts = Attempts(self.retry, random.random)
        avoid: Endpoint | None = None
        started = clock()
        while True:
            endpoint = dispatch.take(avoid) or await session.slot(avoid)
            failure: PenstockError
            try:
                response = await session.post(endpoint, route, body, request_id)
                if 200 <= response.status < 300:
                    return decode(response.body, Origin(endpoint.name, attempts.number, clock() - started))
                failure = response_error(response)
            except TransportError as error:
                failure = error
                if classify(error).refused:  # before the slot is given back, or the next would run into it
                    session.refused(endpoint, error)
            finally:
                dispatch.give_back(endpoint)
            wait = attempts.fail(failure, clock())
            if wait is None or self._session is not session:
                raise failure
            session.retries += 1
            avoid = endpoint
            if wait:
                await asyncio.sleep(wait)


class _Session:
    """What a client is made of while it is open."""

    def __init__(self, client: Client) -> None:
        self.loop = asyncio.get_running_loop()
        self.thread = get_ident()
        self.retries = 0
        self.dispatch = Dispatch(client.addresses, max_in_flight=client.max_in_flight)
        self.pools = [
            Pool(address, timeouts=client.timeouts, ssl_context=client.ssl_context)
            for address in client.addresses
        ]
        bearer = f"authorization: Bearer {client.api_key}\r\n" if client.api_key is not None else ""
        self._headers = f"user-agent: penstock/{__version__}\r\n{bearer}content-type: application/json\r\n"
        self._heads: dict[tuple[int, str], bytes] = {}
        self._watch = Watch(
            self.dispatch,
            self.probe,
            outage=client.retry.outage,
            on_outage=client.on_outage,
            clock=self.loop.time,
        )
        self._task = self.loop.create_task(self._watch.run(), name="penstock outage watch")

    def in_flight(self) -> int:
        return sum(endpoint.in_flight for endpoint in self.dispatch.endpoints)

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        self.dispatch.refuse_all(ConfigError("the client was closed while the request waited for a slot"))
        for pool in self.pools:
            await pool.close()

    def post(
        self, endpoint: Endpoint, route: str, body: bytes, request_id: str | None
    ) -> Coroutine[Any, Any, Response]:
        """Sends a request to a route of the OpenAI API, once awaited."""
        head = self._heads.get((endpoint.index, route))
        if head is None:
            head = self._head("POST", endpoint, endpoint.address.api + route)
            self._heads[endpoint.index, route] = head
        if request_id is not None:
            if not (request_id.isascii() and request_id.isprintable()):
                raise ConfigError(f"the request id {request_id!r} cannot be sent in a header")
            head = b"%sx-request-id: %s\r\n" % (head, request_id.encode())
        return self.pools[endpoint.index].request(head, body)

    async def ask(self, endpoint: Endpoint, path: str) -> Response:
        """A GET that is answered without generating anything."""
        try:
            async with asyncio.timeout(PROBE_TIMEOUT):
                return await self.pools[endpoint.index].request(self._head("GET", endpoint, path))
        except TimeoutError as error:
            if isinstance(error, PhaseTimeout):
                raise
            message = f"{endpoint.name} did not answer {path} within {PROBE_TIMEOUT:g} s"
            raise PhaseTimeout(message, "first_byte") from None

    async def probe(self, endpoint: Endpoint) -> None:
        """Raises TransportError or ResponseError unless the endpoint is there and serving."""
        response = await self.ask(endpoint, endpoint.address.root + "/health")
        if response.status >= 500:
            raise response_error(response)

    async def slot(self, avoid: Endpoint | None) -> Endpoint:
        """Waits for a slot. Raises FleetDown."""
        ticket = _Ticket(self.loop, avoid)
        self.dispatch.wait(ticket)
        try:
            return await ticket.future
        except BaseException:
            self.dispatch.withdraw(ticket)
            if ticket.granted is not None:  # cancelled between the grant and the waking
                self.dispatch.give_back(ticket.granted)
            raise

    def refused(self, endpoint: Endpoint, error: TransportError) -> None:
        if endpoint.up:
            self.dispatch.refused(endpoint, error, self.loop.time())
            self._watch.wake()

    def _head(self, method: str, endpoint: Endpoint, path: str) -> bytes:
        line = f"{method} {path} HTTP/1.1\r\nhost: {endpoint.address.authority}\r\n"
        return (line + self._headers).encode("ascii")


class _Ticket:
    """A place in the dispatch queue, and the future that says how it ended."""

    __slots__ = ("avoid", "future", "granted")

    def __init__(self, loop: asyncio.AbstractEventLoop, avoid: Endpoint | None) -> None:
        self.avoid = avoid
        self.future: asyncio.Future[Endpoint] = loop.create_future()
        self.granted: Endpoint | None = None

    def offer(self, endpoint: Endpoint) -> bool:
        if self.future.done():
            return False
        self.granted = endpoint
        self.future.set_result(endpoint)
        return True

    def refuse(self, error: PenstockError) -> None:
        if not self.future.done():
            self.future.set_exception(type(error)(str(error)))
