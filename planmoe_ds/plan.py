"""Where every row of one layer call goes: computed once from the router's decision, never changed after.

Shape legend: T tokens, K routes per token, H hidden size, E experts in the group, L experts per rank, P ranks,
X chunks, B pieces of a message between nodes, G most ranks on a node, N rows of this rank (one per kept route),
C capacity (slots per expert and source rank). Near ranks are on this rank's node, far ones on others.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from planmoe_ds.backend import Itinerary, RowRoutes, TokenOrder, order_tokens
from planmoe_ds.config import ChunkBy
from planmoe_ds.group import ExpertGroup
from planmoe_ds.headers import Header, check_headers, check_launches
from planmoe_ds.recorder import Label, Recorder
from planmoe_ds.rows import RowOrder, RowTrip, plan_row_trip

NO_ROUTE = -1  # expert index of a route that the router dropped
PIECE_BYTES = 1 << 17  # messages between nodes are not cut into smaller pieces than this


@dataclass(frozen=True)
class Routes:
    """The router's decision.

    expert_KT: integer, NO_ROUTE for dropped routes; slot_KT: integer place in the expert's capacity, unique per
    expert; weight_KT: floating point; num_experts: E; capacity: C, None where the framework pads nothing.
    """

    expert_KT: torch.Tensor
    slot_KT: torch.Tensor
    weight_KT: torch.Tensor
    num_experts: int
    capacity: int | None


@dataclass(frozen=True)
class ExpertLayout:
    """How a chunk's rows lie in the experts' input buffer.

    rows_of_expert: L numbers, ragged layout (experts one after the other); padded_shape: (P, L, C) or None. A padded
    buffer has the shape the framework's own dispatch gives, with zeros in the empty slots.
    """

    rows_of_expert: tuple[int, ...]
    padded_shape: tuple[int, int, int] | None

    @property
    def num_rows(self) -> int:
        """Rows of the buffer."""
        if self.padded_shape is None:
            return sum(self.rows_of_expert)
        sources, experts, capacity = self.padded_shape
        return sources * experts * capacity


@dataclass(frozen=True)
class SidePlan:
    """A chunk's rows from and to the ranks of one side, near or far.

    token: int64, the token behind each row that is sent; received_rows: P numbers; num_entries: rows that the experts
    get from what is received.
    """

    token: torch.Tensor
    received_rows: list[int]
    num_entries: int

    @property
    def num_received(self) -> int:
        """Rows that arrive."""
        return sum(self.received_rows)


@dataclass(frozen=True)
class ChunkPlan:
    """One chunk: its rows' way, the experts it concerns, and where its rows lie in the experts' buffer.

    experts: range of local experts; base_PL: P * L numbers, where a source's rows for an expert start in the buffer;
    rows: set where expert outputs travel back row by row instead of summed.
    """

    itinerary: Itinerary
    near: SidePlan
    far: SidePlan
    experts: tuple[int, int]
    base_PL: list[int]
    layout: ExpertLayout
    rows: RowTrip | None


@dataclass(frozen=True)
class RoutingPlan:
    """All chunks of one layer call."""

    chunks: tuple[ChunkPlan, ...]
    first_expert: int  # of this rank
    experts_per_rank: int
    notes: tuple[int, ...]  # the largest of what the ranks of the group noted, by place

    def routes(self, chunk: ChunkPlan, offset: int, top_k: int, id_bytes: int) -> RowRoutes:
        """How rows say which experts want them, with K expert numbers from column `offset` on."""
        first, last = chunk.experts
        return RowRoutes(
            offset=offset,
            top_k=top_k,
            id_bytes=id_bytes,
            experts_per_rank=self.experts_per_rank,
            first_expert=first,
            last_expert=last,
        )


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What a plan is made from, besides the routes. row_bytes: of one token on the wire between nodes."""

    num_chunks: int
    chunk_by: ChunkBy
    header: Header
    row_bytes: int
    padded_capacity: int | None  # slots per expert and source rank to re-create in the buffer; None: ragged
    row_order: RowOrder | None  # set: expert outputs travel back row by row
    place_of_source: tuple[int, ...] | None = None  # of each source's rows among those for an expert; None: by rank
    notes: tuple[int, ...] = ()  # numbers to tell the other ranks; as many on every rank


