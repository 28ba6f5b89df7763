"""From samples to response bodies: vLLM's objects, field for field, and the faults in them.

An `Answer` is one HTTP request that generates. It guarantees:
- its request ends exactly once in the account, and its samples leave the batch when its client goes away;
- each event of a stream holds the tokens of one step of the schedule, never more;
- what a client does not read is not kept: how far it was sent is known, the rest is made when it reads on.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import orjson

from penstock.scripted.chaos import Fault
from penstock.scripted.connection import Line
from penstock.scripted.forms import Form
from penstock.scripted.protocol import GenerationRequest
from penstock.scripted.samples import Sample
from penstock.wire.server import Exchange

if TYPE_CHECKING:
    from penstock.scripted.account import Entry
    from penstock.scripted.batch import Batch

EVENTS: Final = "text/event-stream; charset=utf-8"
LAST_EVENT: Final = b"data: [DONE]\n\n"
NEVER: Final = 1 << 60
"""More tokens than any sample has."""

_MARK: Final = "\x01"
_MARKED: Final = b"\\u0001"
"""A character that is in no token, and how JSON writes it."""


@dataclass(frozen=True)
class Asked:
    """A checked request and where it came from."""

    exchange: Exchange
    line: Line
    request: GenerationRequest
    form: Form
    entry: Entry
    id: str
    created: int


class Answer(ABC):
    """One request that generates, from its checked form to the last byte of its response.

    fault: one that strikes in the middle, once a sample has more than `strike_at` tokens.
    """

    def __init__(self, batch: Batch, asked: Asked, samples: list[Sample], fault: Fault | None = None) -> None:
        self.batch = batch
        self.samples = samples
        self.exchange = asked.exchange
        self.line = asked.line
        self.request = asked.request
        self.form = asked.form
        self.entry = asked.entry
        self.id = asked.id
        self.created = asked.created
        self.unfinished = len(samples)
        self.fault = fault
        self.strike_at = NEVER
        self.silent = False
        """Nothing is written: a stall is on, or a fault has ended the request."""
        for sample in samples:
            sample.answer = self

    def begin(self) -> None:
        """Submits the samples."""
        self.exchange.on_disconnect = self.gone
        self.exchange.request.body = b""  # a long prompt need not be kept as long as its answer
        self.batch.submit(self)

    @abstractmethod
    def progress(self, sample: Sample) -> None:
        """The schedule has made tokens of this sample, or it was aborted."""

    def gone(self) -> None:
        """The client has gone: nobody waits for the answer."""
        self.batch.drop(self)
        self.batch.account.ended(self.entry, "aborted", self.tokens)

    def stop(self) -> None:
        """Ends the samples; the client gets what there is, with finish reason `abort`."""
        for sample in self.batch.drop(self):
            sample.length = sample.generated
            sample.reason = "abort"
            self.progress(sample)

    @property
    def tokens(self) -> int:
        """Generated so far."""
        return sum(sample.generated for sample in self.samples)

    def named(self) -> set[str]:
        """All the names an abort may use for this request."""
        return {self.id, self.id.partition("-")[2], self.entry.id}

    def finished(self) -> None:
        """The whole answer has been written."""
        stopped = any(sample.reason == "abort" for sample in self.samples)
        self.batch.over(self)
        self.batch.account.ended(self.entry, "stopped" if stopped else "completed", self.tokens)

    def faulted(self, fault: str) -> None:
        """A fault ends the request."""
        self.silent = True
        self.batch.account.struck(self.entry, fault)
        self.batch.drop(self)
        self.batch.account.ended(self.entry, "faulted", self.tokens)

    def stall(self, fault: Fault) -> None:
        """Silence: for a time, or for good."""
        if fault.duration is None:
            self.faulted(fault.name)
        else:
            self.silent = True
            self.batch.account.struck(self.entry, fault.name)
            asyncio.get_running_loop().call_later(fault.duration, self._go_on)

    def _go_on(self) -> None:
        self.silent = False
        if not self.exchange.disconnected:
            self.proceed()

    @abstractmethod
    def proceed(self) -> None:
        """Writes what is due: a stall is over, or the client reads again."""

    def usage(self) -> dict[str, int]:
        prompt = sum({id(sample.prompt): sample.prompt.tokens for sample in self.samples}.values())
        tokens = self.tokens
        return {"prompt_tokens": prompt, "total_tokens": prompt + tokens, "completion_tokens": tokens}


class WholeAnswer(Answer):
    """Answered with one body when all samples have ended."""

    def __init__(self, batch: Batch, asked: Asked, samples: list[Sample], fault: Fault | None = None) -> None:
        super().__init__(batch, asked, samples, fault)
        self._rest = b""

    def progress(self, sample: Sample) -> None:
        if sample.state != "ended":
            return
        self.unfinished -= 1
        if self.unfinished:
            return
        body = orjson.dumps(self.form.body(self))
        if self.fault is None:
            self.finished()
            self.exchange.respond(200, body)
        else:
            self._break(self.fault, body)

    def _break(self, fault: Fault, body: bytes) -> None:
        """Half a body, and what the fault makes of the other half."""
        self.exchange.start(200, "application/json")
        self.exchange.send(body[: len(body) // 2])
        self._rest = body[len(body) // 2 :]
        self.batch.strike(self, fault)

    def proceed(self) -> None:
        self.finished()
        self.exchange.send(self._rest)
        self.exchange.end()


class StreamAnswer(Answer):
    """Answered with server-sent events as the tokens are made."""

    def __init__(self, batch: Batch, asked: Asked, samples: list[Sample], fault: Fault | None = None) -> None:
        super().__init__(batch, asked, samples, fault)
        self._opened = False
        self._step = batch.tokens_per_step
        request = self.request
        self._plain = request.wanted_logprobs is None and not request.continuous_usage
        """A chunk differs from the one before in its text and ids only."""

    def begin(self) -> None:
        super().begin()
        self.line.on_writable = self.proceed
        self.exchange.start(200, EVENTS)

    def progress(self, sample: Sample) -> None:
        if sample.generated > self.strike_at and self.fault is not None:
            self.strike_at = NEVER
            self.batch.strike(self, self.fault)
        if self.line.writable and not self.silent:
            self._write(sample)

    def proceed(self) -> None:
        for sample in self.samples:
            if self.silent or not self.line.writable or self.exchange.disconnected or not self.unfinished:
                return
            self._write(sample)

    def _write(self, sample: Sample) -> None:
        """Writes the chunks that are due, while the client takes them."""
        if not self._opened:
            if not sample.generated and sample.state != "ended":
                return
            self._open()
        send, line = self.exchange.send, self.line
        while sample.sent < sample.generated and line.writable:
            start = sample.sent
            stop = sample.sent = min(start + self._step, sample.generated)
            if stop < sample.length and sample.front and stop - start == 1:
                text = sample.text(start, stop)
                if sample.rest:
                    id = sample.token_ids(start, stop)[0]
                    send(b"%s%s%s%d%s" % (sample.front, text, sample.between, id, sample.rest))
                else:
                    send(sample.front + text + sample.between)
            else:
                self._write_slowly(sample, start, stop)
        if sample.state == "ended" and sample.sent == sample.generated and not sample.closed:
            self._close(sample)

    def _write_slowly(self, sample: Sample, start: int, stop: int) -> None:
        """The first and last chunk of a sample, and those that are not plain."""
        last = stop == sample.length and sample.reason != "abort"
        text = sample.text(start, stop).decode()
        if text or last or self.request.return_token_ids:
            self.exchange.send(
                self.event(self.form.chunk(self, sample, start, stop, text, last), sample, last)
            )
        if last:
            self._close(sample)
        elif self._plain and not sample.front:
            self._make_template(sample)

    def _make_template(self, sample: Sample) -> None:
        event = self.event(self.form.chunk(self, sample, 1, 2, _MARK, False), sample, False)
        sample.front, _, sample.between = event.rpartition(_MARKED)
        if self.request.return_token_ids:
            number = b"%d" % sample.token_ids(1, 2)[0]
            sample.between, _, sample.rest = sample.between.rpartition(number)

    def _open(self) -> None:
        self._opened = True
        for sample in self.samples:
            for choice in self.form.opening(self, sample):
                self.exchange.send(self.event(choice, sample, False))

    def _close(self, sample: Sample) -> None:
        """The sample has been written; the last one ends the stream."""
        sample.closed = True
        if sample.reason == "abort":
            end = sample.generated
            self.exchange.send(self.event(self.form.chunk(self, sample, end, end, "", True), sample, True))
        self.unfinished -= 1
        if self.unfinished:
            return
        self.finished()
        if self.request.includes_usage:
            more = {"usage": self.usage(), "system_fingerprint": self.batch.fingerprint}
            self.exchange.send(self._encoded([], more))
        self.exchange.send(LAST_EVENT)
        self.exchange.end()

    def event(self, choice: dict[str, Any], sample: Sample, last: bool) -> bytes:
        """One server-sent event."""
        more = choice.pop("more", {})
        if last and not self.request.includes_usage:
            more["system_fingerprint"] = self.batch.fingerprint
        if self.request.continuous_usage:
            prompt = sample.prompt.tokens
            made = sample.sent
            more["usage"] = {
                "prompt_tokens": prompt,
                "total_tokens": prompt + made,
                "completion_tokens": made,
                **self.form.running_usage,
            }
        return self._encoded([choice], more)

    def _encoded(self, choices: list[dict[str, Any]], more: dict[str, Any]) -> bytes:
        return b"data: %s\n\n" % orjson.dumps(
            {
                "id": self.id,
                "object": self.form.chunk_kind,
                "created": self.created,
                "model": self.batch.model,
                "choices": choices,
                **more,
            }
        )
