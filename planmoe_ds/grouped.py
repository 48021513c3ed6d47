"""Experts that are equal MLPs, run as one grouped GEMM per projection instead of one after the other.

Recognised by tracing, not by name: Linear - activation - Linear, and SwiGLU's (activation(gate) * up) - down; others
are told of, see between(). Anything else runs as it was written. Every expert keeps its own parameters.

Shape legend: L experts of this rank, R rows of the experts' buffer, H hidden size, F width of the MLP.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from planmoe_ds.gradients import Totals, add_gradients

_ACTIVATIONS = (nn.GELU, nn.SiLU, nn.ReLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.Mish)
_FUNCTIONS = (functional.gelu, functional.silu, functional.relu, torch.relu, torch.tanh, torch.sigmoid)
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

    def can_run(self, buffer: torch.Tensor) -> bool:
        """Whether this device has a grouped GEMM for these sizes and dtypes, and nobody watches the modules."""
        if not buffer.is_cuda or buffer.shape[0] == 0 or not hasattr(torch, "_grouped_mm"):
            return False
        if torch.cuda.get_device_capability(buffer.device) < (9, 0) or torch.is_autocast_enabled("cuda"):
            return False
        first = [self.weights(name)[0] for name in self.names]
        return all(
            weight.dtype == buffer.dtype == torch.bfloat16 and not any(size % _ALIGNMENT for size in weight.shape)
            for weight in first
        ) and not _is_watched(self.modules[0])

    def run(
        self, buffer: torch.Tensor, ends: torch.Tensor, route_weights: torch.Tensor | None = None, *, keep: bool
    ) -> GroupedGraph:
        """Buffer [R, H], the experts' rows one after the other up to ends [L]; keep: a backward will follow.

        route_weights: [R], where the experts multiply by them.
        """
        ends = ends.to(torch.int32)
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
            view = _in_place(weights)
            if view is None:
                return stacked(weights)
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


def recognise(modules: Sequence[nn.Module]) -> GroupedExperts | None:
    """The experts as grouped ones, or None where they are not equal MLPs."""
    return _match(modules) if _are_alike(modules) else None


def between(modules: Sequence[nn.Module], inner: str, outer: str) -> GroupedExperts | None:
    """The same for MLPs that are no more than a first and a last projection of these names, and what lies between.

    Projections multiply by `weight` [out, in] and return (values, None); what lies between is the module's forward
    without them. None where modules differ or have other parameters, biases among them.
    """
    names = {name for name, _ in modules[0].named_parameters()}
    if names != {f"{inner}.weight", f"{outer}.weight"} or not _are_alike(modules):
        return None
    first, kind = modules[0], type(modules[0])
    shell = kind.__new__(kind)  # shares everything but the projections with the first module
    shell.__dict__ = {**first.__dict__, "_modules": {**first._modules, inner: _Through(), outer: _Through()}}

    def activation(values: torch.Tensor, *scales: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = shell(values, *scales)[0]
        return hidden

    return GroupedExperts(tuple(modules), inner, outer, None, activation)


class _Through(nn.Module):
    """In a projection's place: nothing is multiplied."""

    def forward(self, values: torch.Tensor) -> tuple[torch.Tensor, None]:
        return values, None


def _are_alike(modules: Sequence[nn.Module]) -> bool:
    """Whether the modules differ in the values of their parameters only, which all of them train, and are unwatched."""
    first = modules[0]
    described = repr(first)
    if any(type(module) is not type(first) or repr(module) != described for module in modules):
        return False
    if any(_is_watched(module) for module in modules):
        return False
    if not all(parameter.requires_grad for module in modules for parameter in module.parameters()):
        return False
    distinct = {id(parameter) for module in modules for parameter in module.parameters()}
    if len(distinct) != sum(1 for module in modules for _ in module.parameters()):
        return False  # shared parameters
    return len({tuple(parameter.shape for parameter in module.parameters()) for module in modules}) == 1


