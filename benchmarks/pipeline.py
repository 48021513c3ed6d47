"""The scheduler: its solver against ScheMoE's order; a layer on an emulated cluster, executed against predicted.

    python benchmarks/pipeline.py [--quick] [--json FILE] [--cluster 2x2@400mbit/2gbit] [--part solver]

The layer's experts sleep for as long as they would compute, so that the ranks' cores stay free: what is measured is
what overlaps. They sleep as long as the exchanges take, a third each for forward, input gradients and weight gradients.
`one chunk` is the layer without pipelining; the schedulers cut it into `--chunks`. `predicted` is the schedule's
makespan at the costs that the layer measured in its first calls, `bound` what no order can beat at these costs.
Exit code 77: this machine cannot emulate a cluster.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.cluster import ClusterSpec, run_on_cluster  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer instances and rounds: under a minute on 2 cores")
    parser.add_argument("--json", type=Path, help="write configuration and figures there")
    parser.add_argument("--part", choices=["solver", "layer"], help="only this part (default: both)")
    parser.add_argument("--cluster", default="2x2@400mbit/2gbit", help="nodes x ranks @ rate between / inside nodes")
    parser.add_argument("--comm", default="pipe", help="all-to-all (default: pipe)")
    parser.add_argument("--tokens", type=int, default=2048, help="per rank (default: 2048)")
    parser.add_argument("--hidden", type=int, default=1024, help="float32 values per token (default: 1024)")
    parser.add_argument("--chunks", type=int, default=8, help="pieces of the pipelined layers (default: 8)")
    parser.add_argument("--rounds", type=int, help="times every variant takes its turn (default: 7)")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for the cluster (default: 300)")
    arguments = parser.parse_args()
    if arguments.rounds is None:
        arguments.rounds = 3 if arguments.quick else 7
    return arguments


def measure_on_cluster(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run this file on every rank of the emulated cluster; exits with 77 where there can be none."""
    shape, _, rates = arguments.cluster.partition("@")
    inter, _, intra = rates.partition("/")
    nodes, ranks = (int(count) for count in shape.split("x"))
    chosen = ("comm", "tokens", "hidden", "chunks", "rounds")
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        options = [f"--{name}={getattr(arguments, name)}" for name in chosen]
        run = run_on_cluster(
            ClusterSpec.even(nodes, ranks, inter, intra),
            [sys.executable, __file__, *options, f"--json={file.name}"],
            arguments.timeout,
        )
        if run.returncode != 0:
            sys.stderr.write(run.stdout + run.stderr)
            sys.exit(run.returncode)
        return json.loads(Path(file.name).read_text())


def be_a_rank(arguments: argparse.Namespace) -> None:
    """One rank of the layer part; rank 0 writes what was measured."""
    import torch
    import torch.distributed as dist

    from benchmarks._pipeline_layer import measure_layer

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    measured = measure_layer(arguments)
    if dist.get_rank() == 0:
        arguments.json.write_text(json.dumps(measured))
    dist.destroy_process_group()


def main() -> None:
    """Launch, or be one of the ranks."""
    arguments = parse_arguments()
    if "RANK" in os.environ:
        be_a_rank(arguments)
        return
    from benchmarks._pipeline_layer import print_layer_part
    from benchmarks._pipeline_overhead import overhead_microseconds
    from benchmarks._pipeline_solver import print_solver_part, run_solver_part

    print(f"configuration: {vars(arguments)}; {len(os.sched_getaffinity(0))} cores")
    found: dict[str, Any] = {"configuration": {key: str(value) for key, value in vars(arguments).items()}}
    if arguments.part != "layer":
        rows = run_solver_part(arguments.quick)
        found["solver"] = [asdict(row) for row in rows]
        print_solver_part(rows)
        found["executor_us"] = overhead_microseconds(num_chunks=4)
        print(f"RESULT executor_us_per_layer_4_chunks={found['executor_us']:.0f}")
    if arguments.part != "solver":
        found["layer"] = measure_on_cluster(arguments)
        print_layer_part(arguments.cluster, found["layer"])
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
