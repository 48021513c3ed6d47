"""The router in few operations decides what DeepSpeed's decides, from the same random numbers."""

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
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import planmoe_ds
from planmoe_ds.backend import decide_gate, gate_gradient
from planmoe_ds.integrations.deepspeed_gate import PlanMoEGate, choose_gates
from tests.deepspeed.training import Case, make_engine, two_layers
from tests.harness.ranks import RankPool

CPU = torch.device("cpu")
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
HIDDEN = 16
NAMES = ("balance loss", "capacity", "experts", "expert", "slot", "weight", "counts", "next random numbers")


def make_gate(device: str = "cpu", num_experts: int = 8, k: int = 2, factor: float = 1.0, **options: Any) -> TopKGate:
    torch.manual_seed(0)
    return TopKGate(HIDDEN, num_experts, k, factor, 2 * factor, min_capacity=2, **options).to(device)


def quick(gate: TopKGate) -> TopKGate:
    gate.__class__ = PlanMoEGate
    return gate


def make_tokens(number: int, device: str = "cpu") -> torch.Tensor:
    return torch.randn(number, HIDDEN, generator=torch.Generator().manual_seed(3)).to(device)


def decide(gate: TopKGate, tokens: torch.Tensor, used_token: torch.Tensor | None = None) -> list[torch.Tensor]:
    """What the gate decides, and the random numbers that come after it."""
    torch.manual_seed(1)
    decision = gate(tokens, used_token, True, False)
    return [*map(torch.as_tensor, decision), torch.rand(4, device=tokens.device)]


def gradients(gate: TopKGate, tokens: torch.Tensor, decision: list[torch.Tensor]) -> list[torch.Tensor | None]:
    """Of weight and tokens, from those of the routes' weights and of the balance loss."""
    gate.zero_grad()
    tokens.grad = None
    probe = torch.randn(decision[5].shape, generator=torch.Generator().manual_seed(2)).to(tokens.device)
    (decision[0] + (decision[5] * probe).sum()).backward()
    return [gate.wg.weight.grad, tokens.grad]


def compare(gate: TopKGate, tokens: torch.Tensor) -> None:
    """Decisions bit for bit; gradients to rounding, of what comes of them where nothing cancels."""
    assert type(gate) is TopKGate
    tokens = tokens.detach().requires_grad_()
    stock = decide(gate, tokens)
    stock_grads = gradients(gate, tokens, stock)
    ours = decide(quick(gate), tokens)
    grads = gradients(gate, tokens, ours)
    for name, one, other in zip(NAMES, stock, ours, strict=True):
        assert (one.dtype, one.device) == (other.dtype, other.device), name
        assert torch.equal(one, other), name
    scale = 1e-5 if tokens.dtype == torch.float32 else 0.01
    for expected, found in zip(stock_grads, grads, strict=True):
        assert expected is not None
        assert found is not None
        assert (expected - found).abs().max() <= scale * max(1.0, float(expected.abs().max()))


