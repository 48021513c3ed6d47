"""Checks of the Python, the compiled backend and the tools that build it."""

from __future__ import annotations

import re
from pathlib import Path

from planmoe_ds.doctor.finding import Finding
from planmoe_ds.doctor.machine import Machine

_OLDEST_PYTHON = (3, 10)
_OLDEST_TORCH = (2, 4)
_REBUILD = "rebuild it with the torch in use: pip install --no-build-isolation -e . in the planmoe_ds checkout"


def python(machine: Machine) -> Finding:
    """Python itself."""
    version = ".".join(str(part) for part in machine.python)
    if machine.python[:2] < _OLDEST_PYTHON:
        return Finding("Python", "problem", version, advice="install Python 3.10 or newer", required=True)
    return Finding("Python", "ok", version, required=True)


def torch(machine: Machine) -> Finding:
    """Torch and whether it is a CUDA or a CPU build."""
    facts = machine.torch.facts
    if not facts:
        detail = machine.torch.error or "not installed"
        advice = "reinstall torch" if machine.torch.error else "install torch 2.4 or newer"
        return Finding("torch", "problem", detail=detail, advice=advice, required=True)
    build = "CPU build" if facts["cuda"] is None else f"CUDA {facts['cuda']} build"
    build = f"ROCm {facts['hip']} build" if facts["hip"] is not None else build
    if _release(facts["version"]) < _OLDEST_TORCH:
        advice = "install torch 2.4 or newer, then rebuild planmoe_ds"
        return Finding("torch", "problem", facts["version"], build, advice, required=True)
    return Finding("torch", "ok", facts["version"], build, required=True)


def extension(machine: Machine) -> Finding:
    """The compiled backend: present, loadable, how it was built."""
    name = "planmoe_ds._C"
    if not machine.extension.is_installed:
        other = ", ".join(machine.extension_files)
        detail = f"built for another Python: {other}" if other else "not built"
        return Finding(name, "problem", detail=detail, advice=_REBUILD, required=True)
    if machine.extension.error:
        return Finding(name, "problem", detail=machine.extension.error, advice=_REBUILD, required=True)
    facts = machine.extension.facts
    lists = {kind: ", ".join(facts[kind]) for kind in ("comms", "compressors")}
    detail = "; ".join(f"{key}: {value}" for key, value in {**facts["build"], **lists}.items())
    wanted = machine.torch.facts.get("cuda")
    if facts["build"]["cuda"] == "off" and wanted is not None:
        advice = f"for GPUs, which are slow without, rebuild with PLANMOE_CUDA=1 where there is nvcc of CUDA {wanted}"
        return Finding(name, "problem", detail=f"no CUDA kernels; {detail}", advice=advice)
    return Finding(name, "ok", detail=detail, required=True)


def extension_torch(machine: Machine) -> Finding:
    """The torch the backend was built with against the one running."""
    name = "torch of planmoe_ds._C"
    if not machine.extension.facts or not machine.torch.facts:
        return Finding(name, "info", detail="cannot be compared until torch and planmoe_ds._C both load")
    built, running = machine.extension.facts["build"]["torch"], machine.torch.facts["version"]
    if built != running:
        detail = f"built with {built}, running with {running}"
        return Finding(name, "problem", built, detail, _REBUILD, required=True)
    return Finding(name, "ok", built, "the one running", required=True)


