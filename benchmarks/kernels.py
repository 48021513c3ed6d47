"""The CUDA kernels against the card's copy rate, torch and Megatron beside: python benchmarks/kernels.py [--quick].

permute and combine: the bytes that must move (each input row once, each output row once) over their time, as a share
of what a device-to-device copy reaches in the same run. Codecs: GB/s of float32 input, 256 MiB of normal values.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks._layer_cases import SHAPES, Shape, copy_rate, median_ms, routing
from benchmarks.codecs import OF_BFLOAT16
from planmoe_ds.backend import (
    RowRoutes,
    Spread,
    compressor_names,
    dot_rows,
    find_experts,
    fold_rows,
    make_compressor,
    spread_rows,
)


def find_spread(shape: Shape, expert_KT: torch.Tensor, weight_KT: torch.Tensor) -> Spread:
    """The plan of one rank that has all experts."""
    columns = torch.cat(
        [weight_KT.t().contiguous().view(torch.uint8), expert_KT.t().to(torch.int16).contiguous().view(torch.uint8)],
        dim=1,
    )
    counts = torch.bincount(expert_KT.flatten(), minlength=shape.experts)
    base = counts.cumsum(0) - counts
    return find_experts(
        rows=columns,
        routes=RowRoutes(
            offset=4 * shape.top_k, top_k=shape.top_k, id_bytes=2, experts_per_rank=shape.experts,
            last_expert=shape.experts,
        ),
        first_id=0,
        num_entries=shape.tokens * shape.top_k,
        weight_offset=0,
        weight_dtype=torch.float32,
        row_dtype=torch.bfloat16,
        base=base.tolist(),
        source_rows=[shape.tokens],
        table=torch.cat([base, base.new_zeros(1)]),
    )  # fmt: skip


CALLS = 10  # in a row, so that the host's part of a call does not count
ALIGNED = 16  # wire rows start at multiples of it, as in the engine
PEERS = ("permute_torch_index_select", "permute_megatron", "combine_torch_index_add", "combine_megatron")


def time_of(call: Callable[[], object], rounds: int) -> float:
    """Milliseconds of one call."""
    return median_ms(call, rounds, calls=CALLS)


def megatron_calls(
    shape: Shape, tokens: torch.Tensor, expert_KT: torch.Tensor, weight_KT: torch.Tensor, buffer: torch.Tensor
) -> dict[str, Callable[[], object]]:
    """Megatron's own permutation and its inverse on the same routing, where megatron-core is installed."""
    try:
        from megatron.core.transformer.moe.moe_utils import permute, unpermute
    except ImportError as error:
        print(f"Megatron left out: {error}")
        return {}
    chosen = torch.zeros(shape.tokens, shape.experts, dtype=torch.bool, device="cuda")
    chosen.scatter_(1, expert_KT.t(), value=True)
    probabilities = torch.zeros(shape.tokens, shape.experts, device="cuda").scatter_(1, expert_KT.t(), weight_KT.t())
    order = permute(tokens, chosen)[-1]
    return {
        "permute_megatron": lambda: permute(tokens, chosen),
        "combine_megatron": lambda: unpermute(buffer, order, tokens.shape, probs=probabilities, routing_map=chosen),
    }


