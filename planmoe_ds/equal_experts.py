"""Finds experts that are equal MLPs, for grouped.py.

Recognised by tracing, not by name: Linear - activation - Linear, and SwiGLU's (activation(gate) * up) - down; others
are told of, see between(). Anything else runs as it was written.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from planmoe_ds.grouped import GroupedExperts, in_place, is_watched

_ACTIVATIONS = (nn.GELU, nn.SiLU, nn.ReLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.Mish)
_FUNCTIONS = (functional.gelu, functional.silu, functional.relu, torch.relu, torch.tanh, torch.sigmoid)


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
    if any(is_watched(module) for module in modules):
        return False
    if not all(parameter.requires_grad for module in modules for parameter in module.parameters()):
        return False
    distinct = {id(parameter) for module in modules for parameter in module.parameters()}
    if len(distinct) != sum(1 for module in modules for _ in module.parameters()):
        return False  # shared parameters
    return len({tuple(parameter.shape for parameter in module.parameters()) for module in modules}) == 1


def _match(modules: Sequence[nn.Module]) -> GroupedExperts | None:
    graph = _trace(modules[0])
    if graph is None:
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


def _trace(module: nn.Module) -> fx.Graph | None:
    """What the module computes; None for one that cannot be traced, or that keeps something of its calls.

    Tracing runs the module's Python: buffers that it wrote to could not be put back, its attributes can.
    """
    if next(module.buffers(), None) is not None:
        return None
    before = [(part, dict(vars(part))) for part in module.modules()]
    try:
        graph = fx.Tracer().trace(module)
    except Exception:  # noqa: BLE001  whatever a module does that cannot be traced: it runs as it is
        graph = None
    for part, attributes in before:
        if list(map(id, vars(part).values())) != list(map(id, attributes.values())):
            part.__dict__ = attributes
            graph = None
    return graph


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
                if parameters is None or in_place(parameters) is not None:
                    continue
                stacked = torch.stack([parameter.detach() for parameter in parameters])
                for parameter, values in zip(parameters, stacked, strict=True):
                    parameter.data = values
    return True
