"""Which routers decide in few operations, and what these leave to DeepSpeed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.moe import sharded_moe
from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import TopKGate
from deepspeed.utils import groups
from torch import nn

import planmoe_ds
from planmoe_ds.integrations.deepspeed_gate import PlanMoEGate, choose_gates
from tests.deepspeed.gates import HIDDEN, decide, make_gate, make_tokens, quick
from tests.deepspeed.training import Case, make_engine, two_layers
from tests.harness.ranks import RankPool

CPU = torch.device("cpu")


def test_what_it_leaves_to_deepspeed() -> None:
    tokens = make_tokens(12)
    used = (torch.rand(12) < 0.5).long()
    gate = make_gate(k=1)
    stock = decide(gate, tokens, used)
    assert all(map(torch.equal, stock, decide(quick(gate), tokens, used)))
    with pytest.raises(AssertionError, match="min_capacity"):
        gate(tokens[:1], None, True, False)
    gate = quick(make_gate())
    with torch.autocast("cpu", torch.bfloat16):
        assert gate(tokens, None, True, False)[5].shape == (2, 12)
    assert len(gate(tokens)) == 4  # dense, as older code asks for it


def test_a_default_dtype_of_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed draws its random numbers in it."""
    gate, tokens = make_gate(), make_tokens(40)
    monkeypatch.setattr(sharded_moe, "gumbel_map", {})
    torch.set_default_dtype(torch.float64)
    try:
        stock, ours = decide(gate, tokens), decide(quick(gate), tokens)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, stock, ours))


class ThreeParts:
    """An mpu."""

    def get_model_parallel_world_size(self) -> int:
        return 3

    get_tensor_model_parallel_world_size = get_model_parallel_world_size


def agreed_capacities(num_tokens: list[int]) -> list[tuple[int, int]]:
    """Stock's and ours where ranks have so many tokens and nothing is dropped, with and without tensor parallelism."""
    deepspeed.init_distributed("gloo", verbose=False)
    rank, group = torch.distributed.get_rank(), torch.distributed.new_group([0, 1])
    found = []
    for groups.mpu in (None, ThreeParts()):
        for k in (1, 2, 4):
            gate = make_gate(k=k, drop_tokens=False)
            gate.ep_group = group
            tokens = make_tokens(sum(num_tokens))[: num_tokens[rank]]
            pair = decide(gate, tokens)[1], decide(quick(gate), tokens)[1]
            found.append((int(pair[0]), int(pair[1])))
    groups.mpu = None
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("num_tokens", [[20, 30], [3, 40], [7, 7]], ids=str)
def test_ranks_agree_on_a_capacity(ranks: RankPool, num_tokens: list[int]) -> None:
    for found in ranks.run(2, agreed_capacities, num_tokens):
        assert [stock for stock, _ in found] == [ours for _, ours in found]
        assert len({stock for stock, _ in found}) > 2


# ---- when it takes over ----


def in_bfloat16() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("around", [nullcontext, torch.no_grad, torch.inference_mode, in_bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_takes_over_without_a_trace(
    monkeypatch: pytest.MonkeyPatch, around: type[AbstractContextManager[Any]], dtype: torch.dtype
) -> None:
    maps = {name: {} for name in ("uniform_map", "gumbel_map", "exp_selection_uniform_map")}
    for name, samplers in maps.items():
        monkeypatch.setattr(sharded_moe, name, samplers)
    gate, before = make_gate(), torch.get_rng_state()
    calls: list[Any] = []
    gate.register_forward_hook(lambda *_: calls.append(1))
    torch.set_default_dtype(dtype)
    try:
        with around():
            choose_gates([gate], CPU, exact=False)
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)
    assert type(gate) is PlanMoEGate
    assert torch.equal(before, torch.get_rng_state())
    assert [getattr(sharded_moe, name) for name in maps] == [{}] * 3
    assert sharded_moe.gumbel_map is maps["gumbel_map"]
    gate(make_tokens(4), None, True, False)
    assert calls == [1]


@pytest.mark.gpu
def test_takes_over_without_a_trace_on_gpus() -> None:
    gate, before = make_gate("cuda"), torch.cuda.get_rng_state_all()
    choose_gates([gate], torch.device("cuda"), exact=False)
    assert type(gate) is PlanMoEGate
    assert all(map(torch.equal, before, torch.cuda.get_rng_state_all()))


def test_a_gate_of_ones_own_stays() -> None:
    class Own(TopKGate):
        pass

    gate, other = make_gate(), make_gate()
    gate.__class__ = Own
    choose_gates([gate], CPU, exact=False)
    choose_gates([other], torch.device("meta"), exact=False)
    assert [type(gate), type(other)] == [Own, TopKGate]


def doubled(stock: Any, *args: Any, **kwargs: Any) -> Any:
    loss, *others = stock(*args, **kwargs)
    return 2 * loss, *others


def drawing_more(stock: Any, *args: Any, **kwargs: Any) -> Any:
    decision = stock(*args, **kwargs)
    torch.rand(1)
    return decision


def keeping_all(stock: Any, *args: Any, **kwargs: Any) -> Any:
    loss, capacity, *others = stock(*args, **kwargs)
    return loss, capacity + 1, *others


def refusing(stock: Any, *args: Any, **kwargs: Any) -> Any:
    raise ValueError("too few tokens")


@pytest.mark.parametrize("change", [doubled, drawing_more, keeping_all, refusing])
@pytest.mark.parametrize(("k", "name"), [(1, "top1gating"), (2, "top2gating"), (8, "topkgating")])
def test_another_deepspeed_keeps_its_router(monkeypatch: pytest.MonkeyPatch, change: Any, k: int, name: str) -> None:
    stock = getattr(sharded_moe, name)
    monkeypatch.setattr(sharded_moe, name, lambda *args, **kwargs: change(stock, *args, **kwargs))
    changed, same = make_gate(k=k), make_gate(k=3)
    with pytest.warns(UserWarning, match="router decides otherwise"):
        choose_gates([changed, *([same] if k != 8 else [])], CPU, exact=False)
    assert type(changed) is TopKGate
    assert k == 8 or type(same) is PlanMoEGate


def gates_of_sections() -> list[str]:
    """The class of a layer's router without planmoe, with it, and with exact results asked for, also later."""
    case = Case("gate", two_layers(k=2, ep_size=2))
    sections = (None, {"exactness": "reordered"}, {"exactness": "exact"})
    models = [make_engine(case, section).module for section in sections]
    planmoe_ds.activate(models[0], sections[1])
    kinds = [gate_class(model) for model in models]
    planmoe_ds.activate(models[0], sections[2])
    return [*kinds, gate_class(models[0])]


def gate_class(model: nn.Module) -> str:
    return next(type(module).__name__ for module in model.modules() if isinstance(module, TopKGate))


@pytest.mark.distributed
def test_exact_results_take_deepspeeds_own(ranks: RankPool) -> None:
    assert ranks.run(2, gates_of_sections) == [["PlanMoEGate", "PlanMoEGate", "TopKGate", "TopKGate"]] * 2


def test_a_moe_layer_keeps_its_names() -> None:
    layer = MoE(HIDDEN, nn.Linear(HIDDEN, HIDDEN), num_experts=4, k=2)
    names = list(layer.state_dict())
    choose_gates([layer.deepspeed_moe.gate], CPU, exact=False)
    assert list(layer.state_dict()) == names


def test_times_are_kept() -> None:
    gate = quick(make_gate())
    gate.wall_clock_breakdown = True
    gate(make_tokens(40), None, True, False)
    assert gate.gate_time > 0
