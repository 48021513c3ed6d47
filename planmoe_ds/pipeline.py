"""A layer's passes as one differentiable function: forward when it is called, backward when autograd asks.

Which task runs when is the schedule's business (planner.py, scheduling/); what the tasks do is in passes.py.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from planmoe_ds.passes import BackwardPass, ChunkGraph, ForwardPass, LayerCall

__all__ = ["LayerCall", "run_experts"]


class _Pipeline(torch.autograd.Function):
    """tokens [T, H], weights [K, T] -> weighted sums [T, H], or the experts' outputs in row order [N, H].

    The experts' graph of every chunk is kept apart from the outer one, so that backward can run chunk by chunk in an
    order of its own; parameter gradients are summed over chunks and leave once, as gradient hooks expect.
    """

    @staticmethod
    def forward(ctx, tokens, weights, call: LayerCall, *parameters):  # type: ignore[no-untyped-def]
        graphs: dict[int, ChunkGraph] = {}
        forward = ForwardPass(call, tokens.detach(), list(parameters), graphs)
        forward.run(call.orders.forward)
        ctx.call, ctx.parameters = call, parameters
        ctx.num_tokens, ctx.weight_dtype = tokens.shape[0], weights.dtype
        ticket = tokens.new_empty(0)
        ticket.planmoe_graphs = graphs
        ctx.graphs = None if _is_recomputed() else graphs
        ctx.save_for_backward(ticket)  # autograd refuses a second backward unless the graph is retained
        return forward.result()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (ticket,) = ctx.saved_tensors
        graphs = ctx.graphs if ctx.graphs is not None else ticket.planmoe_graphs
        backward = BackwardPass(ctx.call, grad.contiguous(), ctx.num_tokens, list(ctx.parameters), graphs)
        backward.run(ctx.call.orders.backward)
        found = backward.result()
        grad_weights = None if found.weights is None else found.weights.t().to(ctx.weight_dtype)
        # an unused parameter is in the outer graph all the same, and gradient hooks expect a gradient
        grads = (_zeros_if_none(*pair) for pair in zip(found.parameters, ctx.parameters, strict=True))
        return found.tokens, grad_weights, None, *grads


def _zeros_if_none(grad: torch.Tensor | None, parameter: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(parameter) if grad is None else grad


def _is_recomputed() -> bool:
    """Whether torch.utils.checkpoint will run this forward again: then backward finds that run's graphs."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


def run_experts(tokens_TH: torch.Tensor, weight_KT: torch.Tensor, call: LayerCall) -> torch.Tensor:
    """Tokens -> weighted sums of expert outputs [T, H], or the outputs in row order [N, H]; differentiable."""
    return _Pipeline.apply(tokens_TH, weight_KT, call, *call.experts.parameters())  # type: ignore[no-untyped-call]
