"""An order that is learnt while DeepSpeed trains changes nothing in what is learnt."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from planmoe_ds.execution import load_execution, load_routing
from planmoe_ds.integrations.deepspeed import PlanMoELayer
from planmoe_ds.planner import MEASURED, WARM_UP
from planmoe_ds.stock_trial import TRIAL_CALLS
from tests.deepspeed import experts, model
from tests.deepspeed.training import EXACT, Case, compare_with_stock, make_engine, train_engine, two_layers
from tests.harness.ranks import RankPool

pytestmark = pytest.mark.distributed

STEPS = WARM_UP + MEASURED + 2
CHOOSING = 3 * (WARM_UP + MEASURED + 1) + TRIAL_CALLS + 1  # chunks, then planmoe against stock
STOCK = "the framework's own dispatch"
OPEN_CHOICE = {"comm": "auto", "chunks": "auto", "scheduler": "auto"}
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


@pytest.mark.parametrize(
    ("ep_size", "stage", "is_tried"), [(4, 2, True), (2, 0, True), (2, 1, False), (2, 2, False), (1, 2, False)]
)
def test_groups_that_zero_reduces_over_do_not_choose_apart(
    ranks: RankPool, ep_size: int, stage: int, is_tried: bool
) -> None:
    """Where ZeRO adds up gradients of several expert-parallel groups as they come, no layer may go back to stock."""
    case = Case("true", two_layers(ep_size=ep_size), config={"zero_optimization": {"stage": stage}})
    assert ranks.run(4, has_trials, case) == [[is_tried] * 2] * 4


def has_trials(case: Case) -> list[bool]:
    """Of every layer, whether it will be tried with stock's dispatch."""
    engine = make_engine(case, planmoe=True)
    return [layer.stock_trial is not None for layer in engine.module.modules() if isinstance(layer, PlanMoELayer)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_learnt_orders_train_alike(ranks: RankPool, case: Case) -> None:
    long = Case(case.name, config=case.config, recompute=case.recompute, make_expert=case.make_expert, steps=STEPS,
                sections=LEARNT)  # fmt: skip
    assert ranks.run(4, compare_with_stock, long, timeout=240) == [[]] * 4


def test_chosen_chunks_train_alike(ranks: RankPool) -> None:
    """Numbers of chunks that change between calls, a checkpointed call and its recomputation, and a trial of stock."""
    sections = ({**OPEN_CHOICE, "ranks_per_node": 2}, {**OPEN_CHOICE, "comm": "dedup", "ranks_per_node": 2})
    for case in (CASES[0], CASES[3], CASES[4]):
        long = Case(case.name, config={**case.config, "optimizer": {"type": "SGD", "params": {"lr": 0.01}}},
                    recompute=case.recompute, steps=CHOOSING, sections=sections)  # fmt: skip
        assert ranks.run(4, compare_with_stock, long, timeout=240) == [[]] * 4


def say_what_was_chosen(folder: str, case: Case, section: object) -> tuple[list[int], str]:
    """Numbers of chunks in force after the first steps, and what this rank said."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        engine = make_engine(case, planmoe=section)
        train_engine(engine, case, CHOOSING)
    engine.planmoe.recorder.start_trace()
    train_engine(engine, case, 1)
    engine.planmoe.save_trace(f"{folder}/run-{dist.get_rank()}.json")
    return [planner.num_chunks for planner in engine.planmoe.planners], said.getvalue()


def test_true_lets_the_first_steps_choose(ranks: RankPool, tmp_path: Path) -> None:
    """Unless stock wins, whose layers leave no trace."""
    (mine, said), *others = ranks.run(4, say_what_was_chosen, str(tmp_path), Case("true"), True, timeout=120)
    assert all(theirs == mine for theirs, _ in others)
    assert "all-to-all direct: one node: nothing crosses between nodes, chunks by token chosen by the first" in said
    assert "order: " in said
    assert "predicted, forward and backward; " in said
    assert not any("planmoe: MoE layers" in words for _, words in others)
    assert "with planmoe and " in said
    if STOCK not in said:
        assert sum(load_routing(tmp_path / "run-0.json")) > 0
        assert set(load_execution(tmp_path / "run-0.json")[1][0]) >= {"makespan", "lower_bound"}


@pytest.mark.parametrize(
    ("options", "is_tried"), [({}, True), ({"drop_tokens": False}, False), ({"capacity_factor": 2.5}, False)], ids=str
)
def test_stock_is_tried_where_its_buffers_are_bounded(
    ranks: RankPool, tmp_path: Path, options: dict[str, Any], is_tried: bool
) -> None:
    """On several nodes too; a layer that drops nothing stays with planmoe."""
    case, section = Case("true", two_layers(**options)), {**OPEN_CHOICE, "ranks_per_node": 2}
    (_, said), *_ = ranks.run(4, say_what_was_chosen, str(tmp_path), case, section, timeout=120)
    assert "order: " in said
    assert ("with planmoe and " in said) == is_tried
