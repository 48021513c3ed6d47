"""What the test process and its rank processes tell each other, and how functions are named between them."""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class FunctionName:
    """Where a rank finds the function: module name, source file and qualified name inside the module."""

    module: str
    file: str
    qualified_name: str


@dataclass(frozen=True)
class Call:
    """One call on one rank; `arguments` are pickled bytes, for they may need the function's module."""

    function: FunctionName
    arguments: bytes
    environment: dict[str, str]
    search_path: list[str]
    store_file: str
    rank: int
    world_size: int


@dataclass(frozen=True)
class RankOutcome:
    """How a function ended on one rank: `result` when `error` (the exception's type name) is empty."""

    rank: int
    result: Any = None
    error: str = ""
    message: str = ""
    traceback: str = ""
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        """Whether the function raised, or its process ended, on this rank."""
        return self.error != ""


def name_of(function: Callable[..., Any]) -> FunctionName:
    """Name a top-level function so that another process can import it; `ValueError` for others."""
    qualified_name = getattr(function, "__qualname__", "")
    module = sys.modules.get(getattr(function, "__module__", ""))
    if (
        module is None
        or module.__name__ == "__main__"
        or not qualified_name
        or "<locals>" in qualified_name
        or "<lambda>" in qualified_name
    ):
        raise ValueError(
            f"ranks.run got {function!r}: ranks run in other processes and import the function by name, "
            "so it must be defined at the top level of a module that is not the running script"
        )
    file = getattr(module, "__file__", None)
    return FunctionName(module.__name__, "" if file is None else str(Path(file).resolve()), qualified_name)


def find_function(name: FunctionName) -> Callable[..., Any]:
    """Import the named function; a module that is not on the search path is loaded from its file."""
    found: Any = _import_module(name)
    for part in name.qualified_name.split("."):
        found = getattr(found, part)
    function: Callable[..., Any] = found
    return function


def _import_module(name: FunctionName) -> ModuleType:
    loaded = sys.modules.get(name.module)
    if loaded is not None and _is_same_file(getattr(loaded, "__file__", None), name.file):
        return loaded
    if loaded is None and _is_importable(name):
        return importlib.import_module(name.module)
    specification = importlib.util.spec_from_file_location(name.module, name.file)
    if specification is None or specification.loader is None:
        raise ImportError(f"module {name.module} cannot be loaded from '{name.file}' on this rank")
    module = importlib.util.module_from_spec(specification)
    sys.modules[name.module] = module
    specification.loader.exec_module(module)
    return module


def _is_importable(name: FunctionName) -> bool:
    try:
        specification = importlib.util.find_spec(name.module)
    except ModuleNotFoundError:
        return False
    return specification is not None and _is_same_file(specification.origin, name.file)


def _is_same_file(first: str | None, second: str) -> bool:
    return not second or (first is not None and str(Path(first).resolve()) == second)


def pack(value: object) -> bytes:
    """Pickle a value for the other side."""
    return pickle.dumps(value)
