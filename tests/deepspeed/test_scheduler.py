"""An order that is learnt while DeepSpeed trains changes nothing in what is learnt."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest
import torch.distributed as dist

from planmoe_ds.execution import load_execution, load_routing
from planmoe_ds.planner import MEASURED, WARM_UP
from tests.deepspeed import experts, model
from tests.deepspeed.training import EXACT, Case, compare_with_stock, make_engine, train_engine
from tests.harness.ranks import RankPool

pytestmark = pytest.mark.distributed

STEPS = WARM_UP + MEASURED + 2
CHOOSING = 3 * (WARM_UP + MEASURED + 1) + MEASURED + WARM_UP + MEASURED + 2  # chunks, then planmoe against stock
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


def test_chosen_chunks_train_alike(ranks: RankPool) -> None:
    """Numbers of chunks that change between calls, a checkpointed call and its recomputation, and a trial of stock."""
    open_choice = {"comm": "auto", "chunks": "auto", "scheduler": "auto"}
    sections = (open_choice, {**open_choice, "comm": "dedup", "ranks_per_node": 2})
    for case in (CASES[0], CASES[3], CASES[4]):
        long = Case(case.name, config={**case.config, "optimizer": {"type": "SGD", "params": {"lr": 0.01}}},
                    recompute=case.recompute, steps=CHOOSING, sections=sections)  # fmt: skip
        assert ranks.run(4, compare_with_stock, long, timeout=240) == [[]] * 4


def say_what_was_chosen(folder: str) -> tuple[list[int], str]:
    """Numbers of chunks in force after the first steps, and what this rank said."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        engine = make_engine(Case("true"), planmoe=True)
        train_engine(engine, Case("true"), CHOOSING)
    engine.planmoe.recorder.start_trace()
    train_engine(engine, Case("true"), 1)
    engine.planmoe.save_trace(f"{folder}/run-{dist.get_rank()}.json")
    return [planner.num_chunks for planner in engine.planmoe.planners], said.getvalue()


def test_true_lets_the_first_steps_choose(ranks: RankPool, tmp_path: Path) -> None:
    """Unless stock wins, whose layers leave no trace."""
    (mine, said), *others = ranks.run(4, say_what_was_chosen, str(tmp_path), timeout=120)
    assert all(theirs == mine for theirs, _ in others)
    assert "all-to-all direct: one node: nothing crosses between nodes, chunks by token chosen by the first" in said
    assert "order: " in said
    assert "predicted, forward and backward; " in said
    assert not any("planmoe: MoE layers" in words for _, words in others)
    assert "with planmoe and " in said
    if "the framework's own dispatch" not in said:
        assert sum(load_routing(tmp_path / "run-0.json")) > 0
        assert set(load_execution(tmp_path / "run-0.json")[1][0]) >= {"makespan", "lower_bound"}
