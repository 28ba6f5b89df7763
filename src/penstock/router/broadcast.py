"""A request whose body is too large to be held, sent to all workers at once while it arrives.

It guarantees:
- memory does not grow with the body: what the slowest worker has not taken is not read from the client;
- a worker that fails, or takes nothing for STALL seconds, is left behind with its error; the others go on;
- a body that does not arrive whole is whole nowhere: the workers' connections end without its last byte;
- once all of it has been sent, what comes of it counts, whether or not the client waits for the answer.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from penstock.control.control import Control
from penstock.control.engine import Engine, Outcome, answer_of
from penstock.control.steps import Kind
from penstock.errors import ControlFailed, MalformedResponse, PenstockError, PhaseTimeout
from penstock.router.fan_out import all_or_nothing, answer, call_of
from penstock.router.relay import Relay
from penstock.router.upstream import EngineConnection, EngineTransport
from penstock.wire.connection import Response
from penstock.wire.exchange import Request, response_head

if TYPE_CHECKING:
    from penstock.router.inlet import Inlet

STALL: Final = 60.0
"""Seconds a worker may take nothing of the body before it is given up."""
TICK: Final = 1.0
"""Seconds between two looks at workers that stall."""
MAX_ANSWER: Final = 1 << 20
"""Bytes of a worker's answer."""


class Leg:
    """One worker's part: the sink of its response."""

    def __init__(self, engine: Engine, broadcast: Broadcast) -> None:
        self.engine = engine
        self._broadcast = broadcast
        self.connection: EngineConnection | None = None
        loop = asyncio.get_running_loop()
        self.outcome: asyncio.Future[Outcome] = loop.create_future()
        self._clock = loop.time
        self._began = loop.time()
        self._since = loop.time()
        self._status = 0
        self._body = b""

    @property
    def choked(self) -> bool:
        return self.connection is not None and self.connection.choked

    def send(self, data: bytes) -> None:
        if self.connection is not None:
            self._since = self._clock()
            self.connection.upload(data)

    @property
    def complete(self) -> bool:
        return self._broadcast.complete

    def look(self, bound: float, *, stalled: bool) -> None:
        """Gives the worker up when nothing has come of it for `bound` seconds."""
        if not self.outcome.done() and self.connection is not None and self._clock() - self._since > bound:
            did = "took nothing of the request" if stalled else "did not answer"
            self.give_up(PhaseTimeout(f"{self.engine.name} {did} for {bound:g} s", "first_byte"))

    def give_up(self, error: PenstockError) -> None:
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.release()
        self._settle(Outcome(error=error, seconds=self._clock() - self._began))

    def headed(self, connection: EngineConnection) -> None:
        self._status = connection.status

    def arrived(self, parts: list[bytes], *, complete: bool) -> None:
        self._body += b"".join(parts)
        if len(self._body) > MAX_ANSWER:
            self.give_up(MalformedResponse(f"{self.engine.name} answered with too much"))

    def ended(self) -> None:
        self.connection = None
        seconds = self._clock() - self._began
        try:
            value = answer_of(self.engine.name, "the request", Response(self._status, {}, self._body))
        except PenstockError as error:
            self._settle(Outcome(error=error, seconds=seconds))
        else:
            self._settle(Outcome(value, seconds=seconds))

    def failed(self, error: PenstockError) -> None:
        self.connection = None
        self._settle(Outcome(error=error, seconds=self._clock() - self._began))

    def stop_sending(self) -> None:
        self._broadcast.steer()

    def go_on_sending(self) -> None:
        self._broadcast.steer()

    def _settle(self, outcome: Outcome) -> None:
        if not self.outcome.done():
            self.outcome.set_result(outcome)
            self._broadcast.steer()


