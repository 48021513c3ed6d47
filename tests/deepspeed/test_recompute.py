"""Activation checkpointing around the block with the experts, and inside an expert."""

from __future__ import annotations

from typing import Any

import pytest

from tests.deepspeed import experts, model
from tests.deepspeed.training import Case, batch, compare_with_stock, difference, make_engine, train, two_layers
from tests.harness.ranks import RankPool

pytestmark = pytest.mark.distributed

ZERO_2 = {"zero_optimization": {"stage": 2}}
CASES = (
    Case("torch, reentrant", recompute=model.recompute_reentrant),
    Case("torch, reentrant, random token selection", two_layers(k=1), recompute=model.recompute_reentrant),
    Case("torch, reentrant, ZeRO-2", config=ZERO_2, recompute=model.recompute_reentrant),
    Case("torch, non-reentrant", recompute=model.recompute_non_reentrant),
    Case("torch, non-reentrant, ZeRO-2", two_layers(k=1), ZERO_2, recompute=model.recompute_non_reentrant),
    Case("DeepSpeed", recompute=model.recompute_deepspeed),
    Case("DeepSpeed, non-reentrant", recompute=model.recompute_deepspeed_non_reentrant),
    Case("in the expert: torch, non-reentrant", make_expert=experts.NonReentrantExpert),
)
RECOMPUTE = (
    model.recompute_reentrant,
    model.recompute_non_reentrant,
    model.recompute_deepspeed,
    model.recompute_deepspeed_non_reentrant,
)
REFUSED = (experts.ReentrantExpert, experts.DeepSpeedRecomputingExpert)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_recomputation(ranks: RankPool, case: Case) -> None:
    assert ranks.run(4, compare_with_stock, case, timeout=120) == [[]] * 4


def differs_from_stock(case: Case, section: Any) -> str:
    """See difference()."""
    return difference(train(case), train(case, section), 1e-5)


@pytest.mark.parametrize("recompute", RECOMPUTE, ids=lambda recompute: recompute.__name__)
@pytest.mark.parametrize("section", [{"chunks": 4, "scheduler": "optimal"}, True], ids=str)
def test_what_is_recomputed_goes_as_it_went_forward(ranks: RankPool, recompute: model.Recompute, section: Any) -> None:
    """Also in the step in which a scheduler takes another order, or number of chunks."""
    layers = two_layers(ep_size=2, k=2 if section is True else 8)
    case = Case("learns", layers, recompute=recompute, steps=16)
    assert ranks.run(2, differs_from_stock, case, section, timeout=120) == [""] * 2


def expert_calls(recompute: model.Recompute, section: Any) -> int:
    """How often one expert is called in a step."""
    engine = make_engine(Case("calls", make_expert=experts.BufferExpert, recompute=recompute), section)
    loss, _ = engine(*batch(engine))
    engine.backward(loss)
    return int(engine.module.moe_layers()[0].experts.deepspeed_experts[0].calls)


@pytest.mark.parametrize("recompute", RECOMPUTE, ids=lambda recompute: recompute.__name__)
def test_a_block_is_recomputed_once(ranks: RankPool, recompute: model.Recompute) -> None:
    chunks = 4
    assert ranks.run(4, expert_calls, recompute, {"chunks": chunks}) == [2 * chunks] * 4


def train_one_step(case: Case) -> None:
    """Forward and backward with planmoe."""
    engine = make_engine(case, True)
    loss, _ = engine(*batch(engine))
    engine.backward(loss)


@pytest.mark.parametrize("expert", REFUSED, ids=lambda expert: expert.__name__)
def test_reentrant_recomputation_inside_an_expert_is_refused(ranks: RankPool, expert: type) -> None:
    case = Case("refused", two_layers(k=2, ep_size=2), make_expert=expert)
    for outcome in ranks.run(2, train_one_step, case, expect_failure=True):
        assert outcome.error in ("ValueError", "PlanMoEError")
        assert "use_reentrant=False" in outcome.message
