"""Servers of the fake engine, and whether any process of theirs is left."""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from penstock.servers.launched import LaunchedServer, LifeCycle
from penstock.servers.spec import ServerSpec

TAG = "PENSTOCK_TEST"
"""Environment variable by which the processes of one test are known."""

ENGINE = Path(__file__).with_name("fake_engine.py")


class FakeServer(LaunchedServer):
    """A server of the fake engine, which does as `behaviour` says."""

    kind = "fake"
    ready_line = "Application startup complete."

    def __init__(
        self,
        tag: str = "",
        *,
        life: LifeCycle | None = None,
        port: int = 0,
        env: Mapping[str, str] | None = None,
        api_key: str | None = None,
        spec: ServerSpec | None = None,
        **behaviour: Any,
    ) -> None:
        self.behaviour = behaviour
        spec = spec or ServerSpec(
            model="fake", name="fake", port=port, env={TAG: tag, **(env or {})}, api_key=api_key
        )
        super().__init__(spec, life)

    async def _command(self, spec: ServerSpec, environment: Mapping[str, str]) -> list[str]:
        return fake_command(spec.port, **self.behaviour)


def fake_command(port: int, **behaviour: Any) -> list[str]:
    import json

    return [sys.executable, "-I", "-S", str(ENGINE), json.dumps(behaviour), str(port)]


def processes(tag: str) -> list[int]:
    """Running processes with this tag; zombies do not count."""
    wanted, found = f"{TAG}={tag}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            alive = path.with_name("stat").read_text().rpartition(")")[2].split()[0] != "Z"
            if alive and wanted in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


def wait_until_gone(tag: str, seconds: float = 5.0) -> float:
    """Seconds it took until no process of the tag was left. Fails after `seconds`."""
    started = time.monotonic()
    while left := processes(tag):
        assert time.monotonic() - started < seconds, f"still there: {left}"
        time.sleep(0.01)
    return time.monotonic() - started


@contextmanager
def nothing_left() -> Iterator[str]:
    """Gives a tag; afterwards no process with it may run."""
    tag = secrets.token_hex(8)
    yield tag
    assert processes(tag) == []
