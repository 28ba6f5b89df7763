"""The connection of this process to a Ray cluster.

It guarantees one sentence where there is no Ray, or no cluster that answers; a connection that was there
before stays as it was. Ray is imported only inside the functions.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from penstock.errors import ConfigError

NAMESPACE: Final = "penstock"
"""In which the named actors are found, also from another driver of the cluster."""

PROBE: Final = 5.0
"""Seconds in which the head has to accept a connection. Ray itself asks for minutes."""

GPUS_SHOWN: Final = "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"
"""Set to 0, a process that takes no GPUs sees them all the same; Ray warns until it is set."""


def connect(address: str | None = None) -> bool:
    """Joins the cluster at `address` (HOST:PORT); None: the one RAY_ADDRESS names, or that of this machine.

    Whether this call has joined it; False: this process was connected. Raises ConfigError.
    """
    try:
        import ray
    except ImportError:
        raise ConfigError("Ray is not installed here: pip install 'penstock[ray]'.") from None
    if ray.is_initialized():
        return False
    head = _head(address)
    os.environ.setdefault(GPUS_SHOWN, "0")
    try:
        ray.init(address=head, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        why = str(error).partition("\n")[0]
        raise ConfigError(f"The Ray cluster at {head} cannot be joined: {why}") from None
    return True


def disconnect() -> None:
    """Leaves the cluster; Ray ends whatever actors of this driver are left."""
    import ray

    ray.shutdown()


@contextmanager
def connected(address: str | None = None) -> Iterator[None]:
    """A connection for the block, unless there is one already, which stays. Raises ConfigError."""
    ours = connect(address)
    try:
        yield
    finally:
        if ours:
            disconnect()


def require() -> None:
    """Raises ConfigError unless this process is connected to a cluster."""
    try:
        import ray
    except ImportError:
        raise ConfigError("Ray is not installed here: pip install 'penstock[ray]'.") from None
    if not ray.is_initialized():
        raise ConfigError(
            "This process is not connected to Ray: call penstock.cluster.session.connect() first."
        )


def _head(address: str | None) -> str:
    """HOST:PORT of a head that accepts connections. Raises ConfigError."""
    from ray._private.services import canonicalize_bootstrap_address

    if address is not None and "://" in address:
        raise ConfigError(
            f"{address}: Ray's client is not for this. Run the command on a machine of the cluster, and give "
            "HOST:PORT or nothing."
        )
    try:
        head = canonicalize_bootstrap_address(address or "auto")
    except (ConnectionError, ValueError):
        head = None
    if head is None:
        raise ConfigError(
            "There is no Ray cluster here: start one with `ray start --head`, or give its address, HOST:PORT."
        )
    host, _, port = str(head).rpartition(":")
    with contextlib.suppress(OSError, ValueError):
        socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE).close()
        return str(head)
    raise ConfigError(f"The Ray cluster at {head} does not answer within {PROBE:g} s: is its head running?")
