"""Runs a layer's schedule: chunks travel while the experts work on other chunks, forward and backward.

Expert outputs travel back either as sums, one weighted sum per token and rank or node, or, where every sum must be
the framework's own, as rows, one per route.

Shape legend: see plan.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from planmoe_ds.experts import LocalExperts, check_no_foreign_leaves
from planmoe_ds.group import ExpertGroup, SidedArrival, Sides
from planmoe_ds.plan import ChunkPlan, RoutingPlan
from planmoe_ds.recorder import Label, Recorder
from planmoe_ds.schedule import Kind, pipelined
from planmoe_ds.sums import Sums
from planmoe_ds.trace import Phase
from planmoe_ds.wire import LinkCodecs, Spreads, TokenColumns, Wire


@dataclass(frozen=True)
class Codecs:
    """The compressors of each direction."""

    dispatch: LinkCodecs
    combine: LinkCodecs
    gradients: LinkCodecs


@dataclass(frozen=True)
class LayerCall:
    """One call of one layer: everything its forward and backward share."""

    plan: RoutingPlan
    columns: TokenColumns
    hidden: int
    dtype: torch.dtype  # of the tokens; experts may return another one
    experts: LocalExperts
    group: ExpertGroup
    codecs: Codecs
    recorder: Recorder
    layer: int
    token_N: torch.Tensor | None  # the token of every row, where outputs travel back as rows; None: as sums
    keep_graph: bool  # a backward will follow
    check_leaves: bool

    @property
    def returns_rows(self) -> bool:
        """Whether outputs travel back as rows."""
        return self.token_N is not None

    @property
    def num_rows(self) -> int:
        """N; 0 where outputs travel back as sums."""
        return 0 if self.token_N is None else self.token_N.shape[0]

    def wire(self, codecs: LinkCodecs, dtype: torch.dtype) -> Wire:
        """Encoding of rows of `dtype`."""
        directions = (self.codecs.dispatch, self.codecs.combine, self.codecs.gradients)
        alone = self.group.size == 1 and all(direction.near.identity for direction in directions)
        return Wire(self.group, self.plan, codecs, self.hidden, dtype, alone)


@dataclass(frozen=True)
class _Pass:
    """One direction of a layer call: rows out, work on them where the experts are, results back."""

    call: LayerCall
    phase: Phase
    send_out: Callable[[ChunkPlan], SidedArrival]
    work: Callable[[int, ChunkPlan, Sides], SidedArrival]  # arrived rows -> results on their way back
    collect: Callable[[ChunkPlan, Sides], None]

    def run(self) -> None:
        outward: dict[int, SidedArrival] = {}
        homeward: dict[int, SidedArrival] = {}
        chunks = self.call.plan.chunks
        for task in pipelined(len(chunks)):
            index, chunk = task.chunk, chunks[task.chunk]
            if task.kind is Kind.DISPATCH:
                outward[index] = self.send_out(chunk)
            elif task.kind is Kind.EXPERT:
                arrival = outward.pop(index)
                self._wait(arrival, "dispatch", index)
                homeward[index] = self.work(index, chunk, arrival.rows)
            elif task.kind is Kind.COLLECT:
                arrival = homeward.pop(index)
                self._wait(arrival, "combine", index)
                self.collect(chunk, arrival.rows)

    def _wait(self, arrival: SidedArrival, name: str, index: int) -> None:
        if arrival.exchange is not None:
            self.call.recorder.wait(arrival.exchange, Label(name, self.call.layer, index, self.phase))


@dataclass(frozen=True)
class _ChunkGraph:
    """What backward needs of one chunk: the experts' graph from leaf to output, and which rows feed the leaf."""

    leaf: torch.Tensor
    output: torch.Tensor
    spreads: Spreads


def _run_experts(call: LayerCall, index: int, buffer: torch.Tensor, parameters: list[torch.Tensor]) -> torch.Tensor:
    """The experts on one chunk; with a graph if a backward will follow, from `buffer` on."""
    layout = call.plan.chunks[index].layout
    with call.recorder.span("compute", Label("experts", call.layer, index, "forward")):
        if not call.keep_graph:
            return call.experts.run(buffer, layout)
        buffer.requires_grad_()
        with torch.enable_grad():
            output = call.experts.run(buffer, layout)
    if call.check_leaves and index == 0:
        check_no_foreign_leaves(output, [buffer, *parameters], call.layer)
    return output


def _forward(
    call: LayerCall, tokens: torch.Tensor, parameters: list[torch.Tensor], graphs: dict[int, _ChunkGraph]
) -> torch.Tensor:
    """Tokens [T, H] -> weighted sums of expert outputs [T, H], or rows [N, H]; fills `graphs`."""
    out, back = (call.wire(codecs, tokens.dtype) for codecs in (call.codecs.dispatch, call.codecs.combine))
    outputs: list[torch.Tensor] = []
    totals = None if call.returns_rows else Sums(back, tokens.shape[0], 0, tokens)

    def work(index: int, chunk: ChunkPlan, arrived: Sides) -> SidedArrival:
        spreads = out.find_spreads(chunk, arrived, call.columns)
        buffer = out.spread(chunk, arrived, spreads, weighted=False)
        output = _run_experts(call, index, buffer, parameters)
        if call.keep_graph:
            graphs[index] = _ChunkGraph(buffer, output, spreads)
        output = output.detach().contiguous()
        if not outputs:
            outputs.append(output.new_empty((call.num_rows, call.hidden)))
        if call.returns_rows:
            return call.wire(call.codecs.combine, output.dtype).send_rows_back(chunk, output)
        return back.send_sums(chunk, output.to(back.dtype), spreads, weighted=True)

    def collect(chunk: ChunkPlan, arrived: Sides) -> None:
        if totals is None:
            back.collect_rows(chunk, arrived, outputs[0])
        else:
            totals.add(chunk, arrived)

    _Pass(call, "forward", lambda chunk: out.send_tokens(chunk, tokens, call.columns), work, collect).run()
    return outputs[0] if totals is None else totals.values().to(outputs[0].dtype)


