"""`penstock engine`: serve a checkpoint folder with the embedded engine; with `--scripted`, no model."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

import tyro

SCRIPTED = "--scripted"


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and serve; the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if SCRIPTED in arguments:
        arguments.remove(SCRIPTED)
        return serve_scripted(arguments)
    from penstock.engine.args import main as serve_checkpoint

    return serve_checkpoint(argv)


def serve_scripted(arguments: Sequence[str]) -> int:
    """Parse the flags of the scripted engine and serve. Raises ConfigError."""
    from penstock.scripted.config import ScriptedArgs
    from penstock.scripted.server import serve

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    return serve(tyro.cli(ScriptedArgs, prog=f"penstock engine {SCRIPTED}", args=arguments))
