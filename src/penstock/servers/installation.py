"""Where an engine is installed: the interpreter that has it, and its version."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from penstock.errors import ConfigError

ASK_LIMIT: Final = 60.0
"""Seconds an interpreter may take to say which version it has; on a shared file system that is slow."""

_QUESTION: Final = "import sys, importlib.metadata as m; print(m.version(sys.argv[1]))"


@dataclass(frozen=True)
class Package:
    """An engine as a Python package."""

    name: str
    """Of the distribution and of the module."""
    title: str
    script: str
    """Of the command that the package installs."""
    variable: str
    """Environment variable that names the interpreter."""


@dataclass(frozen=True)
class Installation:
    """An engine that is installed."""

    python: str
    version: str


async def find(package: Package, python: str | Path | None, environment: Mapping[str, str]) -> Installation:
    """The engine of the interpreter that is named, else of this one, else of the command on the PATH.

    Raises ConfigError with the sentence for the user when there is none.
    """
    chosen = python or environment.get(package.variable)
    if chosen is None:
        chosen = sys.executable if importlib.util.find_spec(package.name) else _of_command(package.script)
    if chosen is None:
        raise ConfigError(
            f"{package.title} is not installed here. Install it, or name an interpreter that has it with "
            f"python= or the environment variable {package.variable}."
        )
    return Installation(str(chosen), await _version(package, str(chosen), environment))


def _of_command(script: str) -> str | None:
    """The interpreter in the first line of a command on the PATH."""
    path = shutil.which(script)
    if path is None:
        return None
    try:
        with Path(path).open("rb") as file:
            first = file.readline(4096)
    except OSError:
        return None
    python = os.fsdecode(first[2:].strip())
    return python if first.startswith(b"#!/") and " " not in python else None


async def _version(package: Package, python: str, environment: Mapping[str, str]) -> str:
    try:
        asked = await asyncio.create_subprocess_exec(
            *(python, "-c", _QUESTION, package.name),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env=dict(environment),
        )
    except OSError as error:
        raise ConfigError(
            f"The interpreter {python} for {package.title} cannot be run: {error.strerror}."
        ) from None
    try:
        async with asyncio.timeout(ASK_LIMIT):
            answer, _ = await asked.communicate()
    except TimeoutError:
        raise ConfigError(
            f"{python} did not say its version of {package.title} within {ASK_LIMIT:g} s."
        ) from None
    finally:
        if asked.returncode is None:
            asked.kill()
            await asked.wait()
    if asked.returncode != 0:
        raise ConfigError(
            f"The interpreter {python} has no {package.title}: install it there, or name another."
        )
    return answer.decode().strip()
