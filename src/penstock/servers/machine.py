"""What this machine is: its GPUs, and where the user's caches are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def gpu_names() -> list[str]:
    """The models of this machine's NVIDIA GPUs, as the driver names them."""
    names = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        try:
            lines = path.read_text().splitlines()
        except OSError:
            continue
        names += [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
    return names


def cache_folder(environment: Mapping[str, str]) -> Path:
    """The user's cache folder, by the XDG convention."""
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache")