OPTIONS = [
    pytest.param({"k": 1}, id="top-1"),
    pytest.param({"k": 1, "use_rts": False}, id="top-1 without random token selection"),
    pytest.param({"k": 1, "noisy_gate_policy": "RSample"}, id="top-1 with sampling"),
    pytest.param({"k": 1, "noisy_gate_policy": "Jitter"}, id="top-1 with jitter"),
    pytest.param({"k": 1, "drop_tokens": False}, id="top-1 without dropping"),
    pytest.param({"k": 2}, id="top-2"),
    pytest.param({"k": 2, "top2_2nd_expert_sampling": False}, id="top-2 without sampling the second"),
    pytest.param({"k": 2, "noisy_gate_policy": "Jitter"}, id="top-2 with jitter"),
    pytest.param({"k": 2, "noisy_gate_policy": "RSample"}, id="top-2, a policy that only top-1 knows"),
    pytest.param({"k": 2, "drop_tokens": False}, id="top-2 without dropping"),
    pytest.param({"k": 3}, id="top-3"),
    pytest.param({"k": 4, "drop_tokens": False}, id="top-4 without dropping"),
    pytest.param({"k": 8}, id="all"),
    pytest.param({"k": 8, "num_experts": 64}, id="top-8 of 64"),
    pytest.param({"k": 6, "num_experts": 160}, id="top-6 of 160"),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("factor", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("options", OPTIONS)
def test_decides_what_deepspeed_decides(device: str, factor: float, options: dict[str, Any]) -> None:
    for num_tokens in (2, 100, 2500):
        compare(make_gate(device, factor=factor, **options), make_tokens(num_tokens, device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_evaluation_bfloat16_and_equal_tokens(device: str, k: int) -> None:
    tokens = make_tokens(64, device)
    compare(make_gate(device, k=k).eval(), tokens)
    compare(make_gate(device, k=k).to(torch.bfloat16), tokens.to(torch.bfloat16))
    compare(make_gate(device, k=k, factor=0.5), tokens[:1].expand(64, HIDDEN))  # one expert gets all
    compare(make_gate(device, k=k), make_tokens(128, device)[::2])  # not contiguous


@settings(deadline=None, max_examples=100)
@example(num_tokens=1024, num_experts=1, k=1, factor=0.5)
@example(num_tokens=5, num_experts=1, k=2, factor=0.5)
@given(
    num_tokens=st.integers(2, 80),
    num_experts=st.integers(1, 20),
    k=st.integers(1, 20),
    factor=st.floats(0.01, 5.0),
)
def test_any_shape(num_tokens: int, num_experts: int, k: int, factor: float) -> None:
    k = k if k <= 2 else min(k, num_experts)
    compare(make_gate("cpu", num_experts, k, factor), make_tokens(num_tokens))


@pytest.mark.parametrize("device", DEVICES)
def test_a_total_too_small_to_divide_by(device: str) -> None:
    """Both of a token's likely experts are full: DeepSpeed divides by the least number, and so by none of its probs."""
    gate = make_gate(device, factor=0.3, top2_2nd_expert_sampling=False)
    with torch.no_grad():
        gate.wg.weight.zero_()
        gate.wg.weight[0, 0], gate.wg.weight[1, 0] = 40.0, 20.0
    tokens = torch.ones(32, HIDDEN, device=device)
    compare(gate, tokens)
    assert not decide(gate, tokens)[5][:, -1].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("drop_tokens", [True, False])
def test_both_routes_to_one_expert(device: str, drop_tokens: bool) -> None:
    """All other logits are -inf: a token's second route goes to the first expert as well."""
    gate = make_gate(device, drop_tokens=drop_tokens, top2_2nd_expert_sampling=False)
    with torch.no_grad():
        gate.wg.weight[1:] = -float("inf")
        gate.wg.weight[0] = 1
    tokens = torch.ones(6, HIDDEN, device=device)
    stock, ours = decide(gate, tokens), decide(quick(gate), tokens)
    assert all(torch.equal(one, other) for one, other in zip(stock[1:], ours[1:], strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("factor", [0.3, 4.0])
def test_not_a_number(device: str, k: int, factor: float) -> None:
    """Also of tokens that are dropped: a token of NaN becomes NaN."""
    gate, tokens = make_gate(device, k=k, factor=factor, top2_2nd_expert_sampling=False), make_tokens(40, device)
    tokens[3::4] = float("nan")
    stock, ours = decide(gate, tokens), decide(quick(gate), tokens)
    assert ours[5].isnan().any()
    for name, one, other in zip(NAMES, stock, ours, strict=True):
        assert torch.equal(one.isnan(), other.isnan()), name
        assert torch.equal(one.nan_to_num(), other.nan_to_num()), name


# ---- gradients ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("used", [0, 5])
def test_one_output_used_alone(device: str, used: int) -> None:
    found = []
    gate = make_gate(device, k=2, factor=0.5)
    for kind in (TopKGate, PlanMoEGate):
        gate.__class__ = kind
        gate.zero_grad()
        decide(gate, make_tokens(30, device))[used].square().sum().backward(retain_graph=True)
        assert gate.wg.weight.grad is not None
        found.append(gate.wg.weight.grad.clone())
    assert torch.allclose(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_frozen_parts_and_outputs_that_are_changed() -> None:
    tokens = make_tokens(30)
    gate = quick(make_gate())
    gate.wg.weight.requires_grad_(requires_grad=False)
    assert not any(value.requires_grad for value in decide(gate, tokens))
    tokens.requires_grad_()
    decision = decide(gate, tokens)
    decision[5].mul_(2)  # as DeepSpeed's own, it may be changed
    _, grad = gradients(gate, tokens, decision)
    assert gate.wg.weight.grad is None
    assert grad is not None
    decide(gate, tokens)[1].add_(100)
    assert int(decide(gate, tokens)[1]) == int(decision[1])


@pytest.mark.parametrize("kind", [TopKGate, PlanMoEGate])
def test_a_weight_that_is_exchanged_before_backward(kind: type[TopKGate]) -> None:
    """Gradients of the tokens are of the numbers that were there in forward."""
    found = []
    for exchanged in (False, True):
        gate, tokens = make_gate(), make_tokens(30).requires_grad_()
        gate.__class__ = kind
        decision = decide(gate, tokens)
        if exchanged:
            gate.wg.weight.data = torch.zeros_like(gate.wg.weight)
        found.append(gradients(gate, tokens, decision)[1])
    assert found[0] is not None
    assert found[1] is not None
    assert torch.equal(found[0], found[1])


def test_backward_twice() -> None:
    gate = quick(make_gate())
    weight = decide(gate, make_tokens(30))[5]
    for _ in range(2):
        weight.square().sum().backward(retain_graph=True)
    assert gate.wg.weight.grad is not None
    twice = gate.wg.weight.grad.clone()
    gate.zero_grad()
    weight.square().sum().backward()
    assert torch.equal(twice, 2 * gate.wg.weight.grad)


# ---- what it leaves to DeepSpeed ----


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


# ---- bad input ----


@pytest.mark.parametrize(
    ("logits", "options", "words"),
    [
        (torch.zeros(4), {}, "logits must be contiguous float32"),
        (torch.zeros(4, 3, dtype=torch.float64), {}, "logits must be contiguous float32"),
        (torch.zeros(3, 4).t(), {}, "logits must be contiguous float32"),
        (torch.zeros(4, 3), {"top_k": 4}, "top-4 of 3 experts"),
        (torch.zeros(4, 3), {"top_k": 0}, "top-0 of 3 experts"),
        (torch.zeros(4, 3), {"capacity": -2}, "capacity is -2"),
        (torch.zeros(4, 3, device="meta"), {}, "no kernels of the router for tensors on meta"),
    ],
)
def test_bad_logits(logits: torch.Tensor, options: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        decide_gate(logits, **{"top_k": 1, "capacity": 1, "samples": False, "drops_at_random": False, **options})


@pytest.mark.parametrize(
    ("weight_grad", "loss_grad", "words"),
    [
        (torch.zeros(2, 4), torch.zeros(()), "weights' gradient must be float32"),
        (torch.zeros(1, 4, dtype=torch.float16), torch.zeros(()), "weights' gradient must be float32"),
        (torch.zeros(1, 4), torch.zeros(2), "balance loss's gradient must be float32"),
        (torch.zeros(1, 4), torch.zeros((), dtype=torch.float64), "balance loss's gradient must be float32"),
        (torch.zeros(1, 4, device="meta"), torch.zeros(()), "on cpu, got"),
    ],
)
def test_bad_gradients(weight_grad: torch.Tensor, loss_grad: torch.Tensor, words: str) -> None:
    found = decide_gate(torch.zeros(4, 3), top_k=1, capacity=1, samples=False, drops_at_random=False)
    with pytest.raises(ValueError, match=words):
        gate_gradient(found.expert, found.probs, found.total, found.share, weight_grad, loss_grad)
