"""The forward pass: tokens out to the experts, their outputs back."""

from __future__ import annotations

from dataclasses import replace

import torch
from typing_extensions import override

from planmoe_ds.experts import check_no_foreign_leaves
from planmoe_ds.gradients import ExpertGraph, linear_calls, splittable, used_once
from planmoe_ds.group import Sides
from planmoe_ds.grouped import GroupedGraph
from planmoe_ds.passes.base import ChunkGraph, LayerCall, Pass
from planmoe_ds.plan import ChunkPlan
from planmoe_ds.sums import Sums
from planmoe_ds.wire import Launch, Pack, Spreads


class ForwardPass(Pass):
    """Tokens [T, H] -> weighted sums of expert outputs [T, H], or rows [N, H]; fills `graphs`."""

    phase = "forward"
    results_name = "the experts' outputs"

    def __init__(
        self, call: LayerCall, tokens: torch.Tensor, parameters: list[torch.Tensor], graphs: dict[int, ChunkGraph]
    ) -> None:
        out, back = (call.wire(direction, tokens.dtype) for direction in ("dispatch", "combine"))
        super().__init__(call, parameters, graphs, out, back)
        self.tokens = tokens
        self.outputs: torch.Tensor | None = None
        self.totals: Sums | None = None  # where sums come back
        self.spreads: dict[int, Spreads] = {}
        self.route_weights: dict[int, torch.Tensor] = {}  # of the buffer's rows, where the experts take them
        self.places = {id(parameter): place for place, parameter in enumerate(parameters)}

    def result(self) -> torch.Tensor:
        """What the pass returns."""
        assert self.outputs is not None
        return self.outputs if self.totals is None else self.totals.values(self.outputs.dtype)

    @override
    def start_collecting(self) -> None:
        if not self.call.returns_rows:
            self.totals = Sums(self.back, self.tokens.shape[0], 0, self.tokens)

    @override
    def encode(self, chunk: ChunkPlan) -> Launch:
        return self.out.send_tokens(chunk, self.tokens, self.call.columns)

    @override
    def decode(self, index: int, chunk: ChunkPlan, arrived: Sides) -> torch.Tensor:
        spreads = self.spreads[index] = self.out.find_spreads(chunk, arrived, self.call.columns)
        if self.call.experts.takes_weights:
            self.route_weights[index] = self.out.route_weights(chunk, spreads, self.call.columns)
        return self.out.spread(chunk, arrived, spreads, weighted=False)

    @override
    def compute(self, index: int, buffer: torch.Tensor) -> torch.Tensor:
        graph = self._run_experts(index, buffer)
        if self.call.keep_graph:
            self.graphs[index] = ChunkGraph(graph, self.spreads[index])
        return graph.output.detach().contiguous()

    def _run_experts(self, index: int, buffer: torch.Tensor) -> ExpertGraph | GroupedGraph:
        """With a graph if a backward will follow, from `buffer` and the routes' weights on."""
        call, layout = self.call, self.call.plan.chunks[index].layout
        weights = self.route_weights.pop(index, None)
        grouped = call.experts.run_grouped(buffer, layout, weights, keep=call.keep_graph)
        if grouped is not None:
            return grouped
        leaves = (buffer,) if weights is None else (buffer, weights)
        if not call.keep_graph:
            return ExpertGraph(leaves, call.experts.run(buffer, layout, weights))
        for leaf in leaves:
            leaf.requires_grad_()
        split = index in call.orders.backward.splits
        with torch.enable_grad(), linear_calls(active=split) as calls:
            output = call.experts.run(buffer, layout, weights)
        if call.check_leaves and index == 0:
            check_no_foreign_leaves(output, [*leaves, *self.parameters], call.layer)
        if not split:
            return ExpertGraph(leaves, output)
        linears = splittable(calls, self.places)
        patience = call.orders.patience
        if patience.places is None:
            patience.places = used_once(output, linears, self.parameters)
        waiting = [linear for linear in linears if patience.places.issuperset(linear.parameters)]
        return ExpertGraph(leaves, output, waiting)

    @override
    def encode_back(self, index: int, chunk: ChunkPlan, results: torch.Tensor) -> Pack:
        spreads = self.spreads.pop(index)
        if self.outputs is None:
            self.outputs = results.new_empty((self.call.num_rows, self.call.hidden))
            if self.call.returns_rows:
                codecs = self.back.codecs.for_rows(results.dtype)
                self.back = replace(self.back, dtype=results.dtype, codecs=codecs)
        if self.call.returns_rows:
            return lambda wire: wire.send_rows_back(chunk, results)
        sums, weighted = results.to(self.back.dtype), not self.call.experts.takes_weights
        return lambda wire: wire.send_sums(chunk, sums, spreads, weighted=weighted)

    @override
    def collect(self, chunk: ChunkPlan, arrived: Sides) -> None:
        if self.totals is None:
            assert self.outputs is not None
            self.back.collect_rows(chunk, arrived, self.outputs, None)
        else:
            self.totals.add(chunk, arrived)