class Broadcast(Relay):
    """Takes the place of `relay`, whose body has begun to arrive. kind: the step it is of a weight update."""

    __slots__ = ("_control", "_kind", "_legs", "_sending")

    def __init__(self, inlet: Inlet, relay: Relay, control: Control, kind: Kind) -> None:
        super().__init__(inlet, relay.head, relay.length, relay.request_id)
        for name in Relay.__slots__:
            setattr(self, name, getattr(relay, name))
        self._control = control
        self._kind = kind
        self._legs: list[Leg] = []
        self._sending = False
        """What arrives is passed on."""

    # -- what the client's connection tells --------------------------------------------------------

    def start(self) -> None:
        self._task = self._inlet.router.spawn(self._run())
        self._inlet.steer()

    def feed(self, data: bytes) -> None:
        if not self._sending:
            self.body.append(data)
            return
        piece = b"%x\r\n%s\r\n" % (len(data), data) if self.chunked else data
        for leg in self._legs:
            leg.send(piece)

    def finish(self) -> None:
        if self._sending:
            for leg in self._legs:
                leg.send(b"0\r\n\r\n" if self.chunked else b"")

    def takes_more(self) -> bool:
        return self._sending and not any(leg.choked for leg in self._legs)

    def lost(self) -> None:
        if not self.complete:
            self.abandon()

    def abandon(self) -> None:
        self.done = True
        if self._task is not None:
            self._task.cancel()

    def pause(self) -> None:
        """The answer is short."""

    def go_on(self) -> None:
        """It was not stopped."""

    def steer(self) -> None:
        if not self.done:
            self._inlet.steer()

    # -- the workers' side ------------------------------------------------------------------------

    async def _run(self) -> None:
        self._legs = [Leg(engine, self) for engine in self._control.steps.taking_part()]
        try:
            await asyncio.gather(*map(self._connect, self._legs))
            self._begin()
            await self._answers()
            done = {leg.engine: leg.outcome.result() for leg in self._legs}
        finally:
            for leg in self._legs:
                leg.give_up(PhaseTimeout("the request did not arrive whole", "idle"))
        status, body = await self._judge(done)
        self.done, self.status = True, status
        framing = b"content-length: %d\r\n\r\n" % len(body)
        close = self._inlet.closes_after(self)
        self._inlet.write(response_head(status, "application/json", None, close, framing) + body)
        self._inlet.ended(self)

    async def _connect(self, leg: Leg) -> None:
        transport = leg.engine.endpoint.transport
        assert isinstance(transport, EngineTransport)
        try:
            leg.connection = await transport.relay.connect(fresh=True)
        except PenstockError as error:
            leg.failed(error)

    def _begin(self) -> None:
        """Sends what there is, and from now on what comes."""
        request = self.as_request()
        body, self.body = b"".join(self.body), []
        if self.complete or not self.chunked:
            framing = b"content-length: %d\r\n\r\n" % (len(body) if self.complete else self.length or 0)
            self.chunked = False
        else:
            framing, body = b"transfer-encoding: chunked\r\n\r\n", b"%x\r\n%s\r\n" % (len(body), body)
        if self.encoded:
            framing = b"content-encoding: %s\r\n" % request.headers["content-encoding"].encode() + framing
        call = call_of(request)
        for leg in self._legs:
            if leg.connection is not None:
                head = leg.engine.head(call.path, call.content_type)
                leg.connection.submit(leg, head + framing, body, bodyless=False)
        self._sending, self.whole = True, False
        self._inlet.steer()

    async def _answers(self) -> None:
        """Waits for those of all workers."""
        pending = {leg.outcome for leg in self._legs}
        while pending:
            _, pending = await asyncio.wait(pending, timeout=TICK)
            for leg in self._legs:
                if not self.complete and leg.choked:
                    leg.look(STALL, stalled=True)
                elif self.complete:
                    leg.look(leg.engine.update_timeout, stalled=False)

    async def _judge(self, done: dict[Engine, Outcome]) -> tuple[int, bytes]:
        request = self.as_request()
        whole = all_or_nothing(request)
        try:
            outcomes = await self._control.sent(self._kind, request.path, done, all_or_nothing=whole)
        except ControlFailed as error:
            return answer(dict(error.outcomes), str(error))
        return answer(outcomes)

    def as_request(self) -> Request:
        """Its head, as the routes that reach every worker take it."""
        headers = {
            self.fields[at].decode("latin-1").lower(): self.fields[at + 2].decode("latin-1")
            for at in range(0, len(self.fields), 4)
        }
        query = self.target.partition(b"?")[2].decode("latin-1")
        return Request("POST", self.path.decode("ascii"), query, headers, b"")
