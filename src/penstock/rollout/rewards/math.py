"""Mathematical equality by math-verify, which parses LaTeX and compares with sympy.

Runs in a worker: parsing and simplifying can take for ever, or all memory. math-verify's own time limits are
switched off, because it takes a comparison that ran out of time for a wrong answer.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

from penstock.errors import ConfigError
from penstock.rollout.rewards.text import final_answer
from penstock.rollout.score import Score


def check_installed() -> None:
    """Raises ConfigError without the extra `rl`."""
    if find_spec("math_verify") is None:
        raise ConfigError("the reward `math` needs math-verify: pip install 'penstock[rl]'")


def same_mathematics(text: str, reference: str) -> Score:
    r"""1 when the answer in `text` equals the reference, else 0. Call it in a worker.

    reference: LaTeX, with or without $ or \boxed{…}, plain text, or a worked solution that marks its answer.
    The score fails when the reference cannot be read; an answer that cannot be read is wrong.
    """
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off
    gold = parse(_marked(reference), parsing_timeout=None, raise_on_error=True)
    if all(isinstance(one, str) for one in gold):
        return Score.failure(f"the reference answer {reference[-80:]!r} cannot be read as mathematics")
    try:
        answer: list[Any] = parse(text, parsing_timeout=None, raise_on_error=True)
        right = verify(gold, answer, timeout_seconds=None, raise_on_error=True)
    except MemoryError:
        raise
    except Exception:  # sympy raises anything for what is no mathematics
        right = False
    return Score(float(right))


def _marked(reference: str) -> str:
    r"""As math-verify finds it: in \boxed{…}, unless it has delimiters of its own."""
    answer = final_answer(reference) or reference.strip()
    return answer if "$" in answer or "\\(" in answer or "\\[" in answer else f"\\boxed{{{answer}}}"
