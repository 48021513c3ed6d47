"""All-to-all algorithms on emulated clusters, interleaved in one run, beside the time that the links alone need.

    python benchmarks/alltoall.py [--quick] [--json FILE] [--clusters 2x2,4x2@400mbit/1gbit] [--sizes 4,1024]
    torchrun … benchmarks/alltoall.py [--backend nccl]      (on the cluster you have)

all_to_all_single is torch's own, over a process group as torch makes it and (`… batch`) over one whose threads have
planmoe's scheduling policy. `not overlapped` carries the rows inside nodes, then those between nodes. Bounds: `only
intra` and `only inter` carry one class of links' rows and leave the other's out. Seconds are the slowest rank's.
Routed cases also carry a layer's rows out and back (⇄): all_to_all_single one row per route each way, planmoe's
algorithms one per token and rank, dedup one per token and node; packing and summing are planmoe's times' part.
Exit code 77: this machine cannot emulate a cluster.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks._exchange_report import print_round_trips, print_table, results  # noqa: E402
from benchmarks.cluster import ClusterSpec, run_on_cluster  # noqa: E402

SAMPLE_BYTES = 256 << 10  # small exchanges are timed several in a row
MOST_IN_A_ROW = 20
MOST_ROUNDS = 41
FULL = {
    "clusters": "2x2@400mbit/2gbit,2x4@400mbit/2gbit,4x2@400mbit/2gbit,2x4@400mbit/400mbit",
    "sizes": "4,16,64,256,1024,4096",
    "top_k": "1,2,6,8",
    "rounds": 7,
    "seconds": 8.0,
}
QUICK = {**FULL, "clusters": "2x2@400mbit/2gbit", "sizes": "4,64,1024", "top_k": "2", "rounds": 5, "seconds": 3.0}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small cluster, few sizes: under a minute on 2 cores")
    parser.add_argument("--json", type=Path, help="write configuration and times there")
    parser.add_argument("--clusters", help="nodes x ranks per node @ rate between nodes / inside a node, …")
    parser.add_argument("--sizes", help="KiB per pair of ranks (default: 4,16,64,256,1024,4096)")
    parser.add_argument("--top-k", help="routed cases: experts per token (default: 1,2,6,8)")
    parser.add_argument("--rounds", type=int, help="least times that every variant takes its turn (default: 7)")
    parser.add_argument("--seconds", type=float, help="for each case, if its rounds take less (default: 8)")
    parser.add_argument("--backend", choices=["gloo", "nccl"], default="gloo")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for each emulated cluster (default: 900)")
    arguments = parser.parse_args()
    defaults = QUICK if arguments.quick else FULL
    for name, default in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)
    return arguments


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Be one rank: run every case; returns the times, the same on every rank."""
    import torch
    import torch.distributed as dist

    from benchmarks._exchange_cases import make_cases
    from benchmarks._exchange_variants import Variants, make_buffers
    from planmoe_ds.topology import find_topology

    torch.set_num_threads(1)
    device = torch.device("cpu")
    if arguments.backend == "nccl":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    dist.init_process_group(arguments.backend)
    variants = Variants(list(find_topology().node_of_rank), device)
    sizes = [int(size) << 10 for size in arguments.sizes.split(",")]
    measured = []
    for case in make_cases(dist.get_world_size(), sizes, [int(k) for k in arguments.top_k.split(",") if k]):
        buffers = make_buffers(case, device)
        variants.check(buffers)
        in_a_row = max(1, min(MOST_IN_A_ROW, SAMPLE_BYTES // case.largest_bytes))
        runs = variants.bind(buffers)
        entry: dict[str, Any] = {"case": case.name, "pair_bytes": case.pair_bytes, "in_a_row": in_a_row}
        if case.experts is not None:
            round_trips, facts = variants.bind_routed(case, buffers)
            runs |= round_trips
            entry |= facts
        elif case.pair_bytes == min(sizes):
            entry["issue_seconds_per_message"] = variants.issue_seconds(buffers)
        measured.append(entry | {"seconds": take_turns(runs, in_a_row, device, arguments)})
    dist.destroy_process_group()
    return measured


def take_turns(
    runs: dict[str, Callable[[], None]], in_a_row: int, device: Any, arguments: argparse.Namespace
) -> dict[str, list[float]]:
    """Seconds of one exchange of every variant, round after round, each starting with another variant."""
    from benchmarks._exchange_variants import time_run

    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    spent = 0.0  # the same on every rank, as the times are
    for turn in range(MOST_ROUNDS):
        if turn >= arguments.rounds and spent > arguments.seconds:
            break
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(time_run(runs[name], in_a_row, device))
            spent += seconds[name][-1] * in_a_row
    return seconds


def parse_cluster(text: str) -> ClusterSpec:
    """`2x4@400mbit/2gbit`: two nodes of four ranks, rates between nodes and inside one."""
    shape, _, rates = text.partition("@")
    inter, _, intra = (rates or "400mbit/2gbit").partition("/")
    nodes, ranks = (int(count) for count in shape.split("x"))
    return ClusterSpec.even(nodes, ranks, inter, intra)


def measure_on_emulated_clusters(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Run this file on every rank of every emulated cluster; exits with 77 where there can be none."""
    clusters = []
    for name in arguments.clusters.split(","):
        spec = parse_cluster(name)
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            chosen = ("sizes", "top_k", "rounds", "seconds", "backend")
            options = [f"--{key.replace('_', '-')}={getattr(arguments, key)}" for key in chosen]
            program = [sys.executable, __file__, *options, f"--json={file.name}"]
            run = run_on_cluster(spec, program, arguments.timeout)
            if run.returncode != 0:
                sys.stderr.write(run.stderr)
                sys.exit(run.returncode)
            measured = json.loads(Path(file.name).read_text())["clusters"][0]["cases"]
        clusters.append({"name": name, "cases": measured})
    return clusters


def main() -> None:
    """Be the launcher of emulated clusters, or one rank."""
    arguments = parse_arguments()
    if "RANK" in os.environ:
        clusters = [{"name": "this cluster", "cases": measure(arguments)}]
        if os.environ["RANK"] != "0":
            return
    else:
        clusters = measure_on_emulated_clusters(arguments)
    settings = {key: str(value) for key, value in vars(arguments).items()}
    print(f"configuration: {settings}; {len(os.sched_getaffinity(0))} cores")
    for cluster in clusters:
        print_table(cluster)
        print_round_trips(cluster)
    found = results(clusters)
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"configuration": settings, "clusters": clusters, "results": found}, indent=1)
        )
    for name, value in found.items():
        print(f"RESULT {name}={value:.3f}")


if __name__ == "__main__":
    main()
