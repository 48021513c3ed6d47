"""DeepSpeed's own settings: optimizer stages, precisions, accumulation, clipping, timers."""

from __future__ import annotations

import pytest

from tests.deepspeed.training import EXACT, Case, compare_with_stock, two_layers
from tests.harness.ranks import RankPool

pytestmark = pytest.mark.distributed

BFLOAT16 = {"bf16": {"enabled": True}}
ADAM = {"optimizer": {"type": "Adam", "params": {"lr": 1e-2, "torch_adam": True}}}


def zero(stage: int, **options: object) -> dict[str, object]:
    """The ZeRO section of a config."""
    return {"zero_optimization": {"stage": stage, **options}}


FOUR_CHUNKS = (EXACT, {"chunks": 4})
CASES = (
    Case("ZeRO-0, bf16", config={**zero(0), **BFLOAT16}),
    Case("ZeRO-1", config=zero(1)),
    Case("ZeRO-1, bf16", config={**zero(1), **BFLOAT16}),
    Case("ZeRO-1, expert-parallel size 2, bf16", two_layers(k=2, ep_size=2), {**zero(1), **BFLOAT16}),
    Case("ZeRO-2", config=zero(2), sections=FOUR_CHUNKS),
    Case("ZeRO-2, bf16", config={**zero(2), **BFLOAT16}, sections=FOUR_CHUNKS),
    Case("ZeRO-2, expert-parallel size 2", two_layers(k=1, ep_size=2), zero(2), sections=FOUR_CHUNKS),
    # three or more ranks sum an expert's gradient in an order that depends on its place in ZeRO's bucket
    Case("ZeRO-2, expert-parallel size 1", two_layers(k=2, ep_size=1), zero(2), bitwise=False),
    Case("ZeRO-2, small buckets, overlap", config=zero(2, overlap_comm=True, reduce_bucket_size=500)),
    Case("Adam", config=ADAM, sections=(EXACT,)),
    Case("Adam, ZeRO-1, bf16", config={**ADAM, **zero(1), **BFLOAT16}, sections=(EXACT,)),
    Case("gradient accumulation", config={"gradient_accumulation_steps": 2}, steps=2),
    Case("gradient accumulation, ZeRO-2", config={"gradient_accumulation_steps": 2, **zero(2)}, steps=2),
    Case("gradient clipping", config={"gradient_clipping": 0.1}),
    Case("timers", config={"wall_clock_breakdown": True}),
    Case("timers, residual", two_layers(k=1, use_residual=True), {"wall_clock_breakdown": True}),
    Case("flops profiler", config={"flops_profiler": {"enabled": True, "profile_step": 1, "output_file": "/dev/null"}}),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_engine_setting(ranks: RankPool, case: Case) -> None:
    assert ranks.run(4, compare_with_stock, case, timeout=120) == [[]] * 4


def test_sum_of_two_gradients_is_bitwise(ranks: RankPool) -> None:
    case = Case("ZeRO-2, expert-parallel size 1", two_layers(k=2, ep_size=1), zero(2), sections=FOUR_CHUNKS)
    assert ranks.run(2, compare_with_stock, case) == [[]] * 2
