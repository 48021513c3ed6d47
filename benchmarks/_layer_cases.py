"""Shapes and parts that the one-GPU benchmarks share."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Shape:
    """T tokens, H hidden size, F width of an expert, E experts, K routes per token."""

    name: str
    tokens: int
    hidden: int
    width: int
    experts: int
    top_k: int

    def smaller(self) -> Shape:
        """For --quick: the same shape with an eighth of the tokens."""
        return Shape(self.name, self.tokens // 8, self.hidden, self.width, self.experts, self.top_k)


SHAPES = [
    Shape("mixtral8", 8192, 4096, 14336, 8, 2),
    Shape("fine64", 16384, 2048, 1408, 64, 6),
]


def median_ms(run: Callable[[], object], rounds: int, warmup: int = 5, calls: int = 1) -> float:
    """Device time of one call, in milliseconds: of `calls` in a row, as in training, the host not waiting between."""
    for _ in range(warmup):
        run()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return statistics.median(times)


def copy_rate(num_bytes: int = 2 << 30, rounds: int = 20) -> float:
    """Bytes per second of a device-to-device copy, read and written, here and now."""
    source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * num_bytes / (median_ms(lambda: target.copy_(source), rounds) / 1e3)


def routing(shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts [K, T] and weights [K, T] of a random router."""
    scores = torch.randn(shape.tokens, shape.experts, device="cuda").softmax(1)
    weight, expert = scores.topk(shape.top_k, dim=1)
    return expert.t().contiguous(), (weight / weight.sum(1, keepdim=True)).t().contiguous()


def make_experts(shape: Shape) -> list[nn.Module]:
    """GELU MLPs without biases, bf16."""
    with torch.device("cuda"):
        return [
            nn.Sequential(
                nn.Linear(shape.hidden, shape.width, bias=False),
                nn.GELU(),
                nn.Linear(shape.width, shape.hidden, bias=False),
            ).to(torch.bfloat16)
            for _ in range(shape.experts)
        ]
