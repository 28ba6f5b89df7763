"""The engine's command line: flags with vLLM's names. The heavy imports come after they are parsed."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from penstock.engine.config import EngineConfig
from penstock.engine.options import ServerOptions
from penstock.errors import PenstockError


@dataclass(frozen=True, kw_only=True)
class EngineArgs:
    """Serve a checkpoint folder over the OpenAI API.

    With --scripted instead of --model there is no model: see penstock engine --scripted --help.
    """

    engine: Annotated[EngineConfig, tyro.conf.arg(name="")]
    server: Annotated[ServerOptions, tyro.conf.arg(name="")] = field(default_factory=ServerOptions)


def run(args: EngineArgs) -> int:
    """Serve; the exit status, 1 with one sentence on standard error when the engine cannot start."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        from penstock.engine.server import serve

        return serve(args.engine, args.server)
    except PenstockError as error:
        return refuse(str(error))
    except ModuleNotFoundError as missing:
        return refuse(f"the engine needs {missing.name}: install it with pip install 'penstock[engine]'.")


def refuse(sentence: str) -> int:
    """Says why there is no engine; the exit status."""
    sys.stderr.write(f"penstock engine: {sentence}\n")
    return 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and serve."""
    try:
        args = tyro.cli(EngineArgs, prog="penstock engine", args=arguments)
    except PenstockError as error:
        return refuse(str(error))
    return run(args)
