"""Imports point one way, the core is light, and the exported names are the ones documented."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import penstock

PACKAGE = Path(penstock.__file__).parent

LAYERS = [
    {"errors", "sample", "prompt", "models"},
    {"inputs"},
    {"wire"},
    {"scripted"},
    {"continuation", "fleet"},
    {"stream"},
    {"client", "control"},
    {"sync_client"},
    {"servers", "demo"},
    {"batch", "router", "rollout"},
    {"learner", "loadtest", "viewer"},
    {"cluster", "ray"},
    {"cli", "__main__"},
]
"""A part may import its own layer's parts and those before it."""

EXPORTED = {"batch", "client", "errors", "fleet", "sample", "stream", "sync_client", "wire"}
"""Parts whose names the package itself exports."""

ENGINE_MAY_IMPORT = {"errors", "wire", "engine"}


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported_parts(path: Path) -> Iterator[str]:
    """The parts of penstock that the module at `path` imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [
                f"{node.module}.{alias.name}" if node.module == "penstock" else str(node.module)
                for alias in node.names
            ]
        for name in names:
            if name.startswith("penstock.") and not name.startswith("penstock.__"):
                yield name.split(".")[1]


def test_imports_point_one_way() -> None:
    rank = {part: number for number, layer in enumerate(LAYERS) for part in layer}
    for path in PACKAGE.rglob("*.py"):
        part = part_of(path)
        for imported in imported_parts(path):
            if part == "engine":
                assert imported in ENGINE_MAY_IMPORT, f"{path} imports {imported}"
            elif part == "__init__":
                assert imported in EXPORTED, f"{path} imports {imported}"
            elif imported == "engine":
                assert part in ("cli", "learner"), f"{path} imports the engine: it has a process of its own"
            else:
                assert rank[imported] <= rank[part], f"{path} imports {imported}, which lies above it"


def test_the_core_does_not_load_heavy_packages() -> None:
    heavy = ["torch", "numpy", "tokenizers", "transformers", "tyro", "rich", "jinja2", "opentelemetry"]
    code = f"import sys, penstock; print([name for name in {heavy} if name in sys.modules])"
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30
    )
    assert printed.stdout.strip() == "[]"


def test_exported_names_exist() -> None:
    assert penstock.__all__ == sorted(penstock.__all__, key=str.lower)
    for name in penstock.__all__:
        assert getattr(penstock, name) is not None
