"""What both passes through a layer share: the call they belong to, and how tasks hand chunks on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from planmoe_ds.backend import Compressor, Exchange
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
from planmoe_ds.refusals import Refusals
from planmoe_ds.rows import RowOrder
from planmoe_ds.scheduling import Kind
from planmoe_ds.trace import Phase
from planmoe_ds.wire import Launch, Pack, Spreads, TokenColumns, Wire


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
    refusals: Refusals
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
        codecs = getattr(self.codecs, direction).for_rows(dtype)
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
    order keeps chunks in flight; but results that a codec may refuse are kept until the ranks agree that it did not.

    out, back: how rows travel.
    """

    phase: Phase
    results_name: str

    def __init__(
        self,
        call: LayerCall,
        parameters: list[torch.Tensor],
        graphs: dict[int, ChunkGraph],
        out: Wire,
        back: Wire,
    ) -> None:
        self.call = call
        self.parameters = parameters
        self.graphs = graphs
        self.out, self.back = out, back
        self.packs: dict[int, Pack] = {}
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
            self.prepare()
            if self.back.codecs.may_refuse and not call.refusals.may_try(self.results_name):
                self.back = self.back.raw()
            self.start_collecting()
            run_tasks(order, steps, self.phase, call.orders.measurement)
            if self.back.codecs.may_refuse and self.any_rank_says(self.back.codecs.take_refused()):
                call.refusals.add(self.results_name)
                self._send_back_again([task.chunk for task in order.tasks if task.kind is Kind.COLLECT])

    def prepare(self) -> None:
        """What comes before the first task."""

    def before_decoding(self) -> None:
        """What comes before chunks are waited for on their way out."""

    def start_collecting(self) -> None:
        """Forget what came back."""
        raise NotImplementedError

    def encode(self, chunk: ChunkPlan) -> Launch:
        """Pack what goes out."""
        raise NotImplementedError

    def decode(self, index: int, chunk: ChunkPlan, arrived: Sides) -> torch.Tensor:
        """Arrived rows -> the experts' buffer."""
        raise NotImplementedError

    def compute(self, index: int, buffer: torch.Tensor) -> torch.Tensor:
        """The experts' buffer -> results."""
        raise NotImplementedError

    def encode_back(self, index: int, chunk: ChunkPlan, results: torch.Tensor) -> Pack:
        """How results are packed."""
        raise NotImplementedError

    def collect(self, chunk: ChunkPlan, arrived: Sides) -> None:
        """Put what came back where it belongs."""
        raise NotImplementedError

    def weights(self, index: int) -> None:
        """Gradients of the experts' weights, where they were left for later."""
        raise NotImplementedError

    def any_rank_says(self, refused: bool) -> bool:
        """Whether a codec refused rows of any rank of the group; the host waits for all of them."""
        call = self.call
        what = f"layer {call.layer} {self.phase}: agreeing on what a codec can carry"
        with call.recorder.span("wait", Label("agree", call.layer, -1, self.phase)):
            told = call.group.any_rank_says(refused, what)
        call.group.comm.set_phase(pass_phase(call.layer, self.phase))
        return told

    def send_out_again(self) -> None:
        """All chunks that are on their way out, as they are."""
        self.out = self.out.raw()
        for index in [*self.launches]:
            self._encode(index)
        for index in [*self.arrivals]:
            self._wait_for(index, "dispatch")
            self._encode(index)
            self._launch(index)

    def _send_back_again(self, chunks: Sequence[int]) -> None:
        """All results as they are, in the order in which they were collected."""
        self.back = self.back.raw()
        self.start_collecting()
        for index in chunks:
            self.arrivals[index] = self.packs.pop(index)(self.back)()
            self._wait_for(index, "combine")
            self._collect(index)

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
        pack = self.encode_back(index, self.call.plan.chunks[index], self.rows.pop(index))
        if self.back.codecs.may_refuse:
            self.packs[index] = pack
        self.launches[index] = pack(self.back)

    def _collect(self, index: int) -> None:
        self.collect(self.call.plan.chunks[index], self.arrivals.pop(index).rows)

    def _wait_for_dispatch(self, index: int) -> None:
        self.before_decoding()
        self._wait("dispatch", Kind.DISPATCH, index)

    def _wait_for_combine(self, index: int) -> None:
        self._wait("combine", Kind.COMBINE, index)

    def _wait(self, name: str, kind: Kind, index: int) -> None:
        exchange = self._wait_for(index, name)
        if exchange is not None and self.call.orders.measurement is not None:
            self.call.orders.measurement.add_exchange(self.phase, kind, index, exchange)

    def _wait_for(self, index: int, name: str) -> Exchange | None:
        exchange = self.arrivals[index].exchange
        if exchange is not None:
            self.call.recorder.wait(exchange, Label(name, self.call.layer, index, self.phase), self.call.group)
        return exchange
