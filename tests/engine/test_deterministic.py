"""Two runs with one seed: the same bits with "deterministic", whatever their times were; and what that switches off."""

from __future__ import annotations

import hashlib
import random
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from planmoe_ds.config import parse_config
from planmoe_ds.errors import PlanMoEConfigError
from planmoe_ds.planner import MEASURED, WARM_UP
from tests.engine.support import make_layer, rank_device, routes_of, run_layer
from tests.engine.test_schedules import run_orders
from tests.harness.ranks import RankPool

HIDDEN, EXPERTS, TOKENS, TOP_K = 32, 8, 48, 3
STEPS = WARM_UP + MEASURED + 4
FORMS: dict[str, dict[str, object]] = {
    "by token": {},
    "by expert": {"chunk_by": "expert"},
    "dedup int8": {"comm": "dedup", "compression": "int8"},
    "zfp": {"compression": "zfp"},
    "exact": {"exactness": "exact"},
}


class SlowExpert(nn.Module):
    """An MLP that takes a random time: every run's own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(HIDDEN, 2 * HIDDEN), nn.Linear(2 * HIDDEN, HIDDEN)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        time.sleep(random.Random().random() * 0.003)
        return self.outer(torch.nn.functional.gelu(self.inner(rows)))


def train(settings: dict[str, object]) -> tuple[str, bool]:
    """A digest of this rank's experts after some steps, and whether times changed the order of tasks."""
    device = rank_device()
    layer = make_layer({"chunks": 4, "ranks_per_node": 2, "scheduler": "optimal", "deterministic": True, **settings})
    torch.manual_seed(dist.get_rank())
    experts = nn.ModuleList(SlowExpert() for _ in range(EXPERTS // dist.get_world_size())).to(device)
    optimizer = torch.optim.SGD(experts.parameters(), lr=0.5, momentum=0.9)
    first = layer.planner._orders
    for _ in range(STEPS):
        tokens = torch.randn(TOKENS, HIDDEN).to(device).requires_grad_()
        routes = torch.rand(TOKENS, EXPERTS).topk(TOP_K, dim=1).indices.t().contiguous().to(device)
        weights = torch.rand(TOP_K, TOKENS).to(device).requires_grad_()
        output = run_layer(layer, tokens, routes_of(routes, EXPERTS, weights), list(experts))
        output.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    digest = hashlib.sha256()
    assert tokens.grad is not None
    assert weights.grad is not None
    for tensor in [*experts.parameters(), tokens.grad, weights.grad]:
        digest.update(tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest(), layer.planner._orders is not first


@pytest.mark.distributed
@pytest.mark.parametrize("form", FORMS)
def test_two_runs_end_with_the_same_bits(ranks: RankPool, form: str) -> None:
    first, second = (ranks.run(4, train, FORMS[form]) for _ in range(2))
    assert first == second
    assert not any(changed for _, changed in first)
    assert len({digest for digest, _ in first}) == 4


@pytest.mark.gpu
@pytest.mark.distributed
@pytest.mark.parametrize("form", FORMS)
def test_two_runs_on_gpus_end_with_the_same_bits(gpu_ranks: RankPool, form: str) -> None:
    first, second = (gpu_ranks.run(4, train, FORMS[form], timeout=120) for _ in range(2))
    assert first == second


@pytest.mark.distributed
def test_without_it_times_decide_the_order(ranks: RankPool) -> None:
    assert [changed for _, changed in ranks.run(2, train, {"deterministic": False})] == [True, True]


def bits_by_order(chunk_by: str) -> bool:
    """Whether the order of tasks changes any bit of a result in float32."""
    first, *others = run_orders(4, {"chunk_by": chunk_by}, range(8), torch.float32, top_k=4)
    return any(not torch.equal(mine, theirs) for other in others for mine, theirs in zip(first, other, strict=True))


@pytest.mark.distributed
@pytest.mark.parametrize("chunk_by", ["token", "expert", "source"])
def test_the_order_of_tasks_changes_bits(ranks: RankPool, chunk_by: str) -> None:
    """Why it is fixed: weight gradients, and tokens' sums over chunks of experts, are added up in that order."""
    assert any(ranks.run(4, bits_by_order, chunk_by))


@pytest.mark.parametrize("key", ["comm", "compression"])
def test_choices_by_measurement_are_refused(key: str) -> None:
    settings: dict[str, Any] = {key: "auto"}
    parse_config(settings)
    with pytest.raises(PlanMoEConfigError, match=f"deterministic excludes {key} 'auto'.*name one"):
        parse_config({**settings, "deterministic": True})
