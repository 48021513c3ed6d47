"""Experts as grouped GEMMs against each of them on its own rows."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from planmoe_ds.grouped import recognise, share_storage


class SwiGlu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(64, 96, bias=False)
        self.up = nn.Linear(64, 96, bias=False)
        self.down = nn.Linear(96, 64, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.down(functional.silu(self.gate(tokens)) * self.up(tokens))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return 2 * self.outer(functional.gelu(self.inner(tokens)))


def gelu(bias: bool) -> nn.Module:
    return nn.Sequential(nn.Linear(64, 96, bias), nn.GELU(approximate="tanh"), nn.Linear(96, 64, bias))


KINDS = {"gelu": lambda: gelu(False), "gelu with biases": lambda: gelu(True), "swiglu": SwiGlu}
COUNTS = [7, 0, 33, 1, 0]


def gradients(
    modules: list[nn.Module], rows: torch.Tensor, output: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    parameters = [parameter for module in modules for parameter in module.parameters()]
    probe = torch.sin(torch.arange(output.numel(), device=output.device)).reshape(output.shape).to(output.dtype)
    found = torch.autograd.grad(output, [rows, *parameters], probe, allow_unused=True)
    zeros = [
        torch.zeros_like(parameter) if grad is None else grad
        for grad, parameter in zip(found[1:], parameters, strict=True)
    ]
    return found[0], zeros


def check(kind: str, device: str, dtype: torch.dtype, rounding: float, shared: bool) -> None:
    torch.manual_seed(0)
    modules = [KINDS[kind]().to(device, dtype) for _ in COUNTS]
    doubles = [copy.deepcopy(module).double() for module in modules]
    if shared:
        before = [parameter for module in modules for parameter in module.parameters()]
        assert share_storage(modules)
        assert all(old is new for old, new in zip(before, (p for m in modules for p in m.parameters()), strict=True))
    grouped = recognise(modules)
    assert grouped is not None
    rows = torch.randn(sum(COUNTS), 64, device=device, dtype=dtype).requires_grad_()
    wide = rows.detach().double().requires_grad_()
    expected = torch.cat([module(part) for module, part in zip(doubles, wide.split(COUNTS), strict=True)])
    output = grouped.run(rows, torch.tensor(COUNTS, device=device).cumsum(0))
    pairs = [(output, expected)]
    got, want = gradients(modules, rows, output), gradients(doubles, wide, expected)
    pairs += [(got[0], want[0]), *zip(got[1], want[1], strict=True)]
    for mine, theirs in pairs:
        assert mine.shape == theirs.shape
        assert mine.dtype == dtype
        assert (mine.double() - theirs).norm() <= rounding * theirs.norm() + 1e-12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [False, True])
def test_on_the_cpu(kind: str, shared: bool) -> None:
    check(kind, "cpu", torch.float32, 1e-5, shared)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [False, True])
def test_on_the_gpu(kind: str, shared: bool) -> None:
    check(kind, "cuda", torch.bfloat16, 2e-2, shared)


def test_data_and_weight_gradients_apart() -> None:
    modules = [gelu(True) for _ in COUNTS]
    grouped = recognise(modules)
    assert grouped is not None
    rows = torch.randn(sum(COUNTS), 64).requires_grad_()
    output = grouped.run(rows, torch.tensor(COUNTS).cumsum(0))
    parameters = [parameter for module in modules for parameter in module.parameters()]
    together = torch.autograd.grad(output, [rows, *parameters], torch.ones_like(output), retain_graph=True)
    first = torch.autograd.grad(output, [rows], torch.ones_like(output), retain_graph=True)
    rest = torch.autograd.grad(output, parameters, torch.ones_like(output))
    for mine, theirs in zip([*first, *rest], together, strict=True):
        assert torch.equal(mine, theirs)


def test_what_is_not_recognised() -> None:
    assert recognise([Scaled(), Scaled()]) is None
    assert recognise([gelu(True), gelu(False)]) is None
    assert recognise([gelu(True), SwiGlu()]) is None
    hooked = [gelu(True), gelu(True)]
    hooked[1][0].register_forward_hook(lambda *_: None)
    assert recognise(hooked) is None
    frozen = [gelu(True), gelu(True)]
    frozen[0][0].weight.requires_grad_(False)
    assert recognise(frozen) is None
    one = gelu(True)
    assert recognise([one, one]) is None
    assert recognise([nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4))] * 1) is None
