"""Step time and bytes of the GPT-MoE example: stock DeepSpeed against planmoe, interleaved in one run.

    python benchmarks/train_deepspeed.py [--quick] [--json FILE] [--ranks 4] [--top-k 2 --experts 8 …]
    python benchmarks/train_deepspeed.py --cluster 2x2@100mbit/500mbit [--top-k 8 --experts 64 …]

Every variant is a DeepSpeed engine of its own over the same ranks; step after step each takes its turn, so that noise
hits all alike. "compute alone" is stock with its all-to-alls left out: the bound that no dispatch can beat. With
`--cluster` the ranks run on an emulated cluster (nodes x ranks @ rate between nodes / inside a node), and the variants
are those that pay there; `predicted` is what a step took in the first calls outside the MoE layers' passes, and the
makespan of every layer's schedules at the costs that it measured in these calls; `planmoe true` is what its adviser
chooses. Exit code 77: this machine cannot emulate a cluster.
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
    "planmoe true": True,
}
STOCK, BOUND, EXACT, INT8 = (list(VARIANTS)[place] for place in (0, 1, 2, 6))
ON_CLUSTER = {"comm": "dedup", "scheduler": "optimal", "exactness": "reordered"}
CLUSTER_VARIANTS: dict[str, Any] = {
    STOCK: None,
    BOUND: None,
    "planmoe direct, 1 chunk": {"chunks": 1, "comm": "direct"},
    "planmoe dedup, 1 chunk": {**ON_CLUSTER, "chunks": 1},
    "planmoe dedup, 2 chunks": {**ON_CLUSTER, "chunks": 2},
    "planmoe true": True,
    "planmoe true, codecs auto": {"comm": "auto", "chunks": "auto", "scheduler": "auto", "compression": "auto"},
    "planmoe dedup, int8, 1 chunk": {"comm": "dedup", "scheduler": "optimal", "chunks": 1, "compression": "int8"},
    "planmoe dedup, int8, 2 chunks": {"comm": "dedup", "scheduler": "optimal", "chunks": 2, "compression": "int8"},
}


CLUSTER_SECONDS = 900
WARM_UP = 2  # steps before those that count


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


def take_step(engine: Any, tokens: Any, bound: bool) -> float:
    """One training step of the slowest rank, in seconds."""
    import torch
    import torch.distributed as dist

    from benchmarks._stock import without_all_to_all
    from data import language_loss

    dist.barrier()
    start = time.perf_counter()
    with without_all_to_all(active=bound):
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


def learning_steps(section: Any) -> int:
    """Steps in which a variant learns what its tasks cost."""
    from planmoe_ds.choose_chunks import TRIALS
    from planmoe_ds.planner import MEASURED, WARM_UP

    settings = {"chunks": "auto", "scheduler": "auto"} if section is True else section or {}
    rounds = 1 if settings.get("scheduler") in ("optimal", "auto") else 0
    rounds += len(TRIALS) if settings.get("chunks") == "auto" else 0
    return rounds * (WARM_UP + MEASURED + 1)


def tries_stock(section: Any) -> bool:
    """Whether a variant's layers then time stock's dispatch."""
    from planmoe_ds.config import parse_config

    return section is not None and parse_config(section).chooses_everything


def outside_passes(engine: Any, tokens: Any) -> float:
    """One training step, without the seconds between the begin and the end of its MoE layers' passes."""
    from planmoe_ds.execution import passes

    engine.planmoe.recorder.start_trace()
    elapsed = take_step(engine, tokens, bound=False)
    runs = [run for _, _, run in passes(engine.planmoe.recorder.stop_trace())]
    return elapsed - sum(max(span.end_ns for span in run) - run[0].start_ns for run in runs) * 1e-9


def measure(arguments: argparse.Namespace) -> list[Row]:
    """Interleave all variants; collective."""
    import torch

    from planmoe_ds.stock_trial import TRIAL_CALLS

    variants = chosen_variants(arguments)
    engines = {name: make_engine(arguments, section) for name, section in variants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    stats: dict[str, list[Any]] = {name: [] for name in variants}
    outside: dict[str, list[float]] = {name: [] for name in variants}
    shape = (arguments.batch_size, arguments.sequence_length + 1)
    for name, engine in engines.items():
        for _ in range(learning_steps(variants[name])):
            outside[name].append(outside_passes(engine, torch.randint(0, 256, shape)))
        for _ in range(TRIAL_CALLS if tries_stock(variants[name]) else 0):
            take_step(engine, torch.randint(0, 256, shape), bound=False)
    for step in range(WARM_UP + (8 if arguments.quick else arguments.steps)):
        tokens = torch.randint(0, 256, shape)
        for name, engine in engines.items():
            elapsed = take_step(engine, tokens, name == BOUND)
            taken = engine.planmoe.recorder.take() if hasattr(engine, "planmoe") else None
            if step >= WARM_UP:
                seconds[name].append(elapsed)
                stats[name].append(taken)
    return summarize(variants, engines, Samples(seconds, stats, outside))


@dataclass
class Samples:
    """Of every variant: seconds per step, recorder's totals, seconds outside the passes while it learnt."""

    seconds: dict[str, list[float]]
    stats: dict[str, list[Any]]
    outside: dict[str, list[float]]


def summarize(variants: dict[str, Any], engines: dict[str, Any], samples: Samples) -> list[Row]:
    """Medians."""
    seconds, stats, outside = samples.seconds, samples.stats, samples.outside
    medians = {name: statistics.median(found) * 1e3 for name, found in seconds.items()}
    ours = next(name for name, section in variants.items() if section is not None)
    stock_bytes = statistics.median(taken.stock_bytes for taken in stats[ours])
    rows = []
    for name, milliseconds in medians.items():
        quartiles = statistics.quantiles(seconds[name], n=4)
        row = Row(name, milliseconds, (quartiles[2] - quartiles[0]) * 1e3, milliseconds / medians[STOCK])
        if outside[name]:
            row.predicted = statistics.median(outside[name][1:]) * 1e3 + pass_milliseconds(engines[name])
        if variants[name] is not None:
            row.sent_bytes = statistics.median(taken.bytes_sent for taken in stats[name])
            row.exposed_share = statistics.median(taken.exposed_seconds for taken in stats[name]) / milliseconds * 1e3
        elif name == STOCK:
            row.sent_bytes = stock_bytes
        row.bytes_over_stock = row.sent_bytes / stock_bytes
        rows.append(row)
    return rows


def pass_milliseconds(engine: Any) -> float:
    """What the schedules of all layers take at the costs that were learnt."""
    schedules = [schedule for planner in engine.planmoe.planners for schedule in planner.schedules().values()]
    return sum(schedule.makespan for schedule in schedules) * 1e3


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
        rows = [row for name, row in ours.items() if ("int8" in name or "codecs" in name) is wanted]
        if not rows:
            continue
        best = min(rows, key=lambda row: row.milliseconds)
        print(f"RESULT train_speedup_{label}={1 / best.over_stock:.3f}")
        if best.predicted > 0:
            print(f"RESULT train_executed_over_predicted_{label}={best.milliseconds / best.predicted:.3f}")
    for label, name in (("adviser", "planmoe true"), ("adviser_with_codecs", "planmoe true, codecs auto")):
        if name in ours:
            print(f"RESULT train_speedup_{label}={1 / ours[name].over_stock:.3f}")
            print(f"RESULT train_executed_over_predicted_{label}={ours[name].milliseconds / ours[name].predicted:.3f}")
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
