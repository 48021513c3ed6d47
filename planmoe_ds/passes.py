"""The two passes through a layer, task by task: what each does with a chunk, whatever the order.

Expert outputs travel back either as sums, one weighted sum per token and rank or node, or, where every sum must be
the framework's own, as rows, one per route.

Shape legend: see plan.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from typing_extensions import override

from planmoe_ds.backend import Compressor
from planmoe_ds.codecs import Codecs
from planmoe_ds.executor import Order, Steps, run_tasks
from planmoe_ds.experts import Experts, check_no_foreign_leaves
from planmoe_ds.gradients import ExpertGraph, Totals, linear_calls, splittable, used_once
from planmoe_ds.group import ExpertGroup, SidedArrival, Sides
from planmoe_ds.guard import Meter
from planmoe_ds.headers import pass_phase
from planmoe_ds.plan import ChunkPlan, RoutingPlan
from planmoe_ds.planner import CallOrders
from planmoe_ds.recorder import Label, Recorder
from planmoe_ds.rows import RowOrder, add_at
from planmoe_ds.scheduling import Kind
from planmoe_ds.sums import Sums
from planmoe_ds.trace import Phase
from planmoe_ds.wire import Launch, Spreads, TokenColumns, Wire


@dataclass(frozen=True)
class LayerCall:
    """One call of one layer: everything its forward and backward share."""

    plan: RoutingPlan
    columns: TokenColumns
    hidden: int
    dtype: torch.dtype  # of the tokens; experts may return another one
    experts: Experts
    group: ExpertGroup
    codecs: Codecs
    recorder: Recorder
    layer: int
    order: RowOrder | None  # of the rows, where outputs travel back as rows; None: as sums
    keep_graph: bool  # a backward will follow
    check_leaves: bool
    orders: CallOrders
    meter: Meter | None = None  # measures the codecs

    @property
    def returns_rows(self) -> bool:
        """Whether outputs travel back as rows."""
        return self.order is not None

    @property
    def num_rows(self) -> int:
        """N; 0 where outputs travel back as sums."""
        return 0 if self.order is None else self.order.token_N.shape[0]

    def wire(self, direction: str, dtype: torch.dtype) -> Wire:
        """Encoding of rows of `dtype` on their way in a direction of Codecs."""
        codecs = getattr(self.codecs, direction)
        meter = self.meter
        directions = (self.codecs.dispatch, self.codecs.combine, self.codecs.gradients)
        alone = self.group.size == 1 and all(direction.near.identity for direction in directions)
        if meter is None:
            return Wire(self.group, self.plan, codecs, self.hidden, dtype, alone)

        def measure(link: str, codec: Compressor, rows: torch.Tensor) -> None:
            meter.measure((direction, link), codec, rows)

        return Wire(self.group, self.plan, codecs, self.hidden, dtype, alone, measure)


@dataclass(frozen=True)
class ChunkGraph:
    """What backward needs of one chunk: the experts' graph, and which rows feed its leaf."""

    experts: ExpertGraph
    spreads: Spreads


class Pass:
    """One direction of a layer call: rows out, work on them where the experts are, results back.

    What one task of a chunk hands to the next is dropped when it is taken, so that buffers live no longer than the
    order keeps chunks in flight.
    """

    phase: Phase

    def __init__(self, call: LayerCall, parameters: list[torch.Tensor], graphs: dict[int, ChunkGraph]) -> None:
        self.call = call
        self.parameters = parameters
        self.graphs = graphs
        self.launches: dict[int, Launch] = {}
        self.arrivals: dict[int, SidedArrival] = {}
        self.rows: dict[int, torch.Tensor] = {}

    def run(self, order: Order) -> None:
        """All tasks."""
        steps = Steps(
            run={
                Kind.ENCODE: self._encode,
                Kind.DISPATCH: self._launch,
                Kind.DECODE: self._decode,
                Kind.EXPERT: self._compute,
                Kind.WEIGHTS: self._weights,
                Kind.ENCODE_BACK: self._encode_back,
                Kind.COMBINE: self._launch,
                Kind.COLLECT: self._collect,
            },
            wait={Kind.DECODE: self._wait_for_dispatch, Kind.COLLECT: self._wait_for_combine},
        )
        call = self.call
        with call.group.working(f"layer {call.layer} {self.phase}", pass_phase(call.layer, self.phase)):
            run_tasks(order, steps, self.phase, call.orders.measurement)

    def encode(self, chunk: ChunkPlan) -> Launch:
        """Pack what goes out."""
        raise NotImplementedError

    def decode(self, index: int, chunk: ChunkPlan, arrived: Sides) -> torch.Tensor:
        """Arrived rows -> the experts' buffer."""
        raise NotImplementedError

    def compute(self, index: int, buffer: torch.Tensor) -> torch.Tensor:
        """The experts' buffer -> results."""
        raise NotImplementedError

    def encode_back(self, index: int, chunk: ChunkPlan, results: torch.Tensor) -> Launch:
        """Pack results."""
        raise NotImplementedError

    def collect(self, chunk: ChunkPlan, arrived: Sides) -> None:
        """Put what came back where it belongs."""
        raise NotImplementedError

    def weights(self, index: int) -> None:
        """Gradients of the experts' weights, where they were left for later."""
        raise NotImplementedError

    def _encode(self, index: int) -> None:
        self.launches[index] = self.encode(self.call.plan.chunks[index])

    def _launch(self, index: int) -> None:
        self.arrivals[index] = self.launches.pop(index)()

    def _decode(self, index: int) -> None:
        self.rows[index] = self.decode(index, self.call.plan.chunks[index], self.arrivals.pop(index).rows)

    def _compute(self, index: int) -> None:
        with self.call.recorder.span("compute", Label("experts", self.call.layer, index, self.phase)):
            self.rows[index] = self.compute(index, self.rows.pop(index))

    def _weights(self, index: int) -> None:
        if index in self.call.orders.backward.splits:
            with self.call.recorder.span("compute", Label("weights", self.call.layer, index, self.phase)):
                self.weights(index)

    def _encode_back(self, index: int) -> None:
        self.launches[index] = self.encode_back(index, self.call.plan.chunks[index], self.rows.pop(index))

    def _collect(self, index: int) -> None:
        self.collect(self.call.plan.chunks[index], self.arrivals.pop(index).rows)

    def _wait_for_dispatch(self, index: int) -> None:
        self._wait("dispatch", Kind.DISPATCH, index)

    def _wait_for_combine(self, index: int) -> None:
        self._wait("combine", Kind.COMBINE, index)

    def _wait(self, name: str, kind: Kind, index: int) -> None:
        exchange = self.arrivals[index].exchange
        if exchange is None:
            return
        self.call.recorder.wait(exchange, Label(name, self.call.layer, index, self.phase), self.call.group)
        if self.call.orders.measurement is not None:
            self.call.orders.measurement.add_exchange(self.phase, kind, index, exchange)


