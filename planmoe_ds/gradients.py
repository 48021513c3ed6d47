"""Backward through the experts in two parts: the gradient of their input first, those of their weights later.

Only weights of torch.nn.Linear modules, and of modules whose class says `planmoe_linear = True`, can wait: the gradient
that arrives at such a module's output is kept, and making the weight's gradient of it is left for later. Nothing is
computed twice, and the results are those of one pass, bit for bit. All other parameters get their gradients with the
input's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

Totals = list[torch.Tensor | None]


@dataclass(frozen=True)
class LinearOutput:
    """An nn.Linear's output in a graph, and the places of its parameters in the layer's list of parameters."""

    output: torch.Tensor
    parameters: tuple[int, ...]


@dataclass
class ExpertGraph:
    """The experts' graph of one chunk, from leaves to output; `linears` are those whose weight gradients may wait.

    leaves: the experts' buffer and, where they take them, the routes' weights.
    """

    leaves: tuple[torch.Tensor, ...]
    output: torch.Tensor
    linears: Sequence[LinearOutput] = ()
    waiting: list[tuple[LinearOutput, torch.Tensor]] = field(default_factory=list)

    def input_gradient(
        self, grad: torch.Tensor, parameters: Sequence[torch.Tensor], totals: Totals, *, split: bool, keep: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The leaves' gradients; adds parameters' to `totals`, without those of `linears` if `split`.

        keep: the graph stays, for another backward.
        """
        if not self.output.requires_grad:
            return self._leaf_gradients([None] * len(self.leaves))
        linears = self.linears if split else ()
        later = {place for linear in linears for place in linear.parameters}
        now = [place for place in range(len(parameters)) if place not in later]
        inputs = [*self.leaves, *(linear.output for linear in linears), *(parameters[place] for place in now)]
        with _without_hooks(parameters):
            found_grads = torch.autograd.grad(
                self.output, inputs, grad.to(self.output.dtype), allow_unused=True, retain_graph=keep or bool(later)
            )
        of_leaves, grads = found_grads[: len(self.leaves)], found_grads[len(self.leaves) :]
        self.waiting = [pair for pair in zip(linears, grads[: len(linears)], strict=True) if pair[1] is not None]
        for place, found in zip(now, grads[len(linears) :], strict=True):
            totals[place] = add_gradients(totals[place], found)
        return self._leaf_gradients(of_leaves)

    def _leaf_gradients(self, found: Sequence[torch.Tensor | None]) -> tuple[torch.Tensor, torch.Tensor | None]:
        pairs = zip(found, self.leaves, strict=True)
        rows, *weights = [torch.zeros_like(leaf) if grad is None else grad for grad, leaf in pairs]
        return rows, weights[0] if weights else None

    def weight_gradients(self, parameters: Sequence[torch.Tensor], totals: Totals, *, keep: bool) -> None:
        """Add what input_gradient() left for later."""
        for linear, grad in self.waiting:
            inputs = [parameters[place] for place in linear.parameters]
            with _without_hooks(inputs):
                grads = torch.autograd.grad(linear.output, inputs, grad, allow_unused=True, retain_graph=keep)
            for place, found in zip(linear.parameters, grads, strict=True):
                totals[place] = add_gradients(totals[place], found)
        self.waiting = []


@contextmanager
def _without_hooks(parameters: Sequence[torch.Tensor]) -> Iterator[None]:
    """Parameters' own hooks are for their whole gradient, which the graph around this one brings."""
    hooks = [(parameter, parameter._backward_hooks) for parameter in parameters if parameter._backward_hooks]
    for parameter, _ in hooks:
        parameter._backward_hooks = None
    try:
        yield
    finally:
        for parameter, kept in hooks:
            parameter._backward_hooks = kept


def add_gradients(total: torch.Tensor | None, grad: torch.Tensor | None) -> torch.Tensor | None:
    """Their sum; None stands for zero."""
    if total is None or grad is None:
        return grad if total is None else total
    return total + grad


@contextmanager
def linear_calls(*, active: bool = True) -> Iterator[list[tuple[nn.Module, torch.Tensor]]]:
    """Collects every nn.Linear that runs inside, with its output; not those that are run again in backward.

    Nothing is collected unless `active`.
    """
    found: list[tuple[nn.Module, torch.Tensor]] = []
    outside = _saved_tensor_hooks()

    def see(module: nn.Module, _inputs: object, output: object) -> None:
        # inside other hooks on saved tensors (checkpointing) every look at the graph would run that part again
        is_linear = type(module) is nn.Linear or getattr(module, "planmoe_linear", False)
        if is_linear and isinstance(output, torch.Tensor) and _saved_tensor_hooks() is outside:
            found.append((module, output))

    handle = register_module_forward_hook(see) if active else None
    try:
        yield found
    finally:
        if handle is not None:
            handle.remove()


def _saved_tensor_hooks() -> object:
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else hooks[0]


def splittable(calls: Sequence[tuple[nn.Module, torch.Tensor]], places: dict[int, int]) -> list[LinearOutput]:
    """Calls whose weight gradients may wait: modules that ran once and share no parameter.

    places: id of every parameter -> its place.
    """
    owners: dict[int, int] = {}
    for module, _ in calls:
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    found = []
    for module, output in calls:
        mine = [parameter for parameter in module._parameters.values() if parameter is not None]
        trainable = [parameter for parameter in mine if parameter.requires_grad]
        taken = tuple(places[id(parameter)] for parameter in trainable if id(parameter) in places)
        alone = all(owners[id(parameter)] == 1 for parameter in trainable)
        if taken and len(taken) == len(trainable) and alone and output.requires_grad:
            found.append(LinearOutput(output, taken))
    return found


def used_once(
    output: torch.Tensor, linears: Sequence[LinearOutput], parameters: Sequence[torch.Tensor]
) -> frozenset[int]:
    """Places of the parameters that `output` depends on only through their own linear's output."""
    parents: dict[object, list[object]] = {}
    leaves: dict[int, object] = {}
    stack: list[object] = [output.grad_fn]
    seen: set[object] = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            leaves[id(variable)] = node
        for following, _ in node.next_functions:  # type: ignore[attr-defined]
            parents.setdefault(following, []).append(node)
            stack.append(following)
    return frozenset(
        place
        for linear in linears
        for place in linear.parameters
        if _leads_only_to(linear.output.grad_fn, leaves.get(id(parameters[place])), parents)
    )


def _leads_only_to(goal: object, leaf: object, parents: dict[object, list[object]]) -> bool:
    """Whether the one way from a leaf to the graph's end goes through `goal`."""
    node = leaf
    while node is not None and node is not goal:
        above = parents.get(node, [])
        node = above[0] if len(above) == 1 else None
    return node is not None
