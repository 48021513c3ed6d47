"""Every kind of expert module gives what it gives under DeepSpeed alone."""

from __future__ import annotations

import pytest

from tests.deepspeed import experts
from tests.deepspeed.training import EXACT, Case, compare_with_stock
from tests.harness.ranks import RankPool

pytestmark = pytest.mark.distributed

ZERO_2 = {"zero_optimization": {"stage": 2}}
CASES = (
    Case("returns a tuple", make_expert=experts.TupleExpert),
    Case("SwiGLU", make_expert=experts.SwiGLU),
    Case("has buffers", make_expert=experts.BufferExpert),
    Case("dropout", make_expert=experts.DropoutExpert, sections=(EXACT,)),
    Case("unused parameter", make_expert=experts.PartlyUnusedExpert),
    Case("unused parameter, ZeRO-2", config=ZERO_2, make_expert=experts.PartlyUnusedExpert),
    Case("shared parameters", prepare=experts.share_first_matrix),
    Case("shared parameters, ZeRO-1", config={"zero_optimization": {"stage": 1}}, prepare=experts.share_first_matrix),
    Case("frozen experts", prepare=experts.freeze_experts),
    Case("partly frozen experts", prepare=experts.freeze_first_matrix),
    Case("nothing before the experts learns", prepare=experts.freeze_before_experts),
    Case("result in bfloat16", make_expert=experts.AutocastExpert, sections=(EXACT,)),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_expert(ranks: RankPool, case: Case) -> None:
    assert ranks.run(4, compare_with_stock, case, timeout=120) == [[]] * 4
