"""Outputs and all gradients of the engine, in every mode, against the dense fp64 oracle, over generated routings."""

from __future__ import annotations

import random

import pytest
import torch
import torch.distributed as dist
from torch import nn

from planmoe_ds.layer import ExpertParallelLayer
from tests.engine.oracle import Gradients, dense, probe
from tests.engine.support import drop_groups, make_layer, rank_device, routes_of, run_layer
from tests.harness.ranks import RankPool

pytestmark = pytest.mark.distributed

HIDDEN = 24
ROUNDING = 2e-6  # fp32 against fp64
MODES = {
    "exact": {"exactness": "exact", "chunks": 1, "comm": "direct"},
    "exact, 3 chunks": {"exactness": "exact", "chunks": 3},
    "one chunk": {"chunks": 1},
    "2 chunks": {"chunks": 2, "comm": "direct"},
    "16 chunks": {"chunks": 16},
    "by expert": {"chunks": 2, "chunk_by": "expert"},
    "by source": {"chunks": 2, "chunk_by": "source"},
    "by source, exact": {"chunks": 3, "chunk_by": "source", "exactness": "exact"},
    "by source, one copy per node": {"chunks": 2, "chunk_by": "source", "ranks_per_node": 2, "comm": "dedup"},
    "two nodes": {"chunks": 2, "ranks_per_node": 2},
    "one copy per node": {"chunks": 2, "ranks_per_node": 2, "comm": "dedup"},
    "by expert, one copy per node": {"chunks": 3, "chunk_by": "expert", "ranks_per_node": 2, "comm": "dedup"},
    "one rank per node": {"comm": "dedup", "ranks_per_node": 1},
    "two hops": {"chunks": 3, "comm": "hierarchical", "ranks_per_node": 2},
    "one node": {"comm": "dedup", "ranks_per_node": 8},
    "int8": {"compression": "int8"},
    "int8, one copy per node": {"compression": "int8", "ranks_per_node": 2, "comm": "dedup"},
    "int8 gradients": {"compression": {"gradients": "int8"}},
}


def make_experts(num_experts: int) -> list[nn.Module]:
    torch.manual_seed(3)
    return [
        nn.Sequential(nn.Linear(HIDDEN, 2 * HIDDEN), nn.GELU(), nn.Linear(2 * HIDDEN, HIDDEN))
        for _ in range(num_experts)
    ]


def make_routing(seed: int, num_experts: int) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """tokens, experts [K, T] and weights [K, T] of every rank: skewed, empty, dropped, one expert for all."""
    draw = random.Random(seed)
    kind = draw.choice(["uniform", "skewed", "one expert", "dropping", "an empty rank", "nothing kept"])
    num_routes = draw.choice([1, 2, 3, min(6, num_experts)])
    generator = torch.Generator().manual_seed(seed)
    size = dist.get_world_size()
    tokens, experts, weights = [], [], []
    for rank in range(size):
        num_tokens = 0 if kind == "an empty rank" and rank == seed % size else draw.choice([1, 5, 33])
        scores = torch.rand(num_tokens, num_experts, generator=generator)
        if kind == "skewed":
            scores[:, 0] += 0.9
        expert = scores.topk(num_routes, dim=1).indices.t().contiguous().to(torch.int32)
        if kind == "one expert":
            expert[0] = num_experts - 1
            expert[1:] = -1
        elif kind == "dropping":
            expert[torch.rand(expert.shape, generator=generator) < 0.4] = -1
        elif kind == "nothing kept":
            expert[:] = -1
        tokens.append(torch.randn(num_tokens, HIDDEN, generator=generator))
        experts.append(expert)
        weights.append(torch.rand(expert.shape, generator=generator))
    return tokens, experts, weights


