"""The requests with which an OpenAI server is compared with vLLM, good ones and bad ones.

Each case is one request against a server of the checkpoint in `checkpoint.py`, served as `tiny` with a
context of 512 tokens. `compare` says how much of the answer has to be equal: `values` everything but ids,
times and the words of error messages; `shape` keys and types only, for answers that are drawn at random.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

CONTEXT = 512
"""Tokens of context both servers are started with."""

MODEL = "tiny"
"""The name both servers serve the model as."""

HELLO = [{"role": "user", "content": "Hello there, what is two plus two?"}]
JSON_HEADERS = {"content-type": "application/json"}


Compare = Literal["values", "shape"]


@dataclass(frozen=True)
class Case:
    """One request and how its answer is compared."""

    name: str
    path: str
    body: Any = None
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=lambda: dict(JSON_HEADERS))
    compare: Compare = "values"

    @property
    def payload(self) -> bytes:
        """The bytes of the request's body."""
        if self.body is None:
            return b""
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


def _chat(name: str, compare: Compare = "values", **changes: Any) -> Case:
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 8, "temperature": 0} | changes
    return Case(f"chat {name}", "/v1/chat/completions", _without_absent(body), compare=compare)


def _completion(name: str, compare: Compare = "values", **changes: Any) -> Case:
    body = {"model": MODEL, "prompt": "The quick brown", "max_tokens": 8, "temperature": 0} | changes
    return Case(f"completion {name}", "/v1/completions", _without_absent(body), compare=compare)


ABSENT = object()
"""Marks a field to leave out of a request."""


def _without_absent(body: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in body.items() if value is not ABSENT}


IDS = [40, 41, 42, 43, 44]
TURNS = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": "there"}]},
    {"role": "assistant", "content": "The answer"},
]
CONTINUED: dict[str, Any] = {"continue_final_message": True, "add_generation_prompt": False}
USAGE = {"include_usage": True}
CONTINUOUS = {"include_usage": True, "continuous_usage_stats": True}

