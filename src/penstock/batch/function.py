"""Functions of the user's own: found by name, or given; and the name by which a resumed job knows them."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from penstock.errors import ConfigError

Function = Callable[..., Any]


def load(function: str | Function, what: str) -> Function:
    """The function itself, or the one that `module:function` or `path/file.py:function` names.

    A module is looked for in the working directory too. what: what it is for, in a message. Raises
    ConfigError.
    """
    if not isinstance(function, str):
        if not callable(function):
            raise ConfigError(f"{what} must be a function or module:function, not {function!r}.")
        return function
    place, colon, name = function.rpartition(":")
    if not (place and colon and name):
        raise ConfigError(
            f"{what}: {function!r} names no function: write module:function or file.py:function."
        )
    module = _from_file(Path(place), what) if place.endswith(".py") else _from_name(place, what)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            known = [key for key, value in vars(found).items() if callable(value) and not key.startswith("_")]
            near = get_close_matches(part, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ConfigError(f"{what}: {place} has no function {name!r}{hint}")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"{what}: {function} is a {type(found).__name__}, not a function.")
    loaded: Function = found
    return loaded


def name_of(function: str | Function) -> str:
    """`module:function`, or what comes closest to it; of a file its name alone, wherever it lies."""
    if isinstance(function, str):
        place, _, name = function.rpartition(":")
        return f"{Path(place).name if place.endswith('.py') else place}:{name}"
    inner = getattr(function, "func", function)  # functools.partial
    name = getattr(inner, "__qualname__", type(inner).__qualname__)
    module = getattr(inner, "__module__", None) or type(inner).__module__
    return f"{module}:{name}"


def _from_file(path: Path, what: str) -> ModuleType:
    path = path.expanduser().resolve()
    if not path.is_file():
        raise ConfigError(f"{what}: there is no file {path}.")
    name = path.stem
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__file__", None) == str(path):
        return known
    if known is not None or importlib.util.find_spec(name) is not None:
        name = f"penstock_user_{name}"  # a file called json.py is not to stand in for the module
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    folder = str(path.parent)
    sys.path.insert(0, folder)  # for modules that lie beside it
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        sys.modules.pop(name, None)
        if not isinstance(error, Exception):
            raise
        raise ConfigError(f"{what}: {path} cannot be imported ({_said(error)}).") from error
    finally:
        sys.path.remove(folder)
    return module


def _from_name(name: str, what: str) -> ModuleType:
    here = str(Path.cwd())
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ConfigError(f"{what}: the module {name!r} cannot be imported ({_said(error)}).") from error
    finally:
        if added:
            sys.path.remove(here)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
