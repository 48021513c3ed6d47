"""Step time and bytes of the GPT-MoE example: stock DeepSpeed against planmoe, interleaved in one run.

    python benchmarks/train_deepspeed.py [--quick] [--json FILE] [--ranks 4] [--top-k 2 --experts 8 …]
    python benchmarks/train_deepspeed.py --cluster 2x2@100mbit/500mbit [--top-k 8 --experts 64 …]

Every variant is a DeepSpeed engine of its own over the same ranks; step after step each takes its turn, so that noise
hits all alike. "compute alone" is stock with its all-to-alls left out: the bound that no dispatch can beat. With
`--cluster` the ranks run on an emulated cluster (nodes x ranks @ rate between nodes / inside a node), and the variants
are those that pay there; `predicted` is compute alone and what every layer's schedule adds to the experts' time at the
costs that it measured in its first calls. Exit code 77: this machine cannot emulate a cluster.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VARIANTS: dict[str, Any] = {
    "stock DeepSpeed": None,
    "compute alone (bound)": None,
    "planmoe exact, 1 chunk": {"exactness": "exact", "chunks": 1, "comm": "direct"},
    "planmoe 1 chunk": {"chunks": 1, "comm": "direct"},
    "planmoe 2 chunks": {"chunks": 2, "comm": "direct"},
    "planmoe pipe, 2 chunks": {"chunks": 2, "comm": "pipe"},
    "planmoe int8, 1 chunk": {"chunks": 1, "comm": "direct", "compression": "int8"},
}
STOCK, BOUND, EXACT, INT8 = (list(VARIANTS)[place] for place in (0, 1, 2, 6))
ON_CLUSTER = {"comm": "dedup", "scheduler": "optimal", "exactness": "reordered"}
CLUSTER_VARIANTS: dict[str, Any] = {
    STOCK: None,
    BOUND: None,
    "planmoe direct, 1 chunk": {"chunks": 1, "comm": "direct"},
    "planmoe dedup, 1 chunk": {**ON_CLUSTER, "chunks": 1},
    "planmoe dedup, 2 chunks": {**ON_CLUSTER, "chunks": 2},
    "planmoe dedup, int8, 1 chunk": {"comm": "dedup", "scheduler": "optimal", "chunks": 1, "compression": "int8"},
    "planmoe dedup, int8, 2 chunks": {"comm": "dedup", "scheduler": "optimal", "chunks": 2, "compression": "int8"},
}


CLUSTER_SECONDS = 900


@dataclass
class Row:
    """One variant's medians over steps, on rank 0; bytes are what this rank sends to others per step."""

    variant: str
    milliseconds: float = 0.0
    spread: float = 0.0  # interquartile range, milliseconds
    over_stock: float = 0.0
    sent_bytes: float = 0.0
    bytes_over_stock: float = 0.0
    exposed_share: float = 0.0
    predicted: float = 0.0  # milliseconds


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps: under a minute on 2 cores")
    parser.add_argument("--json", type=Path, help="write configuration and rows there")
    parser.add_argument("--only", help="with --cluster: variants whose names hold one of these words, between slashes")
    parser.add_argument("--cluster", help="emulate a cluster: nodes x ranks @ rate between nodes / inside a node")
    for name, default in {
        "ranks": 4, "steps": 40, "layers": 4, "hidden-size": 96, "experts": 8, "top-k": 2, "batch-size": 8,
        "sequence-length": 96, "zero-stage": 1,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def make_engine(arguments: argparse.Namespace, section: Any) -> Any:
    """The example's model and configuration, with or without planmoe."""
    import deepspeed
    import torch.distributed as dist
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    from model import ModelConfig, build_model

    config = ModelConfig(
        num_layers=arguments.layers,
        hidden_size=arguments.hidden_size,
        num_experts=arguments.experts,
        top_k=arguments.top_k,
        ep_size=dist.get_world_size(),
        sequence_length=arguments.sequence_length,
    )
    model = build_model(config, dist.get_rank())
    groups = split_params_into_different_moe_groups_for_optimizer(
        {"params": list(model.parameters()), "name": "parameters"}
    )
    settings = json.loads((ROOT / "examples/gpt_moe/ds_config.json").read_text())
    settings |= {"train_micro_batch_size_per_gpu": arguments.batch_size, "planmoe": section or False}
    settings["zero_optimization"] = {"stage": arguments.zero_stage}
    settings.pop("scheduler")
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=settings)
    return engine


