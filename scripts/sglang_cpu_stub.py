"""Lets SGLang start without packages that a CPU never calls; put on PYTHONPATH as sitecustomize.py.

Every module of the packages named in STUB (comma-separated) can be imported and is empty: each name in it
is a class, each call of one answers None. Kernels of sgl_kernel refuse to be made, so that none is missed
silently.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

STUBBED = frozenset(filter(None, os.environ.get("STUB", "").split(",")))


class _Empty(type):
    """A class any attribute of which is its dotted name."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class _Module(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        where = f"{self.__name__}.{name}"

        def begin(this: Any, *_: Any, **__: Any) -> None:
            if where.startswith("sgl_kernel"):
                raise NotImplementedError(f"{where} is not there on a CPU")

        made = _Empty(name, (), {"__init__": begin, "__call__": lambda *_, **__: None})
        setattr(self, name, made)
        return made


class _Stubs(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] in STUBBED:
            return ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = _Module(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


sys.meta_path.append(_Stubs())
