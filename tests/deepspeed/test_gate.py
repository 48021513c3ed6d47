"""The router in few operations decides what DeepSpeed's decides, from the same random numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.moe import sharded_moe
from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import TopKGate
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from planmoe_ds.backend import decide_gate, gate_gradient
from planmoe_ds.integrations import deepspeed_gate
from planmoe_ds.integrations.deepspeed_gate import PlanMoEGate, quicken
from tests.deepspeed.training import Case, make_engine, two_layers
from tests.harness.ranks import RankPool

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
HIDDEN = 16
NAMES = ("balance loss", "capacity", "experts", "expert", "slot", "weight", "counts")


def make_gate(device: str, num_experts: int = 8, k: int = 2, factor: float = 1.0, **options: Any) -> TopKGate:
    torch.manual_seed(0)
    return TopKGate(HIDDEN, num_experts, k, factor, 2 * factor, min_capacity=2, **options).to(device)


def decide(gate: TopKGate, tokens: torch.Tensor, used_token: torch.Tensor | None = None) -> list[torch.Tensor]:
    """What the gate decides and, of a sum over weights and balance loss, the gradients of weights and tokens."""
    torch.manual_seed(1)
    gate.zero_grad()
    tokens = tokens.detach().requires_grad_()
    decision = gate(tokens, used_token, True, False)
    probe = torch.randn(decision[5].shape, generator=torch.Generator().manual_seed(2)).to(tokens.device)
    (decision[0] + (decision[5] * probe).sum()).backward()
    after = torch.rand(4, device=tokens.device)  # as many random numbers were taken
    found = [*map(torch.as_tensor, decision), after, gate.wg.weight.grad, tokens.grad]
    return [one.detach() for one in found if one is not None]


def compare(gate: TopKGate, tokens: torch.Tensor) -> None:
    """Decisions bit for bit; gradients to rounding, of what comes of them where nothing cancels."""
    assert type(gate) is TopKGate
    *stock, stock_grad, stock_tokens_grad = decide(gate, tokens)
    gate.__class__ = PlanMoEGate
    *ours, grad, tokens_grad = decide(gate, tokens)
    for name, one, other in zip((*NAMES, "random numbers"), stock, ours, strict=True):
        assert one.dtype == other.dtype, name
        assert torch.equal(one, other), name
    scale = 1e-5 if tokens.dtype == torch.float32 else 0.01
    for one, other in ((stock_grad, grad), (stock_tokens_grad, tokens_grad)):
        assert (one - other).abs().max() <= scale * max(1.0, float(one.abs().max()))


OPTIONS = [
    pytest.param({"k": 1}, id="top-1"),
    pytest.param({"k": 1, "use_rts": False}, id="top-1 without random token selection"),
    pytest.param({"k": 1, "noisy_gate_policy": "RSample"}, id="top-1 with sampling"),
    pytest.param({"k": 1, "noisy_gate_policy": "Jitter"}, id="top-1 with jitter"),
    pytest.param({"k": 2}, id="top-2"),
    pytest.param({"k": 2, "top2_2nd_expert_sampling": False}, id="top-2 without sampling the second"),
    pytest.param({"k": 1, "drop_tokens": False}, id="top-1 without dropping"),
    pytest.param({"k": 2, "drop_tokens": False}, id="top-2 without dropping"),
    pytest.param({"k": 4, "drop_tokens": False}, id="top-4 without dropping"),
    pytest.param({"k": 2, "noisy_gate_policy": "Jitter"}, id="top-2 with jitter"),
    pytest.param({"k": 2, "noisy_gate_policy": "RSample"}, id="top-2, a policy that only top-1 knows"),
    pytest.param({"k": 3}, id="top-3"),
    pytest.param({"k": 8}, id="all"),
    pytest.param({"k": 8, "num_experts": 64}, id="top-8 of 64"),
    pytest.param({"k": 6, "num_experts": 160}, id="top-6 of 160"),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("factor", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("options", OPTIONS)
def test_decides_what_deepspeed_decides(device: str, factor: float, options: dict[str, Any]) -> None:
    for num_tokens in (2, 100, 2500):
        tokens = torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(3)).to(device)
        compare(make_gate(device, factor=factor, **options), tokens)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_evaluation_bfloat16_and_equal_tokens(device: str, k: int) -> None:
    tokens = torch.randn(64, HIDDEN, generator=torch.Generator().manual_seed(3)).to(device)
    compare(make_gate(device, k=k).eval(), tokens)
    compare(make_gate(device, k=k).to(torch.bfloat16), tokens.to(torch.bfloat16))
    compare(make_gate(device, k=k, factor=0.5), tokens[:1].expand(64, HIDDEN))  # one expert gets all


@settings(deadline=None, max_examples=100)
@example(num_tokens=1024, num_experts=1, k=1, factor=0.5)
@given(
    num_tokens=st.integers(2, 80),
    num_experts=st.integers(1, 20),
    k=st.integers(1, 20),
    factor=st.floats(0.01, 5.0),
)
def test_any_shape(num_tokens: int, num_experts: int, k: int, factor: float) -> None:
    tokens = torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(num_tokens))
    compare(make_gate("cpu", num_experts, min(k, num_experts), factor), tokens)


@pytest.mark.parametrize("device", DEVICES)
def test_a_sum_too_small_to_divide_by(device: str) -> None:
    """Both of a token's likely experts are full: DeepSpeed divides by the least number, and so by none of its probs."""
    gate = make_gate(device, k=2, factor=0.3, top2_2nd_expert_sampling=False)
    with torch.no_grad():
        gate.wg.weight.zero_()
        gate.wg.weight[0, 0], gate.wg.weight[1, 0] = 40.0, 20.0
    tokens = torch.ones(32, HIDDEN, device=device)
    compare(gate, tokens)
    assert not decide(gate, tokens)[5][:, -1].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_not_a_number(device: str, k: int) -> None:
    gate, tokens = make_gate(device, k=k), torch.randn(20, HIDDEN, device=device)
    tokens[3] = float("nan")
    gate.__class__ = PlanMoEGate
    weight = decide(gate, tokens)[5]
    assert weight[:, 3].isnan().any()
    assert not weight[:, :3].isnan().any()


