"""Experts as grouped GEMMs against each of them on its own rows."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from planmoe_ds.equal_experts import between, recognise, share_storage
from planmoe_ds.grouped import GroupedExperts


class SwiGlu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(64, 96, bias=False)
        self.up = nn.Linear(64, 96, bias=False)
        self.down = nn.Linear(96, 64, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.down(functional.silu(self.gate(tokens)) * self.up(tokens))


class Projection(nn.Linear):
    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return super().forward(tokens), None


class Weighted(nn.Module):
    """An expert that multiplies by its routes' weights, as Megatron's do."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.first, self.last = Projection(64, 192, bias), Projection(96, 64, bias)

    def forward(self, tokens: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, None]:
        gate, up = self.first(tokens)[0].chunk(2, dim=-1)
        hidden = (functional.silu(gate) * up * weights.unsqueeze(-1)).to(tokens.dtype)
        return self.last(hidden)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return 2 * self.outer(functional.gelu(self.inner(tokens)))


class Counting(nn.Module):
    """An expert that counts its calls, in a buffer or in an attribute."""

    def __init__(self, in_a_buffer: bool) -> None:
        super().__init__()
        self.body = gelu(False)
        if in_a_buffer:
            self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        else:
            self.calls = 0

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        output: torch.Tensor = self.body(tokens)
        return output


def gelu(bias: bool) -> nn.Module:
    return nn.Sequential(nn.Linear(64, 96, bias), nn.GELU(approximate="tanh"), nn.Linear(96, 64, bias))


KINDS = {"gelu": lambda: gelu(False), "gelu with biases": lambda: gelu(True), "swiglu": SwiGlu}
COUNTS = [7, 0, 33, 1, 0]


def probe_of(output: torch.Tensor) -> torch.Tensor:
    return torch.sin(torch.arange(output.numel(), device=output.device)).reshape(output.shape).to(output.dtype)


def run(grouped: GroupedExperts, rows: torch.Tensor, *, split: bool) -> list[torch.Tensor]:
    """Output, gradient of the rows, gradients of the parameters in their own order."""
    graph = grouped.run(rows, torch.tensor(COUNTS, device=rows.device).cumsum(0, dtype=torch.int32), keep=True)
    totals: list[torch.Tensor | None] = [None] * len(grouped.parameters)
    grad, _ = graph.input_gradient(probe_of(graph.output), grouped.parameters, totals, split=split, keep=False)
    if split:
        assert totals == [None] * len(totals)
        graph.weight_gradients(grouped.parameters, totals, keep=False)
    found = [total for total in totals if total is not None]
    assert len(found) == len(totals)
    return [graph.output, grad, *found]


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
    rows = torch.randn(sum(COUNTS), 64, device=device, dtype=dtype)
    wide = rows.double().requires_grad_()
    expected = torch.cat([module(part) for module, part in zip(doubles, wide.split(COUNTS), strict=True)])
    copies = dict(
        zip(
            map(id, (p for m in modules for p in m.parameters())),
            (p for m in doubles for p in m.parameters()),
            strict=True,
        )
    )
    inputs = [wide, *(copies[id(parameter)] for parameter in grouped.parameters)]
    wanted = torch.autograd.grad(expected, inputs, probe_of(expected), allow_unused=True)
    for mine, theirs in zip(run(grouped, rows, split=False), [expected, *wanted], strict=True):
        reference = torch.zeros_like(mine).double() if theirs is None else theirs
        assert mine.shape == reference.shape
        assert mine.dtype == dtype
        assert (mine.double() - reference).norm() <= rounding * reference.norm() + 1e-12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [False, True])
def test_on_the_cpu(kind: str, shared: bool) -> None:
    check(kind, "cpu", torch.float32, 1e-5, shared)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [False, True])
def test_on_the_gpu(kind: str, shared: bool) -> None:
    check(kind, "cuda", torch.bfloat16, 2e-2, shared)


def check_weighted(device: str, dtype: torch.dtype, rounding: float, shared: bool) -> None:
    torch.manual_seed(0)
    modules = [Weighted().to(device, dtype) for _ in COUNTS]
    if shared:
        flat = torch.stack([module.first.weight.detach() for module in modules])
        for module, values in zip(modules, flat, strict=True):
            module.first.weight.data = values
    grouped = between(modules, "first", "last")
    assert grouped is not None
    rows = torch.randn(sum(COUNTS), 64, device=device, dtype=dtype)
    scales = torch.rand(sum(COUNTS), device=device)
    graph = grouped.run(rows, torch.tensor(COUNTS, device=device).cumsum(0, dtype=torch.int32), scales, keep=True)
    probe = probe_of(graph.output)
    totals: list[torch.Tensor | None] = [None] * len(grouped.parameters)
    found = [graph.output, *graph.input_gradient(probe, grouped.parameters, totals, split=True, keep=False)]
    graph.weight_gradients(grouped.parameters, totals, keep=False)

    doubles = [copy.deepcopy(module).double() for module in modules]
    leaves = rows.double().requires_grad_(), scales.double().requires_grad_()
    parts = zip(doubles, *(leaf.split(COUNTS) for leaf in leaves), strict=True)
    expected = torch.cat([module(*given)[0] for module, *given in parts])
    weights = [getattr(module, name).weight for name in ("first", "last") for module in doubles]
    wanted = torch.autograd.grad(expected, [*leaves, *weights], probe.double())
    for mine, theirs in zip([*found, *totals], [expected, *wanted], strict=True):
        assert mine is not None
        assert mine.shape == theirs.shape
        assert (mine.double() - theirs).norm() <= rounding * theirs.norm() + 1e-12


