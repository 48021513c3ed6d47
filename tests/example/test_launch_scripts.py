"""What the launch scripts make of the machine and of their options, with programs in place of the real ones."""

from __future__ import annotations

import os
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from tests.example.conftest import EXAMPLE, ROOT, environment_of_ranks

SMI = """#!/bin/sh
for card in 0 1 2 3; do echo "GPU $card: a card"; done
"""
PYTHON = """#!/bin/sh
case "$1" in -c) echo 4711; exit ;; esac
echo "$@"
[ -z "$DS_ENV_FILE" ] || cat "$DS_ENV_FILE"
"""


@pytest.fixture
def machine(tmp_path: Path) -> dict[str, str]:
    """The environment of one with four GPUs, and a Python that prints what it is asked for."""
    for name, content in (("nvidia-smi", SMI), ("python", PYTHON)):
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    environment = environment_of_ranks()
    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "RANKS", "MASTER_PORT"):
        environment.pop(name, None)
    folder = str(tmp_path)
    path, python = f"{folder}:{os.environ['PATH']}", f"{folder}/python"
    return {**environment, "PATH": path, "PYTHON": python, "HOME": folder, "TMPDIR": folder}


def run(command: list[object], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize(
    ("visible", "number"), [(None, 4), ("0,2", 2), ("", 0), ("-1", 0), ("1,-1,2", 1), ("GPU-1a2b", 1), ("0,1,2,3,4", 4)]
)
def test_gpus_are_counted(machine: dict[str, str], visible: str | None, number: int) -> None:
    chosen = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert run([ROOT / "scripts" / "num_gpus.sh"], {**machine, **chosen}).stdout == f"{number}\n"


@pytest.mark.parametrize(
    ("options", "changes", "expected"),
    [
        ([], {}, "--num_accelerators 4 "),
        (["-n", "2"], {}, "--num_accelerators 2 "),
        ([], {"CUDA_VISIBLE_DEVICES": "1,3"}, "--include localhost:1,3 "),
        (["-n", "1"], {"CUDA_VISIBLE_DEVICES": "1,3"}, "--include localhost:1 "),
        ([], {"CUDA_VISIBLE_DEVICES": "3"}, "--num_accelerators 4 "),  # on the CPU
    ],
)
def test_deepspeeds_launcher_gets_the_gpus(
    machine: dict[str, str], options: list[str], changes: dict[str, str], expected: str
) -> None:
    done = run([EXAMPLE / "run_deepspeed.sh", *options], {**machine, **changes})
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout


def test_all_machines_get_the_variables(machine: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("first slots=4\nsecond slots=4\n")
    (tmp_path / ".deepspeed_env").write_text("MINE=1\n")
    command = [EXAMPLE / "run_deepspeed.sh", "-H", tmp_path / "hosts"]
    done = run(command, {**machine, "CUDA_DEVICE_MAX_CONNECTIONS": "16", "GLOO_SOCKET_IFNAME": "eth1"})
    assert done.returncode == 0, done.stderr
    assert f"--hostfile {tmp_path}/hosts --master_port 29500 " in done.stdout
    lines = {"MINE=1", "OMP_NUM_THREADS=1", "CUDA_DEVICE_MAX_CONNECTIONS=16", "GLOO_SOCKET_IFNAME=eth1"}
    assert lines <= set(done.stdout.splitlines())
    done = run([*command, "-n", "2"], machine)
    assert done.returncode == 2
    assert "-n is for one machine" in done.stderr


def test_mpi_passes_the_variables_on(machine: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# two\nfirst slots=4\nsecond slots=4\n")
    (tmp_path / "mpirun").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "mpirun").chmod(0o755)
    set_here = {"NCCL_SOCKET_NTHREADS": "4", "NCCL_DEBUG": "", "NCCL_HOSTID": "a", "GLOO_SOCKET_IFNAME": "eth1"}
    done = run([EXAMPLE / "run_mpi.sh", "-H", tmp_path / "hosts"], {**machine, **set_here})
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    passed = {name for option, name in pairwise(words) if option == "-x"}
    wanted = {"PATH", "OMP_NUM_THREADS", "CUDA_DEVICE_MAX_CONNECTIONS", "NCCL_SOCKET_NTHREADS", "GLOO_SOCKET_IFNAME"}
    assert wanted <= passed
    assert not {"NCCL_DEBUG", "NCCL_HOSTID"} & passed


@pytest.mark.parametrize("script", ["run_mpi.sh", "run_deepspeed.sh"])
def test_options_without_a_script_are_the_examples(machine: dict[str, str], tmp_path: Path, script: str) -> None:
    (tmp_path / "mpirun").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "mpirun").chmod(0o755)
    done = run([EXAMPLE / script, "-n", "2", "--steps", "3"], machine)
    assert done.returncode == 0, done.stderr
    assert "pretrain_deepspeed.py --steps 3" in done.stdout
    done = run([EXAMPLE / script, "-x"], machine)
    assert done.returncode == 2
    assert f"{script} [-n RANKS" in done.stderr
    assert "shellcheck" not in done.stderr
    assert "write_variables" not in done.stderr


def test_a_python_that_is_not_there(machine: dict[str, str]) -> None:
    done = run([EXAMPLE / "run_torchrun.sh"], {**machine, "PYTHON": "python1.5"})
    assert done.returncode == 2
    assert "there is no Python 'python1.5'" in done.stderr
