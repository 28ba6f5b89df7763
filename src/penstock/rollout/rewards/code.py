"""Reward for programs: the code of an answer is run against tests, in a sandbox, in a worker.

A program that fails a test, crashes, prints too much or uses up its memory or its CPU time is wrong: 0. One
that is not over when its time on the clock is, is a failed score: on a busy machine that says nothing of the
program. (CPU time is counted by the kernel and does not depend on what else runs.)
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from typing import Any, Final

import msgspec
import orjson

from penstock.errors import ConfigError
from penstock.prompt import Prompt
from penstock.rollout.rewards import columns, sandbox
from penstock.rollout.rewards.columns import NoReference
from penstock.rollout.rewards.sandbox import KILL_LIMIT, Limits, Ran, SandboxFailed
from penstock.rollout.rewards.workers import Workers
from penstock.rollout.score import Score
from penstock.sample import Sample

log = logging.getLogger(__name__)

MARGIN: Final = 10.0
"""Seconds a worker has beyond the time of its programs."""

CHECK_LIMIT: Final = 60.0
"""Seconds in which a program of one line has to have run; it takes about 0.05."""

UNPROTECTED: Final = {
    "network": "it can reach the network",
    "processes": "it sees other processes",
    "files": "it can read your files, and write where you can",
    "unprivileged": "it runs as root, with no limit on processes",
}
"""What is not prevented on a machine that does not allow it, by the fields of `Protection`."""

_FENCE: Final = re.compile(r"```([^\n`]*)\n(.*?)```", re.DOTALL)

HARNESS: Final = """\
import json, sys
read = sys.stdin.buffer.readline
scope = {"__name__": "solution", "__builtins__": __builtins__}
exec(compile(json.loads(read()), "solution.py", "exec"), scope)
token, tests = json.loads(read())
for number, test in enumerate(tests):
    try:
        exec(compile(test, "test.py", "exec"), scope)
    except Exception:
        continue
    print(f"\\n{token} {number}", flush=True)
"""
"""Runs assert-tests. They and the token that reports success are read once the program has run, so that one
which exits, or prints, does not pass. A program that is out to deceive tests in its own process can."""


class Pair(msgspec.Struct, frozen=True):
    """A test by standard input and output."""

    input: str
    output: str


class _Columns(msgspec.Struct, frozen=True):
    inputs: list[str]
    outputs: list[str]


class Suite(msgspec.Struct, frozen=True):
    """The tests of one row, of either kind."""

    pairs: tuple[Pair, ...] = ()
    asserts: tuple[str, ...] = ()


class Code:
    """1 when the program in the answer passes all tests of the row's column, else 0.

    The program is the answer's last block fenced as Python, or as nothing. Tests: a list of
    `{"input": …, "output": …}`, `{"inputs": […], "outputs": […]}`, or a list of statements such as
    `assert f(2) == 4`; or one of these as JSON text. Outputs are compared without white space at the end
    of lines and of the whole. partial: the share of tests passed instead. limits: of each run. total: seconds
    for all runs of one program; beyond, the score has failed.
    """

    def __init__(
        self,
        workers: Workers,
        *,
        column: str = "tests",
        partial: bool = False,
        limits: Limits = sandbox.DEFAULT,
        total: float = 60.0,
    ) -> None:
        if not total > 0:
            raise ConfigError(f"the total time of programs must be positive, not {total}")
        self.workers = workers
        self.column = column
        self.partial = partial
        self.limits = limits
        self.total = total
        self._checked = False

    async def check(self) -> None:
        """Warns, once, of what this machine does not keep a program from. Raises ConfigError when no program
        can be run here."""
        self._checked = True
        found = await self.workers.score(protections, limit=CHECK_LIMIT)
        if found.failed is not None:
            raise ConfigError(f"the sandbox does not work on this machine: {found.failed}")
        if lacking := [what for name, what in UNPROTECTED.items() if not found.parts[name]]:
            log.warning("THE SANDBOX IS OPEN: of a program under test, %s.", "; ".join(lacking))

    async def __call__(self, prompt: Prompt, sample: Sample) -> Score:
        if not self._checked:
            await self.check()
        try:
            tests = parse_tests(columns.value(prompt, self.column))
        except (NoReference, ValueError) as error:
            return Score.failure(str(error))
        program = program_in(sample.answer)
        if program is None:
            return Score(0.0, {"passed": 0.0})
        limit = self.total + self.limits.wall + KILL_LIMIT + MARGIN
        return await self.workers.score(
            grade, program, tests, self.limits, self.total, self.partial, limit=limit
        )


def program_in(answer: str) -> str | None:
    """The last fenced block that is Python or says nothing of its language; None without one."""
    for language, block in reversed(_FENCE.findall(answer)):
        if language.strip().lower() in ("python", "python3", "py", ""):
            return str(block)
    return None


def parse_tests(found: Any) -> Suite:
    """The tests in a row's column. Raises ValueError for what holds none."""
    if isinstance(found, str):
        try:
            found = orjson.loads(found)
        except orjson.JSONDecodeError as error:
            raise ValueError(f"the tests are text but not JSON ({error})") from None
    try:
        if isinstance(found, dict):
            apart = msgspec.convert(found, _Columns)
            found = [Pair(*both) for both in zip(apart.inputs, apart.outputs, strict=True)]
        tests = msgspec.convert(found, tuple[Pair | str, ...])
    except (msgspec.ValidationError, ValueError) as error:
        raise ValueError(f"the tests cannot be read ({error})") from None
    pairs = tuple(test for test in tests if isinstance(test, Pair))
    asserts = tuple(test for test in tests if isinstance(test, str))
    if bool(pairs) == bool(asserts):
        raise ValueError("the tests must be pairs of input and output, or statements, and at least one")
    return Suite(pairs, asserts)