def test_what_it_leaves_to_deepspeed() -> None:
    tokens = torch.randn(12, HIDDEN)
    used = (torch.rand(12) < 0.5).long()
    gate = make_gate("cpu", k=1)
    stock = decide(gate, tokens, used)
    gate.__class__ = PlanMoEGate
    assert all(map(torch.equal, stock, decide(gate, tokens, used)))
    gate = make_gate("cpu")
    gate.__class__ = PlanMoEGate
    with torch.autocast("cpu", torch.bfloat16):
        assert gate(tokens, None, True, False)[5].shape == (2, 12)
    assert len(gate(tokens)) == 4  # dense, as older code asks for it
    gate = make_gate("cpu", k=1)
    gate.__class__ = PlanMoEGate
    with pytest.raises(AssertionError, match="min_capacity"):
        gate(tokens[:1], None, True, False)


# ---- when it takes over ----


def test_takes_over_without_a_trace() -> None:
    gate, before = make_gate("cpu"), torch.get_rng_state()
    calls: list[Any] = []
    gate.register_forward_hook(lambda *_: calls.append(1))
    quicken(gate, torch.device("cpu"))
    assert type(gate) is PlanMoEGate
    assert torch.equal(before, torch.get_rng_state())
    gate(torch.randn(4, HIDDEN), None, True, False)
    assert calls == [1]


def test_a_gate_of_ones_own_stays() -> None:
    class Own(TopKGate):
        pass

    gate = make_gate("cpu")
    gate.__class__ = Own
    quicken(gate, torch.device("cpu"))
    assert type(gate) is Own
    quicken(gate, torch.device("meta"))
    assert type(gate) is Own


def test_another_deepspeed_keeps_its_router(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = sharded_moe.top2gating

    def doubled(*args: Any, **kwargs: Any) -> Any:
        loss, *others = stock(*args, **kwargs)
        return 2 * loss, *others

    monkeypatch.setattr(sharded_moe, "top2gating", doubled)
    deepspeed_gate._decides_alike.cache_clear()
    gate = make_gate("cpu")
    with pytest.warns(UserWarning, match="router decides otherwise"):
        quicken(gate, torch.device("cpu"))
    assert type(gate) is TopKGate
    deepspeed_gate._decides_alike.cache_clear()


def gates_of_sections() -> list[str]:
    """The class of a layer's router without planmoe, with it, and with exact results asked for."""
    case = Case("gate", two_layers(k=2, ep_size=2))
    sections = (None, {"exactness": "reordered"}, {"exactness": "exact"})
    engines = [make_engine(case, section) for section in sections]
    return [type(next(m for m in e.module.modules() if isinstance(m, TopKGate))).__name__ for e in engines]


@pytest.mark.distributed
def test_exact_results_take_deepspeeds_own(ranks: RankPool) -> None:
    assert ranks.run(2, gates_of_sections) == [["TopKGate", "PlanMoEGate", "TopKGate"]] * 2


def test_a_moe_layer_keeps_its_names() -> None:
    layer = MoE(HIDDEN, nn.Linear(HIDDEN, HIDDEN), num_experts=4, k=2)
    names = list(layer.state_dict())
    quicken(layer.deepspeed_moe.gate, torch.device("cpu"))
    assert list(layer.state_dict()) == names


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
        (torch.zeros(1, 4), torch.zeros(2), "balance loss's gradient must be one float32"),
        (torch.zeros(1, 4), torch.zeros((), dtype=torch.float64), "balance loss's gradient must be one float32"),
        (torch.zeros(1, 4, device="meta"), torch.zeros(()), "gradients must be on cpu"),
    ],
)
def test_bad_gradients(weight_grad: torch.Tensor, loss_grad: torch.Tensor, words: str) -> None:
    found = decide_gate(torch.zeros(4, 3), top_k=1, capacity=1, samples=False, drops_at_random=False)
    with pytest.raises(ValueError, match=words):
        gate_gradient(found.expert, found.weight, found.probs, found.total, found.share, weight_grad, loss_grad)
