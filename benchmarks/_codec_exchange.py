"""One exchange of rows between the ranks of an emulated cluster, encoded and decoded with several codecs in turn."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.cluster import ClusterSpec, run_on_cluster  # noqa: E402

CODECS = ("none", "bf16", "int8")
NO_CLUSTER = 77


def measure_on_cluster(cluster: str, num_rows: int, hidden: int, rounds: int) -> dict[str, float] | None:
    """Median seconds by codec of the slowest rank; None where this machine cannot emulate a cluster.

    cluster: `2x1@400mbit/2gbit`; num_rows: float32 rows of `hidden` values from every rank to every other.
    """
    shape, _, rates = cluster.partition("@")
    inter, _, intra = rates.partition("/")
    nodes, ranks = (int(count) for count in shape.split("x"))
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        options = [f"--rows={num_rows}", f"--hidden={hidden}", f"--rounds={rounds}", f"--json={file.name}"]
        run = run_on_cluster(ClusterSpec.even(nodes, ranks, inter, intra), [sys.executable, __file__, *options], 300)
        if run.returncode == NO_CLUSTER:
            return None
        if run.returncode != 0:
            raise SystemExit(run.stderr)
        found: dict[str, float] = json.loads(Path(file.name).read_text())
        return found


def main() -> None:
    """Be one rank."""
    parser = argparse.ArgumentParser()
    for name in ("rows", "hidden", "rounds"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    import torch
    import torch.distributed as dist

    from planmoe_ds.backend import make_comm, make_compressor
    from planmoe_ds.topology import find_topology

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    groups = [dist.new_group() for _ in range(2)]
    comm = make_comm("direct", groups, list(find_topology().node_of_rank), torch.device("cpu"))
    counts = [0 if peer == rank else arguments.rows for peer in range(size)]
    rows = torch.randn(sum(counts), arguments.hidden)
    back = torch.empty_like(rows)
    seconds: dict[str, list[float]] = {name: [] for name in CODECS}
    for turn in range(arguments.rounds + 1):
        for name in CODECS[turn % len(CODECS) :] + CODECS[: turn % len(CODECS)]:
            codec = make_compressor(name)
            dist.barrier()
            start = time.perf_counter()
            wire = codec.encode(rows)
            received = torch.empty_like(wire)
            comm.start(wire, counts, received, counts).wait()
            codec.decode(received, back)
            elapsed = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
            if turn > 0:
                seconds[name].append(float(elapsed))
    comm.close()
    if rank == 0:
        arguments.json.write_text(json.dumps({name: statistics.median(times) for name, times in seconds.items()}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