@dataclass(frozen=True)
class _Gradients:
    """Of tokens [T, H], weights [T, K] (None with rows, whose weights are the caller's), and parameters."""

    tokens: torch.Tensor
    weights: torch.Tensor | None
    parameters: list[torch.Tensor | None]


def _backward(
    call: LayerCall, grad: torch.Tensor, parameters: list[torch.Tensor], num_tokens: int, graphs: dict[int, _ChunkGraph]
) -> _Gradients:
    """The gradient of what _forward returned -> those of what it was given; takes chunks from `graphs`."""
    out, back = (call.wire(call.codecs.gradients, dtype) for dtype in (grad.dtype, call.dtype))
    keep = torch._C._autograd._get_current_graph_task_keep_graph()
    parameter_grads: list[torch.Tensor | None] = [None] * len(parameters)
    num_extra = call.columns.num_extra
    grad_rows = grad.new_empty((call.num_rows, call.hidden), dtype=back.dtype)
    totals = Sums(back, num_tokens, num_extra, grad)

    def send_out(chunk: ChunkPlan) -> SidedArrival:
        return out.send_rows_out(chunk, grad) if call.returns_rows else out.send_tokens(chunk, grad, None)

    def work(index: int, chunk: ChunkPlan, arrived: Sides) -> SidedArrival:
        graph = graphs[index] if keep else graphs.pop(index)
        if call.returns_rows:
            buffer = out.place_rows(chunk, arrived)
        else:
            buffer = out.spread(chunk, arrived, graph.spreads, weighted=True)
        with call.recorder.span("compute", Label("experts", call.layer, index, "backward")):
            rows = _expert_gradients(graph, buffer, parameters, parameter_grads, keep).to(back.dtype).contiguous()
        if call.returns_rows:
            return back.send_rows_back(chunk, rows)
        weight_grads = out.dots(arrived, graph.spreads, graph.output.detach().to(out.dtype).contiguous(), num_extra)
        return back.send_sums(chunk, rows, graph.spreads, weighted=False, extra=weight_grads)

    def collect(chunk: ChunkPlan, arrived: Sides) -> None:
        if call.returns_rows:
            back.collect_rows(chunk, arrived, grad_rows)
        else:
            totals.add(chunk, arrived)

    _Pass(call, "backward", send_out, work, collect).run()
    if call.token_N is not None:
        grad_tokens = grad.new_zeros((num_tokens, call.hidden), dtype=back.dtype)
        return _Gradients(grad_tokens.index_add_(0, call.token_N, grad_rows), None, parameter_grads)
    return _Gradients(totals.values(), totals.extra()[:, : call.columns.top_k], parameter_grads)


def _expert_gradients(
    graph: _ChunkGraph,
    grad_buffer: torch.Tensor,
    parameters: list[torch.Tensor],
    totals: list[torch.Tensor | None],
    keep: bool,
) -> torch.Tensor:
    """The gradient of the chunk's leaf; adds the parameters' to `totals`."""
    if not graph.output.requires_grad:
        return torch.zeros_like(graph.leaf)
    grad_leaf, *grads = torch.autograd.grad(
        graph.output, [graph.leaf, *parameters], grad_buffer.to(graph.output.dtype), allow_unused=True,
        retain_graph=keep,
    )  # fmt: skip
    for place, grad in enumerate(grads):
        totals[place] = _add(totals[place], grad)
    return grad_leaf if grad_leaf is not None else torch.zeros_like(graph.leaf)


class _Pipeline(torch.autograd.Function):
    """tokens [T, H], weights [K, T] -> weighted sums [T, H], or the experts' outputs in row order [N, H].

    The experts' graph of every chunk is kept apart from the outer one, so that backward can run chunk by chunk in an
    order of its own; parameter gradients are summed over chunks and leave once, as gradient hooks expect.
    """

    @staticmethod
    def forward(ctx, tokens, weights, call: LayerCall, *parameters):  # type: ignore[no-untyped-def]
        graphs: dict[int, _ChunkGraph] = {}
        result = _forward(call, tokens.detach(), list(parameters), graphs)
        ctx.call, ctx.parameters = call, parameters
        ctx.num_tokens, ctx.weight_dtype = tokens.shape[0], weights.dtype
        ticket = tokens.new_empty(0)
        ticket.planmoe_graphs = graphs
        ctx.graphs = None if _is_recomputed() else graphs
        ctx.save_for_backward(ticket)  # autograd refuses a second backward unless the graph is retained
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (ticket,) = ctx.saved_tensors
        graphs = ctx.graphs if ctx.graphs is not None else ticket.planmoe_graphs
        found = _backward(ctx.call, grad.contiguous(), list(ctx.parameters), ctx.num_tokens, graphs)
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


def _add(total: torch.Tensor | None, grad: torch.Tensor | None) -> torch.Tensor | None:
    if total is None or grad is None:
        return grad if total is None else total
    return total + grad


def run_experts(tokens_TH: torch.Tensor, weight_KT: torch.Tensor, call: LayerCall) -> torch.Tensor:
    """Tokens -> weighted sums of expert outputs [T, H], or the outputs in row order [N, H]; differentiable."""
    return _Pipeline.apply(tokens_TH, weight_KT, call, *call.experts.parameters())  # type: ignore[no-untyped-call]
