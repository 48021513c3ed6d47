"""`planmoe probe`: what the links cost, as a table for people or JSON for programs."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from planmoe_ds.costs import LinkCost
from planmoe_ds.errors import PlanMoEConfigError, PlanMoEMismatchError
from planmoe_ds.probe import ProbeReport, run_probe
from planmoe_ds.topology import Topology, find_topology

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_MPICH = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
# What marks a launcher, and what it calls _NAMES: Open MPI, MPICH and Intel MPI, srun. A batch script has Slurm's
# variables too, but only a task of srun has a step; Slurm's own PMI tells no local rank.
_LAUNCHERS = {
    "OMPI_COMM_WORLD_RANK": tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "MPI_LOCALRANKID": _MPICH,
    "SLURM_STEP_ID": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
    "PMI_RANK": _MPICH,
}
_HOW = (
    "planmoe probe measures between ranks, so every rank must run it: start it with your launcher, such as\n"
    "    torchrun --nproc-per-node 4 --no-python planmoe probe\n"
    "or mpirun and srun with MASTER_ADDR (rank 0's machine) and MASTER_PORT exported to all ranks"
)


def run(ranks_per_node: int | list[int] | None = None, *, refresh: bool = False, as_json: bool = False) -> int:
    """Measure or load, and print on rank 0; returns the exit code."""
    os.environ.update(launcher_variables(os.environ))
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        print(f"{', '.join(missing)}: not set. {_HOW}", file=sys.stderr)
        return 2
    try:
        device = _device(os.environ)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    except (ValueError, RuntimeError) as error:  # a variable that is no number, a port in use, ranks that do not come
        print(f"planmoe probe: the ranks did not meet: {error}", file=sys.stderr)
        return 2
    try:
        topology = find_topology(ranks_per_node)
        report = run_probe(device, topology, refresh=refresh)
        if dist.get_rank() == 0 and as_json:
            print(report.costs.model_dump_json(indent=1))
        elif dist.get_rank() == 0:
            print_report(report, topology, Console())
    except (PlanMoEConfigError, PlanMoEMismatchError) as error:  # the same on every rank
        if dist.get_rank() == 0:
            print(f"planmoe probe: {error}", file=sys.stderr)
        dist.barrier()  # a launcher ends all ranks with the first: rank 0 has spoken now
        return 2
    finally:
        dist.destroy_process_group()
    return 0


def _device(environment: Mapping[str, str]) -> torch.device:
    """This rank's GPU; the CPU where the machine's ranks have not one each, which NCCL wants."""
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    ranks = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    if cards == 0 or environment.get("DS_ACCELERATOR") == "cpu":
        return torch.device("cpu")
    if ranks > cards and not environment.get("NCCL_MULTI_RANK_GPU_ENABLE"):
        if environment.get("LOCAL_RANK", "0") == "0":
            print(f"planmoe probe: {ranks} ranks, {cards} GPUs here: measured over gloo, not NCCL", file=sys.stderr)
        return torch.device("cpu")
    device = torch.device("cuda", int(environment.get("LOCAL_RANK", "0")) % cards)
    torch.cuda.set_device(device)
    return device


def launcher_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, as torch calls them, where only MPI's or Slurm's are set."""
    marker = next((marker for marker in ("RANK", *_LAUNCHERS) if marker in environment), "RANK")
    if marker == "RANK":
        return {}
    names = zip(_NAMES, _LAUNCHERS[marker], strict=True)
    return {name: environment[theirs] for name, theirs in names if theirs in environment}


def print_report(report: ProbeReport, topology: Topology, console: Console) -> None:
    """A row per class of links, alone and with the other class busy."""
    costs = report.costs
    if topology.num_ranks == 1:
        console.print("1 rank: there are no links to measure", highlight=False)
        return
    table = Table(title=f"{topology.describe()}, {costs.backend}", title_justify="left")
    table.add_column("link", no_wrap=True)
    for heading in ("alpha µs", "beta µs/MB", "GB/s rank", "GB/s node", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, cost in (
        ("intra", costs.intra),
        ("inter", costs.inter),
        ("intra, both busy", costs.intra_while_both),
        ("inter, both busy", costs.inter_while_both),
    ):
        if cost is not None:
            table.add_row(name, *_cells(cost, max(topology.ranks_per_node)))
    console.print(table)
    if costs.direct_overlap is not None:
        console.print(f"one exchange over both hides {costs.direct_overlap:.0%} of the shorter one", highlight=False)
    origin = "kept from an earlier run in" if report.from_cache else "measured now, kept in"
    where = f"{origin} {report.path}" if report.is_kept else "measured now, not kept"
    console.print(where, soft_wrap=True, highlight=False)


def _cells(cost: LinkCost, ranks_per_node: int) -> list[str]:
    rate = 1e-9 / cost.beta_seconds_per_byte
    return [
        f"{cost.alpha_seconds * 1e6:.0f}",
        f"{cost.beta_seconds_per_byte * 1e12:.1f}",
        f"{rate:.3g}",
        f"{rate * ranks_per_node:.3g}",
        f"{cost.worst_error:.0%}",
    ]
