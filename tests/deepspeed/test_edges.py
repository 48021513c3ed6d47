"""What rarely happens: backward twice, an expert or a rank without tokens, values that are not finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.deepspeed.model import (
    HIDDEN,
    Recompute,
    TinyModel,
    keep,
    recompute_non_reentrant,
    tell_experts_apart,
    two_matrices,
)
from tests.deepspeed.training import (
    EXACT,
    FLOAT32_TOLERANCE,
    Case,
    Values,
    batch,
    compare_with_stock,
    difference,
    make_engine,
    two_layers,
)
from tests.harness.ranks import RankPool

pytestmark = pytest.mark.distributed

CHUNKINGS = ({"chunks": 1}, {"chunks": 4}, {"chunks": 2, "chunk_by": "expert", "compression": "int8"})
ZERO_2 = {"zero_optimization": {"stage": 2}}


def gradients(model: nn.Module) -> Values:
    """A copy of every parameter's gradient."""
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def backward_twice(section: Any, recompute: Recompute) -> tuple[str, str]:
    """(how twice the gradient differs from two backward passes, the error of a third)."""
    engine = make_engine(Case("twice", recompute=recompute), section)
    loss, _ = engine.module(*batch(engine))
    loss.backward(retain_graph=True)
    once = gradients(engine.module)
    loss.backward()
    twice = {name: 2 * value for name, value in once.items()}
    problem = difference(twice, gradients(engine.module), 0.0)
    try:
        loss.backward()
    except RuntimeError as error:
        return problem, str(error)
    return problem, ""


@pytest.mark.parametrize("recompute", [keep, recompute_non_reentrant], ids=lambda recompute: recompute.__name__)
@pytest.mark.parametrize("section", CHUNKINGS, ids=str)
def test_backward_twice_is_twice_the_gradient(ranks: RankPool, section: Any, recompute: Recompute) -> None:
    for problem, error in ranks.run(4, backward_twice, section, recompute):
        assert problem == ""
        assert "backward through the graph a second time" in error


def send_all_to_expert_five(model: TinyModel) -> None:
    """Make the router choose expert 5 for every token: no other expert gets any, nor do two of four ranks."""
    tell_experts_apart(model)
    with torch.no_grad():
        for block in model.blocks:
            block.norm.bias[0] = 10
            block.moe.deepspeed_moe.gate.wg.weight[:, 0] = 0
            block.moe.deepspeed_moe.gate.wg.weight[5, 0] = 3


@pytest.mark.parametrize("config", [{}, ZERO_2], ids=["ZeRO-0", "ZeRO-2"])
@pytest.mark.parametrize("drop_tokens", [True, False], ids=["dropping", "no dropping"])
def test_all_tokens_to_one_expert(ranks: RankPool, config: Any, drop_tokens: bool) -> None:
    layers = two_layers(k=1, drop_tokens=drop_tokens)
    case = Case("one expert", layers, config, prepare=send_all_to_expert_five, sections=(EXACT, {"chunks": 4}))
    assert ranks.run(4, compare_with_stock, case) == [[]] * 4


def uneven_batches(section: Any) -> Values:
    """Outputs and gradients where every rank has another number of tokens, rank 1 none at all."""
    engine = make_engine(Case("uneven", two_layers(k=2, min_capacity=1)), section)
    tokens = torch.randn((5, 0, 1, 40)[dist.get_rank()], HIDDEN).to(engine.device)
    _, output = engine.module(tokens)
    output.square().sum().backward()
    return {"output": output.detach(), **gradients(engine.module)}


def compare_uneven_batches() -> str:
    """How sixteen chunks differ from one, whose own results the oracle tests cover."""
    tolerance = 4 * FLOAT32_TOLERANCE  # the router's gradient is a small difference of large numbers
    return difference(uneven_batches(EXACT), uneven_batches({"chunks": 16}), tolerance)


def test_ranks_with_different_numbers_of_tokens(ranks: RankPool) -> None:
    assert ranks.run(4, compare_uneven_batches) == [""] * 4


