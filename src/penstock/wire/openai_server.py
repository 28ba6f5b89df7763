"""The server's side of the OpenAI API as vLLM has it: what our engines share, whatever generates.

Routes, refusals, the decoding of bodies and the answers that are the same for each. What is wrong with a
request is a `Refused`, which carries the status and the fields of the error body.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from random import getrandbits
from typing import Annotated, Any, Final, Generic, TypeVar

import msgspec
import orjson

from penstock.errors import ConfigError
from penstock.wire.exchange import Exchange, Request

DEFAULT_COMPLETION_TOKENS: Final = 16
"""max_tokens of a completion that names none."""
MAX_SAMPLES: Final = 16384
"""Samples of one prompt in one request."""
MAX_LOGPROBS: Final = 20
"""Alternatives per token a request may ask for."""

Handler = Callable[[Exchange], None]
Routes = Mapping[str, Mapping[str, Handler]]
"""Handlers by path and method."""
TokenId = Annotated[int, msgspec.Meta(ge=0)]


class Refused(ConfigError):
    """A request that is answered with an error; the arguments are those of the error body."""

    def __init__(
        self, message: str, *, param: str | None = None, type: str = "BadRequestError", code: int = 400
    ) -> None:
        super().__init__(message)
        self.param = param
        self.type = type
        self.code = code
        """HTTP status."""


class StreamOptions(msgspec.Struct):
    """What a stream says besides its text."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """/detokenize."""

    tokens: list[TokenId]
    model: str | None = None


class AbortRequest(msgspec.Struct, kw_only=True):
    """/abort_requests, and /abort with one `request_id`."""

    request_ids: list[str] | None = None
    request_id: str | None = None


Body = TypeVar("Body")


class Reader(Generic[Body]):
    """Decodes request bodies of one type, as leniently as vLLM: "5" is a number where one is expected."""

    def __init__(self, type: type[Body]) -> None:
        self._decoder = msgspec.json.Decoder(type, strict=False)

    def read(self, body: bytes) -> Body:
        """Raises Refused naming the field that is wrong."""
        try:
            return self._decoder.decode(body)
        except msgspec.ValidationError as error:
            message = str(error)
            missing = re.match(r"Object missing required field `(\w+)`", message)
            place = re.search(r" - at `\$(.*)`$", message)
            where = f".{missing[1]}" if missing else place[1] if place else ""
            param = "body" + where.replace("[", ".").replace("]", "")
            raise Refused(message, param=param, type="Bad Request") from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            byte = re.search(r"byte (\d+)", str(error))
            param = f"body.{byte[1] if byte else len(body)}" if body else "body"
            raise Refused(f"JSON decode error: {error}", param=param, type="Bad Request") from None


def json_of(request: Request) -> bytes:
    """The body of a request that says it is JSON. Raises Refused for another content type, as vLLM does."""
    media_type = request.headers.get("content-type", "").partition(";")[0]
    if media_type.strip().lower() != "application/json":
        raise Refused("Unsupported Media Type: Only 'application/json' is allowed", type="Bad Request")
    return request.body


def handler_of(routes: Routes, exchange: Exchange) -> Handler | None:
    """Who answers a request; None: nobody, and it has been answered so."""
    request = exchange.request
    methods = routes.get(request.path)
    if methods is None:
        exchange.respond(404, b'{"detail":"Not Found"}')
        return None
    handler = methods.get(request.method)
    if handler is None:
        exchange.respond(405, b'{"detail":"Method Not Allowed"}', headers={"allow": ", ".join(methods)})
    return handler


def error_body(message: str, type: str, code: int, param: str | None = None) -> bytes:
    """vLLM's form of an error."""
    return orjson.dumps({"error": {"message": message, "type": type, "param": param, "code": code}})


def refusal(error: Exception) -> tuple[int, bytes]:
    """Status and body for an error; what is not the request's fault is a 500."""
    if isinstance(error, Refused):
        return error.code, error_body(str(error), error.type, error.code, error.param)
    if isinstance(error, ConfigError):
        return 400, error_body(str(error), "BadRequestError", 400)
    return 500, error_body(str(error), "InternalServerError", 500)


def model_cards(names: Sequence[str], root: str, max_model_len: int, created: int) -> Mapping[str, Any]:
    """The answer to /v1/models."""
    permission = {
        "object": "model_permission",
        "created": created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    cards = [
        {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "penstock",
            "root": root,
            "parent": None,
            "max_model_len": max_model_len,
            "permission": [{"id": f"modelperm-{random_id()}", **permission}],
        }
        for name in names
    ]
    return {"object": "list", "data": cards}


def random_id() -> str:
    """16 hexadecimal digits."""
    return f"{getrandbits(64):016x}"


def package_version() -> str:
    """Of penstock, `0` when it is not installed."""
    try:
        return version("penstock")
    except PackageNotFoundError:
        return "0"
