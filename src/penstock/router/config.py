"""Settings that can be changed while the router runs: all of a change at once, or nothing of it.

Pure: what is applied is `Router.reconfigure`'s business.
"""

from __future__ import annotations

from dataclasses import fields, replace
from difflib import get_close_matches
from typing import Any, Final, get_type_hints

import msgspec

from penstock.errors import ConfigError
from penstock.router.args import RouterArgs

CHANGEABLE: Final = (
    "policy",
    "max_concurrent_requests",
    "worker_max_in_flight",
    "queue_size",
    "queue_timeout_secs",
    "request_timeout_secs",
    "retry_max_retries",
    "health_check_interval_secs",
    "health_failure_threshold",
    "resume_streams",
)
"""What they mean is said at `RouterArgs`. What waits, and what is in flight, goes on under the new ones."""

_KNOWN: Final = frozenset(field.name for field in fields(RouterArgs))


def changed(args: RouterArgs, body: bytes) -> RouterArgs:
    """The settings with the changes in `body`, a JSON object. Raises ConfigError, with one sentence."""
    try:
        given = msgspec.json.decode(body, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ConfigError(f"the body must be a JSON object of settings: {error}") from None
    if not given:
        raise ConfigError(f"the body names no setting; what can be changed is {', '.join(CHANGEABLE)}")
    types = get_type_hints(RouterArgs)
    changes = {}
    for name, value in given.items():
        if name not in CHANGEABLE:
            raise ConfigError(_unchangeable(name))
        try:
            changes[name] = msgspec.convert(value, types[name])
        except msgspec.ValidationError as error:
            raise ConfigError(f"{name} cannot be {value!r}: {error}") from None
    if args.adaptive and "worker_max_in_flight" in changes:
        raise ConfigError("the workers' limits are adaptive: each worker finds its own")
    new = replace(args, **changes)
    new.check()
    return new


def _unchangeable(name: str) -> str:
    if name in _KNOWN:
        return f"{name} cannot be changed while the router runs; what can is {', '.join(CHANGEABLE)}"
    near = get_close_matches(name, CHANGEABLE, n=1)
    return f"there is no setting {name!r}" + (f"; is {near[0]!r} meant?" if near else "")
