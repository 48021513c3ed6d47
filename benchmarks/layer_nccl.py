"""A MoE layer of DeepSpeed over NCCL, forward and backward: stock against planmoe.

    python -m benchmarks.layer_nccl [--ranks 4] [--hosts 2] [--gbit 10 [--fair]] [--shapes T,H,F,E,K …] [--quick]
        [--json FILE]

bf16, capacity factor 1.25, GELU experts of two matrices, the same routes for all. "without all-to-all" is stock with
its all-to-alls left out: the bound of what pads, with stock's router. Milliseconds of the slowest rank, and those that
rank 0's host takes to start a step, medians; one variant after the other. How ranks share cards: benchmarks/_nccl.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks._nccl import (
    add_cluster,
    describe_ranks,
    forget_deepspeed_groups,
    launch,
    median_host_ms,
    median_ms,
    start,
)
from benchmarks._stock import without_all_to_all

SHAPES = ["2048,1024,4096,8,2", "4096,2048,1408,64,8"]
STOCK, BOUND = "stock DeepSpeed", "without all-to-all (bound)"
SAME = {"exactness": "reordered"}  # the same mathematics, sums in another order
VARIANTS: dict[str, dict[str, Any]] = {
    "planmoe pipe": {**SAME, "comm": "pipe", "chunks": 1},
    "planmoe dedup": {**SAME, "comm": "dedup", "chunks": 1},
    "planmoe dedup, 2 chunks": {**SAME, "comm": "dedup", "chunks": 2, "scheduler": "optimal"},
    "planmoe dedup, lossless": {**SAME, "comm": "dedup", "chunks": 1, "compression": {"inter": "lossless"}},
    "planmoe dedup, lossless, 2 chunks": {
        **SAME, "comm": "dedup", "chunks": 2, "scheduler": "optimal", "compression": {"inter": "lossless"},
    },
    "planmoe dedup, e4m7": {"comm": "dedup", "chunks": 1, "compression": {"inter": "e4m7"}},
    "planmoe dedup, e4m7, 2 chunks": {
        "comm": "dedup", "chunks": 2, "scheduler": "optimal", "compression": {"inter": "e4m7"},
    },
    "planmoe dedup, hadamard_int8": {"comm": "dedup", "chunks": 1, "compression": "hadamard_int8"},
    "planmoe dedup, hadamard_int8, 2 chunks": {
        "comm": "dedup", "chunks": 2, "scheduler": "optimal", "compression": "hadamard_int8",
    },
    "planmoe auto": {"comm": "auto", "chunks": "auto", "scheduler": "auto"},
    "planmoe auto, codecs too": {**SAME, **dict.fromkeys(("comm", "chunks", "scheduler", "compression"), "auto")},
}  # fmt: skip
SAME_BITS = {  # as those without the codec; with e4m7, where all rows fit it
    "planmoe dedup, lossless": "planmoe dedup",
    "planmoe dedup, lossless, 2 chunks": "planmoe dedup, 2 chunks",
    "planmoe dedup, e4m7": "planmoe dedup",
    "planmoe dedup, e4m7, 2 chunks": "planmoe dedup, 2 chunks",
}
CODECS = {"_e4m7": "e4m7", "_8bit": "int8"}  # ends of RESULT names, and of which variants they tell
LEARNING = {"optimal": 9, "auto": 40}  # calls from which a scheduler learns what tasks cost, and which way is faster


def make_layer(shape: list[int], device: torch.device) -> Any:
    """deepspeed.moe.layer.MoE over all ranks."""
    from deepspeed.moe.layer import MoE

    _, hidden, width, experts, top_k = shape
    torch.manual_seed(0)
    expert = nn.Sequential(nn.Linear(hidden, width, bias=False), nn.GELU(), nn.Linear(width, hidden, bias=False))
    size = dist.get_world_size()
    layer = MoE(
        hidden, expert, num_experts=experts, ep_size=size, k=top_k, capacity_factor=1.25, min_capacity=4,
        use_rts=False, top2_2nd_expert_sampling=False,
    )  # fmt: skip
    layer.set_deepspeed_parallelism()
    return layer.to(device, torch.bfloat16)


def measure(
    shape: list[int], variant: str, hosts: int, rounds: int, device: torch.device
) -> tuple[dict[str, float], list[torch.Tensor]]:
    """One variant's time, and what a rank sends, with and without the network between hosts; outputs and gradients."""
    import planmoe_ds

    layer = make_layer(shape, device)
    session = None
    if variant in VARIANTS:
        section = VARIANTS[variant]
        session = planmoe_ds.activate(
            nn.ModuleList([layer]), {**section, "ranks_per_node": dist.get_world_size() // hosts}
        )
    torch.manual_seed(1 + dist.get_rank())
    tokens = torch.randn(1, shape[0], shape[1], device=device, dtype=torch.bfloat16).requires_grad_()
    probe = torch.randn_like(tokens)

    def step() -> list[torch.Tensor]:
        tokens.grad = None
        for parameter in layer.parameters():
            parameter.grad = None
        output, balance, _ = layer(tokens)
        torch.autograd.backward([output, balance], [probe, torch.ones_like(balance)])
        return [output.detach(), tokens.grad, *(parameter.grad for parameter in layer.parameters())]

    warm_up = LEARNING.get(str(VARIANTS.get(variant, {}).get("scheduler")), 2)
    with without_all_to_all(active=variant == BOUND):
        time = median_ms(step, rounds, warm_up)
        host = median_host_ms(step, rounds)
    figures = {"ms": time, "host_ms": host, "peak_gib": torch.cuda.max_memory_allocated() / 2**30}
    if session is not None:
        session.recorder.take()
    found = step()
    if session is not None:
        taken = session.recorder.take()
        figures |= {"sent_mb": taken.bytes_sent / 1e6, "stock_mb": taken.stock_bytes / 1e6}
    return figures, found


def count_differences(found: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    """Numbers whose bits differ, on all ranks."""
    bits = {2: torch.int16, 4: torch.int32}
    count = sum(
        int((one.cpu().view(bits[one.element_size()]) != other.view(bits[one.element_size()])).sum())
        for one, other in zip(found, others, strict=True)
    )
    total = torch.tensor(count, device="cuda")
    dist.all_reduce(total)
    return float(total)


def main() -> None:
    """Launch the ranks, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_cluster(parser)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="tokens per rank, hidden, width, experts, top-k")
    parser.add_argument("--only", default="", help="variants whose names hold one of these words, between slashes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one small shape, few rounds")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    if "RANK" not in os.environ:
        sys.exit(launch(options))
    device = start(options.hosts)
    import deepspeed

    deepspeed.init_distributed("nccl")
    shapes, rounds = (["512,256,512,8,2"], 2) if options.quick else (options.shapes, options.rounds)
    wanted = {name for name in VARIANTS if any(word in name for word in options.only.split("/"))}
    wanted |= {SAME_BITS[name] for name in wanted if name in SAME_BITS}
    chosen = [name for name in VARIANTS if name in wanted]
    found: dict[str, dict[str, dict[str, float]]] = {}
    speaks = dist.get_rank() == 0
    if speaks:
        print(describe_ranks(options))
    for text in shapes:
        shape = [int(number) for number in text.split(",")]
        rows = found[text] = {}
        kept: dict[str, list[torch.Tensor]] = {}  # on the CPU, so that peaks of memory stay comparable
        for variant in (STOCK, BOUND, *chosen):
            torch.cuda.reset_peak_memory_stats()
            rows[variant], results = measure(shape, variant, options.hosts, rounds, device)
            if variant in SAME_BITS.values():
                kept[variant] = [values.cpu() for values in results]
            if variant in SAME_BITS:
                rows[variant]["differing"] = count_differences(results, kept[SAME_BITS[variant]])
            del results
            forget_deepspeed_groups()
            if speaks:
                row, stock = rows[variant], rows[STOCK]["ms"]
                sent = f"{row['sent_mb']:8.1f} MB of stock's {row['stock_mb']:.1f}" if "sent_mb" in row else ""
                same = f", {row['differing']:.0f} numbers differ from those without it" if "differing" in row else ""
                print(
                    f"{text:22} {variant:40} {row['ms']:9.2f} ms {stock / row['ms']:6.2f}x "
                    f"host {row['host_ms']:6.2f} ms {sent}{same}",
                    flush=True,
                )
    if speaks:
        report(found, options)
    dist.destroy_process_group()


def best_by_codec(times: dict[str, float]) -> dict[str, float]:
    """The shortest of the variants' times by the end of a RESULT name, "" for those without a codec."""
    best: dict[str, float] = {}
    for name, time in times.items():
        label = next((label for label, codec in CODECS.items() if codec in name), "")
        best[label] = min(time, best.get(label, time))
    return best


def report(found: dict[str, dict[str, dict[str, float]]], options: argparse.Namespace) -> None:
    """The RESULT lines: the best with stock's mathematics, the best with e4m7 and the best with 8-bit codecs."""
    for text, rows in found.items():
        shape = f"top{text.rsplit(',', 1)[1]}"
        for label, time in best_by_codec({name: row["ms"] for name, row in rows.items() if name in VARIANTS}).items():
            print(f"RESULT nccl_layer_speedup_{shape}{label}={rows[STOCK]['ms'] / time:.3f}")
    if options.json is not None:
        options.json.write_text(json.dumps({"ranks": options.ranks, "hosts": options.hosts, "shapes": found}, indent=1))


if __name__ == "__main__":
    main()