class ForwardPass(Pass):
    """Tokens [T, H] -> weighted sums of expert outputs [T, H], or rows [N, H]; fills `graphs`."""

    phase = "forward"

    def __init__(
        self, call: LayerCall, tokens: torch.Tensor, parameters: list[torch.Tensor], graphs: dict[int, ChunkGraph]
    ) -> None:
        super().__init__(call, parameters, graphs)
        self.tokens = tokens
        self.out, self.back = (call.wire(direction, tokens.dtype) for direction in ("dispatch", "combine"))
        self.outputs: torch.Tensor | None = None
        self.totals = None if call.returns_rows else Sums(self.back, tokens.shape[0], 0, tokens)
        self.spreads: dict[int, Spreads] = {}
        self.route_weights: dict[int, torch.Tensor] = {}  # of the buffer's rows, where the experts take them
        self.places = {id(parameter): place for place, parameter in enumerate(parameters)}

    def result(self) -> torch.Tensor:
        """What the pass returns."""
        assert self.outputs is not None
        return self.outputs if self.totals is None else self.totals.values(self.outputs.dtype)

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

    def _run_experts(self, index: int, buffer: torch.Tensor) -> ExpertGraph:
        """With a graph if a backward will follow, from `buffer` and the routes' weights on."""
        call, layout = self.call, self.call.plan.chunks[index].layout
        weights = self.route_weights.pop(index, None)
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
    def encode_back(self, index: int, chunk: ChunkPlan, results: torch.Tensor) -> Launch:
        spreads = self.spreads.pop(index)
        if self.outputs is None:
            self.outputs = results.new_empty((self.call.num_rows, self.call.hidden))
        if self.call.returns_rows:
            return self.call.wire("combine", results.dtype).send_rows_back(chunk, results)
        weighted = not self.call.experts.takes_weights
        return self.back.send_sums(chunk, results.to(self.back.dtype), spreads, weighted=weighted)

    @override
    def collect(self, chunk: ChunkPlan, arrived: Sides) -> None:
        if self.totals is None:
            assert self.outputs is not None
            self.back.collect_rows(chunk, arrived, self.outputs, None)
        else:
            self.totals.add(chunk, arrived)


@dataclass(frozen=True)
class Gradients:
    """Of tokens [T, H], weights [T, K] (None where they are the caller's), and parameters."""

    tokens: torch.Tensor
    weights: torch.Tensor | None
    parameters: Totals


class BackwardPass(Pass):
    """The gradient of what the forward pass returned -> those of what it was given; takes chunks from `graphs`."""

    phase = "backward"

    def __init__(
        self,
        call: LayerCall,
        grad: torch.Tensor,
        num_tokens: int,
        parameters: list[torch.Tensor],
        graphs: dict[int, ChunkGraph],
    ) -> None:
        super().__init__(call, parameters, graphs)
        self.grad = grad
        self.out, self.back = (call.wire("gradients", dtype) for dtype in (grad.dtype, call.dtype))
        self.keep = torch._C._autograd._get_current_graph_task_keep_graph()
        self.totals: Totals = [None] * len(parameters)
        self.num_tokens = num_tokens
        self.num_extra = call.columns.num_extra
        self.sums = Sums(self.back, num_tokens, self.num_extra, grad)
        self.grad_rows = grad.new_empty((call.num_rows, call.hidden), dtype=self.back.dtype)
        takes_weights = call.experts.takes_weights
        wide = self.back.wide_dtype
        self.grad_row_weights = grad.new_zeros(call.num_rows + 1, dtype=wide) if takes_weights else None
        self.route_grads: dict[int, torch.Tensor] = {}  # of the weights of the buffer's rows
        self.arrived: dict[int, Sides] = {}
        self.uses = dict.fromkeys(graphs, 2)  # tasks after compute() that need a chunk's graph

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
    def encode_back(self, index: int, chunk: ChunkPlan, results: torch.Tensor) -> Launch:
        graph = self._take(index)
        route_grads = self.route_grads.pop(index, None)
        if self.call.returns_rows:
            return self.back.send_rows_back(chunk, results, route_grads)
        arrived = self.arrived.pop(index)
        if route_grads is not None:
            extra = self.back.by_route(graph.spreads, route_grads, self.num_extra)
            return self.back.send_sums(chunk, results, graph.spreads, weighted=False, extra=extra)
        output = graph.experts.output.detach().to(self.out.dtype).contiguous()
        weight_grads = self.out.dots(arrived, graph.spreads, output, self.num_extra)
        return self.back.send_sums(chunk, results, graph.spreads, weighted=False, extra=weight_grads)

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
