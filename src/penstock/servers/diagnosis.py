"""What an engine's log says: how far a start has come, and why an engine could not start or died.

Pure: lines in, `Stage` or `Diagnosis` out. A cause is recognised by the beginning of a line, after the
engine's own prefix (process, level, time, place), so that the text of a prompt in a log is not taken for an
error. The messages themselves are in `patterns.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from penstock.errors import EngineError
from penstock.servers.patterns import PATTERNS, STAGES, Kind, Pattern, Stage

SHOWN: Final = 20
"""Lines of the log that an error's message shows; `log_tail` has more."""


class Diagnosis(msgspec.Struct, frozen=True):
    """What went wrong, in one sentence, and what to do about it, in another."""

    kind: Kind
    sentence: str
    advice: str
    line: str = ""
    """The line of the log that says so."""


_COMPILED: Final = [(pattern, re.compile(pattern.regex)) for pattern in PATTERNS]

_PREFIX: Final = re.compile(
    r"(?:\([\w ]+ (?:rank=\d+ )?pid=\d+[^)]*\)\s*)?"
    r"(?:\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[^\]]*\]\s*)?"
    r"(?:(?:ERROR|FATAL|CRITICAL|WARNING|INFO|DEBUG) \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\] ?)?"
    r"(?:\[rank\d+\]:\s?)?\s*"
)
"""What engines put before a message: vLLM the process, level, time and place; SGLang the time and rank."""

_ERROR: Final = re.compile(r"(?:[A-Za-z_][\w.]*\.)?[A-Z]\w*(?:Error|Exception): .+")
"""The last line of a Python traceback."""


def stage_of(line: str) -> Stage | None:
    """The stage that begins with a line; None for most lines. Readiness is the engine's own line."""
    message = _message(line)
    return next((stage for stage, regex in STAGES if regex.match(message)), None)


def recognise(line: str) -> tuple[Diagnosis, Pattern] | None:
    """What one line says went wrong, and the pattern that knew it."""
    message = _message(line)
    for pattern, regex in _COMPILED:
        match = regex.match(message)
        if match is not None:
            known = {name: value or "" for name, value in match.groupdict().items()}
            sentence, advice = (text.format(**known) for text in (pattern.sentence, pattern.advice))
            return Diagnosis(pattern.kind, sentence, advice, message), pattern
    return None


def diagnose(lines: Iterable[str]) -> Diagnosis | None:
    """Why an engine with this log ended: the first cause that is known, else the first symptom.

    Where no cause is known, the last exception before the symptom is quoted; None when there is nothing.
    """
    symptom: Diagnosis | None = None
    raised = ""
    for line in lines:
        found = recognise(line)
        if found is None:
            message = _message(line)
            # What is raised after the first symptom follows from it.
            if _ERROR.match(message) and (symptom is None or not raised):
                raised = message
        elif not found[1].symptom:
            return found[0]
        else:
            symptom = symptom or found[0]
    if raised:
        sentence = f"The engine raised an error: {raised}"
        return Diagnosis(Kind.UNKNOWN, sentence, "Look in the log for what led to it.", raised)
    return symptom


def ending(status: int | None) -> str:
    """How a process ended, for a person. `status` is negative for a signal, None when not known."""
    return "exit status unknown" if status is None else f"exit {status}"


def killed(status: int | None) -> Diagnosis | None:
    """What a process that said nothing was ended by, as far as its exit status tells."""
    if status == -9:
        return Diagnosis(
            Kind.KILLED,
            "It was killed (SIGKILL).",
            "If nobody did, the machine ran out of memory: look at dmesg, or at the job's memory limit.",
        )
    return None


class DiagnosedError(EngineError):
    """An engine server ended. Nothing of it is left.

    `diagnosis` says why, where that is known; `log_tail` has the last lines of its log, `log_file` all.
    """

    def __init__(
        self,
        what: str,
        *,
        diagnosis: Diagnosis | None = None,
        log_tail: Sequence[str] = (),
        log_file: Path | None = None,
        status: int | None = None,
    ) -> None:
        super().__init__(_report(what, diagnosis, log_tail, log_file))
        self.diagnosis = diagnosis
        self.log_tail = tuple(log_tail)
        self.log_file = log_file
        self.status = status
        """Exit status of the engine, negative for a signal, None when it did not end by itself."""


class StartFailed(DiagnosedError):
    """An engine server did not become ready."""


class EngineDied(DiagnosedError):
    """An engine server died after it had been ready."""


def _message(line: str) -> str:
    prefix = _PREFIX.match(line)
    return line[prefix.end() :] if prefix is not None else line


def _report(what: str, diagnosis: Diagnosis | None, tail: Sequence[str], file: Path | None) -> str:
    said = [what] if diagnosis is None else [what, diagnosis.sentence, diagnosis.advice]
    where = [f"The whole log: {file}"] if file is not None else []
    return "\n    ".join([" ".join(said), *tail[-SHOWN:], *where])
