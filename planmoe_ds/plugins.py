"""All-to-alls, compressors and schedulers written in Python: one class each, registered here or by a package.

A package that is not imported by the training script names its classes in its pyproject.toml:

    [project.entry-points."planmoe_ds.comms"]
    ring = "my_package.ring:Ring"

(`planmoe_ds.compressors` for compressors, `planmoe_ds.schedulers` for schedulers).
A class is imported when it is first asked for by name. Every rank must have the same ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from planmoe_ds.native import _C
from planmoe_ds.scheduling.abstract import AbstractScheduler
from planmoe_ds.scheduling.optimal import OptimalScheduler
from planmoe_ds.scheduling.pipelined import PipelinedScheduler
from planmoe_ds.scheduling.sequential import SequentialScheduler

__all__ = [
    "PLUGINS",
    "AbstractComm",
    "AbstractCompressor",
    "AbstractScheduler",
    "PluginRegistry",
    "Plugins",
    "register_comm",
    "register_compressor",
    "register_scheduler",
]

AbstractComm = _C.Comm
AbstractCompressor = _C.Compressor

_NAME = re.compile(r"[a-z][a-z0-9_-]*")
_TAKEN = ("auto",)  # has a meaning of its own in the config
_Base = TypeVar("_Base")
_Class = TypeVar("_Class", bound=type)


class PluginRegistry(Generic[_Base]):
    """Name -> class of one kind, on top of the compiled ones."""

    def __init__(self, kind: str, base: type[_Base], group: str, built_in: Callable[[], list[str]]) -> None:
        self._kind = kind
        self._base = base
        self._group = group
        self._built_in = built_in
        self._classes: dict[str, type[_Base]] = {}

    def add(self, name: str, plugin: type[_Base]) -> None:
        """ValueError when the name is not a good one or taken, or the class is not of this kind."""
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name in _TAKEN:
            raise ValueError(
                f"{name!r} is no name for a plug-in ({self._kind}): use lower-case letters, digits, '-' and '_', "
                f"a letter first, and none of {', '.join(_TAKEN)}"
            )
        if not (isinstance(plugin, type) and issubclass(plugin, self._base)):
            raise ValueError(  # noqa: TRY004
                f"{self._kind} '{name}' is {plugin!r}, expected a subclass of planmoe_ds.Abstract"
                f"{self._base.__name__.removeprefix('Abstract')}"
            )
        path = f"{plugin.__module__}:{plugin.__qualname__}"
        if name in self._built_in() or self._classes.get(name, plugin) is not plugin:
            raise ValueError(f"{self._kind} '{name}' is registered twice, the second time as {path}")
        self._classes[name] = plugin

    def names(self) -> list[str]:
        """Compiled, registered and installed ones, sorted; imports nothing."""
        return sorted({*self._built_in(), *self._classes, *self._installed})

    def find(self, name: str) -> type[_Base] | None:
        """The class of that name, None for compiled ones; ValueError naming all of them for unknown ones."""
        if name not in self.names():
            raise ValueError(f"unknown {self._kind} '{name}'; known: {', '.join(self.names())}")
        if name in self._installed:
            self.add(name, self._load(self._installed[name]))
        return self._classes.get(name)

    @cached_property
    def _installed(self) -> dict[str, EntryPoint]:
        """Installed packages' entry points; ValueError when a name is taken."""
        found: dict[str, EntryPoint] = {}
        for entry in entry_points(group=self._group):
            other = found.get(entry.name)
            if entry.name in self._built_in() or (other is not None and other.value != entry.value):
                raise ValueError(f"{self._kind} '{entry.name}' is registered twice, the second time by {_where(entry)}")
            found[entry.name] = entry
        return found

    def _load(self, entry: EntryPoint) -> type[_Base]:
        try:
            plugin: type[_Base] = entry.load()
        except Exception as error:
            raise ImportError(
                f"{self._kind} '{entry.name}' cannot be loaded from {_where(entry)}: {type(error).__name__}: {error}. "
                "Repair or uninstall that package"
            ) from error
        return plugin


def _where(entry: EntryPoint) -> str:
    package = "an unnamed package" if entry.dist is None else f"the package '{entry.dist.name}'"
    return f"{package} ({entry.group}: {entry.value})"


class Plugins:
    """What is registered in this process."""

    def __init__(self) -> None:
        self.comms = PluginRegistry("all-to-all algorithm", AbstractComm, "planmoe_ds.comms", _C.comm_names)
        self.compressors = PluginRegistry(
            "compressor", AbstractCompressor, "planmoe_ds.compressors", _C.compressor_names
        )
        self.schedulers = PluginRegistry("scheduler", AbstractScheduler, "planmoe_ds.schedulers", list)
        self.schedulers.add("sequential", SequentialScheduler)
        self.schedulers.add("pipelined", PipelinedScheduler)
        self.schedulers.add("optimal", OptimalScheduler)


PLUGINS = Plugins()


def register_comm(name: str) -> Callable[[_Class], _Class]:
    """Make a subclass of AbstractComm known as `name`; ValueError when that is taken or no good name."""

    def register(plugin: _Class) -> _Class:
        PLUGINS.comms.add(name, plugin)
        return plugin

    return register


def register_compressor(name: str) -> Callable[[_Class], _Class]:
    """Make a subclass of AbstractCompressor known as `name`; ValueError when that is taken or no good name."""

    def register(plugin: _Class) -> _Class:
        PLUGINS.compressors.add(name, plugin)
        return plugin

    return register


def register_scheduler(name: str) -> Callable[[_Class], _Class]:
    """Make a subclass of AbstractScheduler known as `name`; ValueError when that is taken or no good name."""

    def register(plugin: _Class) -> _Class:
        PLUGINS.schedulers.add(name, plugin)
        return plugin

    return register
