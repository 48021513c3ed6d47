"""The environment report: every check on made-up machines, and the whole report among broken packages."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import sys
from pathlib import Path
from types import MappingProxyType

import pytest
from rich.console import Console

from planmoe_ds import doctor
from planmoe_ds.doctor import build_checks, framework_checks
from planmoe_ds.doctor.finding import Finding
from planmoe_ds.doctor.machine import Distribution, Machine, Probe, look

CPU_TORCH = {
    "version": "2.13.0+cpu",
    "cuda": None,
    "hip": None,
    "path": "",
    "nccl": "",
    "devices": [],
    "cuda_error": "",
}
GPU_TORCH = {**CPU_TORCH, "version": "2.13.0+cu130", "cuda": "13.0", "nccl": "2.32.3"}
BACKEND = {"build": {"torch": "2.13.0+cpu", "cuda": "off"}, "compressors": ["int8", "none"], "comms": ["direct"]}
BARE = Machine(
    python=(3, 11, 7),
    torch=Probe(CPU_TORCH),
    extension=Probe(BACKEND),
    extension_files=(),
    deepspeed=Probe(),
    megatron_core=Probe(),
    transformer_engine=Probe(),
    packages=MappingProxyType({}),
    distributions=MappingProxyType({}),
    commands=MappingProxyType({"compiler": "", "nvcc": "", "mpirun": ""}),
    environment=MappingProxyType({}),
)


def machine(**changes: object) -> Machine:
    """A CPU machine with torch and a built planmoe_ds and nothing else, but for the changes."""
    return dataclasses.replace(BARE, **changes)


def over_rdma(**environment: str) -> Machine:
    """One with NCCL and two network cards for it."""
    return machine(torch=Probe(GPU_TORCH), rdma=("efa_0", "mlx5_1"), environment=environment)


def module(version: str) -> Probe:
    """A package that imports well."""
    return Probe({"version": version, "path": ""})


def versions(**answers: str) -> dict[str, str]:
    """What the tools answer to --version; the others are not there."""
    return {**BARE.commands, **answers}


CASES = [
    # check, machine, status, text the finding has to contain
    (build_checks.python, machine(), "ok", "3.11.7"),
    (build_checks.python, machine(python=(3, 9, 1)), "problem", "install Python 3.10"),
    (build_checks.torch, machine(), "ok", "CPU build"),
    (build_checks.torch, machine(torch=Probe(GPU_TORCH)), "ok", "CUDA 13.0 build"),
    (build_checks.torch, machine(torch=Probe({**CPU_TORCH, "hip": "6.4"})), "ok", "ROCm 6.4 build"),
    (build_checks.torch, machine(torch=Probe({**CPU_TORCH, "version": "2.3.1"})), "problem", "torch 2.4 or newer"),
    (build_checks.torch, machine(torch=Probe()), "problem", "not installed"),
    (build_checks.torch, machine(torch=Probe(error="OSError: libgomp")), "problem", "OSError: libgomp"),
    (build_checks.extension, machine(), "ok", "compressors: int8, none"),
    (build_checks.extension, machine(extension=Probe()), "problem", "pip install --no-build-isolation"),
    (
        build_checks.extension,
        machine(extension=Probe(), extension_files=("_C.cpython-310.so",)),
        "problem",
        "built for another Python: _C.cpython-310.so",
    ),
    (build_checks.extension, machine(extension=Probe(error="undefined symbol: x")), "problem", "undefined symbol: x"),
    (build_checks.extension, machine(torch=Probe(GPU_TORCH)), "problem", "rebuild with PLANMOE_CUDA=1"),
    (build_checks.extension_torch, machine(), "ok", "2.13.0+cpu"),
    (
        build_checks.extension_torch,
        machine(torch=Probe({**CPU_TORCH, "version": "2.14.0"})),
        "problem",
        "built with 2.13.0+cpu, running with 2.14.0",
    ),
    (build_checks.extension_torch, machine(torch=Probe()), "info", "until torch"),
    (build_checks.compiler, machine(), "missing", "c++ --version did not answer"),
    (build_checks.compiler, machine(environment={"CXX": "icpx"}), "missing", "icpx --version did not answer"),
    (build_checks.compiler, machine(commands=versions(compiler="c++ (Debian 12.2.0-14) 12.2.0")), "ok", "12.2.0"),
    (build_checks.nvcc, machine(), "info", "not needed with this torch"),
    (build_checks.nvcc, machine(torch=Probe(GPU_TORCH)), "missing", "install the CUDA 13.0 toolkit"),
    (
        build_checks.nvcc,
        machine(torch=Probe(GPU_TORCH), commands=versions(nvcc="Cuda compilation tools, release 12.4, V12.4.1")),
        "problem",
        "CUDA 12.4, but torch was built with CUDA 13.0",
    ),
    (
        build_checks.nvcc,
        machine(torch=Probe(GPU_TORCH), commands=versions(nvcc="Cuda compilation tools, release 13.1, V13.1.9")),
        "ok",
        "13.1",
    ),
    (build_checks.mpirun, machine(), "missing", "openmpi-bin"),
    (build_checks.mpirun, machine(commands=versions(mpirun="mpirun (Open MPI) 4.1.4")), "ok", "4.1.4"),
    (build_checks.zfp, machine(), "missing", "choose one of its compressors: int8, none"),
    (build_checks.zfp, machine(extension=Probe()), "missing", "pip install --no-build-isolation"),
    (build_checks.zfp, machine(extension=Probe({**BACKEND, "compressors": ["none", "zfp8"]})), "ok", "built in"),
    (build_checks.pybind11, machine(torch=Probe()), "info", "torch brings its own"),
    (
        build_checks.pybind11,
        machine(distributions={"pybind11": Distribution("3.9.9", "")}),
        "info",
        "the pybind11 package is 3.9.9",
    ),
    (framework_checks.nccl, machine(), "missing", "CUDA build of torch"),
    (framework_checks.nccl, machine(torch=Probe(GPU_TORCH)), "ok", "2.32.3"),
    (framework_checks.nccl_sockets, machine(), "info", "no NCCL"),
    (framework_checks.nccl_sockets, machine(torch=Probe(GPU_TORCH)), "info", "NCCL_SOCKET_NTHREADS=2"),
    (framework_checks.nccl_sockets, over_rdma(), "info", "not used while NCCL can use efa_0, mlx5_1"),
    (framework_checks.nccl_sockets, over_rdma(NCCL_IB_DISABLE="1"), "info", "NCCL_NSOCKS_PERTHREAD=2"),
    (framework_checks.nccl_sockets, over_rdma(NCCL_IB_DISABLE=""), "info", "not used while NCCL can use efa_0"),
    (framework_checks.nccl_sockets, over_rdma(NCCL_NET="Socket"), "info", "NCCL_NSOCKS_PERTHREAD=2"),
    (framework_checks.nccl_sockets, over_rdma(NCCL_NET_PLUGIN="none"), "info", "not used while NCCL can use efa_0"),
    (framework_checks.nccl_sockets, over_rdma(NCCL_NET_PLUGIN="ofi"), "info", "chooses the network"),
    (
        framework_checks.nccl_sockets,
        machine(torch=Probe(GPU_TORCH), environment={"NCCL_NSOCKS_PERTHREAD": "4"}),
        "info",
        "NCCL_NSOCKS_PERTHREAD=4",
    ),
    (framework_checks.cuda_devices, machine(), "missing", "over gloo"),
    (
        framework_checks.cuda_devices,
        machine(torch=Probe({**GPU_TORCH, "cuda_error": "Found no NVIDIA driver"})),
        "missing",
        "Found no NVIDIA driver",
    ),
    (framework_checks.cuda_devices, machine(torch=Probe({**GPU_TORCH, "devices": ["H200"] * 8})), "ok", "8 x H200"),
    (framework_checks.max_connections, machine(), "info", "not set"),
    (framework_checks.max_connections, machine(environment={"CUDA_DEVICE_MAX_CONNECTIONS": "1"}), "info", "Megatron's"),
    (framework_checks.max_connections, machine(environment={"CUDA_DEVICE_MAX_CONNECTIONS": "2"}), "info", "different"),
    (framework_checks.max_connections, machine(environment={"CUDA_DEVICE_MAX_CONNECTIONS": "32"}), "info", "works"),
    (framework_checks.max_connections, machine(environment={"CUDA_DEVICE_MAX_CONNECTIONS": "x"}), "problem", "1 to 32"),
    (framework_checks.max_connections, machine(environment={"CUDA_DEVICE_MAX_CONNECTIONS": "64"}), "problem", "64"),
    (framework_checks.deepspeed, machine(), "missing", "pip install deepspeed==0.19.8"),
    (framework_checks.deepspeed, machine(deepspeed=module("0.19.8")), "ok", "tested"),
    (framework_checks.deepspeed, machine(deepspeed=module("0.15.0")), "info", "tested: 0.19.8"),
    (framework_checks.deepspeed, machine(deepspeed=Probe(error="no torch")), "problem", "no torch"),
    (framework_checks.megatron_core, machine(), "missing", "megatron-core==0.16.1"),
    (framework_checks.megatron_core, machine(python=(3, 12, 1)), "missing", "megatron-core==0.19.0"),
    (framework_checks.megatron_core, machine(), "missing", "0.17.1 (Python 3.12+)"),
    (framework_checks.megatron_core, machine(python=(3, 9, 1)), "missing", "install Python 3.10"),
    (framework_checks.megatron_core, machine(megatron_core=module("0.16.1")), "ok", "tested"),
    (framework_checks.megatron_core, machine(megatron_core=module("0.12.0")), "info", "not tested"),
    (framework_checks.megatron_core, machine(megatron_core=Probe(error="no apex")), "problem", "no apex"),
    (framework_checks.megatron_lm, machine(), "missing", "PYTHONPATH"),
    (framework_checks.transformer_engine, machine(), "missing", "--transformer-impl local"),
    (framework_checks.transformer_engine, machine(transformer_engine=Probe(error="no cudnn")), "problem", "no cudnn"),
    (framework_checks.transformer_engine, machine(transformer_engine=module("2.9")), "ok", "2.9"),
    (framework_checks.apex, machine(), "missing", "https://github.com/NVIDIA/apex"),
]


@pytest.mark.parametrize(
    ("check", "machine", "status", "text"), CASES, ids=[f"{case[0].__name__}-{case[2]}-{case[3]}" for case in CASES]
)
def test_check(check, machine: Machine, status: str, text: str) -> None:  # type: ignore[no-untyped-def]
    finding = check(machine)
    assert finding.status == status
    assert text in " ".join((finding.version, finding.detail, finding.advice))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].__name__}-{case[2]}-{case[3]}")
def test_every_gap_says_what_to_do(case) -> None:  # type: ignore[no-untyped-def]
    finding = case[0](case[1])
    assert bool(finding.advice) or finding.status in ("ok", "info")


def test_nvidia_apex_is_known_by_its_files(tmp_path: Path) -> None:
    (tmp_path / "apex" / "normalization").mkdir(parents=True)
    packages = {"apex": (tmp_path / "apex",)}
    assert framework_checks.apex(machine(packages=packages)).status == "info"
    assert framework_checks.apex(machine(packages={**packages, "amp_C": ()})).status == "ok"


def test_other_apex_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "apex" / "templates").mkdir(parents=True)
    distribution = {"apex": Distribution("0.9.10", "Pyramid toolkit")}
    finding = framework_checks.apex(machine(packages={"apex": (tmp_path / "apex",)}, distributions=distribution))
    assert (finding.status, finding.version) == ("problem", "0.9.10")
    assert "another project: Pyramid toolkit" in finding.detail
    assert "pip uninstall apex" in finding.advice


def test_megatron_lm_checkout(tmp_path: Path) -> None:
    (tmp_path / "megatron" / "training").mkdir(parents=True)
    packages = {"megatron": (tmp_path / "megatron",)}
    assert framework_checks.megatron_lm(machine(packages=packages)).status == "info"
    (tmp_path / "pretrain_gpt.py").touch()
    assert framework_checks.megatron_lm(machine(packages=packages)).status == "ok"


def test_pybind11_before_torchs_own(tmp_path: Path) -> None:
    (tmp_path / "pybind11").mkdir()
    (tmp_path / "pybind11" / "pybind11.h").touch()
    finding = build_checks.pybind11(machine(environment={"CPLUS_INCLUDE_PATH": f"/usr/include:{tmp_path}"}))
    assert finding.status == "problem"
    assert str(tmp_path) in finding.advice


def test_pybind11_version_is_read_from_torchs_headers() -> None:
    import torch

    facts = {**CPU_TORCH, "path": torch.__file__}
    assert build_checks.pybind11(machine(torch=Probe(facts))).version.count(".") == 2


def test_a_failing_check_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(machine: Machine) -> Finding:
        raise KeyError("surprise")

    monkeypatch.setattr(doctor, "look", lambda: BARE)
    monkeypatch.setattr(doctor, "CHECKS", (broken, build_checks.python))
    first, second = doctor.collect()
    assert (first.component, first.status) == ("broken", "problem")
    assert "KeyError: 'surprise'" in first.detail
    assert second.status == "ok"


def test_report_as_table_and_json() -> None:
    findings = [
        Finding("torch", "ok", "2.13.0", "CPU build", required=True),
        Finding("planmoe_ds._C", "problem", detail="not built", advice="build it", required=True),
    ]
    text = io.StringIO()
    doctor.print_table(findings, Console(file=text, width=100))
    assert "CPU build" in text.getvalue()
    assert "planmoe_ds._C: build it" in text.getvalue()
    assert "planmoe_ds cannot run here: planmoe_ds._C." in text.getvalue()
    content = json.loads(doctor.as_json(findings))
    assert content["usable"] is False
    assert content["findings"][1]["advice"] == "build it"


@pytest.mark.slow
def test_broken_packages_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages that print, raise, exit or crash when imported, and an unrelated apex that must not run at all."""
    ran = tmp_path / "apex-was-run"
    sources = {
        "deepspeed": "print('banner'); raise RuntimeError('wrong CUDA')",
        "transformer_engine": "",
        "transformer_engine/pytorch": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
        "megatron": "",
        "megatron/core": "print('noise'); __version__ = '0.16.1'",
        "apex": f"open({str(ran)!r}, 'w')",
    }
    for name, source in sources.items():
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.split(".")[0] in sources]:
        monkeypatch.delitem(sys.modules, name)
    findings = {finding.component: finding for finding in doctor.collect()}
    assert findings["DeepSpeed"].status == "problem"
    assert "RuntimeError: wrong CUDA" in findings["DeepSpeed"].detail
    assert "SIGSEGV" in findings["Transformer Engine"].detail
    assert (findings["megatron-core"].status, findings["megatron-core"].version) == ("ok", "0.16.1")
    assert findings["NVIDIA apex"].status == "problem"
    assert not ran.exists()


@pytest.mark.slow
def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv("CXX", "no-such-compiler")
    found = look()
    assert found.torch.facts["version"] == torch.__version__
    assert found.extension.facts["build"]["torch"] == torch.__version__
    assert found.commands["compiler"] == ""
    assert found.environment["PATH"] == os.environ["PATH"]
