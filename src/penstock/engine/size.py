"""Sizes in bytes on the command line, as vLLM's flags take them: `64M` is 64 MiB, `64m` is 64,000,000."""

from __future__ import annotations

from typing import Annotated, Final

from tyro.constructors import PrimitiveConstructorSpec

UNITS: Final = {
    **{letter: 1000**power for power, letter in enumerate("kmgt", start=1)},
    **{letter: 1024**power for power, letter in enumerate("KMGT", start=1)},
}


def parse_size(text: str) -> int:
    """Bytes. Raises ValueError, which says what a size looks like."""
    number, unit = (text[:-1], UNITS[text[-1]]) if text[-1:] in UNITS else (text, 1)
    try:
        return int(float(number) * unit) if unit > 1 else int(number)
    except ValueError:
        raise ValueError(
            f"{text!r} is no size: give a number of bytes, or one with k, K, m, M, g, G, t or T"
        ) from None


Size = Annotated[
    int,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="BYTES",
        instance_from_str=lambda words: parse_size(words[0]),
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [str(value)],
    ),
]
"""An int that the command line reads with `parse_size`."""
