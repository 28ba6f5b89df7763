"""What two OpenAI servers answered, made comparable.

An observation is an answer without what differs from run to run (ids, times, fingerprints) and without the
words of error messages. The events of a stream are put together to one answer, since how many tokens come in
one event is a matter of timing; the shapes of its events are kept beside it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from http.client import HTTPConnection
from typing import Any

from penstock.wire.sse import EventParser
from tests.engine_server.cases import Case

TOLERANCE = 1e-4
"""Largest difference of two logprobs that are the same."""

TIMEOUT = 60.0
"""Seconds for one answer."""

VOLATILE = {"created", "system_fingerprint", "version", "root", "message"}
"""Fields of which only the type is compared; `message` unless it is a chat message."""

ALLOWED = {
    "$.content_type": {
        "health": "the server always names a content type, vLLM none when there is no content",
        "ping": "as health",
    },
    "$.body.data[0].owned_by": {"models": "the engine is not vLLM"},
    "$.body.error.param": {
        "chat message of a wrong type": "vLLM names a class of its own in the path to the message",
        "chat message without a role": "as above",
        "chat content of a wrong type": "as above",
        "completion mixed prompt": "vLLM names the first item, here it is the first that differs",
        "abort bad JSON": "the place of the error is named, as for other requests",
    },
}
"""Where answers may differ: path, case, reason."""


def observe(host: str, port: int, case: Case) -> dict[str, Any]:
    """Sends a case's request and returns the observation of the answer."""
    connection = HTTPConnection(host, port, timeout=TIMEOUT)
    try:
        connection.request(case.method, case.path, body=case.payload or None, headers=case.headers)
        response = connection.getresponse()
        content = response.read()
        kind = response.getheader("content-type")
        seen: dict[str, Any] = {"status": response.status, "content_type": kind}
        allow = response.getheader("allow")
        if allow is not None:
            seen["allow"] = allow
    finally:
        connection.close()
    if kind is not None and kind.startswith("text/event-stream"):
        return seen | _observed_stream(content.decode())
    return seen | {"body": _stable(json.loads(content)) if content else ""}


def shape(value: Any, key: str = "") -> Any:
    """Keys and types of a JSON value; elements of a list are one."""
    if isinstance(value, dict):
        if key == "top_logprobs":
            return {"*": "number"}
        return {name: shape(item, name) for name, item in sorted(value.items())}
    if isinstance(value, list):
        shapes = {json.dumps(shape(item, key), sort_keys=True) for item in value}
        return [json.loads(item) for item in sorted(shapes)]
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return type(value).__name__
    return "number"


def differences(case: Case, expected: dict[str, Any], actual: dict[str, Any]) -> list[str]:
    """One sentence for each difference that is not allowed."""
    if case.compare == "shape":
        expected, actual = (
            {name: item if name != "body" else shape(item) for name, item in seen.items() if name != "joined"}
            for seen in (expected, actual)
        )
    return [
        f"{path}: {first!r} in vLLM, {second!r} here"
        for path, first, second in _unequal("$", expected, actual)
        if case.name not in ALLOWED.get(path, {})
    ]


def _unequal(path: str, first: Any, second: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(first, dict) and isinstance(second, dict):
        for name in sorted(first.keys() | second.keys()):
            yield from _unequal(f"{path}.{name}", first.get(name, "absent"), second.get(name, "absent"))
    elif isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        for index, (one, other) in enumerate(zip(first, second, strict=True)):
            yield from _unequal(f"{path}[{index}]", one, other)
    elif isinstance(first, float) and isinstance(second, float):
        if abs(first - second) > TOLERANCE:
            yield path, first, second
    elif first != second:
        yield path, first, second


def _stable(value: Any) -> Any:
    if isinstance(value, list):
        return [_stable(item) for item in value]
    if not isinstance(value, dict):
        return value
    stable = {}
    for name, item in value.items():
        if name in VOLATILE and not isinstance(item, dict):
            stable[name] = shape(item)
        elif name == "id" and isinstance(item, str):
            stable[name] = re.sub(r"^(chatcmpl|cmpl|modelperm)-[0-9a-f]{16}$", r"\1-*", item)
        else:
            stable[name] = _stable(item)
    return stable


def _observed_stream(content: str) -> dict[str, Any]:
    payloads = [data.decode() for data in EventParser().feed(content.encode())]
    events = [json.loads(payload) for payload in payloads[:-1]]
    shapes = {json.dumps(shape(event), sort_keys=True) for event in events}
    return {
        "last": payloads[-1],
        "shapes": [json.loads(item) for item in sorted(shapes)],
        "joined": _joined(events),
    }


def _joined(events: list[dict[str, Any]]) -> dict[str, Any]:
    """All events of a stream in one: texts, ids and logprobs joined, of other fields the last not null."""
    choices: dict[str, dict[str, Any]] = {}
    whole: dict[str, Any] = {"choices": choices}
    for event in events:
        for choice in event.pop("choices", ()):
            _join(choices.setdefault(str(choice["index"]), {}), choice)
        # Which usage a choice had when another one got its token is a matter of timing: the last one counts.
        whole |= _stable({name: item for name, item in event.items() if item is not None})
    return whole


def _join(whole: dict[str, Any], part: dict[str, Any]) -> None:
    for name, item in part.items():
        if item is None:
            whole.setdefault(name, None)
        elif isinstance(item, dict):
            before = whole.get(name)
            whole[name] = before if isinstance(before, dict) else {}
            _join(whole[name], item)
        elif isinstance(item, list) or name in ("text", "content"):
            whole[name] = (whole.get(name) or type(item)()) + item
        else:
            whole[name] = item
