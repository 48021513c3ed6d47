"""Experts that are equal MLPs, run as one grouped GEMM per projection instead of one after the other.

equal_experts.py finds them. Every expert keeps its own parameters.

Shape legend: L experts of this rank, R rows of the experts' buffer, H hidden size, F width of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import nn

from planmoe_ds.gradients import Totals, add_gradients

_ALIGNMENT = 8  # bf16 values: sixteen bytes


@dataclass(frozen=True)
class GroupedExperts:
    """L equal MLPs.

    Names of their Linear modules; gated: of SwiGLU's second one; activation: row by row, with the routes' weights as a
    second argument where run() gets them.
    """

    modules: tuple[nn.Module, ...]
    inner: str
    outer: str
    gated: str | None  # what the activation's output is multiplied with
    activation: Callable[..., torch.Tensor]

    def __post_init__(self) -> None:
        """What is exchanged later is not what was found."""
        assert self._found is not None
        assert self._training is not None

    @cached_property
    def names(self) -> list[str]:
        """The Linear modules, inputs first."""
        return [name for name in (self.inner, self.gated, self.outer) if name is not None]

    def weights(self, name: str) -> list[nn.Parameter]:
        """The weights of one projection, expert by expert."""
        return self._weights[name]

    def biases(self, name: str) -> list[nn.Parameter] | None:
        """Its biases."""
        return self._biases[name]

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """All of them, projection by projection, weights first."""
        found: list[nn.Parameter] = []
        for name in self.names:
            found += self.weights(name)
            found += self.biases(name) or []
        return found

    @cached_property
    def _linears(self) -> dict[str, list[Any]]:
        found: dict[str, Any] = {name: [module.get_submodule(name) for module in self.modules] for name in self.names}
        return found

    @cached_property
    def _weights(self) -> dict[str, list[nn.Parameter]]:
        return {name: [linear.weight for linear in linears] for name, linears in self._linears.items()}

    @cached_property
    def _biases(self) -> dict[str, list[nn.Parameter] | None]:
        return {
            name: None if linears[0].bias is None else [linear.bias for linear in linears]
            for name, linears in self._linears.items()
        }

    @cached_property
    def _training(self) -> list[bool]:
        """An expert that computes otherwise in training was looked at in this mode."""
        return [module.training for module in self.modules]

    @cached_property
    def _found(self) -> list[tuple[dict[str, Any], str, nn.Module, dict[str, Any], Any, Any, tuple[bool, bool]]]:
        found = []
        for name, linears in self._linears.items():
            *path, key = name.split(".")
            for module, linear in zip(self.modules, linears, strict=True):
                siblings = module.get_submodule(".".join(path))._modules
                weight, bias = linear.weight, linear.bias
                found.append((siblings, key, linear, linear._parameters, weight, bias, _train(weight, bias)))
        return found

    @cached_property
    def _hooks(self) -> tuple[dict[int, Any], ...]:
        return tuple(hooks for module in self.modules for hooks in hooks_of(module))

    def is_current(self) -> bool:
        """Whether the Linear modules and their parameters are still those that were found, and train as then; cheap."""
        return self._training == [module.training for module in self.modules] and all(
            siblings.get(key) is linear
            and own.get("weight") is weight
            and own.get("bias") is bias
            and trains == _train(weight, bias)
            for siblings, key, linear, own, weight, bias, trains in self._found
        )

    def can_run(self, buffer: torch.Tensor) -> bool:
        """Whether this device has a grouped GEMM for these sizes and dtypes, and nobody watches the modules."""
        if not buffer.is_cuda or buffer.shape[0] == 0 or not hasattr(torch, "_grouped_mm"):
            return False
        if not _is_recent(buffer.device) or torch.is_autocast_enabled("cuda"):
            return False
        first = [self.weights(name)[0] for name in self.names]
        return all(
            weight.dtype == buffer.dtype == torch.bfloat16 and not any(size % _ALIGNMENT for size in weight.shape)
            for weight in first
        ) and not any(self._hooks)

    def run(
        self, buffer: torch.Tensor, ends: torch.Tensor, route_weights: torch.Tensor | None = None, *, keep: bool
    ) -> GroupedGraph:
        """Buffer [R, H], the experts' rows one after the other up to ends, int32 [L]; keep: a backward will follow.

        route_weights: [R], where the experts multiply by them.
        """
        leaves = [self._project(name, buffer, ends) for name in self.names[:-1]]
        scales = [] if route_weights is None else [route_weights.detach()]
        with torch.set_grad_enabled(keep):
            for leaf in (*leaves, *scales):
                leaf.requires_grad_(keep)
            hidden = self.activation(leaves[0], *scales)
            hidden = hidden if len(leaves) == 1 else hidden * leaves[1]
        output = self._project(self.names[-1], hidden.detach(), ends)
        return GroupedGraph(self, buffer, ends, leaves, scales, hidden, output)

    def _project(self, name: str, rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            values = grouped_mm(rows, self.stacked(name).transpose(1, 2), ends)
            return _add_bias(values, self.biases(name), ends)

    def stacked(self, name: str) -> torch.Tensor:
        """The weights of a projection, [L, ...], looked up again where they have moved."""
        weights = self.weights(name)
        places = [weight.data_ptr() for weight in weights]
        if self._views.get(name, (None, None))[0] != places:
            view = in_place(weights)
            if view is None:
                return torch.stack([weight.detach() for weight in weights])
            self._views[name] = (places, view)
        return self._views[name][1]

    @cached_property
    def _views(self) -> dict[str, tuple[list[int], torch.Tensor]]:
        return {}


@dataclass
class GroupedGraph:
    """One run, and its backward in two parts: what gradients.ExpertGraph is for experts that autograd runs back.

    leaves: what the activation, and the gate, saw; scales: the routes' weights, if the experts take them; hidden: with
    the graph from these. The experts' weights are looked up again in backward: copies of what lies apart would take
    their space until then.
    """

    experts: GroupedExperts
    buffer: torch.Tensor
    ends: torch.Tensor
    leaves: list[torch.Tensor]
    scales: list[torch.Tensor]
    hidden: torch.Tensor
    output: torch.Tensor
    waiting: list[torch.Tensor] | None = None  # gradients of the leaves, then of the output

    def input_gradient(
        self, grad: torch.Tensor, parameters: Sequence[torch.Tensor], totals: Totals, *, split: bool, keep: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Gradients of the buffer and of the routes' weights; adds the parameters' to `totals` unless `split`.

        keep: another backward follows.
        """
        grad = grad.to(self.output.dtype).contiguous()
        *inputs, last = self.experts.names
        grad_hidden = grouped_mm(grad, self.experts.stacked(last), self.ends)
        found = torch.autograd.grad(self.hidden, [*self.leaves, *self.scales], grad_hidden, retain_graph=keep)
        grad_leaves, grad_scales = found[: len(self.leaves)], found[len(self.leaves) :]
        total = None
        for name, grad_leaf in zip(inputs, grad_leaves, strict=True):
            part = grouped_mm(grad_leaf, self.experts.stacked(name), self.ends)
            total = part if total is None else total.add_(part)
        assert total is not None
        self.waiting = [*grad_leaves, grad]
        if not split:
            self.weight_gradients(parameters, totals, keep=keep)
        return total, grad_scales[0] if grad_scales else None

    def weight_gradients(self, _parameters: Sequence[torch.Tensor], totals: Totals, *, keep: bool) -> None:
        """Add what input_gradient() left for later, in the order of GroupedExperts.parameters."""
        del keep  # nothing is freed here that another backward needs
        assert self.waiting is not None
        inputs = [self.buffer] * len(self.leaves) + [self.hidden.detach()]
        place = 0
        for name, rows, grad in zip(self.experts.names, inputs, self.waiting, strict=True):
            found = list(grouped_outer(grad, rows, self.ends).unbind())
            if self.experts.biases(name) is not None:
                ones = rows.new_ones((rows.shape[0], _ALIGNMENT))
                found += grouped_outer(ones, grad, self.ends)[:, 0].contiguous().unbind()
            for gradient in found:
                totals[place] = add_gradients(totals[place], gradient)
                place += 1
        self.waiting = None


