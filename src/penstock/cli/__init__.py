"""The command line: one file a command, loaded only when it is called.

Every command's module has `main(argv) -> int`. A PenstockError becomes one sentence on stderr and a non-zero
exit status: 2 for what can be mended on the command line, 1 for what went wrong on the way.
"""

from __future__ import annotations

import importlib
import os
import sys
from difflib import get_close_matches

from penstock import __version__
from penstock.errors import ConfigError, PenstockError

COMMANDS = {
    "generate": "reasoning traces for a dataset: JSONL in, JSONL out, resumable",
    "export": "the rows of a job as JSONL, Parquet or a Hugging Face dataset, and to the hub",
    "merge": "the shards of a job, joined to its output",
    "view": "browse, search and filter traces in a web page on this machine",
    "status": "what is done, failed and owed of a job, running or not",
    "top": "a running job from another terminal: rows, rates, time left",
    "serve": "start engines, watch and restart them, with the router in front if asked for",
    "route": "one address for many engines: relays, balances, retries",
    "engine": "serve a checkpoint folder behind the OpenAI API; with --scripted no model at all, for tests",
    "bench": "load tests: engine, router and client under the same requests, what each layer adds",
    "slurm": "submit a command to Slurm: an array job of shards, or a Ray cluster in an allocation",
    "doctor": "look at this machine: limits, ports, memory, GPUs, versions; says what to change",
    "train": "reinforcement learning of the shipped model on this machine: engines, rollouts, learner",
    "demo": "a small dataset through the embedded engine with the shipped model, and its answers checked",
}


def main(argv: list[str] | None = None) -> int:
    """Entry point of the `penstock` command. Returns the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    match arguments:
        case [] | ["-h" | "--help"]:
            sys.stdout.write(_overview())
            return 0
        case ["--version"]:
            sys.stdout.write(f"penstock {__version__}\n")
            return 0
        case [command, *rest] if command in COMMANDS:
            return _run(command, rest)
        case [unknown, *_]:
            near = get_close_matches(unknown, COMMANDS, n=1, cutoff=0.0)[0]
            return _complain(f"There is no command {unknown!r}; did you mean {near!r}?", 2)
    raise AssertionError(arguments)


def _run(command: str, argv: list[str]) -> int:
    module = importlib.import_module(f"penstock.cli.{command}")
    try:
        return int(module.main(argv))
    except ConfigError as error:
        return _complain(str(error), 2)
    except PenstockError as error:
        return _complain(str(error), 1)
    except BrokenPipeError:
        # The reader of our output went away: nothing can be said to it any more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _complain(sentence: str, status: int) -> int:
    sys.stderr.write(f"penstock: {sentence}\n")
    return status


def _overview() -> str:
    lines = [f"  {name:<10} {what}\n" for name, what in COMMANDS.items()]
    return "usage: penstock COMMAND … (penstock COMMAND --help says more)\n\n" + "".join(lines)