@contextmanager
def without_all_to_all(active: bool) -> Iterator[None]:
    """Stock's all-to-all becomes the identity: same compute, wrong tokens."""
    from deepspeed.moe import sharded_moe

    original = sharded_moe._AllToAll
    if active:
        sharded_moe._AllToAll = type("Identity", (), {"apply": staticmethod(lambda _group, rows: rows.contiguous())})
    try:
        yield
    finally:
        sharded_moe._AllToAll = original


def take_step(engine: Any, tokens: Any, bound: bool) -> float:
    """One training step of the slowest rank, in seconds."""
    import torch
    import torch.distributed as dist

    from data import language_loss

    dist.barrier()
    start = time.perf_counter()
    with without_all_to_all(bound):
        logits, balance_loss = engine(tokens[:, :-1])
        engine.backward(language_loss(logits, tokens[:, 1:]) + 0.01 * balance_loss)
        engine.step()
    seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds)


def chosen_variants(arguments: argparse.Namespace) -> dict[str, Any]:
    """Stock, the bound, and the variants whose names hold one of the words asked for."""
    variants = CLUSTER_VARIANTS if arguments.cluster else VARIANTS
    words = arguments.only.split("/") if arguments.only else [""]
    return {
        name: section
        for name, section in variants.items()
        if name in (STOCK, BOUND) or any(word in name for word in words)
    }