CHAT = [
    _chat("plain"),
    _chat("without a model", model=ABSENT),
    _chat("null model", model=None),
    _chat("max_completion_tokens", max_tokens=ABSENT, max_completion_tokens=5),
    _chat("stream", stream=True),
    _chat("stream with usage", stream=True, stream_options=USAGE),
    _chat("stream with continuous usage", stream=True, stream_options=CONTINUOUS),
    _chat("stream with ids", stream=True, return_token_ids=True),
    _chat("stream with logprobs", stream=True, logprobs=True, top_logprobs=2),
    _chat("token ids", return_token_ids=True),
    _chat("logprobs", logprobs=True),
    _chat("top logprobs", logprobs=True, top_logprobs=3),
    _chat("tokens as ids", logprobs=True, top_logprobs=1, return_tokens_as_token_ids=True),
    _chat("turns", messages=TURNS),
    _chat("continued", messages=TURNS, **CONTINUED),
    _chat("continued stream", messages=TURNS, stream=True, return_token_ids=True, **CONTINUED),
    _chat("no generation prompt", add_generation_prompt=False, return_token_ids=True),
    _chat("template arguments", chat_template_kwargs={"enable_thinking": False}, return_token_ids=True),
    _chat("unknown fields", surprise=1, metadata={"a": "b"}, user="me"),
    _chat("n sampled", "shape", n=3, temperature=1.0, seed=7, ignore_eos=True),
    _chat("n sampled stream", "shape", n=2, temperature=1.0, seed=7, ignore_eos=True, stream=True),
    _chat(
        "all sampling fields",
        "shape",
        temperature=0.9,
        top_p=0.9,
        top_k=20,
        min_p=0.05,
        seed=1,
        ignore_eos=True,
    ),
    _chat("penalties", presence_penalty=0.5, frequency_penalty=0.5, repetition_penalty=1.2),
    _chat("to the end of the context", max_tokens=ABSENT, ignore_eos=True, return_token_ids=True),
    _chat("number in a string", max_tokens="4"),
    _chat("greedy with n", n=2),
    _chat("unknown model", model="other"),
    _chat("no messages", messages=ABSENT),
    _chat("empty messages", messages=[]),
    _chat("messages of a wrong type", messages="Hello"),
    _chat("message of a wrong type", messages=["Hello"]),
    _chat("message without a role", messages=[{"content": "Hello"}]),
    _chat("content of a wrong type", messages=[{"role": "user", "content": 7}]),
    _chat("unknown role", messages=[{"role": "wizard", "content": "Hello"}]),
    _chat("continue by default", continue_final_message=True),
    _chat("continue nothing", messages=HELLO[:0], continue_final_message=True, add_generation_prompt=False),
    _chat("tool result", messages=[*HELLO, {"role": "tool", "content": "4", "tool_call_id": "a"}]),
    _chat(
        "reasoning", messages=[*HELLO, {"role": "assistant", "content": "4", "reasoning": "2 + 2"}, *HELLO]
    ),
    _chat("role the template refuses", messages=[{"role": "stranger", "content": "Hello"}]),
    _chat("no content", messages=[*HELLO, {"role": "assistant", "content": None}, *HELLO]),
    _chat("no content at all", messages=[*HELLO, {"role": "assistant"}, *HELLO]),
    _chat("empty content", messages=[{"role": "user", "content": ""}]),
    _chat("content of another kind", messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
    _chat("name", messages=[{"role": "user", "content": "Hello", "name": "Ann"}]),
    _chat("no effort", reasoning_effort="none"),
    _chat("some effort", reasoning_effort="low"),
    _chat("effort of a wrong value", reasoning_effort="heroic"),
    _chat("template arguments that are fields", chat_template_kwargs={"add_generation_prompt": False}),
    _chat("null stream", stream=None),
    _chat("seed of minus one", seed=-1),
    _chat("top_k of minus one", top_k=-1),
    _chat("no samples", n=0),
    _chat("no tools", tools=[]),
    _chat("tools without a parser", tools=[{"type": "function", "function": {"name": "f"}}]),
    _chat("response format", response_format={"type": "text"}),
    _chat("continue and generate", continue_final_message=True, add_generation_prompt=True),
    _chat("top logprobs alone", top_logprobs=2),
    _chat("too many logprobs", logprobs=True, top_logprobs=50),
    _chat("negative logprobs", logprobs=True, top_logprobs=-2),
    _chat("stream options alone", stream_options=USAGE),
    _chat("too long", messages=[{"role": "user", "content": "Hello there " * 600}]),
    _chat("template in the request", chat_template="{{ messages }}"),
    _chat(
        "null values", "shape", temperature=None, top_p=None, n=None, stop=None, seed=None, ignore_eos=True
    ),
]

COMPLETIONS = [
    _completion("plain"),
    _completion("default length", max_tokens=ABSENT),
    _completion("of many", prompt=["The quick", "brown fox"]),
    _completion("of ids", prompt=IDS),
    _completion("of lists of ids", prompt=[IDS, IDS[1:]], return_token_ids=True),
    _completion("of many, stream", prompt=["The quick", "brown fox"], stream=True, stream_options=USAGE),
    _completion("stream", stream=True, return_token_ids=True),
    _completion("stream with continuous usage", stream=True, stream_options=CONTINUOUS),
    _completion("stream with logprobs", stream=True, logprobs=2),
    _completion("token ids", return_token_ids=True),
    _completion("logprobs", logprobs=0),
    _completion("top logprobs", logprobs=3),
    _completion("tokens as ids", logprobs=1, return_tokens_as_token_ids=True),
    _completion(
        "n of many, sampled", "shape", prompt=["The", "brown"], n=2, temperature=1.0, ignore_eos=True
    ),
    _completion("ignore_eos, min_tokens", max_tokens=12, min_tokens=12, ignore_eos=True),
    _completion("special tokens kept", skip_special_tokens=False),
    _completion("own id", request_id="mine"),
    _completion("max_tokens over the context", max_tokens=5000),
    _completion("max_tokens beyond the rest", prompt=IDS * 100, max_tokens=100, ignore_eos=True),
    _completion("null max_tokens", max_tokens=None),
    _completion("no prompt", prompt=ABSENT),
    _completion("empty prompt", prompt=""),
    _completion("empty list", prompt=[]),
    _completion("empty text in a list", prompt=[""]),
    _completion("empty ids in a list", prompt=[[]]),
    _completion("empty ids among others", prompt=[IDS, []]),
    _completion("null in a list", prompt=[None]),
    _completion("prompt of a wrong type", prompt=5),
    _completion("mixed prompt", prompt=["a", 5]),
    _completion("negative id", prompt=[5, -1]),
    _completion("id outside the vocabulary", prompt=[5, 100_000]),
    _completion("too long", prompt=IDS * 200),
    _completion("exactly the context", prompt=(IDS * 200)[:CONTEXT]),
    _completion("unknown model", model="other"),
    _completion("wrong type of max_tokens", max_tokens="many"),
    _completion("fraction of a token", max_tokens=1.5),
    _completion("no tokens", max_tokens=0),
    _completion("negative max_tokens", max_tokens=-1),
    _completion("negative temperature", temperature=-1),
    _completion("high temperature", temperature=3),
    _completion("wrong type of temperature", temperature="hot"),
    _completion("top_p of zero", top_p=0),
    _completion("top_p over one", top_p=1.5),
    _completion("top_k of minus two", top_k=-2),
    _completion("min_p over one", min_p=2),
    _completion("no samples", n=0),
    _completion("presence penalty", presence_penalty=5),
    _completion("frequency penalty", frequency_penalty=-5),
    _completion("repetition penalty", repetition_penalty=0),
    _completion("min over max tokens", min_tokens=20),
    _completion("negative min_tokens", min_tokens=-1),
    _completion("empty stop", stop=""),
    _completion("wrong type of stop", stop=5),
    _completion("wrong stop ids", stop_token_ids=["a"]),
    _completion("wrong type of stream", stream="perhaps"),
    _completion("wrong type of seed", seed="x"),
    _completion("too many logprobs", logprobs=50),
    _completion("negative logprobs", logprobs=-3),
    _completion("stream options alone", stream_options=USAGE),
]

# The greedy answer to HELLO is d·\t·ju·<·row·tan·g·<|im_end|>, the letters being its tokens.
STOPS = [
    _chat("stop", stop="<row"),
    _chat("stop in a list", stop=["zebra", "wt"]),
    _chat("stop included", stop=["wt"], include_stop_str_in_output=True, return_token_ids=True),
    _chat("stop of which only the beginning comes", max_tokens=7, stop=["angle"]),
    _chat("stop, stream", stop=["wt"], stream=True, stream_options=USAGE),
    _chat("stop, stream, with logprobs", stop=["wt"], stream=True, logprobs=True, return_token_ids=True),
    _chat("stop included, stream", stop=["wt"], include_stop_str_in_output=True, stream=True),
    _chat("stop of which only the beginning comes, stream", max_tokens=7, stop=["angle"], stream=True),
    _chat("stop before min_tokens", stop=["ju", "tan"], min_tokens=4),
    _chat("stop that ends after min_tokens", stop=["u<ro"], min_tokens=4),
    _chat("two stops, the first one found", stop=["g", "<"]),
    _chat("five stops", stop=["a", "b", "c", "d", "e"]),
    _chat("stop id", stop_token_ids=[321], return_token_ids=True),
    _chat("stop id included", stop_token_ids=[321], include_stop_str_in_output=True),
    _chat("stop id outside the vocabulary", stop_token_ids=[100_000]),
    _chat("stop id, stream", stop_token_ids=[321], stream=True, return_token_ids=True),
    _chat("end of text", max_tokens=20, return_token_ids=True),
    _chat("end of text, stream", max_tokens=20, stream=True, return_token_ids=True),
    _chat("end of text, special tokens kept", max_tokens=20, skip_special_tokens=False),
    _chat("end of text included", max_tokens=20, skip_special_tokens=False, include_stop_str_in_output=True),
    _chat("end of text ignored", max_tokens=20, ignore_eos=True, return_token_ids=True),
    _chat(
        "end of text ignored, kept", max_tokens=20, ignore_eos=True, skip_special_tokens=False, stream=True
    ),
    _chat("end of text as a stop id", max_tokens=20, stop_token_ids=[2], ignore_eos=True),
    _chat("end of text after min_tokens", max_tokens=20, min_tokens=10, return_token_ids=True),
    _chat("second end of text", max_tokens=20, add_generation_prompt=False, return_token_ids=True),
]

OTHERS = [
    Case("models", "/v1/models", method="GET"),
    Case("health", "/health", method="GET"),
    Case("ping", "/ping", method="GET"),
    Case("version", "/version", method="GET", compare="shape"),
    Case("load", "/load", method="GET"),
    Case("tokenize", "/tokenize", {"model": MODEL, "prompt": "Hello, naïve café"}),
    Case("tokenize strings", "/tokenize", {"prompt": "Hello", "return_token_strs": True}),
    Case("tokenize chat", "/tokenize", {"model": MODEL, "messages": HELLO}),
    Case("tokenize chat, continued", "/tokenize", {"messages": TURNS, **CONTINUED}),
    Case("tokenize nothing", "/tokenize", {"model": MODEL}),
    Case("tokenize unknown model", "/tokenize", {"model": "other", "prompt": "a"}),
    Case("detokenize", "/detokenize", {"model": MODEL, "tokens": IDS}),
    Case("detokenize special", "/detokenize", {"tokens": [1, *IDS, 2]}),
    Case("detokenize wrong type", "/detokenize", {"tokens": "a"}),
    Case("detokenize outside the vocabulary", "/detokenize", {"tokens": [100_000]}),
    Case("reset prefix cache", "/reset_prefix_cache"),
    Case("abort unknown", "/abort_requests", {"request_ids": ["nobody"]}),
    Case("abort all", "/abort_requests", {}),
    Case("abort bad JSON", "/abort_requests", b"{"),
    Case("unknown path", "/v1/surprise", {}),
    Case("unknown path, GET", "/surprise", method="GET"),
    Case("wrong method", "/v1/chat/completions", method="GET"),
    Case("wrong method for models", "/v1/models", {}),
    Case("bad JSON", "/v1/chat/completions", b'{"model": "tiny", "messages": ['),
    Case("not an object", "/v1/chat/completions", b"[1, 2]"),
    Case("empty body", "/v1/completions", b""),
    Case("no content type", "/v1/completions", {"prompt": "a", "max_tokens": 1}, headers={}),
    Case(
        "request id in a header",
        "/v1/chat/completions",
        {"messages": HELLO, "max_tokens": 2, "temperature": 0},
        headers=JSON_HEADERS | {"x-request-id": "abc"},
    ),
    Case(
        "request id in a header, completion",
        "/v1/completions",
        {"prompt": "a", "max_tokens": 2, "temperature": 0},
        headers=JSON_HEADERS | {"x-request-id": "abc"},
    ),
]

CASES = [*CHAT, *COMPLETIONS, *STOPS, *OTHERS]
