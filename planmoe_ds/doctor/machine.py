"""What the checks look at: imports tried in child processes, commands, environment variables."""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from planmoe_ds.doctor.facts import MARK

_IMPORT_SECONDS = 180.0
_COMMAND_SECONDS = 20.0
_PACKAGES = ("amp_C", "apex", "megatron", "zfpy")
_DISTRIBUTIONS = ("apex", "pybind11", "transformer_engine")
_DOCTOR = Path(__file__).resolve().parent
_RDMA = Path("/sys/class/infiniband")


@dataclass(frozen=True)
class Probe:
    """Outcome of an import in a child process: facts, or the error; neither when there is nothing to import."""

    facts: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""

    @property
    def is_installed(self) -> bool:
        """Whether there was something to import."""
        return bool(self.facts or self.error)


@dataclass(frozen=True)
class Distribution:
    """What pip knows of an installed project."""

    version: str
    summary: str


@dataclass(frozen=True)
class Machine:
    """Everything the checks need to know; they themselves look at nothing else but files named here.

    `packages` maps importable names to their folders (none for a single file), `distributions` installed projects
    to pip's metadata, `commands` tools to what they answer to --version (empty if absent). `rdma`: network cards that
    reach other machines' memory.
    """

    python: tuple[int, int, int]
    torch: Probe
    extension: Probe
    extension_files: tuple[str, ...]
    deepspeed: Probe
    megatron_core: Probe
    transformer_engine: Probe
    packages: Mapping[str, tuple[Path, ...]]
    distributions: Mapping[str, Distribution]
    commands: Mapping[str, str]
    environment: Mapping[str, str]
    rdma: tuple[str, ...] = ()


def look() -> Machine:
    """Inspect this machine; the imports run side by side, each in a process of its own."""
    extension = _DOCTOR.parent / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    tools = {"compiler": os.environ.get("CXX", "c++"), "nvcc": "nvcc", "mpirun": "mpirun"}
    with ThreadPoolExecutor() as pool:
        torch = pool.submit(_probe, "torch" if _folders("torch") else "")
        native = pool.submit(_probe, "extension" if extension.is_file() else "", str(extension))
        deepspeed = pool.submit(_probe_package, "deepspeed", "deepspeed")
        megatron = pool.submit(_probe_package, "megatron", "megatron.core", "core")
        transformer_engine = pool.submit(_probe_package, "transformer_engine", "transformer_engine.pytorch")
        commands = {tool: pool.submit(_ask_version, command) for tool, command in tools.items()}
        return Machine(
            python=(sys.version_info.major, sys.version_info.minor, sys.version_info.micro),
            torch=torch.result(),
            extension=native.result(),
            extension_files=tuple(sorted(path.name for path in _DOCTOR.parent.glob("_C.*.so"))),
            deepspeed=deepspeed.result(),
            megatron_core=megatron.result(),
            transformer_engine=transformer_engine.result(),
            packages={name: folders for name in _PACKAGES if (folders := _folders(name)) is not None},
            distributions=_distributions(),
            commands={tool: answer.result() for tool, answer in commands.items()},
            environment=dict(os.environ),
            rdma=tuple(sorted(path.name for path in _RDMA.glob("*"))),
        )


def _folders(name: str) -> tuple[Path, ...] | None:
    """Folders of the top-level package `name`, found without running its code; None if there is no such name."""
    try:
        specification = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # an entry of the search path that cannot be searched
        return None
    if specification is None:
        return None
    return tuple(Path(place) for place in specification.submodule_search_locations or ())


def _distributions() -> dict[str, Distribution]:
    found = {}
    for name in _DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            metadata = importlib.metadata.metadata(name)
            found[name] = Distribution(metadata["Version"] or "", metadata["Summary"] or "")
    return found


def _probe_package(package: str, module: str, subfolder: str = "") -> Probe:
    """Import `module` if its top-level package is there and has the subfolder."""
    is_there = any((folder / subfolder).is_dir() for folder in _folders(package) or ())
    return _probe("module" if is_there else "", module)


def _probe(kind: str, argument: str = "") -> Probe:
    """Let a child process gather facts of a kind (see `facts.py`); no kind, no facts."""
    if not kind:
        return Probe()
    path = os.pathsep.join(entry or os.curdir for entry in sys.path)
    try:
        child = subprocess.run(
            [sys.executable, str(_DOCTOR / "facts.py"), kind, argument],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_IMPORT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Probe(error=f"importing it took more than {_IMPORT_SECONDS:g} s")
    for line in child.stdout.splitlines():
        if line.startswith(MARK):
            return Probe(facts=json.loads(line.removeprefix(MARK)))
    return Probe(error=_why(child))


def _why(child: subprocess.CompletedProcess[str]) -> str:
    if child.returncode < 0:
        return f"importing it ended with {signal.Signals(-child.returncode).name}"
    lines = [line.strip() for line in child.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"importing it ended with exit code {child.returncode}"


def _ask_version(command: str) -> str:
    try:
        child = subprocess.run(
            [*command.split(), "--version"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_COMMAND_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return child.stdout.strip() if child.returncode == 0 else ""