def measure(arguments: argparse.Namespace) -> list[Row]:
    """Interleave all variants; collective."""
    import torch

    from planmoe_ds.planner import MEASURED, WARM_UP

    variants = chosen_variants(arguments)
    engines = {name: make_engine(arguments, section) for name, section in variants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    stats: dict[str, list[Any]] = {name: [] for name in variants}
    steps = 8 if arguments.quick else arguments.steps
    warm_up = WARM_UP + MEASURED + 1 if arguments.cluster else 2
    for step in range(steps + warm_up):
        tokens = torch.randint(0, 256, (arguments.batch_size, arguments.sequence_length + 1))
        for name, engine in engines.items():
            if step < warm_up - 2 and not (variants[name] or {}).get("scheduler"):
                continue  # only the scheduler that learns needs so many
            elapsed = take_step(engine, tokens, name == BOUND)
            taken = engine.planmoe.recorder.take() if hasattr(engine, "planmoe") else None
            if step >= warm_up:
                seconds[name].append(elapsed)
                stats[name].append(taken)
    ours = next(name for name, section in variants.items() if section is not None)
    stock_bytes = statistics.median(taken.stock_bytes for taken in stats[ours])
    stock_seconds = statistics.median(seconds[STOCK])
    rows = []
    for name in variants:
        quartiles = statistics.quantiles(seconds[name], n=4)
        row = Row(name, statistics.median(seconds[name]) * 1e3, (quartiles[2] - quartiles[0]) * 1e3)
        row.over_stock = row.milliseconds / (stock_seconds * 1e3)
        if variants[name] is not None:
            row.predicted = statistics.median(seconds[BOUND]) * 1e3 + added_milliseconds(engines[name])
            row.sent_bytes = statistics.median(taken.bytes_sent for taken in stats[name])
            row.exposed_share = (
                statistics.median(taken.exposed_seconds for taken in stats[name]) / row.milliseconds * 1e3
            )
        elif name == STOCK:
            row.sent_bytes = stock_bytes
        row.bytes_over_stock = row.sent_bytes / stock_bytes
        rows.append(row)
    return rows


def added_milliseconds(engine: Any) -> float:
    """What the schedules of all layers take beyond the experts' own time; 0 where nothing was learnt."""
    from planmoe_ds.integrations.deepspeed import PlanMoELayer
    from planmoe_ds.scheduling import Kind

    seconds = 0.0
    for layer in engine.module.modules():
        if not isinstance(layer, PlanMoELayer):
            continue
        for schedule in layer.planmoe.planner.schedules().values():
            work = [task.legs[0][1] for task in schedule.graph.tasks if task.kind in (Kind.EXPERT, Kind.WEIGHTS)]
            seconds += schedule.makespan - sum(work)
    return seconds * 1e3


def report(arguments: argparse.Namespace, rows: list[Row]) -> None:
    """The table, the JSON file, the RESULT lines."""
    print(f"configuration: {vars(arguments)}; {len(os.sched_getaffinity(0))} cores, gloo")
    columns = f"{'ms/step':>9}{'± IQR':>8}{'/ stock':>9}{'kB sent':>9}{'/ stock':>9}{'exposed':>9}{'predicted':>11}"
    print(f"{'variant':<30}{columns}")
    for row in rows:
        print(
            f"{row.variant:<30}{row.milliseconds:9.1f}{row.spread:8.1f}{row.over_stock:9.2f}{row.sent_bytes / 1e3:9.0f}"
            f"{row.bytes_over_stock:9.2f}{row.exposed_share:9.0%}{row.predicted:11.0f}"
        )
    if arguments.json:
        settings = {key: str(value) for key, value in vars(arguments).items()}
        arguments.json.write_text(
            json.dumps({"configuration": settings, "rows": [asdict(row) for row in rows]}, indent=1)
        )
    by_name = {row.variant: row for row in rows}
    if arguments.cluster:
        report_cluster(by_name)
        return
    print(f"RESULT step_time_over_stock_exact={by_name[EXACT].over_stock:.3f}")
    print(f"RESULT bytes_over_stock_exact={by_name[EXACT].bytes_over_stock:.3f}")
    print(f"RESULT bytes_over_stock_int8={by_name[INT8].bytes_over_stock:.3f}")
    print(f"RESULT compute_alone_over_stock={by_name[BOUND].over_stock:.3f}")


def report_cluster(by_name: dict[str, Row]) -> None:
    """The best variant with the same mathematics, the best with 8-bit codecs, and the bound."""
    ours = {name: row for name, row in by_name.items() if CLUSTER_VARIANTS[name] is not None}
    for label, wanted in (("exact", False), ("8bit", True)):
        rows = [row for name, row in ours.items() if ("int8" in name) is wanted]
        if not rows:
            continue
        best = min(rows, key=lambda row: row.milliseconds)
        print(f"RESULT train_speedup_{label}={1 / best.over_stock:.3f}")
        if best.predicted > by_name[BOUND].milliseconds:
            print(f"RESULT train_executed_over_predicted_{label}={best.milliseconds / best.predicted:.3f}")
    print(f"RESULT train_speedup_bound={1 / by_name[BOUND].over_stock:.3f}")
    print(f"RESULT train_communication_share_of_stock={1 - by_name[BOUND].over_stock:.3f}")
    print(f"RESULT train_slowest_variant_over_stock={max(row.over_stock for row in ours.values()):.3f}")


def launch(arguments: argparse.Namespace) -> int:
    """Start the ranks, here or on an emulated cluster; returns the exit code."""
    environment = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **os.environ}
    if arguments.cluster is None:
        ranks = f"--nproc_per_node={arguments.ranks}"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", ranks]
        return subprocess.run([*launcher, *sys.argv], env=environment, check=False).returncode
    sys.path.insert(0, str(ROOT))
    from benchmarks.cluster import ClusterSpec, run_on_cluster

    shape, _, rates = arguments.cluster.partition("@")
    inter, _, intra = rates.partition("/")
    nodes, ranks_per_node = (int(count) for count in shape.split("x"))
    spec = ClusterSpec.even(nodes, ranks_per_node, inter, intra)
    program = [sys.executable, *sys.argv]
    return run_on_cluster(spec, program, CLUSTER_SECONDS, environment=environment, capture=False).returncode


def main() -> None:
    """Launch the ranks, or be one of them."""
    arguments = parse_arguments()
    if "RANK" not in os.environ:
        sys.exit(launch(arguments))
    sys.path[:0] = [str(ROOT), str(ROOT / "examples/gpt_moe")]
    warnings.filterwarnings("ignore", category=FutureWarning)
    import deepspeed
    import torch

    import planmoe_ds  # noqa: F401  switches the hook on

    torch.set_num_threads(1)
    if arguments.cluster:  # nodes share no memory, and building this takes a compiler a minute
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    rows = measure(arguments)
    if torch.distributed.get_rank() == 0:
        report(arguments, rows)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
