"""Routers of DeepSpeed, what they decide, and how two of them compare."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.moe.sharded_moe import TopKGate

from planmoe_ds.integrations.deepspeed_gate import PlanMoEGate

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
HIDDEN = 16
NAMES = ("balance loss", "capacity", "experts", "expert", "slot", "weight", "counts", "next random numbers")


def make_gate(device: str = "cpu", num_experts: int = 8, k: int = 2, factor: float = 1.0, **options: Any) -> TopKGate:
    """A router of HIDDEN numbers per token, on the device, the same every time."""
    torch.manual_seed(0)
    return TopKGate(HIDDEN, num_experts, k, factor, 2 * factor, min_capacity=2, **options).to(device)


def quick(gate: TopKGate) -> TopKGate:
    """The same gate, in few operations."""
    gate.__class__ = PlanMoEGate
    return gate


def make_tokens(number: int, device: str = "cpu") -> torch.Tensor:
    """[number, HIDDEN], the same every time."""
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
