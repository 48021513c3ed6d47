"""30 steps on 4 ranks against stock DeepSpeed: bit for bit with one chunk, rounding level with more."""

from __future__ import annotations

import pytest

from tests.deepspeed.training import Case, difference, train, two_layers
from tests.harness.ranks import RankPool

pytestmark = pytest.mark.distributed

STEPS = 30
LOSS_TOLERANCE = 1e-6  # relative, of the last step's loss


def case_of(zero_stage: int) -> Case:
    config = {
        "zero_optimization": {"stage": zero_stage},
        "optimizer": {"type": "Adam", "params": {"lr": 3e-3, "torch_adam": True}},
    }
    return Case(f"zero {zero_stage}", two_layers(k=2, capacity_factor=1.25), config, steps=STEPS)


def compare(zero_stage: int, comm: str) -> dict[str, object]:
    """Whether one chunk is bitwise equal, and the relative difference of the last loss with 2 and 4 chunks."""
    case = case_of(zero_stage)
    stock = train(case)
    exact = {"exactness": "exact", "comm": comm}
    result: dict[str, object] = {"one chunk": difference(stock, train(case, {**exact, "chunks": 1}), 0.0)}
    last = f"step {STEPS - 1}: loss"
    for chunks in (2, 4):
        loss = train(case, {**exact, "chunks": chunks})[last]
        result[f"{chunks} chunks"] = abs(float(loss) / float(stock[last]) - 1)
    return result


@pytest.mark.parametrize(("zero_stage", "comm"), [(0, "direct"), (1, "pipe")])
def test_thirty_steps(ranks: RankPool, zero_stage: int, comm: str) -> None:
    for result in ranks.run(4, compare, zero_stage, comm, timeout=180):
        assert result["one chunk"] == ""
        assert result["2 chunks"] <= LOSS_TOLERANCE
        assert result["4 chunks"] <= LOSS_TOLERANCE
