"""Step time and bytes of the GPT-MoE example: stock DeepSpeed against planmoe, interleaved in one run.

    python benchmarks/train_deepspeed.py [--quick] [--json FILE] [--ranks 4] [--top-k 2 --experts 8 …]

Every variant is a DeepSpeed engine of its own over the same ranks; step after step each takes its turn, so that noise
hits all alike. "compute alone" is stock with its all-to-alls left out: the bound that no dispatch can beat.
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


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps: under a minute on 2 cores")
    parser.add_argument("--json", type=Path, help="write configuration and rows there")
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


def measure(arguments: argparse.Namespace) -> list[Row]:
    """Interleave all variants; collective."""
    import torch

    engines = {name: make_engine(arguments, section) for name, section in VARIANTS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    stats: dict[str, list[Any]] = {name: [] for name in VARIANTS}
    steps = 8 if arguments.quick else arguments.steps
    for step in range(steps + 2):
        tokens = torch.randint(0, 256, (arguments.batch_size, arguments.sequence_length + 1))
        for name, engine in engines.items():
            elapsed = take_step(engine, tokens, name == BOUND)
            taken = engine.planmoe.recorder.take() if hasattr(engine, "planmoe") else None
            if step >= 2:
                seconds[name].append(elapsed)
                stats[name].append(taken)
    stock_bytes = statistics.median(taken.stock_bytes for taken in stats[EXACT])
    stock_seconds = statistics.median(seconds[STOCK])
    rows = []
    for name in VARIANTS:
        quartiles = statistics.quantiles(seconds[name], n=4)
        row = Row(name, statistics.median(seconds[name]) * 1e3, (quartiles[2] - quartiles[0]) * 1e3)
        row.over_stock = row.milliseconds / (stock_seconds * 1e3)
        if VARIANTS[name] is not None:
            row.sent_bytes = statistics.median(taken.bytes_sent for taken in stats[name])
            row.exposed_share = (
                statistics.median(taken.exposed_seconds for taken in stats[name]) / row.milliseconds * 1e3
            )
        elif name == STOCK:
            row.sent_bytes = stock_bytes
        row.bytes_over_stock = row.sent_bytes / stock_bytes
        rows.append(row)
    return rows


def report(arguments: argparse.Namespace, rows: list[Row]) -> None:
    """The table, the JSON file, the RESULT lines."""
    print(f"configuration: {vars(arguments)}; {len(os.sched_getaffinity(0))} cores, gloo")
    print(f"{'variant':<24}{'ms/step':>9}{'± IQR':>8}{'/ stock':>9}{'kB sent':>9}{'/ stock':>9}{'exposed':>9}")
    for row in rows:
        print(
            f"{row.variant:<24}{row.milliseconds:9.1f}{row.spread:8.1f}{row.over_stock:9.2f}{row.sent_bytes / 1e3:9.0f}"
            f"{row.bytes_over_stock:9.2f}{row.exposed_share:9.0%}"
        )
    if arguments.json:
        settings = {key: str(value) for key, value in vars(arguments).items()}
        arguments.json.write_text(
            json.dumps({"configuration": settings, "rows": [asdict(row) for row in rows]}, indent=1)
        )
    by_name = {row.variant: row for row in rows}
    print(f"RESULT step_time_over_stock_exact={by_name[EXACT].over_stock:.3f}")
    print(f"RESULT bytes_over_stock_exact={by_name[EXACT].bytes_over_stock:.3f}")
    print(f"RESULT bytes_over_stock_int8={by_name[INT8].bytes_over_stock:.3f}")
    print(f"RESULT compute_alone_over_stock={by_name[BOUND].over_stock:.3f}")


def main() -> None:
    """Launch the ranks, or be one of them."""
    arguments = parse_arguments()
    if "RANK" not in os.environ:
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={arguments.ranks}",
        ]
        environment = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **os.environ}
        sys.exit(subprocess.run([*launcher, *sys.argv], env=environment, check=False).returncode)
    sys.path[:0] = [str(ROOT), str(ROOT / "examples/gpt_moe")]
    warnings.filterwarnings("ignore", category=FutureWarning)
    import deepspeed
    import torch

    import planmoe_ds  # noqa: F401  switches the hook on

    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    rows = measure(arguments)
    if torch.distributed.get_rank() == 0:
        report(arguments, rows)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
