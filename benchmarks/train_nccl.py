"""A GPT-MoE trained with DeepSpeed or Megatron over NCCL: stock against planmoe, step by step.

    python -m benchmarks.train_nccl [--framework megatron] [--ranks 4] [--hosts 2]
        [--gbit 18 [--fair]] [--top-k 8 --experts 64 …] [--quick] [--json FILE] [--profile FILE]

bf16, ZeRO 1 or Megatron's distributed optimizer, random bytes; every other block of the model has experts. "without
all-to-all" is stock with its all-to-alls left out: the bound that no dispatch can beat. Milliseconds per step of the
slowest rank, medians; one variant after the other, in processes of its own. `--profile` keeps a step of the last
variant as torch's profiler saw it on rank 0, for `python -m benchmarks.plot_profile`. For ranks that share a card see
benchmarks/_nccl.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks._nccl import add_cluster, describe_ranks, launch, median_ms, start
from benchmarks.layer_nccl import BOUND, LEARNING, best_by_codec
from benchmarks.layer_nccl import VARIANTS as LAYER_VARIANTS

ROOT = Path(__file__).resolve().parent.parent
STOCK = "stock"
VARIANTS: dict[str, Any] = {
    STOCK: None,
    BOUND: None,
    **LAYER_VARIANTS,
}
WARM_UP = 3


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {
        "steps": 6, "layers": 8, "hidden-size": 1024, "heads": 16, "experts": 64, "top-k": 8, "batch-size": 4,
        "sequence-length": 1024,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--framework", choices=["deepspeed", "megatron"], default="deepspeed")
    parser.add_argument("--only", default="", help="variants whose names hold one of these words, between slashes")
    parser.add_argument("--quick", action="store_true", help="a small model, few steps")
    add_cluster(parser)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--profile", help="write the trace of a step of the last variant there")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)  # for the ranks
    parser.add_argument("--row", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.layers, arguments.hidden_size, arguments.heads, arguments.steps = 2, 256, 4, 2
        arguments.batch_size, arguments.sequence_length, arguments.experts, arguments.top_k = 2, 128, 8, 2
    return arguments


def make_training(arguments: argparse.Namespace, device: torch.device) -> Any:
    """The variant's model and optimizer."""
    section = VARIANTS[arguments.variant]
    if section is not None:
        section = {**section, "ranks_per_node": dist.get_world_size() // arguments.hosts}
    if arguments.framework == "megatron":
        from benchmarks._nccl_megatron import MegatronTraining

        return MegatronTraining(arguments, section, device)
    from benchmarks._nccl_deepspeed import DeepSpeedTraining

    return DeepSpeedTraining(arguments, section, device)


def measure(arguments: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """One variant: time, memory, tokens, what a rank sends and what of the exchange is not hidden; collective."""
    training = make_training(arguments, device)
    torch.manual_seed(1 + dist.get_rank())
    tokens = torch.randint(0, 256, (arguments.batch_size, arguments.sequence_length + 1), device=device)

    def step() -> None:
        training.step(tokens)

    warm_up = WARM_UP + LEARNING.get((VARIANTS[arguments.variant] or {}).get("scheduler", ""), 0)
    with training.without_all_to_all(active=arguments.variant == BOUND):
        time = median_ms(step, arguments.steps, warm_up)
    figures = {
        "ms": time,
        "tokens_per_second": dist.get_world_size() * tokens[:, 1:].numel() / time * 1e3,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "parameters": count_parameters(training.model),
    }
    if training.session is not None:
        training.session.recorder.take()
        step()
        torch.cuda.synchronize()
        taken = training.session.recorder.take()
        figures |= {"sent_mb": taken.bytes_sent / 1e6, "stock_mb": taken.stock_bytes / 1e6}
        figures |= {"exposed_ms": taken.exposed_seconds * 1e3}
    if arguments.profile:
        profile(step, arguments.profile)
    return figures


def count_parameters(model: torch.nn.Module) -> int:
    """Of the whole model: each rank holds other experts."""
    size = dist.get_world_size()
    return sum(values.numel() * (1 if getattr(values, "allreduce", True) else size) for values in model.parameters())


def profile(step: Any, path: str) -> None:
    """What the card does in one step, as a Chrome trace."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    dist.barrier()
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        torch.cuda.synchronize()
    if dist.get_rank() == 0:
        profiler.export_chrome_trace(path)


def chosen_variants(arguments: argparse.Namespace) -> list[str]:
    """Stock, the bound, and those asked for."""
    words = arguments.only.split("/")
    return [name for name in VARIANTS if name in (STOCK, BOUND) or any(word in name for word in words)]


def be_a_rank(arguments: argparse.Namespace) -> None:
    """Measure one variant with the other ranks."""
    device = start(arguments.hosts)
    sys.path.insert(0, str(ROOT / "examples/gpt_moe"))
    row: dict[str, Any] = measure(arguments, device)
    if dist.get_rank() == 0:
        arguments.row.write_text(json.dumps({**row, "ranks": describe_ranks(arguments)}))
    dist.destroy_process_group()


def main() -> None:
    """Launch the ranks for every variant, or be one of them."""
    arguments = parse_arguments()
    if "RANK" in os.environ:
        be_a_rank(arguments)
        return
    rows: dict[str, dict[str, Any]] = {}
    failed: list[str] = []
    variants = chosen_variants(arguments)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row.json"
        for variant in variants:
            more = ["--variant", variant, "--row", str(path)]
            more += ["--profile", ""] if variant != variants[-1] else []
            if launch(arguments, *more):
                print(f"{variant:40} failed", flush=True)
                failed.append(variant)
                continue
            row = rows[variant] = json.loads(path.read_text())
            if variant == STOCK:
                print(row["ranks"])
            sent = f"{row['sent_mb']:8.1f} MB of stock's {row['stock_mb']:.1f}" if "sent_mb" in row else ""
            print(
                f"{variant:40} {row['ms']:9.1f} ms {rows.get(STOCK, row)['ms'] / row['ms']:6.2f}x "
                f"{row['tokens_per_second']:9.0f} tokens/s {row['peak_gib']:6.1f} GiB {sent}",
                flush=True,
            )
    if STOCK in rows and BOUND in rows:
        report(rows, arguments)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def report(rows: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> None:
    """The RESULT lines: the best with stock's mathematics, the best with e4m7 and the best with 8-bit codecs."""
    stock = rows[STOCK]["ms"]
    print(f"{rows[STOCK]['parameters'] / 1e9:.2f} billion parameters")
    for label, time in best_by_codec({name: row["ms"] for name, row in rows.items() if VARIANTS[name]}).items():
        print(f"RESULT nccl_train_speedup{label or '_exact'}={stock / time:.3f}")
    print(f"RESULT nccl_train_communication_share_of_stock={1 - rows[BOUND]['ms'] / stock:.3f}")
    if arguments.json is not None:
        settings = {key: str(value) for key, value in vars(arguments).items()}
        arguments.json.write_text(json.dumps({"configuration": settings, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
