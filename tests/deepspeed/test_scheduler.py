"""An order that is learnt while DeepSpeed trains changes nothing in what is learnt."""

from __future__ import annotations

import pytest

from planmoe_ds.planner import MEASURED, WARM_UP
from tests.deepspeed import experts, model
from tests.deepspeed.training import EXACT, Case, compare_with_stock
from tests.harness.ranks import RankPool

pytestmark = pytest.mark.distributed

STEPS = WARM_UP + MEASURED + 2
LEARNT = (
    {**EXACT, "scheduler": "optimal"},  # weight gradients wait, bit for bit the same
    {"scheduler": "optimal", "chunks": 3},
    {"scheduler": "optimal", "chunks": 4, "max_in_flight": 2, "comm": "dedup", "ranks_per_node": 2},
)
CASES = (
    Case("ZeRO-0, two batches per step", config={"gradient_accumulation_steps": 2}),
    Case("ZeRO-1", config={"zero_optimization": {"stage": 1}}),
    Case("ZeRO-2", config={"zero_optimization": {"stage": 2}}),
    Case("ZeRO-2, reentrant", config={"zero_optimization": {"stage": 2}}, recompute=model.recompute_reentrant),
    Case("non-reentrant", recompute=model.recompute_non_reentrant),
    Case("non-reentrant in the expert", make_expert=experts.NonReentrantExpert),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_learnt_orders_train_alike(ranks: RankPool, case: Case) -> None:
    long = Case(case.name, config=case.config, recompute=case.recompute, make_expert=case.make_expert, steps=STEPS,
                sections=LEARNT)  # fmt: skip
    assert ranks.run(4, compare_with_stock, long, timeout=240) == [[]] * 4
