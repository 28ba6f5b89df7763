"""What several tests of the batch job want."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def quick_disk() -> Iterator[None]:
    """Where it does not matter whether the disk has it: that takes time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fdatasync", lambda fd: None)
        yield
