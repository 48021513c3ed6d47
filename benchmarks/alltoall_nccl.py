"""All-to-alls over NCCL: torch's all_to_all_single against planmoe's, uniform and skewed.

    python -m benchmarks.alltoall_nccl [--ranks 2] [--hosts 1] [--gbit 10 [--fair]] [--quick] [--json FILE]

GB/s that a rank sends to others (its bus bandwidth), from medians of the slowest rank; one variant after the other.
Skewed: rank 0 gets half of everything. See benchmarks/_nccl.py for hosts and ranks that share a card.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks._nccl import add_cluster, launch, median_ms, start

KIB = (64, 1024, 16384, 262144)  # sent by each rank
WIDTH = 1024  # bytes per row
NAMES = ("direct", "hierarchical", "pipe", "dedup")


def split(rows: int, size: int, skewed: bool) -> list[int]:
    """Rows for each rank."""
    if not skewed or size == 1:
        return [rows // size] * size
    return [rows // 2] + [rows // 2 // (size - 1)] * (size - 1)


def measure(kib: int, skewed: bool, hosts: int, rounds: int) -> dict[str, float]:
    """GB/s by variant."""
    from planmoe_ds.backend import make_comm

    rank, size, device = dist.get_rank(), dist.get_world_size(), torch.device("cuda", torch.cuda.current_device())
    shares = split(kib, size, skewed)
    send_rows, recv_rows = shares, [shares[rank]] * size
    send = torch.randint(0, 255, (sum(send_rows), WIDTH), dtype=torch.uint8, device=device)
    recv = torch.empty((sum(recv_rows), WIDTH), dtype=torch.uint8, device=device)
    nodes = [place // (size // hosts) for place in range(size)]
    moved = (sum(send_rows) - send_rows[rank]) * WIDTH
    most = torch.tensor(float(moved), device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)

    def torchs() -> None:
        dist.all_to_all_single(recv, send, recv_rows, send_rows)

    found = {"all_to_all_single": float(most) / median_ms(torchs, rounds) / 1e6}
    for name in NAMES:
        comm = make_comm(name, GROUPS, nodes, device)
        found[name] = (
            float(most) / median_ms(lambda c=comm: c.start(send, send_rows, recv, recv_rows).wait(), rounds) / 1e6
        )
    return found


GROUPS: list[dist.ProcessGroup] = []


def main() -> None:
    """Launch the ranks, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds")
    add_cluster(parser)
    parser.set_defaults(ranks=torch.cuda.device_count())
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    if "RANK" not in os.environ:
        sys.exit(launch(options))
    start(options.hosts)
    from planmoe_ds.connect import num_links

    GROUPS.extend(dist.new_group() for _ in range(num_links("auto")))
    found: dict[str, dict[str, float]] = {}
    for kib in KIB[:2] if options.quick else KIB:
        for skewed in (False, True):
            label = f"{kib} KiB {'skewed' if skewed else 'uniform'}"
            found[label] = measure(kib, skewed, options.hosts, 3 if options.quick else options.rounds)
            if dist.get_rank() == 0:
                print(
                    f"{label:20} " + "  ".join(f"{name} {rate:8.2f}" for name, rate in found[label].items()), flush=True
                )
    if dist.get_rank() == 0:
        worst = min(max(row[name] for name in NAMES) / row["all_to_all_single"] for row in found.values())
        print(f"RESULT nccl_best_over_all_to_all_single_worst={worst:.3f}")
        if options.json is not None:
            options.json.write_text(json.dumps(found, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
