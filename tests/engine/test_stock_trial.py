"""A layer goes back to the framework's dispatch where that is faster, on all ranks in the same call, and says why."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from planmoe_ds.planner import MEASURED, WARM_UP
from planmoe_ds.stock_trial import PATIENCE, TRIAL_CALLS, StockTrial
from tests.engine.support import make_layer, routes_of, run_layer
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
    assert "It needs equal numbers of tokens on all ranks" in said[0]
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
    (mine, said), (theirs, _) = ranks.run(2, try_both, [60.0, 60.0], [1.0, 1.0], way)
    assert mine == theirs
    assert len(said) == 1
    if way == "one never":
        assert said[0].startswith("planmoe's dispatch: not all forward passes had a backward one")
        assert mine[-1] == "planmoe"
    else:
        assert said[0].startswith("the framework's own dispatch from now on")


def try_with_uneven_tokens(first_uneven: int) -> tuple[list[str], list[str]]:
    """What calls used, and what was said, where ranks have different numbers of tokens from a call on."""
    said: list[str] = []
    number = 0
    planner: Any = SimpleNamespace(is_settled=True)
    group = make_layer({"comm": "direct"}).group
    trial = StockTrial(group, planner, lambda _, reason: said.append(reason), lambda: number > first_uneven)
    used: list[str] = []
    tokens = torch.ones(2, 2, requires_grad=True)

    def layer(name: str) -> Any:
        return lambda hidden: (used.append(name), hidden * 2)[1]

    for number in range(NUM_CALLS):  # noqa: B007  the closure looks at it
        trial.run(tokens, layer("planmoe"), layer("stock")).sum().backward()
    return used, said


@pytest.mark.parametrize("first_uneven", [2, NUM_CALLS - 3])
def test_uneven_tokens_keep_planmoe(ranks: RankPool, first_uneven: int) -> None:
    (mine, said), (theirs, _) = ranks.run(2, try_with_uneven_tokens, first_uneven)
    assert mine == theirs
    assert mine[-1] == "planmoe"
    assert ("stock" in mine) == (first_uneven > 2)
    assert "different numbers of tokens" in said[-1]


def uneven_layer() -> tuple[bool, bool]:
    """Whether a layer knows, before and after, that ranks had different numbers of tokens in a call."""
    layer = make_layer({"comm": "direct"})
    found = []
    for num_tokens in (3, 3 + dist.get_rank()):
        tokens, experts = torch.randn(num_tokens, 4), torch.zeros(1, num_tokens, dtype=torch.long)
        run_layer(layer, tokens, routes_of(experts, 2), [nn.Linear(4, 4)])
        found.append(layer.has_been_uneven)
    return found[0], found[1]


def test_layers_notice_uneven_tokens(ranks: RankPool) -> None:
    assert ranks.run(2, uneven_layer) == [(False, True)] * 2


def change_in_place() -> list[str]:
    """What calls used whose output is changed in place."""
    planner: Any = SimpleNamespace(is_settled=True)
    trial = StockTrial(make_layer({"comm": "direct"}).group, planner, lambda *_: None)
    used: list[str] = []

    def layer(name: str) -> Any:
        return lambda hidden: (used.append(name), hidden * 2)[1]

    for _ in range(NUM_CALLS):
        tokens = torch.ones(2, 2, requires_grad=True)
        output = trial.run(tokens, layer("planmoe"), layer("stock"))
        output += tokens
        output.mul_(2).sum().backward()
        assert torch.equal(tokens.grad, torch.full_like(tokens, 6.0))  # type: ignore[arg-type]
    return used


def test_outputs_may_be_changed_in_place(ranks: RankPool) -> None:
    mine, theirs = ranks.run(2, change_in_place)
    assert mine[: len(TRIED)] == theirs[: len(TRIED)] == TRIED


def test_nothing_changes_without_backward(ranks: RankPool) -> None:
    (mine, said), _ = ranks.run(2, try_both, [60.0, 60.0], [1.0, 1.0], "never backward")
    assert set(mine) == {"planmoe"}
    assert said == []