@cache
def _is_recent(device: torch.device) -> bool:
    """Whether torch's grouped GEMM runs there."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


def hooks_of(module: nn.Module) -> Iterator[dict[int, Any]]:
    """Where those of the module and its parts are kept, now and later."""
    for part in module.modules():
        yield from (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)


def is_watched(module: nn.Module) -> bool:
    """Whether somebody's hooks wait for calls of the module or its parts."""
    return any(hooks_of(module))


def in_place(parameters: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """[L, ...] over parameters that lie at equal distances in one storage, as in an optimizer's flat buffer."""
    first = parameters[0].detach()
    if len(parameters) == 1:
        return first.unsqueeze(0)
    address = first.data_ptr()
    step = parameters[1].data_ptr() - address
    size = first.element_size()
    storage = first.untyped_storage().data_ptr()
    regular = (
        step >= first.numel() * size
        and step % 16 == 0
        and all(
            parameter.data_ptr() == address + place * step
            and parameter.is_contiguous()
            and parameter.untyped_storage().data_ptr() == storage
            for place, parameter in enumerate(parameters)
        )
    )
    if not regular:
        return None
    return first.as_strided((len(parameters), *first.shape), (step // size, *first.stride()), first.storage_offset())


def _train(weight: Any, bias: Any) -> tuple[bool, bool]:
    return weight.requires_grad, bias is not None and bias.requires_grad


def stacked(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """[L, ...]: where the parameters lie, or a copy where they lie apart."""
    found = in_place(parameters)
    return torch.stack([parameter.detach() for parameter in parameters]) if found is None else found


def grouped_mm(rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Rows [R, A] of group l, up to ends[l], times weights[l] [A, B] -> [R, B]."""
    if rows.is_cuda:
        return torch._grouped_mm(rows, weights, offs=ends)
    out = rows.new_empty((rows.shape[0], weights.shape[2]))
    for first, last, weight in zip([0, *ends.tolist()], ends.tolist(), weights, strict=False):
        torch.mm(rows[first:last], weight, out=out[first:last])
    return out


def grouped_outer(left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Left [R, A], right [R, B] -> [L, A, B]: left of each group, transposed, times right; zero for empty groups."""
    if left.is_cuda:
        return torch._grouped_mm(left.t(), right, offs=ends)
    bounds = list(zip([0, *ends.tolist()], ends.tolist(), strict=False))
    return torch.stack([left[first:last].t() @ right[first:last] for first, last in bounds])


def _add_bias(rows: torch.Tensor, biases: Sequence[torch.Tensor] | None, ends: torch.Tensor) -> torch.Tensor:
    if biases is None:
        return rows
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    return rows.add_(torch.repeat_interleave(stacked(biases), counts, dim=0, output_size=rows.shape[0]))
