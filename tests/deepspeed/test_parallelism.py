"""Every arrangement of the ranks gives what DeepSpeed alone gives."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist

from planmoe_ds.auto_planner import Planner, make_planner
from planmoe_ds.config import PlanMoEConfig
from tests.deepspeed.tensor_parallel import SplitExpert, TwoByTwo, gather_works_on_gloo
from tests.deepspeed.training import EXACT, Case, compare_with_stock, make_engine, two_layers
from tests.harness.ranks import RankPool

pytestmark = pytest.mark.distributed

DATA_BEFORE_EXPERT = {"use_data_before_expert_parallelism": True}
WIRES = (
    {**EXACT, "comm": "direct"},
    {**EXACT, "comm": "pipe", "ranks_per_node": 2},
    {"comm": "direct", "chunks": 3},
    {"comm": "pipe", "chunks": 4, "ranks_per_node": 2, "chunk_by": "expert"},
    {"comm": "pipe", "chunks": 16, "ranks_per_node": 1},
    {"exactness": "exact", "chunks": 2},
    {"exactness": "reordered", "chunks": 1},
)
DATA_PARALLEL = (
    Case("expert-parallel size 1", two_layers(k=2, ep_size=1)),
    Case("expert-parallel size 2", two_layers(k=2, ep_size=2)),
    Case("expert-parallel size 2, top-1, no dropping", two_layers(k=1, ep_size=2, drop_tokens=False)),
    Case("data before expert", two_layers(k=2, ep_size=2), DATA_BEFORE_EXPERT),
    Case("another size in each layer", ({"k": 2, "ep_size": 2, "num_experts": 4}, {"k": 1, "ep_size": 4})),
    Case("one expert per rank", two_layers(k=2, num_experts=4)),
    Case("every algorithm and chunking", two_layers(k=2), sections=WIRES),
)
BY_SOURCE = {"exactness": "reordered", "chunks": 2, "chunk_by": "source"}  # each rank has other chunks
LEARNING = {"exactness": "reordered", "chunks": "auto", "scheduler": "auto"}
TENSOR_PARALLEL = (
    Case("experts whole, by source", two_layers(k=2, ep_size=4), make_mpu=TwoByTwo, sections=(BY_SOURCE,)),
    Case("experts whole, size 2", two_layers(k=2, ep_size=2), make_mpu=TwoByTwo),
    Case("experts whole, size 4", two_layers(k=2, ep_size=4), make_mpu=TwoByTwo),
    Case("experts whole, no dropping", two_layers(k=2, drop_tokens=False), make_mpu=TwoByTwo),
    Case("experts whole, top-3", two_layers(k=3), make_mpu=TwoByTwo, bitwise_on_gpus=False),
    Case("experts whole, top-1", two_layers(k=1, ep_size=2), make_mpu=TwoByTwo),
    Case("experts whole, ZeRO-1", two_layers(k=2), {"zero_optimization": {"stage": 1}}, make_mpu=TwoByTwo),
    Case(
        "experts split",
        two_layers(k=2, ep_size=2, enable_expert_tensor_parallelism=True),
        make_expert=SplitExpert,
        make_mpu=TwoByTwo,
    ),
    Case(
        "experts split, top-1",
        two_layers(k=1, ep_size=2, enable_expert_tensor_parallelism=True),
        make_expert=SplitExpert,
        make_mpu=TwoByTwo,
    ),
    Case(
        "experts split, size 1",
        two_layers(k=2, ep_size=1, enable_expert_tensor_parallelism=True),
        make_expert=SplitExpert,
        make_mpu=TwoByTwo,
    ),
)


def compare_tensor_parallel(case: Case) -> list[str]:
    """compare_with_stock where tensor-parallel ranks exchange tokens."""
    with gather_works_on_gloo():
        return compare_with_stock(case)


@pytest.mark.parametrize("case", DATA_PARALLEL, ids=str)
def test_expert_parallel_sizes(ranks: RankPool, case: Case) -> None:
    assert ranks.run(4, compare_with_stock, case, timeout=120) == [[]] * 4


@pytest.mark.parametrize("case", TENSOR_PARALLEL, ids=str)
def test_tensor_parallel(ranks: RankPool, case: Case) -> None:
    assert ranks.run(4, compare_tensor_parallel, case, timeout=120) == [[]] * 4


def compare_with_other_chunks(case: Case) -> list[str]:
    """compare_tensor_parallel where the expert-parallel groups of tensor-parallel ranks choose other chunks."""

    def plan(config: PlanMoEConfig, *rest: Any) -> Planner:
        return make_planner(config.model_copy(update={"chunks": 1 + 2 * (dist.get_rank() % 2)}), *rest)

    with patch("planmoe_ds.layer.make_planner", plan):
        return compare_tensor_parallel(case)


def test_tensor_parallel_ranks_whose_groups_have_other_chunks(ranks: RankPool) -> None:
    sections = ({"exactness": "reordered", "chunks": "auto", "scheduler": "pipelined"},)
    case = Case("other chunks", two_layers(k=2, ep_size=2), DATA_BEFORE_EXPERT, make_mpu=TwoByTwo, sections=sections)
    assert ranks.run(4, compare_with_other_chunks, case, timeout=120) == [[]] * 4


def choose_with_split_experts() -> list[tuple[int, bool]]:
    """Every layer's number of chunks, and whether it is there to stay."""
    case = Case(
        "experts split", two_layers(k=2, ep_size=2, enable_expert_tensor_parallelism=True), make_expert=SplitExpert,
        make_mpu=TwoByTwo,
    )  # fmt: skip
    planners = make_engine(case, LEARNING).planmoe.planners
    return [(planner.num_chunks, planner.is_settled) for planner in planners]


def test_split_experts_follow_no_groups_times(ranks: RankPool) -> None:
    """Their ranks reduce once per chunk with ranks of other expert-parallel groups."""
    assert ranks.run(4, choose_with_split_experts, timeout=120) == [[(1, True)] * 2] * 4


def tries_stock(case: Case) -> list[bool]:
    """Whether every layer tries the framework's own dispatch too."""
    return [layer.stock_trial is not None for layer in make_engine(case, True).module.moe_layers()]


@pytest.mark.parametrize("make_mpu", [None, TwoByTwo], ids=["data parallel", "tensor parallel"])
def test_tensor_parallel_ranks_try_no_stock_dispatch(ranks: RankPool, make_mpu: Any) -> None:
    """Times of their groups may differ: one would go back to stock while others wait for its rows."""
    case = Case("top-2", two_layers(k=2), make_mpu=make_mpu)
    assert ranks.run(4, tries_stock, case, timeout=120) == [[make_mpu is None] * 2] * 4


@pytest.mark.parametrize("world_size", [1, 2])
def test_fewer_ranks(ranks: RankPool, world_size: int) -> None:
    case = Case(f"{world_size} ranks", two_layers(k=2, ep_size=world_size))
    assert ranks.run(world_size, compare_with_stock, case) == [[]] * world_size
