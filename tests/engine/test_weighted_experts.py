"""Experts that multiply by their routes' weights themselves, whole and cut into shards, against a dense fp64 oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from planmoe_ds.experts import Experts
from planmoe_ds.plan import ExpertLayout, Routes
from planmoe_ds.sharded_experts import forward_sharded
from tests.engine.support import make_layer, rank_device, slots_of
from tests.harness.ranks import RankPool

pytestmark = pytest.mark.distributed

HIDDEN, INNER, EXPERTS, TOKENS, ROUTES = 8, 12, 8, 13, 3
ROUNDING = 3e-6
MODES = {
    "exact": {"exactness": "exact", "chunks": 1},
    "exact, 2 chunks": {"exactness": "exact", "chunks": 2},
    "sums": {"chunks": 2},
    "by expert": {"chunks": 2, "chunk_by": "expert"},
    "one copy per node": {"chunks": 2, "comm": "dedup", "ranks_per_node": 2},
}


@dataclass(frozen=True)
class Weighted(Experts):
    """Experts that square their routes' weights: not the same as multiplying outputs."""

    pairs: Sequence[tuple[nn.Parameter, nn.Parameter]]
    takes_weights: bool = True

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for pair in self.pairs for parameter in pair]

    def run(self, buffer: torch.Tensor, layout: ExpertLayout, weights: torch.Tensor | None) -> torch.Tensor:
        assert weights is not None
        rows, scales = buffer.split(list(layout.rows_of_expert)), weights.split(list(layout.rows_of_expert))
        return torch.cat([_expert(*part) for part in zip(self.pairs, rows, scales, strict=True)])


def _expert(pair: Sequence[torch.Tensor], rows: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return (torch.tanh(rows @ pair[0]) * scales.unsqueeze(1) ** 2) @ pair[1]


def make_weights(expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(expert)
    return torch.randn(HIDDEN, INNER, generator=generator), torch.randn(INNER, HIDDEN, generator=generator)


def make_inputs(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens [T, H], expert numbers [K, T], some dropped, and weights [K, T]; rank 1 has no tokens."""
    generator = torch.Generator().manual_seed(100 + rank)
    num_tokens = 0 if rank == 1 else TOKENS
    chosen = torch.rand(num_tokens, EXPERTS, generator=generator).topk(ROUTES, dim=1).indices.sort(dim=1).values.t()
    chosen = torch.where(torch.rand(chosen.shape, generator=generator) < 0.2, -1, chosen)
    tokens = torch.randn(num_tokens, HIDDEN, generator=generator)
    return tokens, chosen, torch.rand(chosen.shape, generator=generator)


def compare(settings: dict[str, Any], num_shards: int) -> dict[str, float]:
    """Largest relative errors of this rank's output and gradients."""
    rank, size = dist.get_rank(), dist.get_world_size()
    holder, shard = rank // num_shards, rank % num_shards
    num_local = EXPERTS * num_shards // size
    mine = range(holder * num_local, (holder + 1) * num_local)
    part = slice(shard * INNER // num_shards, (shard + 1) * INNER // num_shards)
    device = rank_device()
    pairs = [
        (nn.Parameter(first[:, part].clone().to(device)), nn.Parameter(second[part].clone().to(device)))
        for first, second in map(make_weights, mine)
    ]
    tokens, chosen, weights = (values.to(device) for values in make_inputs(rank))
    tokens.requires_grad_()
    weights.requires_grad_()
    layer = make_layer(settings)
    routes = Routes(chosen, slots_of(chosen, EXPERTS), weights, EXPERTS, None)
    output = forward_sharded(layer, tokens, routes, Weighted(pairs), num_shards)
    output.sin().sum().backward()

    oracle = [tuple(part.double().requires_grad_() for part in make_weights(expert)) for expert in range(EXPERTS)]
    total = torch.zeros((), dtype=torch.float64)
    expected: dict[int, tuple[torch.Tensor, ...]] = {}
    for source in range(size):
        inputs = make_inputs(source)
        leaf, scale = inputs[0].double().requires_grad_(), inputs[2].double().requires_grad_()
        dense = torch.stack([torch.tanh(leaf @ first) for first, _ in oracle])
        summed = torch.zeros_like(leaf)
        for route in range(ROUTES):
            for expert in range(EXPERTS):
                hit = (inputs[1][route] == expert).double() * scale[route] ** 2
                summed = summed + (dense[expert] * hit.unsqueeze(1)) @ oracle[expert][1]
        total = total + summed.sin().sum()
        expected[source] = (summed, leaf, scale)
    total.backward()
    summed, leaf, scale = expected[rank]
    found = {"output": (output, summed), "tokens": (tokens.grad, leaf.grad), "weights": (weights.grad, scale.grad)}
    for pair, expert in zip(pairs, mine, strict=True):
        found[f"first of {expert}"] = (pair[0].grad, oracle[expert][0].grad[:, part])
        found[f"second of {expert}"] = (pair[1].grad, oracle[expert][1].grad[part])
    return {name: _error(*values) for name, values in found.items()}


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    if expected.numel() == 0:
        return 0.0
    return float((found.cpu() - expected).abs().max() / expected.abs().max().clamp(min=1e-6))


@pytest.mark.parametrize("num_shards", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_against_the_oracle(ranks: RankPool, mode: str, num_shards: int) -> None:
    for errors in ranks.run(4, compare, MODES[mode], num_shards):
        assert max(errors.values()) < ROUNDING, errors
