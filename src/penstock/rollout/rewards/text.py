"""Rewards that are pure functions of a text: exact match, numbers, format, length.

Each takes time linear in the text, so these run in the event loop's own process. What may take longer (a
pattern of the user's, mathematics, programs) runs in `workers`.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Final

from penstock.sample import THINK_CLOSE, THINK_OPEN, Sample

ANSWER_OPEN: Final = "<answer>"
ANSWER_CLOSE: Final = "</answer>"
GSM8K_MARK: Final = "####"

NUMBER_LIMIT: Final = 100
"""Characters of a number at most; what is longer is taken for none."""

EXPONENT_LIMIT: Final = 300
"""Digits before or behind the point that an exponent may make."""

_BRACE: Final = re.compile(r"(?P<boxed>\\(?:boxed|fbox)\s*\{)|\\.|[{}]", re.DOTALL)
_DECIMAL: Final = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
_NUMBER: Final = re.compile(
    rf"(?P<whole>(?:{_DECIMAL}))(?:[eE](?P<exponent>[+-]?\d{{1,4}}))?(?:/(?P<over>(?:{_DECIMAL})))?"
)
_IN_TEXT: Final = re.compile(rf"(?<![\w.])[-−+]?(?:{_DECIMAL})(?:/(?:{_DECIMAL}))?%?")
_LATEX_FRACTION: Final = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_LATEX_WRAP: Final = re.compile(r"\\(?:text|mathrm|mbox|mathbf|textbf)\s*\{([^{}]*)\}")
_DECORATION: Final = re.compile(r"\\?\$|\\[,;:! ]|\\left|\\right|€|£|\\\(|\\\)|\\\[|\\\]")


def exact_match(text: str, reference: str) -> bool:
    """Whether the text is the reference, but for white space around it."""
    return text.strip() == reference.strip()


# -- numbers ----------------------------------------------------------------------------------------


def boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{…} whose braces close, None when there is none."""
    open_braces: list[int] = []  # where the content of each begins; 0: not that of a box
    found = slice(0, 0)
    for brace in _BRACE.finditer(text):
        if brace["boxed"] or brace[0] == "{":
            open_braces.append(brace.end() if brace["boxed"] else 0)
        elif brace[0] == "}" and open_braces and (start := open_braces.pop()) > found.start:
            found = slice(start, brace.start())
    return text[found] if found.start else None


def final_answer(text: str, *, last_number: bool = False) -> str | None:
    r"""The answer a text marks as its last word: in \boxed{…}, else behind ####, else in <answer>…</answer>.

    last_number: without such a mark, the last number in the text. None when there is nothing.
    """
    if (inside := boxed(text)) is not None:
        return inside.strip()
    _, mark, behind = text.rpartition(GSM8K_MARK)
    if mark and (line := behind.strip().partition("\n")[0].strip()):
        return line
    head, closed, _ = text.rpartition(ANSWER_CLOSE)
    if closed and ANSWER_OPEN in head:
        return head.rpartition(ANSWER_OPEN)[2].strip()
    if last_number and (numbers := _IN_TEXT.findall(text)):
        return str(numbers[-1])
    return None


def parse_number(text: str) -> tuple[Fraction, bool] | None:
    r"""The number a text consists of, exactly, and whether it is a percentage; None for anything else.

    Takes a sign, thousands separators, a decimal point, an exponent, a/b, \frac{a}{b}, a currency sign
    before, a word or \text{…} behind (a unit), and a full stop.
    """
    if len(text) > NUMBER_LIMIT:
        return None
    text = _LATEX_FRACTION.sub(r"\1/\2", text.replace("−", "-").replace("{,}", ","))
    text = _DECORATION.sub("", _LATEX_WRAP.sub(r" \1", text)).replace("\\%", "%").strip()
    negative = text.startswith("-")
    text = text.removeprefix("-" if negative else "+").lstrip()
    match = _NUMBER.match(text)
    if match is None:
        return None
    rest = text[match.end() :].removesuffix(".")
    unit = rest.strip()
    percent = unit in ("%", "percent")
    if unit and not percent and not (unit.isalpha() and (len(unit) > 1 or rest[0].isspace())):
        return None
    value = _value(match)
    return None if value is None else (-value if negative else value, percent)


