"""The router in few operations decides what DeepSpeed's decides, from the same random numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.moe.sharded_moe import TopKGate
from hypothesis import example, given, settings
from hypothesis import strategies as st

from planmoe_ds.backend import decide_gate, gate_gradient
from planmoe_ds.integrations.deepspeed_gate import PlanMoEGate
from tests.deepspeed.gates import DEVICES, HIDDEN, NAMES, compare, decide, gradients, make_gate, make_tokens, quick

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


@settings(max_examples=100)
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