def run_engine(layer: ExpertParallelLayer, experts: list[nn.Module], seed: int) -> Gradients:
    """One rank's output and gradients; backward runs twice, so that repeated backward is covered everywhere."""
    rank, size = dist.get_rank(), dist.get_world_size()
    tokens, expert_KT, weight_KT = (values[rank] for values in make_routing(seed, len(experts)))
    device = rank_device()
    local = [expert.to(device) for expert in experts[rank * len(experts) // size : (rank + 1) * len(experts) // size]]
    leaf, weight = (values.to(device, copy=True).requires_grad_() for values in (tokens, weight_KT))
    output = run_layer(layer, leaf, routes_of(expert_KT.to(device), len(experts), weight), local)
    for expert in local:
        expert.zero_grad()
    loss = (output * probe(output.shape).float().to(device)).sum()
    loss.backward(retain_graph=True)
    first = leaf.grad.clone()
    loss.backward()
    assert torch.allclose(leaf.grad, 2 * first, rtol=1e-6, atol=0 if device.type == "cpu" else 1e-5)  # CUDA: atomics
    grads = [[parameter.grad.cpu() / 2 for parameter in expert.parameters()] for expert in local]
    return Gradients(output.detach().cpu(), leaf.grad.cpu() / 2, weight.grad.cpu() / 2, grads)


def compare(mode_names: list[str], num_cases: int, num_experts: int) -> dict[tuple[str, str], float]:
    """Relative error per mode and kind of tensor, ||got - expected|| / ||expected|| over all cases."""
    found = {}
    for name in mode_names:
        errors = compare_settings(MODES[name], num_cases, num_experts)
        found |= {(name, kind): error for kind, error in errors.items()}
        drop_groups()
    return found


def compare_settings(settings: dict[str, object], num_cases: int, num_experts: int) -> dict[str, float]:
    """Relative error per kind of tensor for one mode."""
    rank, size = dist.get_rank(), dist.get_world_size()
    first, last = (place * num_experts // size for place in (rank, rank + 1))
    layers, experts = [make_layer(settings, index) for index in range(2)], make_experts(num_experts)
    squares: dict[str, list[float]] = {}
    for seed in range(num_cases):
        expected = dense([expert.cpu() for expert in experts], *make_routing(seed, num_experts))[rank]
        got = run_engine(layers[seed % 2], experts, seed)
        pairs = [(kind, getattr(got, kind), getattr(expected, kind)) for kind in ("output", "tokens", "weights")]
        for mine, theirs in zip(got.experts, expected.experts[first:last], strict=True):
            pairs += [("experts", *pair) for pair in zip(mine, theirs, strict=True)]
        for kind, mine, theirs in pairs:
            assert mine.shape == theirs.shape
            total = squares.setdefault(kind, [0.0, 0.0])
            total[0] += float((mine.double() - theirs).square().sum())
            total[1] += float(theirs.square().sum())
    return {kind: (error / size) ** 0.5 for kind, (error, size) in squares.items()}


def check(results: list[dict[tuple[str, str], float]], rounding: float = ROUNDING) -> None:
    for worst in results:
        for (name, kind), error in worst.items():
            assert error < (0.03 if "int8" in name else rounding), (name, kind, error)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_mode_against_the_oracle(ranks: RankPool, world_size: int) -> None:
    check(ranks.run(world_size, compare, list(MODES), 16, 8, timeout=180))


@pytest.mark.parametrize("counts", [[2, 1], [1, 2], [1, 3], [3, 1], [1, 1, 2], [3, 5]], ids=str)
@pytest.mark.parametrize("comm", ["pipe", "dedup", "hierarchical"])
def test_uneven_nodes(ranks: RankPool, comm: str, counts: list[int]) -> None:
    world_size = sum(counts)
    settings = {"comm": comm, "ranks_per_node": counts, "chunks": 2}
    for errors in ranks.run(world_size, compare_settings, settings, 8, 3 * world_size, timeout=120):
        assert max(errors.values()) < ROUNDING, errors


def test_one_expert_per_rank(ranks: RankPool) -> None:
    check(ranks.run(4, compare, ["16 chunks", "by expert"], 8, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_mode_over_nccl(gpu_ranks: RankPool, world_size: int) -> None:
    check(gpu_ranks.run(world_size, compare, list(MODES), 8, 8, timeout=300), rounding=1e-5)


@pytest.mark.gpu
def test_eight_ranks_over_nccl(gpu_ranks: RankPool) -> None:
    modes = ["2 chunks", "two nodes", "one copy per node", "two hops", "int8, one copy per node"]
    check(gpu_ranks.run(8, compare, modes, 6, 8, timeout=300), rounding=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("counts", [[2, 1], [1, 3], [1, 1, 2], [3, 5]], ids=str)
@pytest.mark.parametrize("comm", ["pipe", "dedup", "hierarchical"])
def test_uneven_nodes_over_nccl(gpu_ranks: RankPool, comm: str, counts: list[int]) -> None:
    settings = {"comm": comm, "ranks_per_node": counts, "chunks": 2}
    for errors in gpu_ranks.run(sum(counts), compare_settings, settings, 8, 3 * sum(counts), timeout=120):
        assert max(errors.values()) < 1e-5, errors
