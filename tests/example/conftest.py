"""Runs the example's scripts in processes of their own, small enough for a test."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "gpt_moe"
TIMEOUT_SECONDS = 240
LAUNCHER_PREFIXES = ("OMPI_", "PMI_", "PMIX_", "SLURM_", "TORCHELASTIC_")
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

TINY_MODEL = ("--hidden-size", "32", "--heads", "2", "--layers", "2", "--experts", "4", "--sequence-length", "32")
TINY_RUN = ("--batch-size", "2", "--evaluation-batches", "1", "--sample-bytes", "4", "--log-every", "1")

Launch = Callable[[Sequence[object]], subprocess.CompletedProcess[str]]


def environment_of_ranks() -> dict[str, str]:
    """For ranks on the CPU, free of any launcher around the tests."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in LAUNCHER_VARIABLES and not name.startswith(LAUNCHER_PREFIXES)
    }
    environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    return {**environment, "PYTHONPATH": str(ROOT)}


def start(command: Sequence[object]) -> subprocess.CompletedProcess[str]:
    """Run a command from the repository's root on the CPU."""
    return subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env=environment_of_ranks(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )


def torchrun(script: str, arguments: Sequence[object], num_ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """Run a script of the example on num_ranks ranks under torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    return start([*launcher, EXAMPLE / script, *arguments])


@pytest.fixture
def pretrain() -> Launch:
    """Call with extra arguments: a tiny pretraining on 2 ranks."""
    return lambda arguments: torchrun("pretrain_deepspeed.py", [*TINY_MODEL, *TINY_RUN, *arguments])


@pytest.fixture
def example_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the example's modules importable, as they are for a script that lies beside them."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