def pybind11(machine: Machine) -> Finding:
    """Another pybind11 than torch's own: with it a build succeeds and then rejects every ProcessGroup."""
    if not machine.torch.facts:
        return Finding("pybind11", "info", detail="torch brings its own, once it is installed")
    bundled = _bundled_pybind11(Path(machine.torch.facts["path"]).parent)
    variables = ("CPATH", "CPLUS_INCLUDE_PATH", "C_INCLUDE_PATH")
    for variable in variables:
        for entry in machine.environment.get(variable, "").split(":"):
            if entry and (Path(entry) / "pybind11" / "pybind11.h").is_file():
                detail = f"{variable} puts {entry}/pybind11 before torch's own {bundled}"
                return Finding("pybind11", "problem", bundled, detail, f"take {entry} out of {variable} to build")
    if "pybind11" not in machine.distributions:
        return Finding("pybind11", "ok", bundled, "torch's own headers")
    separate = machine.distributions["pybind11"].version
    if separate == bundled:
        return Finding("pybind11", "ok", bundled, "torch's own headers; the pybind11 package is the same version")
    detail = f"torch's own headers; the pybind11 package is {separate}"
    return Finding("pybind11", "info", bundled, detail, "keep the package's headers off the include path when building")


def _bundled_pybind11(torch_folder: Path) -> str:
    header = torch_folder / "include" / "pybind11" / "detail" / "common.h"
    if not header.is_file():
        return ""
    found = dict(re.findall(r"#\s*define PYBIND11_VERSION_(MAJOR|MINOR|MICRO|PATCH)\s+(\w+)", header.read_text()))
    last = found.get("MICRO", found.get("PATCH", "?"))
    return f"{found.get('MAJOR', '?')}.{found.get('MINOR', '?')}.{last}"


def compiler(machine: Machine) -> Finding:
    """The C++ compiler, for building planmoe_ds and the operators DeepSpeed compiles when first used."""
    answer = machine.commands["compiler"]
    if not answer:
        advice = "install a compiler for C++20 (Debian: g++) or set CXX; a planmoe_ds already built runs without"
        command = machine.environment.get("CXX", "c++")
        return Finding("C++ compiler", "missing", detail=f"{command} --version did not answer", advice=advice)
    return Finding("C++ compiler", "ok", _first_version(answer), answer.splitlines()[0])


def nvcc(machine: Machine) -> Finding:
    """The CUDA compiler against the CUDA of torch."""
    answer = machine.commands["nvcc"]
    wanted = machine.torch.facts.get("cuda")
    if not answer:
        if wanted is None:
            return Finding("nvcc", "info", detail="not installed, and not needed with this torch")
        return Finding("nvcc", "missing", advice=f"install the CUDA {wanted} toolkit to build the CUDA kernels")
    found = re.search(r"release (\d+\.\d+)", answer)
    release = "" if found is None else found.group(1)
    if wanted is not None and release.split(".")[0] != wanted.split(".")[0]:
        detail = f"CUDA {release}, but torch was built with CUDA {wanted}"
        return Finding("nvcc", "problem", release, detail, f"put the CUDA {wanted} toolkit first on PATH to build")
    return Finding("nvcc", "ok", release)


def mpirun(machine: Machine) -> Finding:
    """The MPI launcher."""
    answer = machine.commands["mpirun"]
    if not answer:
        advice = "install Open MPI (Debian: openmpi-bin) to launch with mpirun; torchrun and deepspeed do without"
        return Finding("mpirun", "missing", advice=advice)
    return Finding("mpirun", "ok", _first_version(answer), answer.splitlines()[0])


def zfp(machine: Machine) -> Finding:
    """The zfp codec: planmoe's own; LLNL's zfpy only serves to compare streams in tests."""
    peer = "installed" if "zfpy" in machine.packages else "not installed"
    detail = f"zfpy, which only tests compare with, is {peer}"
    compressors = machine.extension.facts.get("compressors", [])
    if any(name.startswith("zfp") for name in compressors):
        return Finding("zfp", "ok", detail=f"planmoe's own codec is built in; {detail}")
    advice = f"choose one of its compressors: {', '.join(compressors)}" if compressors else _REBUILD
    return Finding("zfp", "missing", detail=f"planmoe_ds._C has no zfp compressor; {detail}", advice=advice)


def _first_version(answer: str) -> str:
    found = re.search(r"\d+(\.\d+)+", answer)
    return "" if found is None else found.group(0)


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