def build_plan(
    expert_KT: torch.Tensor,
    num_experts: int,
    group: ExpertGroup,
    request: PlanRequest,
    recorder: Recorder,
    label: Label,
) -> RoutingPlan:
    """Order this rank's tokens, agree on the counts with the group, then lay out every chunk.

    Raises PlanMoEMismatchError when ranks are in different layers or launched their exchanges in different orders.
    """
    comm = group.comm
    order = order_tokens(
        expert=expert_KT.long().cpu().contiguous(),
        num_experts=num_experts,
        num_chunks=request.num_chunks,
        chunk_by_expert=request.chunk_by is ChunkBy.EXPERT,
        rank=group.rank,
        node_of_rank=comm.node_of_rank,
        first_hop=comm.first_hops,
        num_pieces=comm.num_pieces,
        rows_per_piece=max(1, PIECE_BYTES // request.row_bytes),
    )
    sent = _counts(order, group.size, comm.passes_on)
    received, notes = _exchange_counts(sent, request, group, expert_KT.device, recorder, label)
    experts_per_rank = num_experts // group.size
    chunks = [
        _plan_chunk(chunk, order, received, group, request, expert_KT.device) for chunk in range(request.num_chunks)
    ]
    return RoutingPlan(tuple(chunks), group.rank * experts_per_rank, experts_per_rank, notes)


@dataclass(frozen=True)
class _Counts:
    """What ranks tell each other, int64; the first dimension is the peer."""

    expert_rows_PXL: torch.Tensor
    near_PX: torch.Tensor
    far_PXB: torch.Tensor  # rows that end at the receiver of this message
    passed_PXB: torch.Tensor | None = None  # rows that it passes on
    fan_PXBG: torch.Tensor | None = None

    def pack(self) -> torch.Tensor:
        """int64 [P, width]."""
        return torch.cat([values.flatten(1) for values in self._values()], dim=1)

    def unpack(self, message: torch.Tensor) -> _Counts:
        """Counts of the shapes of these from int64 [P, width]."""
        found = []
        for values in self._values():
            width = values[0].numel()
            found.append(message[:, :width].reshape(values.shape))
            message = message[:, width:]
        return _Counts(*found)

    def _values(self) -> list[torch.Tensor]:
        return [values for values in (getattr(self, field.name) for field in fields(self)) if values is not None]


def _counts(order: TokenOrder, num_ranks: int, passes_on: bool) -> _Counts:
    """What this rank tells every peer."""
    num_chunks = order.expert_rows.shape[0]
    experts = order.expert_rows.reshape(num_chunks, num_ranks, -1).transpose(0, 1)
    near, far = order.near_sent.t(), order.far_final.transpose(0, 1)
    if not passes_on:
        return _Counts(experts, near, far)
    return _Counts(experts, near, far, order.far_sent.transpose(0, 1), order.fan.transpose(0, 1))


def _exchange_counts(
    sent: _Counts, request: PlanRequest, group: ExpertGroup, device: torch.device, recorder: Recorder, label: Label
) -> tuple[_Counts, tuple[int, ...]]:
    """Every peer's counts for this rank, and the largest of everybody's notes."""
    header, launches = request.header.pack(), torch.tensor(group.launch_digests())  # as every peer should have them
    shared = torch.cat([header, torch.tensor(request.notes, dtype=torch.int64)]).expand(group.size, -1)
    counts = sent.pack()
    filler = counts.new_zeros((group.size, group.counts_filler(counts.shape[1])))
    message = torch.cat([launches.unsqueeze(1), shared, counts, filler], dim=1)
    ones = [1] * group.size
    arrival = group.exchange(message.to(device), ones, ones)
    if arrival.exchange is None:
        received = arrival.rows.cpu()
    else:
        recorder.wait(arrival.exchange, label, group)
        with group.waiting(arrival.exchange, label.describe()):  # here the host waits for accelerators
            received = arrival.rows.cpu()  # the one host copy of a layer call
    first_note = 1 + len(header)
    first_count = first_note + len(request.notes)
    check_headers(received[:, 1:first_note].tolist(), request.header, group.global_ranks)
    check_launches(received[:, :1], launches.unsqueeze(1), request.header.layer, group.global_ranks, group.rank)
    notes = tuple(received[:, first_note:first_count].amax(0).tolist())
    return sent.unpack(received[:, first_count:]), notes


def _plan_chunk(
    chunk: int,
    order: TokenOrder,
    received: _Counts,
    group: ExpertGroup,
    request: PlanRequest,
    device: torch.device,
) -> ChunkPlan:
    counts_PL = received.expert_rows_PXL[:, chunk]
    near_received, far_received = received.near_PX[:, chunk], received.far_PXB[:, chunk]
    itinerary = Itinerary(
        near_sent=order.near_sent[chunk].tolist(),
        near_received=near_received.tolist(),
        far_sent=order.far_sent[chunk].flatten().tolist(),
        far_received=far_received.flatten().tolist(),
        passed=[] if received.passed_PXB is None else received.passed_PXB[:, chunk].flatten().tolist(),
        fan=[] if received.fan_PXBG is None else received.fan_PXBG[:, chunk].flatten().tolist(),
    )
    is_near = group.is_near
    near_entries = int(counts_PL[is_near].sum())
    near = SidePlan(order.near_token[chunk].to(device), near_received.tolist(), near_entries)
    far_entries = int(counts_PL.sum()) - near_entries
    far = SidePlan(order.far_token[chunk].to(device), far_received.sum(1).tolist(), far_entries)
    layout, base_PL = _lay_out(counts_PL, request.padded_capacity, request.place_of_source)
    rows = None
    if request.row_order is not None:
        rows = plan_row_trip(request.row_order, chunk, counts_PL, base_PL, is_near, device)
    experts_per_rank = counts_PL.shape[1]
    experts = (0, experts_per_rank)
    if request.chunk_by is ChunkBy.EXPERT:
        first, last = (-(-place * experts_per_rank // request.num_chunks) for place in (chunk, chunk + 1))
        experts = (first, last)
    return ChunkPlan(itinerary, near, far, experts, base_PL.flatten().tolist(), layout, rows)


def _lay_out(
    counts_PL: torch.Tensor, padded_capacity: int | None, place_of_source: tuple[int, ...] | None = None
) -> tuple[ExpertLayout, torch.Tensor]:
    """The buffer's layout, and where each source's rows for each expert start in it, [P, L]."""
    num_sources, num_local = counts_PL.shape
    if place_of_source is not None:
        place = torch.tensor(place_of_source)
        layout, base_PL = _lay_out(counts_PL[place.argsort()], padded_capacity)
        return layout, base_PL[place]
    rows_of_expert = tuple(counts_PL.sum(0).tolist())
    if padded_capacity is None:
        by_expert = counts_PL.t().reshape(-1)
        base = (by_expert.cumsum(0) - by_expert).reshape(num_local, num_sources).t()
        return ExpertLayout(rows_of_expert, None), base
    capacity = max(padded_capacity, int(counts_PL.max()))
    base = torch.arange(num_sources * num_local).reshape(num_sources, num_local) * capacity
    return ExpertLayout(rows_of_expert, (num_sources, num_local, capacity)), base