def _match(modules: Sequence[nn.Module]) -> GroupedExperts | None:
    try:
        graph = fx.Tracer().trace(modules[0])
    except Exception:  # noqa: BLE001  whatever a module does that cannot be traced: it runs as it is
        return None
    nodes = [node for node in graph.nodes if node.op != "output"]
    linears = [node for node in nodes if _module_of(modules[0], node, (nn.Linear,))]
    acts = [node for node in nodes if _is_activation(modules[0], node)]
    inputs = [node for node in nodes if node.op == "placeholder"]
    result = next(node for node in graph.nodes if node.op == "output").args[0]
    if len(inputs) != 1 or len(acts) != 1 or not linears or linears[-1] is not result:
        return None
    names = {name for name, _ in modules[0].named_parameters()}
    owned = {f"{node.target}.{kind}" for node in linears for kind in ("weight", "bias")}
    if not names <= owned:
        return None
    pattern = _pattern(nodes, linears, acts[0], inputs[0])
    if pattern is None:
        return None
    inner, gated, outer = pattern
    return GroupedExperts(tuple(modules), inner, outer, gated, _activation(modules[0], acts[0]))


def _pattern(
    nodes: list[fx.Node], linears: list[fx.Node], act: fx.Node, given: fx.Node
) -> tuple[str, str | None, str] | None:
    """Targets of the inner, the gated and the outer Linear."""
    inner = act.args[0]
    if len(nodes) == 4 and len(linears) == 2:
        if inner is linears[0] and linears[0].args == (given,) and linears[1].args == (act,):
            return str(linears[0].target), None, str(linears[1].target)
        return None
    products = [node for node in nodes if node.op == "call_function" and node.target in (torch.mul, operator.mul)]
    if len(nodes) != 6 or len(linears) != 3 or len(products) != 1:
        return None
    product = products[0]
    others = [value for value in product.args if value is not act]
    if inner not in linears[:2] or linears[2].args != (product,) or len(others) != 1 or others[0] not in linears[:2]:
        return None
    if others[0] is inner or any(node.args != (given,) for node in linears[:2]):
        return None
    return str(inner.target), str(others[0].target), str(linears[2].target)  # type: ignore[union-attr]


def _module_of(module: nn.Module, node: fx.Node, kinds: tuple[type, ...]) -> bool:
    return node.op == "call_module" and type(module.get_submodule(str(node.target))) in kinds and not node.kwargs


def _is_activation(module: nn.Module, node: fx.Node) -> bool:
    if _module_of(module, node, _ACTIVATIONS):
        return len(node.args) == 1
    constant = all(not isinstance(value, fx.Node) for value in [*node.args[1:], *node.kwargs.values()])
    return node.op == "call_function" and node.target in _FUNCTIONS and constant and len(node.args) > 0


def _activation(module: nn.Module, node: fx.Node) -> Callable[[torch.Tensor], torch.Tensor]:
    if node.op == "call_module":
        found = module.get_submodule(str(node.target))
        if getattr(found, "inplace", False):
            return lambda values: found(values.clone())
        return found
    options = {key: value for key, value in node.kwargs.items() if key != "inplace"}
    function: Any = node.target
    return lambda values: function(values, *node.args[1:], **options)


def _is_watched(module: nn.Module) -> bool:
    """Whether somebody's hooks wait for calls of the module or its parts."""
    return any(
        part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
        for part in module.modules()
    )


def share_storage(modules: Sequence[nn.Module]) -> bool:
    """Lay the experts' parameters in one storage per projection, so that a grouped GEMM reads them where they are.

    Parameters stay the objects that they are, with the same values. Only before an optimizer or a wrapper keeps views
    of them. Returns whether the experts can be grouped.
    """
    grouped = recognise(modules)
    if grouped is None:
        return False
    with torch.no_grad():
        for name in grouped.names:
            for parameters in (grouped.weights(name), grouped.biases(name)):
                if parameters is None or _in_place(parameters) is not None:
                    continue
                stacked = torch.stack([parameter.detach() for parameter in parameters])
                for parameter, values in zip(parameters, stacked, strict=True):
                    parameter.data = values
    return True


def _in_place(parameters: Sequence[torch.Tensor]) -> torch.Tensor | None:
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


def stacked(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """[L, ...]: where the parameters lie, or a copy where they lie apart."""
    found = _in_place(parameters)
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