@pytest.mark.parametrize("shared", [False, True])
def test_experts_that_take_weights(shared: bool) -> None:
    check_weighted("cpu", torch.float32, 1e-5, shared)


@pytest.mark.gpu
@pytest.mark.parametrize("shared", [False, True])
def test_experts_that_take_weights_on_the_gpu(shared: bool) -> None:
    check_weighted("cuda", torch.bfloat16, 2e-2, shared)


def test_no_groups_between_projections_of_other_experts() -> None:
    assert between([Weighted(bias=True) for _ in COUNTS], "first", "last") is None
    frozen = [Weighted(), Weighted()]
    frozen[1].last.weight.requires_grad_(False)
    assert between(frozen, "first", "last") is None
    more = Weighted()
    more.scale = nn.Parameter(torch.ones(1))
    assert between([more], "first", "last") is None


def test_data_and_weight_gradients_apart() -> None:
    grouped = recognise([gelu(True) for _ in COUNTS])
    assert grouped is not None
    rows = torch.randn(sum(COUNTS), 64)
    for mine, theirs in zip(run(grouped, rows, split=True), run(grouped, rows, split=False), strict=True):
        assert torch.equal(mine, theirs)


def test_a_second_backward_finds_the_same() -> None:
    grouped = recognise([gelu(True) for _ in COUNTS])
    assert grouped is not None
    rows, ends = torch.randn(sum(COUNTS), 64), torch.tensor(COUNTS).cumsum(0, dtype=torch.int32)
    graph = grouped.run(rows, ends, keep=True)
    found = []
    for keep in (True, False):
        totals: list[torch.Tensor | None] = [None] * len(grouped.parameters)
        grad, _ = graph.input_gradient(torch.ones_like(rows), grouped.parameters, totals, split=False, keep=keep)
        found.append([grad, *totals])
    for first, second in zip(*found, strict=True):
        assert first is not None
        assert second is not None
        assert torch.equal(first, second)


def test_weights_that_move_are_found_again() -> None:
    modules = [gelu(False) for _ in COUNTS]
    share_storage(modules)
    grouped = recognise(modules)
    assert grouped is not None
    rows = torch.randn(sum(COUNTS), 64)
    before = run(grouped, rows, split=False)[0]
    moved = [(parameter.data * 2).clone() for parameter in grouped.parameters]
    for parameter, values in zip(grouped.parameters, moved, strict=True):
        parameter.data = values
    expected = torch.cat([module(part) for module, part in zip(modules, rows.split(COUNTS), strict=True)])
    after = run(grouped, rows, split=False)[0]
    assert torch.allclose(after, expected, atol=1e-5)
    assert not torch.allclose(after, before)


def test_what_was_exchanged_is_noticed() -> None:
    modules = [SwiGlu() for _ in COUNTS]
    grouped = recognise(modules)
    assert grouped is not None
    assert grouped.is_current()
    modules[1].load_state_dict({name: one.clone() for name, one in modules[1].state_dict().items()})
    assert grouped.is_current()
    modules[1].load_state_dict({name: one.clone() for name, one in modules[1].state_dict().items()}, assign=True)
    assert not grouped.is_current()
    grouped = recognise(modules)
    assert grouped is not None
    modules[2].up = nn.Linear(64, 96, bias=False)
    assert not grouped.is_current()
    assert not any(grouped._hooks)
    modules[1].down.register_forward_hook(lambda *_: None)
    assert any(grouped._hooks)


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


@pytest.mark.parametrize("in_a_buffer", [False, True])
def test_what_counts_its_calls_is_left_alone(in_a_buffer: bool) -> None:
    modules = [Counting(in_a_buffer) for _ in range(2)]
    assert recognise(modules) is None
    assert [int(module.calls) for module in modules] == [0, 0]
    modules[0](torch.zeros(1, 64))
    assert int(modules[0].calls) == 1


def test_mode_and_frozen_parameters_are_noticed() -> None:
    """An expert that is other in training, or whose parameters no longer train, is looked at again."""
    modules = [SwiGlu() for _ in COUNTS]
    grouped = recognise(modules)
    assert grouped is not None
    for module in modules:
        module.eval()
    assert not grouped.is_current()
    grouped = recognise(modules)
    assert grouped is not None
    assert grouped.is_current()
    modules[1].down.weight.requires_grad_(False)
    assert not grouped.is_current()
    assert recognise(modules) is None
