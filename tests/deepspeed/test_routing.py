"""Every option of DeepSpeed's router gives what DeepSpeed alone gives."""

from __future__ import annotations

import pytest

from tests.deepspeed.training import Case, compare_with_stock, two_layers
from tests.harness.ranks import RankPool

pytestmark = pytest.mark.distributed

CASES = (
    Case("top-1", two_layers(k=1)),
    Case("top-1 without dropping", two_layers(k=1, drop_tokens=False)),
    Case("top-1 without random token selection", two_layers(k=1, use_rts=False)),
    Case("top-1 with jitter", two_layers(k=1, noisy_gate_policy="Jitter")),
    Case("top-1 with sampling", two_layers(k=1, noisy_gate_policy="RSample")),
    Case("top-1 with a mask of used tokens", two_layers(k=1), used_token=True),
    Case("top-2", two_layers(k=2)),
    Case("top-2 without sampling the second", two_layers(k=2, top2_2nd_expert_sampling=False)),
    Case("top-2 without dropping", two_layers(k=2, drop_tokens=False)),
    Case("top-2 with jitter", two_layers(k=2, noisy_gate_policy="Jitter")),
    Case("top-3", two_layers(k=3), bitwise_on_gpus=False),
    Case("top-3 without dropping", two_layers(k=3, drop_tokens=False), bitwise_on_gpus=False),
    Case("top-8, every expert", two_layers(k=8), bitwise_on_gpus=False),
    Case("capacity factor 0.25, no minimum", two_layers(k=2, capacity_factor=0.25, min_capacity=0)),
    Case("capacity factor 1.5, minimum 6", two_layers(k=1, capacity_factor=1.5, min_capacity=6)),
    Case("minimum above the need", two_layers(k=2, min_capacity=30)),
    Case("other capacity in evaluation", two_layers(k=2, capacity_factor=2.0, eval_capacity_factor=0.5)),
    Case("residual top-1", two_layers(k=1, use_residual=True)),
    Case("residual top-2", two_layers(k=2, use_residual=True, drop_tokens=False)),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_router_option(ranks: RankPool, case: Case) -> None:
    assert ranks.run(4, compare_with_stock, case, timeout=120) == [[]] * 4
