"""Finds the patch set for the Megatron at hand, and puts wrappers around names of its modules, now or on import."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from planmoe_ds.errors import PlanMoEError
from planmoe_ds.hook import forget, when_imported

VERSIONS = {v: f"v{v.replace('.', '_')}" for v in ("0.15", "0.16", "0.17", "0.19", "0.20")}  # of Megatron core


@dataclass(frozen=True)
class Patch:
    """One name of one upstream module, put into a wrapper. name may be "Class.method"."""

    module: str
    name: str
    why: str
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]

    def install(self, module: ModuleType) -> None:
        """Wrap the name, once; ImportError when the module does not have it."""
        holder, attribute = self._find(module)
        original = getattr(holder, attribute, None)
        if original is None:
            raise ImportError(
                f"{self.module} has no {self.name}, which planmoe needs to {self.why}: this Megatron differs from the "
                f"one that megatron_patches knows for its version"
            )
        if hasattr(original, "planmoe_wraps"):
            return
        wrapper = functools.wraps(original)(self.wrap(original))
        wrapper.planmoe_wraps = original  # type: ignore[attr-defined]
        setattr(holder, attribute, wrapper)

    def uninstall(self) -> None:
        """Put the original back, and expect the module no more."""
        forget(self.module, self.install)
        if self.module not in sys.modules:
            return
        holder, attribute = self._find(sys.modules[self.module])
        original = getattr(getattr(holder, attribute, None), "planmoe_wraps", None)
        if original is not None:
            setattr(holder, attribute, original)

    def _find(self, module: ModuleType) -> tuple[Any, str]:
        *classes, attribute = self.name.split(".")
        holder: Any = module
        for name in classes:
            holder = getattr(holder, name, None)
        return holder, attribute


def apply() -> None:
    """Patch the Megatron that `import megatron` finds; calling it again changes nothing.

    Raises ImportError when there is no megatron.core or no such module, PlanMoEError for a version without a patch set.
    """
    for patch in _patches():
        _, package, *names = patch.module.split(".")
        path = _root() / package
        if path.exists() and not any(path.joinpath(*names).with_suffix(kind).exists() for kind in ("", ".py")):
            raise ImportError(f"this Megatron has no {patch.module}, where planmoe would {patch.why}")
        forget(patch.module, patch.install)  # a second call does not expect the module twice
        when_imported(patch.module, patch.install)


def remove() -> None:
    """Take every patch back."""
    for patch in _patches():
        patch.uninstall()


def _patches() -> tuple[Patch, ...]:
    version = _megatron_version()
    name = VERSIONS.get(".".join(version.split(".")[:2]))
    if name is None:
        raise PlanMoEError(
            f"megatron_patches has nothing for Megatron core {version}; it knows "
            f"{', '.join(f'{known}.x' for known in VERSIONS)}"
        )
    patches: tuple[Patch, ...] = importlib.import_module(f"megatron_patches.{name}").PATCHES
    return patches


def _megatron_version() -> str:
    """The version of megatron.core, read from its file: importing it takes seconds, and others may come first."""
    path = _root() / "core" / "package_info.py"
    facts: dict[str, Any] = {"__name__": "package_info", "__file__": str(path)}
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), facts)  # noqa: S102
    return f"{facts['MAJOR']}.{facts['MINOR']}.{facts['PATCH']}"


def _root() -> Path:
    spec = importlib.util.find_spec("megatron")
    for place in [] if spec is None else list(spec.submodule_search_locations or []):
        if (Path(place) / "core" / "package_info.py").exists():
            return Path(place)
    raise ImportError(
        "megatron.core cannot be found: run from a Megatron-LM checkout, put it on PYTHONPATH, or install megatron-core"
    )
