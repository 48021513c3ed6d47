"""Run something once a module has been imported, whether that was before or comes later."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def when_imported(name: str, action: Callable[[ModuleType], None]) -> None:
    """Call action(module) now if module `name` is imported already, else right after its import."""
    module = sys.modules.get(name)
    if module is not None:
        action(module)
    else:
        sys.meta_path.insert(0, _Finder(name, action))


def forget(name: str, action: Callable[[ModuleType], None]) -> None:
    """Take back a when_imported() of a module that has not been imported; nothing when there was none."""
    pending = [finder for finder in sys.meta_path if isinstance(finder, _Finder) and finder.waits_for(name, action)]
    for finder in pending:
        sys.meta_path.remove(finder)


class _Finder(MetaPathFinder):
    def __init__(self, name: str, action: Callable[[ModuleType], None]) -> None:
        self._name = name
        self._action = action

    def waits_for(self, name: str, action: Callable[[ModuleType], None]) -> bool:
        """Whether this came from when_imported(name, action)."""
        return self._name == name and self._action == action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        others = [finder for finder in sys.meta_path if hasattr(finder, "find_spec")]  # one may wait for it as well
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._action)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Loader, action: Callable[[ModuleType], None]) -> None:
        self._loader = loader
        self._action = action

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._action(module)
