"""run_megatron_lm.sh: its launchers start a checkout's script, unedited, on ranks that meet, behind the patches."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.example.conftest import EXAMPLE, TIMEOUT_SECONDS, environment_of_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SCRIPT = """
import os, pathlib, sys
import torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor(dist.get_rank() + 1)
dist.all_reduce(total)
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
found = [*(os.environ[name] for name in names), str(int(total)), str("megatron_patches" in sys.modules), *sys.argv[1:]]
pathlib.Path(__file__).with_name(f"found.{dist.get_rank()}").write_text(" ".join(found))
dist.destroy_process_group()
"""
SRUN = """#!/bin/sh
[ "$SRUN_CPUS_PER_TASK" = 3 ] || exit 1
shift  # --kill-on-bad-exit=1
for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & done
wait
"""
SCONTROL = """#!/bin/sh
[ "$1 $2 $3" = "show hostnames here" ] && echo 127.0.0.1
"""
JOB = {"SLURM_JOB_NODELIST": "here", "SLURM_JOB_ID": "4711", "SLURM_NTASKS": "2", "SLURM_NNODES": "1"}
JOB |= {"SLURM_CPUS_PER_TASK": "3"}


def run(checkout: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """On two ranks, from another folder than the checkout's."""
    return subprocess.run(
        [EXAMPLE / "run_megatron_lm.sh", *words],
        cwd=checkout.parent,
        env={**environment_of_ranks(), "RANKS": "2", "MEGATRON_LM": checkout.name, **environment},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with a script of the name of Megatron-LM's, and programs named as SLURM's beside it."""
    (tmp_path / "checkout").mkdir()
    (tmp_path / "checkout" / "pretrain_gpt.py").write_text(SCRIPT)
    (tmp_path / "slurm").mkdir()
    for name, content in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "slurm" / name).write_text(content)
        (tmp_path / "slurm" / name).chmod(0o755)
    return tmp_path / "checkout"


@pytest.mark.parametrize("launcher", ["torchrun", "mpi", "srun"])
def test_a_launcher_starts_the_script(checkout: Path, launcher: str) -> None:
    if launcher == "mpi" and shutil.which("mpirun") is None:
        pytest.skip("mpirun is not installed (apt-get install openmpi-bin)")
    path = f"{checkout.parent / 'slurm'}:{os.environ['PATH']}"
    done = run(checkout, launcher, "pretrain_gpt.py", "--num-experts", "8", **JOB, PATH=path)
    assert done.returncode == 0, done.stderr
    found = [path.read_text() for path in sorted(checkout.glob("found.*"))]  # what ranks print at once may be mixed up
    assert found == [f"{rank} {rank} 2 2 3 True --num-experts 8" for rank in range(2)], done.stdout + done.stderr


def test_mistakes_are_told(checkout: Path) -> None:
    done = run(checkout, "pretrain_bert.py")
    assert done.returncode == 2
    assert "there is no 'pretrain_bert.py' in MEGATRON_LM=checkout" in done.stderr
    done = run(checkout, MEGATRON_LM="")
    assert done.returncode != 0
    assert "must name a Megatron-LM checkout" in done.stderr
    done = run(checkout, "torchrun", "pretrain_gpt.py", NNODES="2")
    assert done.returncode != 0
    assert "must name the first machine when NNODES is above 1" in done.stderr
