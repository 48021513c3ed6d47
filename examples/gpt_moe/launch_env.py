"""One process environment for every launcher: torchrun, deepspeed, mpirun, mpiexec, srun, or plain python."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass

from errors import ExampleError, LoneError

DEFAULT_PORT = "29500"
SECONDS_TO_EXPLAIN = 15.0
"""Launchers stop all ranks as soon as one fails: others wait, so that a machine's first says why for all of them."""


@dataclass(frozen=True)
class LauncherVariables:
    """The names one launcher gives to rank, world size, local rank and local world size."""

    launcher: str
    rank: str
    world_size: str
    local_rank: str
    local_world_size: str
    marker: str


LAUNCHERS = (
    LauncherVariables("torchrun or deepspeed", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "RANK"),
    LauncherVariables(
        "mpirun (Open MPI)",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "OMPI_COMM_WORLD_RANK",
    ),
    LauncherVariables(
        "mpiexec (MPICH or Intel MPI)", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", "PMI_RANK"
    ),
    # A batch script has SLURM_PROCID too; only a task started by srun has a step.
    LauncherVariables(
        "srun", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE", "SLURM_STEP_ID"
    ),
)


@dataclass(frozen=True)
class ProcessPlace:
    """Where this process stands: its rank among world_size, and its local rank among those of its machine."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def place_from(environment: Mapping[str, str]) -> ProcessPlace:
    """Read this process's place from the first launcher that left its variables; one lone process without any.

    Raises ExampleError naming the variable that is missing or is not a number.
    """
    for launcher in LAUNCHERS:
        if launcher.marker in environment and not (launcher.marker == "PMI_RANK" and _is_pmi_of_srun(environment)):
            return _place_from_launcher(environment, launcher)
    return ProcessPlace(rank=0, world_size=1, local_rank=0, local_world_size=1)


def prepare_environment(environment: MutableMapping[str, str] | None = None) -> ProcessPlace:
    """Fill in RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT where missing.

    Call it before torch.distributed or DeepSpeed starts. Raises ExampleError when several machines take part and
    MASTER_ADDR is not set, because no launcher but torchrun says which machine is the first.
    """
    target = os.environ if environment is None else environment
    place = place_from(target)
    if "MASTER_ADDR" not in target and place.local_world_size < place.world_size:
        raise ExampleError(
            f"MASTER_ADDR is not set and {place.world_size} ranks run on several machines "
            f"({place.local_world_size} on this one): export MASTER_ADDR=<first machine> on all of them"
        )
    target.setdefault("RANK", str(place.rank))
    target.setdefault("WORLD_SIZE", str(place.world_size))
    target.setdefault("LOCAL_RANK", str(place.local_rank))
    target.setdefault("LOCAL_WORLD_SIZE", str(place.local_world_size))
    target.setdefault("MASTER_ADDR", "127.0.0.1")
    target.setdefault("MASTER_PORT", DEFAULT_PORT)
    return place


def meet_ranks(backend: str) -> None:
    """Start torch.distributed over what prepare_environment filled in.

    torchrun keeps one key-value store over its restarts, where gloo would find the addresses of ranks that ended: every
    attempt has keys of its own.
    """
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store, rank, world_size = next(rendezvous("env://"))
    dist.init_process_group(backend, store=PrefixStore(f"attempt {attempt}", store), rank=rank, world_size=world_size)


def run_on_this_rank(run: Callable[[ProcessPlace], int], program: str) -> int:
    """Prepare the environment, run, and return the exit status.

    It is 2 after an ExampleError, told by a machine's first rank, and later by others that no launcher stopped; a
    LoneError is told at once by each rank that met it.
    """
    place = ProcessPlace(rank=0, world_size=1, local_rank=0, local_world_size=1)
    try:
        place = prepare_environment()
        return run(place)
    except ExampleError as error:
        if place.local_rank > 0 and not isinstance(error, LoneError):
            time.sleep(SECONDS_TO_EXPLAIN + place.local_rank)
        print(f"{program}: error: {error}", file=sys.stderr, flush=True)
        return 2


def _is_pmi_of_srun(environment: Mapping[str, str]) -> bool:
    """Whether srun itself speaks PMI (`--mpi=pmi2`), which tells no local rank."""
    speaks = "SLURM_STEP_ID" in environment and "MPI_LOCALRANKID" not in environment
    return speaks and environment.get("SLURM_PROCID") == environment["PMI_RANK"]


def _place_from_launcher(environment: Mapping[str, str], launcher: LauncherVariables) -> ProcessPlace:
    world_size = _number(environment, launcher.world_size, launcher.launcher)
    # deepspeed sets no local world size, mpiexec not always: then MASTER_ADDR decides (see prepare_environment).
    local_world_size = world_size
    if launcher.local_world_size in environment:
        local_world_size = _number(environment, launcher.local_world_size, launcher.launcher)
    elif launcher.marker == "SLURM_STEP_ID" and environment.get("SLURM_NNODES", "").isdecimal():
        local_world_size = -(-world_size // max(1, int(environment["SLURM_NNODES"])))  # srun spreads them evenly
    rank = _number(environment, launcher.rank, launcher.launcher)
    local_rank = rank % local_world_size
    if launcher.local_rank in environment:
        local_rank = _number(environment, launcher.local_rank, launcher.launcher)
    return ProcessPlace(rank, world_size, local_rank, local_world_size)


def _number(environment: Mapping[str, str], name: str, launcher: str) -> int:
    value = environment.get(name)
    if value is None or not value.isdecimal():
        shown = "is not set" if value is None else f"is {value!r}, not a number"
        raise ExampleError(f"{name} {shown}, yet this process was started by {launcher}: check the launch command")
    return int(value)
