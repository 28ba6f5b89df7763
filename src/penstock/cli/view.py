"""`penstock view`: a web page to browse, search and filter traces."""

from __future__ import annotations

import os
import sys
import webbrowser
from dataclasses import dataclass
from pathlib import Path

import tyro
from tyro.conf import Positional

from penstock.viewer.server import Viewer
from penstock.wire.loop import Stop, run


@dataclass(frozen=True)
class ViewArgs:
    """Browse, search and filter a JSONL file of traces in a web page on this machine.

    The file may be as large as it likes and still grow; nothing is ever written. Ctrl-C ends it.
    """

    out: Positional[Path]
    """JSONL file of traces: what `penstock generate` wrote or is writing, or one with the same columns."""
    host: str = "127.0.0.1"
    """Address to listen on. Where other machines reach it, the URL has a secret in it."""
    port: int = 0
    """0: one that is free."""
    open: bool = True
    """Open the browser, where there is a display."""


def main(argv: list[str]) -> int:
    """Run the command. Returns 0 when it was told to end."""
    args = tyro.cli(ViewArgs, prog="penstock view", args=argv)
    return run(_view(args))


async def _view(args: ViewArgs) -> int:
    async with Viewer(args.out, args.host, args.port) as viewer:
        stop = Stop()
        sys.stdout.write(f"{viewer.url}\n")
        sys.stdout.flush()
        if args.open and _has_display():
            webbrowser.open(viewer.url)
        await stop.wished
    return 0


def _has_display() -> bool:
    """A browser that could only be one in this terminal is not opened."""
    return sys.platform == "darwin" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