def measure_shape(shape: Shape, copy: float, rounds: int) -> dict[str, float]:
    """Shares of the copy rate of planmoe's kernels and of what torch and Megatron have for the same."""
    expert_KT, weight_KT = routing(shape)
    plan = find_spread(shape, expert_KT, weight_KT)
    codec = make_compressor("none")
    tokens = torch.randn(shape.tokens, shape.hidden, device="cuda").bfloat16()
    buffer = torch.empty(shape.tokens * shape.top_k, shape.hidden, device="cuda", dtype=torch.bfloat16)
    result = torch.empty_like(tokens)
    wire, back = tokens.view(torch.uint8), result.view(torch.uint8)
    order = plan.target.argsort()
    token_of_row = plan.source[order]
    weight_of_row = plan.weight[order].bfloat16().unsqueeze(1)
    ideal = (shape.tokens + shape.tokens * shape.top_k) * shape.hidden * 2 / copy * 1e3

    def torch_combine() -> torch.Tensor:
        return result.zero_().index_add_(0, token_of_row, buffer * weight_of_row)

    calls: dict[str, Callable[[], object]] = {
        "permute": lambda: spread_rows(codec, wire, plan, False, buffer),
        "permute_torch_index_select": lambda: torch.index_select(tokens, 0, token_of_row),
        "combine": lambda: fold_rows(codec, buffer, plan, True, back),
        "combine_torch_index_add": torch_combine,
        "weighted_permute": lambda: spread_rows(codec, wire, plan, True, buffer),
        "gate_gradients": lambda: dot_rows(codec, wire, plan, buffer, shape.top_k),
        **megatron_calls(shape, tokens, expert_KT, weight_KT, buffer),
    }
    times = {name: time_of(call, rounds) for name, call in calls.items()}
    plan_ms = time_of(lambda: find_spread(shape, expert_KT, weight_KT), rounds)
    found = {f"{shape.name}_{name}_ms": time for name, time in times.items()}
    found |= {f"{shape.name}_{name}_roofline": ideal / time for name, time in times.items()}
    return found | {f"{shape.name}_plan_ms": plan_ms}


def measure_codec(name: str, rounds: int, dtype: torch.dtype) -> dict[str, float]:
    """GB/s of float32 values (4 bytes each, whatever the dtype) through encode and decode."""
    codec = make_compressor(name)
    rows = torch.randn(32768, 2048, device="cuda").to(dtype)
    width = -(-codec.row_bytes(rows.shape[1], dtype) // ALIGNED) * ALIGNED
    wire = torch.empty(rows.shape[0], width, dtype=torch.uint8, device="cuda")
    codec.encode_into(rows, None, wire)
    out = torch.empty_like(rows)
    kind = str(dtype).removeprefix("torch.")
    num_bytes = rows.numel() * 4
    return {
        f"{name}_{kind}_encode_gbs": num_bytes / time_of(lambda: codec.encode_into(rows, None, wire), rounds) / 1e6,
        f"{name}_{kind}_decode_gbs": num_bytes / time_of(lambda: codec.decode(wire, out), rounds) / 1e6,
    }


def main() -> None:
    """Measure, print, and write what --json names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller shapes, fewer rounds")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    rounds = 10 if options.quick else 50
    copy = copy_rate((1 << 28) if options.quick else (2 << 30))
    figures: dict[str, float] = {"copy_gbs": copy / 1e9}
    print(f"{torch.cuda.get_device_name()}: copy {copy / 1e9:.0f} GB/s read and written; medians of {rounds} x {CALLS}")
    shapes = [shape.smaller() for shape in SHAPES] if options.quick else SHAPES
    for shape in shapes:
        figures |= measure_shape(shape, copy, rounds)
    for name in compressor_names():
        for dtype in (torch.float32, torch.bfloat16):
            if name not in OF_BFLOAT16 or dtype is torch.bfloat16:
                figures |= measure_codec(name, rounds, dtype)
    for name, value in figures.items():
        print(f"{name:45} {value:10.3f}")
    for shape in shapes:
        beside = [
            f"{name} {figures[f'{shape.name}_{name}_roofline']:.2f}"
            for name in PEERS
            if f"{shape.name}_{name}_roofline" in figures
        ]
        print(f"{shape.name}: shares of the copy rate of peers: {', '.join(beside)}")
    for what in ("permute", "combine"):
        worst = min(figures[f"{shape.name}_{what}_roofline"] for shape in shapes)
        print(f"RESULT {what}_roofline={worst:.3f}")
    if options.json is not None:
        options.json.write_text(json.dumps({"device": torch.cuda.get_device_name(), **figures}, indent=1))


if __name__ == "__main__":
    main()