def count_gradients(chunks: int) -> dict[str, int]:
    """How often each parameter's gradient arrives in one step."""
    engine = make_engine(Case("hooks", config=ZERO_2), {"chunks": chunks})
    calls = dict.fromkeys((name for name, _ in engine.module.named_parameters()), 0)

    def count(name: str) -> None:
        calls[name] += 1

    for name, parameter in engine.module.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: count(name))
    loss, _ = engine(*batch(engine))
    engine.backward(loss)
    engine.step()
    return calls


def test_gradient_hooks_fire_once(ranks: RankPool) -> None:
    for calls in ranks.run(4, count_gradients, 4):
        assert set(calls.values()) == {1}


def scaled_gradients(section: Any) -> tuple[float, float]:
    """The least and the largest ratio of experts' gradients with a hook that halves them to those without."""
    norms = []
    for factor in (1.0, 0.5):
        engine = make_engine(Case("hooks", two_layers(ep_size=2)), section)
        found = [one for name, one in engine.module.named_parameters() if "experts" in name]
        for parameter in found:
            parameter.register_hook(lambda grad, factor=factor: factor * grad)
        engine.module(*batch(engine))[0].backward()
        norms.append(torch.stack([one.grad.norm() for one in found]))
    ratio = norms[1] / norms[0]
    return float(ratio.min()), float(ratio.max())


@pytest.mark.parametrize("section", [EXACT, {"chunks": 4}, {"chunks": 4, "scheduler": "optimal"}], ids=str)
def test_a_parameters_own_hook_runs_once(ranks: RankPool, section: Any) -> None:
    for ratios in ranks.run(2, scaled_gradients, section):
        assert ratios == pytest.approx((0.5, 0.5))


def train_without_parameters() -> float:
    """Experts that have none."""
    engine = make_engine(Case("identity", two_layers(ep_size=2), make_expert=nn.Identity), {"chunks": 2})
    loss, _ = engine(*batch(engine))
    engine.backward(loss)
    return float(loss)


def test_experts_without_parameters(ranks: RankPool) -> None:
    assert all(loss > 0 for loss in ranks.run(2, train_without_parameters))


class OverflowingExpert(nn.Module):
    """NaN for some rows: what an expert computes, not the router, decides."""

    def __init__(self) -> None:
        super().__init__()
        self.body = two_matrices()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows through the body, NaN where the first value is large."""
        poison = torch.where(rows[..., :1] > 1.5, torch.nan, 0.0)
        output: torch.Tensor = self.body(rows) + poison
        return output


def which_are_nan(section: Any, spoilt: str) -> Values:
    """Which outputs and which parameters' gradients hold a NaN, when tokens, experts or the gradient bring one."""
    expert = OverflowingExpert if spoilt == "experts" else two_matrices
    engine = make_engine(Case("NaN", two_layers(k=2), make_expert=expert), section)
    tokens, _ = batch(engine)
    if spoilt == "tokens" and dist.get_rank() == 1:
        tokens[0, 0, 0] = torch.nan
    _, output = engine.module(tokens)
    weight = torch.ones_like(output)
    if spoilt == "gradient" and dist.get_rank() == 1:
        weight[0, 0] = torch.nan
    (output * weight).sum().backward()
    found = {name: grad.isnan().any() for name, grad in gradients(engine.module).items()}
    return {"output": output.isnan().any(-1), **found}


def compare_nans(spoilt: str) -> list[str]:
    """Where NaNs of DeepSpeed alone and of planmoe are not in the same places."""
    stock = which_are_nan(None, spoilt)
    assert any(value.any() for value in stock.values()) or dist.get_rank() != 1
    sections = (EXACT, {"chunks": 4}, {"chunks": 2, "compression": "int8"})
    return [difference(stock, which_are_nan(section, spoilt), 0.0) for section in sections]


@pytest.mark.parametrize("spoilt", ["tokens", "experts", "gradient"])
def test_nan_stays_nan_where_it_was(ranks: RankPool, spoilt: str) -> None:
    assert ranks.run(4, compare_nans, spoilt) == [[""] * 3] * 4
