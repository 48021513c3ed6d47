"""What both passes through a layer share: the call they belong to, and how tasks hand chunks on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from planmoe_ds.backend import Compressor
from planmoe_ds.codecs import Codecs
from planmoe_ds.executor import Order, Steps, run_tasks
from planmoe_ds.experts import Experts
from planmoe_ds.gradients import ExpertGraph
from planmoe_ds.group import ExpertGroup, SidedArrival, Sides
from planmoe_ds.grouped import GroupedGraph
from planmoe_ds.guard import Meter
from planmoe_ds.headers import pass_phase
from planmoe_ds.plan import ChunkPlan, RoutingPlan
from planmoe_ds.planner import CallOrders
from planmoe_ds.recorder import Label, Recorder
from planmoe_ds.rows import RowOrder
from planmoe_ds.scheduling import Kind
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

    experts: ExpertGraph | GroupedGraph
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
