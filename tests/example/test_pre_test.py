"""The one-layer comparison with stock DeepSpeed: it passes, it can fail, and every launcher starts it."""

from __future__ import annotations

import shutil

import pytest

from tests.example.conftest import EXAMPLE, start, torchrun

TINY = ("--batch_size=2", "--num_tokens=64", "--model_dim=16", "--hidden_size=32", "--num_steps=2")
TENSORS = ("output", "input gradient", "router gradient", "expert gradients")

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--top=1", "--chunks=4", "--comm=pipe"],
        ["--compression=int8"],
        ["--dtype=bfloat16", "--num_local_experts=1"],
    ],
    ids=["defaults", "top 1 in four pipelined chunks", "int8", "bfloat16"],
)
def test_it_agrees_with_stock(options: list[str]) -> None:
    done = torchrun("pre_test.py", [*TINY, *options])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASSED" in done.stdout
    for name in TENSORS:
        assert f"max relative error of {name}" in done.stdout
    assert "sent per rank and step, MiB" in done.stdout


def test_a_difference_fails_and_is_named() -> None:
    done = torchrun("pre_test.py", [*TINY, "--compression=int8", "--tolerance=1e-7"])
    assert done.returncode != 0
    assert "FAILED: output, input gradient" in done.stdout


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun is not installed (apt-get install openmpi-bin)")
def test_mpirun_starts_it() -> None:
    done = start([EXAMPLE / "run_mpi.sh", "-n", 4, "pre_test.py", *TINY])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 ranks on cpu" in done.stdout
    assert "PASSED" in done.stdout


def test_deepspeeds_launcher_starts_it() -> None:
    done = start([EXAMPLE / "run_deepspeed.sh", "-n", 2, "pre_test.py", *TINY])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASSED" in done.stdout


def test_a_missing_script_is_told() -> None:
    done = start([EXAMPLE / "run_torchrun.sh", "nothing.py"])
    assert done.returncode == 2
    assert "there is no script 'nothing.py'" in done.stderr
