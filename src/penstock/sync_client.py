"""The client for code that is not asynchronous: the same calls, each of which waits for its result.

A thread of its own runs the event loop, so any number of threads may share one `SyncClient`, each with one
request in flight. It guarantees: leaving the `with` block ends the thread and closes every connection; a call
that is interrupted (Ctrl-C) is cancelled, so that the engine stops.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import CancelledError
from types import TracebackType
from typing import Any, Final, Self, TypeVar, Unpack, overload

import uvloop

from penstock.client import Client, Messages, Prompt, RequestOptions
from penstock.errors import ConfigError, PenstockError
from penstock.fleet.fleet import Fleet, FleetOptions, FleetStatistics
from penstock.sample import Delta, Sample, SamplingParams
from penstock.stream import SampleStream

CLOSE_TIMEOUT: Final = 10.0
"""Seconds the thread may take to end."""

T = TypeVar("T")


class SyncClient:
    """`with SyncClient(url, model=…) as client: sample = client.chat(messages)`. Arguments as `Client`."""

    def __init__(
        self,
        fleet: str | Sequence[str] | Fleet,
        *,
        model: str | None = None,
        resume_streams: bool = False,
        **options: Unpack[FleetOptions],
    ) -> None:
        self._client = Client(fleet, model=model, resume_streams=resume_streams, **options)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def __repr__(self) -> str:
        return f"<SyncClient {self._client.fleet}>"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loop": None, "_thread": None}

    def __enter__(self) -> Self:
        if self._loop is not None:
            raise ConfigError("the client is already open")
        loop = self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=loop.run_forever, name="penstock client", daemon=True)
        self._thread.start()
        try:
            self._wait(self._client.__aenter__())
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._wait(self._client.__aexit__(None, None, None))
        finally:
            self._end()

    @overload
    def chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        n: None = None,
        **options: Unpack[RequestOptions],
    ) -> Sample: ...

    @overload
    def chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        n: int,
        **options: Unpack[RequestOptions],
    ) -> list[Sample]: ...

    def chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        n: int | None = None,
        **options: Unpack[RequestOptions],
    ) -> Sample | list[Sample]:
        """As `Client.chat`."""
        if n is None:
            return self._wait(self._client.chat(messages, params, **options))
        return self._wait(self._client.chat(messages, params, n=n, **options))

    @overload
    def complete(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        n: None = None,
        **options: Unpack[RequestOptions],
    ) -> Sample: ...

    @overload
    def complete(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        n: int,
        **options: Unpack[RequestOptions],
    ) -> list[Sample]: ...

    def complete(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        n: int | None = None,
        **options: Unpack[RequestOptions],
    ) -> Sample | list[Sample]:
        """As `Client.complete`."""
        if n is None:
            return self._wait(self._client.complete(prompt, params, **options))
        return self._wait(self._client.complete(prompt, params, n=n, **options))

    def stream(
        self,
        prompt: Prompt | Messages,
        params: SamplingParams | None = None,
        **options: Unpack[RequestOptions],
    ) -> SyncStream:
        """As `Client.stream`: `with client.stream(messages) as stream: for delta in stream: …`."""

        async def make() -> SampleStream:
            return self._client.stream(prompt, params, **options)

        return SyncStream(self, self._wait(make()))

    def tokenize(self, prompt: str | Messages, *, model: str | None = None) -> tuple[int, ...]:
        """As `Client.tokenize`."""
        return self._wait(self._client.tokenize(prompt, model=model))

    def detokenize(self, tokens: Sequence[int], *, model: str | None = None) -> str:
        """As `Client.detokenize`."""
        return self._wait(self._client.detokenize(tokens, model=model))

    def models(self) -> list[str]:
        """As `Client.models`."""
        return self._wait(self._client.models())

    def health(self) -> dict[str, PenstockError | None]:
        """As `Client.health`."""
        return self._wait(self._client.health())

    def statistics(self) -> FleetStatistics:
        """As `Client.statistics`."""

        async def ask() -> FleetStatistics:
            return self._client.statistics()

        return self._wait(ask())

    # -- inside -----------------------------------------------------------------------------------

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which runs in the client's thread."""
        if self._loop is None:
            work.close()
            raise ConfigError("the client is not open: use it inside `with`")
        if threading.current_thread() is self._thread:
            work.close()
            raise ConfigError("a SyncClient cannot be used in its own thread: use Client")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except CancelledError as error:
            raise ConfigError("the client was closed while the request was under way") from error
        except BaseException:
            future.cancel()
            raise

    def _end(self) -> None:
        loop, self._loop = self._loop, None
        thread, self._thread = self._thread, None
        assert loop is not None and thread is not None

        async def end() -> None:
            """Nobody may be left who waits for a result."""
            left = asyncio.all_tasks() - {asyncio.current_task()}
            for task in left:
                task.cancel()
            if left:
                await asyncio.wait(left, timeout=CLOSE_TIMEOUT / 2)
            await asyncio.sleep(0)  # the results are handed over
            loop.stop()

        asyncio.run_coroutine_threadsafe(end(), loop)
        thread.join(CLOSE_TIMEOUT)
        if not thread.is_alive():
            loop.close()


class SyncStream:
    """A `SampleStream` for code that is not asynchronous."""

    def __init__(self, client: SyncClient, stream: SampleStream) -> None:
        self._client = client
        self._stream = stream

    def __enter__(self) -> Self:
        self._client._wait(self._stream.__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client._wait(self._stream.__aexit__(None, None, None))

    def __iter__(self) -> Iterator[Delta]:
        while True:
            try:
                yield self._client._wait(self._stream.__anext__())
            except StopAsyncIteration:
                return

    @property
    def sample(self) -> Sample:
        """As `SampleStream.sample`."""
        return self._stream.sample