def _value(match: re.Match[str]) -> Fraction | None:
    exponent = int(match["exponent"] or 0)
    if abs(exponent) > EXPONENT_LIMIT:
        return None
    over = _decimal(match["over"]) if match["over"] else Fraction(1)
    return None if over == 0 else _decimal(match["whole"]) * Fraction(10) ** exponent / over


def _decimal(digits: str) -> Fraction:
    return Fraction(digits.replace(",", "").removesuffix("."))


def same_number(answer: str, reference: str) -> bool:
    """Whether both are the same number, exactly; 50% is both 50 and 0.5. False when one is no number."""
    ours, theirs = parse_number(answer), parse_number(reference)
    if ours is None or theirs is None:
        return False
    (ours_value, ours_percent), (value, percent) = ours, theirs
    if ours_percent == percent:
        return ours_value == value
    return ours_value in (value, value / 100) if percent else value in (ours_value, ours_value / 100)


def numeric(text: str, reference: str, *, last_number: bool = False) -> bool:
    """Whether the text's final answer is the reference's number. The reference may be a worked solution, too,
    as GSM8K's are. Raises ValueError when the reference has no number."""
    wanted = final_answer(reference) or reference
    if parse_number(wanted) is None:
        raise ValueError(f"the reference answer {reference[-80:]!r} is no number")
    answer = final_answer(text, last_number=last_number)
    return answer is not None and same_number(answer, wanted)


# -- format -----------------------------------------------------------------------------------------


def has_format(text: str, *, answer_tags: bool = True) -> bool:
    """Whether a text is `<think>…</think><answer>…</answer>`: each tag once, in this order, both filled, and
    nothing else around. Without answer_tags: `<think>…</think>` and then an answer.

    `<think>` may be missing: some chat templates put it into the prompt.
    """
    thought, closed, rest = text.strip().partition(THINK_CLOSE)
    thought, rest = thought.removeprefix(THINK_OPEN), rest.strip()
    if not (closed and thought.strip() and rest):
        return False
    if answer_tags:
        if not (rest.startswith(ANSWER_OPEN) and rest.endswith(ANSWER_CLOSE)):
            return False
        rest = rest[len(ANSWER_OPEN) : -len(ANSWER_CLOSE)]
    tags = (THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE)
    return bool(rest.strip()) and not any(tag in thought or tag in rest for tag in tags)


def whole_text(sample: Sample) -> str:
    """The completion with its reasoning in tags, also where the engine has taken it out of the text."""
    if sample.reasoning is None or THINK_CLOSE in sample.text or THINK_OPEN in sample.text:
        return sample.text
    return f"{THINK_OPEN}{sample.reasoning}{THINK_CLOSE}{sample.text}"


# -- length -----------------------------------------------------------------------------------------


def tokens_of(sample: Sample) -> int | None:
    """Generated tokens, None when the engine has not said."""
    if sample.token_ids is not None:
        return len(sample.token_ids)
    return sample.usage.completion_tokens or None


def length_penalty(tokens: int, *, target: int, scale: float) -> float:
    """-scale · |target - tokens|, 0 at best. Source: L1 (LCPO-Exact), https://arxiv.org/abs/2503.04697, eq. 1
    (there with scale 0.0003)."""
    return -scale * abs(target - tokens)


def overlong_penalty(tokens: int, *, longest: int, buffer: int) -> float:
    """0 up to longest - buffer tokens, then falling by 1/buffer a token to -1 at `longest` and beyond.

    Source: the soft overlong punishment of DAPO, https://arxiv.org/abs/2503.14476, eq. 13 (there L_max and
    L_cache).
    """
    return -min(1.0, max(0.0, (tokens - (longest - buffer)) / buffer))