# -- in a worker --------------------------------------------------------------------------------------


def protections() -> Score:
    """What a program is kept from on this machine, as parts 1 or 0."""
    try:
        ran = sandbox.run("print('well')")
    except SandboxFailed as error:
        return Score.failure(str(error))
    if ran.output != b"well\n":
        return Score.failure(f"a program of one line ended with status {ran.status} {ran.ended}")
    return Score(1.0, {name: float(getattr(ran.protection, name)) for name in UNPROTECTED})


def grade(program: str, tests: Suite, limits: Limits, total: float, partial: bool) -> Score:
    """Runs the tests. Fails by a timeout, or when the sandbox does not work."""
    count = len(tests.pairs) + len(tests.asserts)
    deadline = time.monotonic() + total
    passed = 0
    try:
        if tests.asserts:
            passed = _asserts_passed(program, tests.asserts, limits)
        for pair in tests.pairs:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the tests were not over within {total:g} s")
            if _passes(program, pair, limits):
                passed += 1
            elif not partial:
                break
    except TimeoutError as error:
        return Score.failure(f"timeout: {error}")
    except SandboxFailed as error:
        return Score.failure(f"the sandbox failed: {error}")
    share = passed / count
    return Score(share if partial else float(passed == count), {"passed": share})


def _passes(program: str, pair: Pair, limits: Limits) -> bool:
    ran = _run(program, pair.input.encode(), limits)
    return ran.status == 0 and _lines(ran.output.decode(errors="replace")) == _lines(pair.output)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _asserts_passed(program: str, asserts: tuple[str, ...], limits: Limits) -> int:
    token = secrets.token_hex(16)
    stdin = orjson.dumps(program) + b"\n" + orjson.dumps([token, asserts]) + b"\n"
    reported = set(_run(HARNESS, stdin, limits).output.split(b"\n"))
    return sum(f"{token} {number}".encode() in reported for number in range(len(asserts)))


def _run(program: str, stdin: bytes, limits: Limits) -> Ran:
    """Raises TimeoutError when the time on the clock is over."""
    ran = sandbox.run(program, stdin, limits)
    if ran.ended == "wall":
        raise TimeoutError(f"the program was not over within {limits.wall:g} s")
    return ran
