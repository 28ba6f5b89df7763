"""The models that ship with the package, as ordinary Hugging Face checkpoint folders."""

from __future__ import annotations

from pathlib import Path
from typing import Final

ARITHMETIC: Final = Path(__file__).parent / "arithmetic"
"""A Qwen3 of one million parameters, trained on `penstock.demo.arithmetic` by scripts/train_arithmetic.py."""
