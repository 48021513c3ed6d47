"""A layer goes back to the framework's dispatch where that is faster, on all ranks in the same call, and says why."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from planmoe_ds.planner import MEASURED, WARM_UP
from planmoe_ds.stock_trial import PATIENCE, TRIAL_CALLS, StockTrial
from tests.engine.support import make_layer
from tests.harness.ranks import RankPool

pytestmark = pytest.mark.distributed

NUM_CALLS = TRIAL_CALLS + 2
TRIED = ["planmoe"] * (WARM_UP + MEASURED) + ["stock"] * (WARM_UP + MEASURED) + ["planmoe"]


class Sleep(torch.autograd.Function):
    """The identity, forward and backward in so many seconds."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, seconds: float) -> torch.Tensor:
        ctx.save_for_backward(tensor)  # so that checkpointing has something to recompute
        ctx.seconds = seconds
        time.sleep(seconds)
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (tensor,) = ctx.saved_tensors
        time.sleep(ctx.seconds)
        return grad * tensor, None


def try_both(planmoe_ms: list[float], stock_ms: list[float], way: str = "plain") -> tuple[list[str], list[str]]:
    """What every call used, recomputations among them, and what was reported; times by rank."""
    said: list[str] = []
    group = make_layer({"comm": "direct"}).group
    planner: Any = SimpleNamespace(is_settled=True)
    trial = StockTrial(group, planner, lambda choice, reason: said.append(f"{choice}: {reason}"))
    used: list[str] = []

    def layer(name: str, milliseconds: list[float]) -> Any:
        def run(hidden: torch.Tensor) -> torch.Tensor:
            used.append(name)
            return Sleep.apply(hidden, milliseconds[dist.get_rank()] * 1e-3)

        return run

    def call(hidden: torch.Tensor) -> torch.Tensor:
        return trial.run(hidden, layer("planmoe", planmoe_ms), layer("stock", stock_ms))

    tokens = torch.ones(2, 2, requires_grad=True)
    for number in range(NUM_CALLS if not way.startswith("one") else NUM_CALLS + PATIENCE):
        if way == "evaluated too":
            with torch.no_grad():
                trial.run(tokens, lambda hidden: hidden, lambda hidden: hidden)
        output = checkpoint(call, tokens, use_reentrant=False) if way == "recomputed" else call(tokens)
        if way == "one twice" and number == 3:
            output.sum().backward(retain_graph=True)
        if way != "never backward" and (way, number) != ("one never", 8):
            output.sum().backward()
    return used, said


@pytest.mark.parametrize("way", ["plain", "evaluated too"])
def test_the_faster_one_stays(ranks: RankPool, way: str) -> None:
    (mine, said), (theirs, _) = ranks.run(2, try_both, [60.0, 60.0], [1.0, 1.0], way)
    assert mine == theirs == [*TRIED, "stock", "stock"]
    assert len(said) == 1
    assert said[0].startswith("the framework's own dispatch from now on: a layer took ")
    (mine, said), _ = ranks.run(2, try_both, [1.0, 1.0], [60.0, 60.0], way)
    assert mine == [*TRIED, "planmoe", "planmoe"]
    assert said[0].startswith("planmoe's dispatch: ")


def test_ranks_that_disagree_decide_together(ranks: RankPool) -> None:
    (mine, _), (theirs, _) = ranks.run(2, try_both, [1.0, 120.0], [20.0, 1.0])
    assert mine == theirs == [*TRIED, "stock", "stock"]


def test_what_is_recomputed_is_what_ran(ranks: RankPool) -> None:
    (mine, _), (theirs, _) = ranks.run(2, try_both, [60.0, 60.0], [1.0, 1.0], "recomputed")
    assert mine == theirs
    assert mine[::2] == mine[1::2] == [*TRIED, "stock", "stock"]


@pytest.mark.parametrize("way", ["one never", "one twice"])
def test_a_call_without_its_backward_ends_the_trial(ranks: RankPool, way: str) -> None:
    (mine, said), (theirs, _) = ranks.run(2, try_both, [6.0, 6.0], [1.0, 1.0], way)
    assert mine == theirs
    assert len(said) == 1
    if way == "one never":
        assert said[0].startswith("planmoe's dispatch: not all forward passes had a backward one")
        assert mine[-1] == "planmoe"
    else:
        assert said[0].startswith("the framework's own dispatch from now on")


def test_nothing_changes_without_backward(ranks: RankPool) -> None:
    (mine, said), _ = ranks.run(2, try_both, [60.0, 60.0], [1.0, 1.0], "never backward")
    assert set(mine) == {"planmoe"}
    assert said == []
