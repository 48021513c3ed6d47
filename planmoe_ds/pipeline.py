"""Runs a layer's schedule: chunks travel while the experts work on other chunks, forward and backward.

Shape legend: see plan.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from planmoe_ds.backend import Compressor
from planmoe_ds.experts import LocalExperts, check_no_foreign_leaves
from planmoe_ds.group import Arrival, ExpertGroup
from planmoe_ds.plan import ChunkPlan, RoutingPlan
from planmoe_ds.recorder import Label, Recorder
from planmoe_ds.schedule import Kind, pipelined
from planmoe_ds.trace import Phase


@dataclass(frozen=True)
class Codecs:
    """The compressor of each direction."""

    dispatch: Compressor
    combine: Compressor
    gradients: Compressor


@dataclass(frozen=True)
class LayerCall:
    """One call of one layer: everything its forward and backward share."""

    plan: RoutingPlan
    experts: LocalExperts
    group: ExpertGroup
    codecs: Codecs
    recorder: Recorder
    layer: int
    keep_graph: bool  # a backward will follow
    check_leaves: bool


@dataclass(frozen=True)
class _Pass:
    """Rows out, work on them where the experts are, results back: one direction of a layer call."""

    call: LayerCall
    phase: Phase
    source: torch.Tensor  # [T, H] gathered by token, or [N, H] in row order
    gather: bool
    outward: Compressor
    homeward: Compressor
    work: Callable[[int, torch.Tensor], torch.Tensor]  # (chunk, buffer [rows, H]) -> [rows, H]

    def run(self) -> torch.Tensor:
        """Returns the results in row order, [N, H]."""
        plan = self.call.plan
        outward: dict[int, Arrival] = {}
        homeward: dict[int, Arrival] = {}
        worked: dict[int, torch.Tensor] = {}
        result: torch.Tensor | None = None
        for task in pipelined(len(plan.chunks)):
            index, chunk = task.chunk, plan.chunks[task.chunk]
            if task.kind is Kind.DISPATCH:
                outward[index] = self._dispatch(chunk)
            elif task.kind is Kind.EXPERT:
                buffer = self._unpack(index, chunk, outward.pop(index))
                with self.call.recorder.span("compute", self._label("experts", index)):
                    worked[index] = self.work(index, buffer).detach()
            elif task.kind is Kind.COMBINE:
                homeward[index] = self._combine(chunk, worked[index])
            else:
                rows = worked.pop(index)
                if result is None:
                    result = rows.new_empty((plan.num_rows, rows.shape[1]))
                self._collect(index, chunk, homeward.pop(index), result)
        assert result is not None
        return result

    def _dispatch(self, chunk: ChunkPlan) -> Arrival:
        last_row = chunk.first_row + chunk.num_rows
        if self.gather:
            wire = self.outward.encode(self.source, self.call.plan.token_N[chunk.first_row : last_row])
        else:
            wire = self.outward.encode(self.source[chunk.first_row : last_row])
        return self.call.group.exchange(wire, chunk.send_rows, chunk.recv_rows)

    def _unpack(self, index: int, chunk: ChunkPlan, arrival: Arrival) -> torch.Tensor:
        self._wait(arrival, "dispatch", index)
        shape = (chunk.layout.num_rows, self.source.shape[1])
        padded = chunk.layout.padded_shape is not None
        buffer = self.source.new_zeros(shape) if padded else self.source.new_empty(shape)
        self.outward.decode(arrival.rows, buffer, chunk.position_R)
        return buffer

    def _combine(self, chunk: ChunkPlan, rows: torch.Tensor) -> Arrival:
        wire = self.homeward.encode(rows.contiguous(), chunk.position_R)
        return self.call.group.exchange(wire, chunk.recv_rows, chunk.send_rows)

    def _collect(self, index: int, chunk: ChunkPlan, arrival: Arrival, result: torch.Tensor) -> None:
        self._wait(arrival, "combine", index)
        self.homeward.decode(arrival.rows, result[chunk.first_row : chunk.first_row + chunk.num_rows])

    def _wait(self, arrival: Arrival, name: str, index: int) -> None:
        if arrival.exchange is not None:
            self.call.recorder.wait(arrival.exchange, self._label(name, index))

    def _label(self, name: str, index: int) -> Label:
        return Label(name, self.call.layer, index, self.phase)


class _Pipeline(torch.autograd.Function):
    """tokens [T, H] -> expert outputs in row order [N, H].

    The experts' graph of every chunk is kept apart from the outer one, so that backward can run chunk by chunk in an
    order of its own; parameter gradients are summed over chunks and leave once, as gradient hooks expect.
    """

    @staticmethod
    def forward(ctx, tokens, call: LayerCall, *parameters):  # type: ignore[no-untyped-def]
        graphs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def work(index: int, buffer: torch.Tensor) -> torch.Tensor:
            layout = call.plan.chunks[index].layout
            if not call.keep_graph:
                return call.experts.run(buffer, layout)
            leaf = buffer.requires_grad_()
            with torch.enable_grad():
                output = call.experts.run(leaf, layout)
            if call.check_leaves and index == 0:
                check_no_foreign_leaves(output, [leaf, *parameters], call.layer)
            graphs[index] = (leaf, output)
            return output

        codecs = call.codecs
        rows = _Pass(call, "forward", tokens.detach(), True, codecs.dispatch, codecs.combine, work).run()
        ctx.call, ctx.parameters = call, parameters
        ctx.num_tokens = tokens.shape[0]
        ticket = tokens.new_empty(0)
        ticket.planmoe_graphs = graphs
        ctx.graphs = None if _is_recomputed() else graphs
        ctx.save_for_backward(ticket)  # autograd refuses a second backward unless the graph is retained
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_rows):  # type: ignore[no-untyped-def]
        (ticket,) = ctx.saved_tensors
        graphs = ctx.graphs if ctx.graphs is not None else ticket.planmoe_graphs
        call: LayerCall = ctx.call
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        totals: list[torch.Tensor | None] = [None] * len(ctx.parameters)

        def work(index: int, grad_buffer: torch.Tensor) -> torch.Tensor:
            leaf, output = graphs[index] if keep else graphs.pop(index)
            if not output.requires_grad:
                return torch.zeros_like(leaf)
            grad_leaf, *grads = torch.autograd.grad(
                output, [leaf, *ctx.parameters], grad_buffer, allow_unused=True, retain_graph=keep
            )
            for place, grad in enumerate(grads):
                totals[place] = _add(totals[place], grad)
            return grad_leaf if grad_leaf is not None else torch.zeros_like(leaf)

        codec = call.codecs.gradients
        grads_N = _Pass(call, "backward", grad_rows.contiguous(), False, codec, codec, work).run()
        grad_tokens = grads_N.new_zeros((ctx.num_tokens, grads_N.shape[1]))
        grad_tokens.index_add_(0, call.plan.token_N, grads_N)
        # an unused parameter is in the outer graph all the same, and gradient hooks expect a gradient
        grads = (_zeros_if_none(total, parameter) for total, parameter in zip(totals, ctx.parameters, strict=True))
        return grad_tokens, None, *grads


def _zeros_if_none(grad: torch.Tensor | None, parameter: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(parameter) if grad is None else grad


def _is_recomputed() -> bool:
    """Whether torch.utils.checkpoint will run this forward again: then backward finds that run's graphs."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


def _add(total: torch.Tensor | None, grad: torch.Tensor | None) -> torch.Tensor | None:
    if total is None or grad is None:
        return grad if total is None else total
    return total + grad


def run_experts(tokens: torch.Tensor, call: LayerCall) -> torch.Tensor:
    """Tokens [T, H] -> expert outputs [N, H] in the plan's row order, differentiable."""
    return _Pipeline.apply(tokens, call, *call.experts.parameters())  # type: ignore[no-untyped-call]
