"""SequentialMLP's experts as grouped GEMMs, which the engine takes on GPUs, trained here on the CPU in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.nn import functional

from planmoe_ds.experts import Experts
from planmoe_ds.grouped import GroupedGraph
from planmoe_ds.layer import ExpertParallelLayer
from planmoe_ds.plan import ExpertLayout
from tests.harness.ranks import RankPool
from tests.megatron.cases import PAD, TWO_CHUNKS, Case
from tests.megatron.test_parity import ROUNDING

pytestmark = pytest.mark.distributed

SWIGLU = {"gated_linear_unit": True, "activation_func": functional.silu}
CASES = (
    Case("GELU", steps=8),
    Case("SwiGLU", steps=8, config=SWIGLU),
    Case("SwiGLU, fused", steps=3, config={**SWIGLU, "bias_activation_fusion": True}),
    Case("ETP2", steps=8, tensor=2, expert=2, expert_tensor=2, config=SWIGLU),
    Case("drop and pad, recompute", steps=8, config={
        **PAD, "recompute_granularity": "selective", "recompute_modules": ["moe"]}),
)  # fmt: skip
SECTIONS = {
    "two chunks": (TWO_CHUNKS, ROUNDING),
    "optimal": ({"chunks": 2, "scheduler": "optimal"}, ROUNDING),  # weight gradients wait
}


@contextmanager
def grouped_on_the_cpu() -> Iterator[list[int]]:
    """While open, layers on the CPU group their experts, too; counts the runs' experts."""
    with_groups, run_grouped = ExpertParallelLayer._with_groups, Experts.run_grouped
    runs: list[int] = []

    def run(
        self: Experts, buffer: torch.Tensor, layout: ExpertLayout, weights: torch.Tensor | None, *, keep: bool
    ) -> GroupedGraph | None:
        if self.grouped is None:
            return None
        runs.append(len(layout.rows_of_expert))
        return self.grouped.run(
            buffer, torch.tensor(layout.rows_of_expert).cumsum(0, dtype=torch.int32), weights, keep=keep
        )

    layer: Any = ExpertParallelLayer
    layer._with_groups = lambda self, experts, _device: with_groups(self, experts, torch.device("cuda"))
    Experts.run_grouped = run  # type: ignore[method-assign]
    try:
        yield runs
    finally:
        layer._with_groups, Experts.run_grouped = with_groups, run_grouped  # type: ignore[method-assign]


def compare_grouped(case: Case) -> tuple[dict[str, str], int]:
    """What differs from Megatron's own training, and how often experts ran as one."""
    from tests.megatron.training import compare

    with grouped_on_the_cpu() as runs:
        return compare(case, SECTIONS), len(runs)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_training(megatron_ranks: RankPool, pytestconfig: pytest.Config, case: Case) -> None:
    if pytestconfig.getoption("--backend") == "nccl":
        pytest.skip("GPUs have no grouped GEMM in fp32; in bf16: tests/gpu/test_grouped.py")
    for differences, num_runs in megatron_ranks.run(case.ranks, compare_grouped, case, timeout=150):
        assert differences == dict.fromkeys(SECTIONS, "")
        assert num_runs >= 2 * 2 * 2 * case.micro_batches * case.steps  # sections, layers, chunks


@pytest.mark.parametrize(
    "config",
    [
        {"add_bias_linear": True},
        {"moe_router_topk": 1, "moe_router_pre_softmax": True, "moe_apply_probs_on_input": True},
    ],
    ids=["biases", "probs on input"],
)
def test_others_run_one_by_one(megatron_ranks: RankPool, config: dict[str, Any]) -> None:
    for differences, num_runs in megatron_ranks.run(4, compare_grouped, Case("EP4", steps=2, config=config)):
        assert differences == dict.fromkeys(SECTIONS, "")
        assert num_runs == 0


def count_members(case: Case) -> tuple[int, int]:
    """Of a layer's experts those that may be grouped, without and with fused accumulation of gradients."""
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from planmoe_ds.integrations.megatron import MegatronExperts
    from tests.megatron import training

    training.start(case)
    model = training.make_chunks(case, training.make_config(case))[0]
    layer = next(module for module in model.modules() if isinstance(module, MoELayer))
    experts = MegatronExperts(layer.experts)
    plain = len(experts.members())
    layer.experts.config.gradient_accumulation_fusion = True
    return plain, len(experts.members())


def test_experts_that_add_up_their_own_gradients_are_left_as_they_are(megatron_ranks: RankPool) -> None:
    """A fused projection tells Megatron to pass by the gradients that grouped GEMMs return for the same weights."""
    assert megatron_ranks.run(2, count_members, Case("EP2", ranks=2, expert=2)) == [(4, 0)] * 2
