"""The backward pass: gradients of the outputs out to the experts, those of the tokens back."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from typing_extensions import override

from planmoe_ds.gradients import Totals
from planmoe_ds.group import Sides
from planmoe_ds.passes.base import ChunkGraph, LayerCall, Pass
from planmoe_ds.plan import ChunkPlan
from planmoe_ds.refusals import OnItsWay
from planmoe_ds.rows import add_at
from planmoe_ds.sums import Sums
from planmoe_ds.wire import Launch, Pack

_GRADIENTS = "gradients of the outputs"


@dataclass(frozen=True)
class Gradients:
    """Of tokens [T, H], weights [T, K] (None where they are the caller's), and parameters."""

    tokens: torch.Tensor
    weights: torch.Tensor | None
    parameters: Totals


class BackwardPass(Pass):
    """The gradient of what the forward pass returned -> those of what it was given; takes chunks from `graphs`."""

    phase = "backward"
    results_name = "the tokens' gradients"

    def __init__(
        self,
        call: LayerCall,
        grad: torch.Tensor,
        num_tokens: int,
        parameters: list[torch.Tensor],
        graphs: dict[int, ChunkGraph],
    ) -> None:
        out, back = (call.wire("gradients", dtype) for dtype in (grad.dtype, call.dtype))
        super().__init__(call, parameters, graphs, out, back)
        self.grad = grad
        self.misfits: OnItsWay | None = None
        self.keep = torch._C._autograd._get_current_graph_task_keep_graph()
        self.totals: Totals = [None] * len(parameters)
        self.num_tokens = num_tokens
        self.num_extra = call.columns.num_extra
        self.grad_rows = grad.new_empty((call.num_rows, call.hidden), dtype=self.back.dtype)
        takes_weights = call.experts.takes_weights
        wide = self.back.wide_dtype
        self.grad_row_weights = grad.new_zeros(call.num_rows + 1, dtype=wide) if takes_weights else None
        self.route_grads: dict[int, torch.Tensor] = {}  # of the weights of the buffer's rows
        self.arrived: dict[int, Sides] = {}
        self.uses = dict.fromkeys(graphs, 2)  # tasks after compute() that need a chunk's graph

    @override
    def prepare(self) -> None:
        if not self.out.codecs.may_refuse:
            return
        if self.call.refusals.may_try(_GRADIENTS):
            self.misfits = OnItsWay(self.out.codecs.misfits(self.grad))
        else:
            self.out = self.out.raw()

    @override
    def before_decoding(self) -> None:
        if self.misfits is None:
            return
        misfits, self.misfits = self.misfits, None
        begin = time.perf_counter()
        refused = self.any_rank_says(bool(misfits.value()))
        if self.call.orders.measurement is not None:  # the host's seconds are those in which it starts tasks
            self.call.orders.measurement.host_seconds -= time.perf_counter() - begin
        if refused:
            self.call.refusals.add(_GRADIENTS)
            self.out.codecs.take_refused()  # by those that did not fit
            self.send_out_again()

    @override
    def start_collecting(self) -> None:
        self.sums = Sums(self.back, self.num_tokens, self.num_extra, self.grad)

    def result(self) -> Gradients:
        """What the pass returns."""
        order, top_k = self.call.order, self.call.columns.top_k
        if order is None:
            return Gradients(self.sums.values(self.call.dtype), self.sums.extra()[:, :top_k], self.totals)
        grad_tokens = self.grad.new_zeros((self.num_tokens, self.call.hidden), dtype=self.call.dtype)
        add_at(grad_tokens, order.token_N, self.grad_rows)
        grad_weights = None
        if self.grad_row_weights is not None:
            grad_weights = self.grad_row_weights[order.row_of_route_KT].view(top_k, -1).t()
        return Gradients(grad_tokens, grad_weights, self.totals)

    @override
    def encode(self, chunk: ChunkPlan) -> Launch:
        if self.call.returns_rows:
            return self.out.send_rows_out(chunk, self.grad)
        return self.out.send_tokens(chunk, self.grad, None)

    @override
    def decode(self, index: int, chunk: ChunkPlan, arrived: Sides) -> torch.Tensor:
        if self.call.returns_rows:
            return self.out.place_rows(chunk, arrived)
        self.arrived[index] = arrived
        return self.out.spread(chunk, arrived, self.graphs[index].spreads, weighted=not self.call.experts.takes_weights)

    @override
    def compute(self, index: int, buffer: torch.Tensor) -> torch.Tensor:
        split = index in self.call.orders.backward.splits
        experts = self.graphs[index].experts
        rows, weights = experts.input_gradient(buffer, self.parameters, self.totals, split=split, keep=self.keep)
        if weights is not None:
            self.route_grads[index] = weights.to(self.back.wide_dtype)
        if not split:
            self.uses[index] -= 1
        return rows.to(self.back.dtype).contiguous()

    @override
    def weights(self, index: int) -> None:
        self._take(index).experts.weight_gradients(self.parameters, self.totals, keep=self.keep)

    @override
    def encode_back(self, index: int, chunk: ChunkPlan, results: torch.Tensor) -> Pack:
        graph = self._take(index)
        route_grads = self.route_grads.pop(index, None)
        if self.call.returns_rows:
            return lambda wire: wire.send_rows_back(chunk, results, route_grads)
        arrived = self.arrived.pop(index)
        if route_grads is not None:
            extra = self.back.by_route(graph.spreads, route_grads, self.num_extra)
        else:
            output = graph.experts.output.detach().to(self.out.dtype).contiguous()
            extra = self.out.dots(arrived, graph.spreads, output, self.num_extra)
        spreads = graph.spreads
        return lambda wire: wire.send_sums(chunk, results, spreads, weighted=False, extra=extra)

    @override
    def collect(self, chunk: ChunkPlan, arrived: Sides) -> None:
        if self.call.returns_rows:
            self.back.collect_rows(chunk, arrived, self.grad_rows, self.grad_row_weights)
        else:
            self.sums.add(chunk, arrived)

    def _take(self, index: int) -> ChunkGraph:
        """A chunk's graph, for the last time unless another task or another backward needs it."""
        self.uses[index] -= 1
        return self.graphs[index] if self.keep or self.uses[index] > 0 else self.graphs.pop(index)
