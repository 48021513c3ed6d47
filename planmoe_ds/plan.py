"""Where every row of one layer call goes: computed once from the router's decision, never changed after.

Shape legend: T tokens, K routes per token, H hidden size, E experts in the group, L experts per rank, P ranks,
X chunks, B pieces of a message between nodes, G most ranks on a node, N rows of this rank (one per kept route),
C capacity (slots per expert and source rank). Near ranks are on this rank's node, far ones on others.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from planmoe_ds.backend import (
    Itinerary,
    RowRoutes,
    TokenOrder,
    order_tokens,
    order_tokens_on_device,
    routes_on_device,
)
from planmoe_ds.choose import least_piece
from planmoe_ds.config import ChunkBy
from planmoe_ds.errors import PlanMoEMismatchError
from planmoe_ds.group import ExpertGroup
from planmoe_ds.headers import Header, check_headers, check_launches
from planmoe_ds.recorder import Label, Recorder
from planmoe_ds.rows import RowOrder, RowTrip, plan_row_trip

NO_ROUTE = -1  # expert index of a route that the router dropped
MOST_BYTES = 1 << 46  # of rows in one message: more is an error


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
    ends: torch.Tensor | None = None  # int64 [L] on the accelerator, where each expert's rows end, if ragged

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
    get from what is received. Accelerators: returns, int32 [T of the chunk, S], where in `token` each token stands,
    then -1; table, see ArrivedRows in csrc/kernels/routing.h.
    """

    token: torch.Tensor
    received_rows: list[int]
    num_entries: int
    returns: torch.Tensor | None = None
    table: torch.Tensor | None = None

    @property
    def num_received(self) -> int:
        """Rows that arrive."""
        return sum(self.received_rows)


@dataclass(frozen=True)
class ChunkPlan:
    """One chunk: its rows' way, the experts it concerns, and where its rows lie in the experts' buffer.

    tokens: range of tokens; experts: range of local experts; base_PL: P * L numbers, where a source's rows for an
    expert start in the buffer; rows: set where expert outputs travel back row by row instead of summed.
    """

    itinerary: Itinerary
    near: SidePlan
    far: SidePlan
    tokens: tuple[int, int]
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
    device, chunks = expert_KT.device, range(request.num_chunks)
    agree = _agree_on_device if routes_on_device(expert_KT) else _agree_on_host
    agreed = agree(expert_KT, num_experts, group, request, recorder, label)
    order = agreed.order
    drafts = [_draft_chunk(chunk, order, agreed.received, group, request) for chunk in chunks]
    tables = _upload(drafts, device) if routes_on_device(expert_KT) else [None] * len(drafts)
    num_tokens = expert_KT.shape[1]
    planned = [_plan_chunk(chunk, num_tokens, order, drafts[chunk], tables[chunk], request, device) for chunk in chunks]
    experts_per_rank = num_experts // group.size
    return RoutingPlan(tuple(planned), group.rank * experts_per_rank, experts_per_rank, agreed.notes)


@dataclass(frozen=True)
class _Order:
    """The rows that this rank sends, by chunk: see TokenOrder in csrc/kernels/routing.h; counts are on the CPU.

    near_return, far_return: int32 [X by expert, else 1, T, S], accelerators only.
    """

    near_token: list[torch.Tensor]
    far_token: list[torch.Tensor]
    near_sent_XP: torch.Tensor
    far_sent_XPB: torch.Tensor
    near_return: torch.Tensor | None = None
    far_return: torch.Tensor | None = None


@dataclass(frozen=True)
class _Agreement:
    """What this rank sends, what it receives, and the largest of everybody's notes."""

    order: _Order
    received: _Counts
    notes: tuple[int, ...]


def _agree_on_host(
    expert_KT: torch.Tensor,
    num_experts: int,
    group: ExpertGroup,
    request: PlanRequest,
    recorder: Recorder,
    label: Label,
) -> _Agreement:
    order = order_tokens(expert=expert_KT.long().cpu().contiguous(), **_order_settings(num_experts, group, request))
    sent = _counts(order, group.size, group.comm.passes_on)
    opening, counts = _opening(request, group), sent.pack()
    filler = counts.new_zeros((group.size, group.counts_filler(counts.shape[1])))
    message = torch.cat([opening, counts, filler], dim=1)
    _, received = _exchange_message(message.to(expert_KT.device), group, recorder, label)
    notes = _check_opening(received, opening, request, group)
    tokens = _Order(order.near_token, order.far_token, order.near_sent, order.far_sent)
    told = received[:, opening.shape[1] :]
    counts_of = _unpack(told, [values.shape for values in sent.values()])
    _check_counts(told, counts_of, request, group)
    return _Agreement(tokens, counts_of, notes)


def _agree_on_device(
    expert_KT: torch.Tensor,
    num_experts: int,
    group: ExpertGroup,
    request: PlanRequest,
    recorder: Recorder,
    label: Label,
) -> _Agreement:
    """The same without the host, which waits once, for the counts of all ranks."""
    shapes = _count_shapes(num_experts, group, request.num_chunks)
    opening = _opening(request, group)
    first, width = opening.shape[1], sum(shape[1:].numel() for shape in shapes)
    invalid_column = first + width  # the first of the filler, on every rank
    columns = invalid_column + 1 + group.counts_filler(width)
    blank = torch.zeros((group.size, columns), dtype=torch.int64, pin_memory=True)
    blank[:, :first] = opening
    message = blank.to(expert_KT.device, non_blocking=True)
    ordered = order_tokens_on_device(
        expert=expert_KT,
        **_order_settings(num_experts, group, request),
        tables=group.routing_tables,
        message=message,
        first_column=first,
    )
    mine, theirs = _exchange_message(message, group, recorder, label)
    invalid = int(mine[0, invalid_column])
    if invalid:
        raise ValueError(f"{invalid} routes lead to experts that do not exist, there are {num_experts}")
    notes = _check_opening(theirs, opening, request, group)
    sent, received = (_unpack(side[:, first:], shapes) for side in (mine, theirs))
    _check_counts(theirs[:, first:], received, request, group)
    far_sent = (sent.far_PXB if sent.passed_PXB is None else sent.passed_PXB).transpose(0, 1)
    near_sent = sent.near_PX.t()
    sizes = torch.stack([near_sent.sum(1), far_sent.sum((1, 2))], dim=1).flatten().tolist()
    pieces = ordered.tokens[: sum(sizes)].split(sizes)
    order = _Order(list(pieces[::2]), list(pieces[1::2]), near_sent, far_sent, ordered.near_return, ordered.far_return)
    return _Agreement(order, received, notes)


def _order_settings(num_experts: int, group: ExpertGroup, request: PlanRequest) -> dict[str, Any]:
    return {
        "num_experts": num_experts,
        "num_chunks": request.num_chunks,
        "chunk_by_expert": request.chunk_by is ChunkBy.EXPERT,
        "rank": group.rank,
        "node_of_rank": group.comm.node_of_rank,
        "first_hop": group.comm.first_hops,
        "num_pieces": group.comm.num_pieces,
        "rows_per_piece": max(1, least_piece(group.comm.device.type) // request.row_bytes),
    }


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
        return torch.cat([values.flatten(1) for values in self.values()], dim=1)

    def values(self) -> list[torch.Tensor]:
        """Those that there are, in the order of a message."""
        return [values for values in (getattr(self, field.name) for field in fields(self)) if values is not None]


def _unpack(message: torch.Tensor, shapes: list[torch.Size]) -> _Counts:
    """Counts from int64 [P, width or more]."""
    found, first = [], 0
    for shape in shapes:
        width = shape[1:].numel()
        found.append(message[:, first : first + width].reshape(shape))
        first += width
    return _Counts(*found)


def _count_shapes(num_experts: int, group: ExpertGroup, num_chunks: int) -> list[torch.Size]:
    comm, size = group.comm, group.size
    pieces = max(1, comm.num_pieces)
    shapes = [(size, num_chunks, num_experts // size), (size, num_chunks), (size, num_chunks, pieces)]
    if comm.passes_on:
        nodes = comm.node_of_rank
        largest = max(nodes.count(node) for node in nodes)
        shapes += [(size, num_chunks, pieces), (size, num_chunks, pieces, largest)]
    return [torch.Size(shape) for shape in shapes]


def _counts(order: TokenOrder, num_ranks: int, passes_on: bool) -> _Counts:
    """What this rank tells every peer."""
    num_chunks = order.expert_rows.shape[0]
    experts = order.expert_rows.reshape(num_chunks, num_ranks, -1).transpose(0, 1)
    near, far = order.near_sent.t(), order.far_final.transpose(0, 1)
    if not passes_on:
        return _Counts(experts, near, far)
    return _Counts(experts, near, far, order.far_sent.transpose(0, 1), order.fan.transpose(0, 1))


def _opening(request: PlanRequest, group: ExpertGroup) -> torch.Tensor:
    """What a message starts with, int64 [P, width]: the peer's launches as it should have them, header, notes."""
    launches = torch.tensor(group.launch_digests()).unsqueeze(1)
    shared = torch.cat([request.header.pack(), torch.tensor(request.notes, dtype=torch.int64)])
    return torch.cat([launches, shared.expand(group.size, -1)], dim=1)


def _check_opening(
    received: torch.Tensor, opening: torch.Tensor, request: PlanRequest, group: ExpertGroup
) -> tuple[int, ...]:
    """Compare all ranks' messages, int64 [P, width], with this rank's opening; the largest of everybody's notes."""
    header, first_count = request.header, opening.shape[1]
    first_note = first_count - len(request.notes)
    check_headers(received[:, 1:first_note].tolist(), header, group.global_ranks)
    check_launches(received[:, :1], opening[:, :1], header.layer, group.global_ranks, group.rank)
    return tuple(received[:, first_note:first_count].amax(0).tolist())


def _check_counts(message: torch.Tensor, received: _Counts, request: PlanRequest, group: ExpertGroup) -> None:
    """Sizes of buffers are made from what peers say: PlanMoEMismatchError names those whose numbers cannot be.

    message: int64 [P, width], with all of `received`. A token that a rank sends is for one expert of the receiver at
    least and for each route's at most; a rank that passes rows on gives each rank of its node as many at most.
    """
    top_k = request.header.routes_per_token
    if _are_numbers_of_rows(message, request.row_bytes) and _fit_together(received, top_k):
        return
    wrong = []
    for place, rank in enumerate(group.global_ranks):
        own = _Counts(*(values[place : place + 1] for values in received.values()))
        if not (_are_numbers_of_rows(message[place], request.row_bytes) and _fit_together(own, top_k)):
            wrong.append(rank)
    raise PlanMoEMismatchError(
        f"layer {request.header.layer}: what ranks {wrong} say that they send to rank "
        f"{group.global_ranks[group.rank]} cannot be: numbers of rows are negative, do not fit together, or are more "
        "than any machine holds. The message was damaged on its way, or planmoe is not the same there"
    )


def _are_numbers_of_rows(message: torch.Tensor, row_bytes: int) -> bool:
    low, high = torch.aminmax(message)
    return low.item() >= 0 and high.item() <= MOST_BYTES // row_bytes  # so that no sum of them overflows


def _fit_together(received: _Counts, top_k: int) -> bool:
    entries_PX = received.expert_rows_PXL.sum(-1)
    rows_PX = received.near_PX + received.far_PXB.sum(-1)
    spare = [entries_PX - rows_PX, top_k * rows_PX - entries_PX]
    if received.passed_PXB is not None and received.fan_PXBG is not None:
        spare.append(received.passed_PXB - received.fan_PXBG.amax(-1))
    return all(values.min().item() >= 0 for values in spare)


def _exchange_message(
    message: torch.Tensor, group: ExpertGroup, recorder: Recorder, label: Label
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's message, int64 [P, width], and what its peers sent it, both on the CPU."""
    ones = [1] * group.size
    arrival = group.exchange(message, ones, ones)
    if arrival.exchange is None:
        message = message.cpu()
        return message, message
    recorder.wait(arrival.exchange, label, group)
    with group.waiting(arrival.exchange, label.describe()):  # here the host waits for accelerators
        if message.device.type == "cpu":
            return message, arrival.rows
        sent, received = torch.stack([message, arrival.rows]).cpu()  # the one host copy of a layer call
        return sent, received


@dataclass(frozen=True)
class _Draft:
    """A chunk in numbers, all on the CPU."""

    itinerary: Itinerary
    received_rows: tuple[list[int], list[int]]  # near, far
    num_entries: tuple[int, int]
    layout: ExpertLayout
    base_PL: torch.Tensor
    counts_PL: torch.Tensor
    is_near: torch.Tensor
    counted: bool  # a row's place among those of its source and expert is counted by the receiver

    def table(self, side: int) -> torch.Tensor:
        """See ArrivedRows in csrc/kernels/routing.h."""
        received = torch.tensor(self.received_rows[side])
        base = self.base_PL
        if self.counted and len(received) > 1:
            counts = torch.where((self.is_near if side == 0 else ~self.is_near).unsqueeze(1), self.counts_PL, 0)
            base = base - (counts.cumsum(0) - counts)
        return torch.cat([base.flatten(), received.cumsum(0) - received])

    def ends(self) -> torch.Tensor:
        """Where every expert's rows end in a ragged buffer."""
        return torch.tensor(self.layout.rows_of_expert).cumsum(0)


def _upload(drafts: list[_Draft], device: torch.device) -> list[list[torch.Tensor]]:
    """Every chunk's tables, near and far, and ends, in one copy that the host does not wait for."""
    parts = [part for draft in drafts for part in (draft.table(0), draft.table(1), draft.ends())]
    sizes = [part.numel() for part in parts]
    uploaded = torch.cat(parts).pin_memory().to(device, non_blocking=True).split(sizes)
    return [list(uploaded[first : first + 3]) for first in range(0, len(parts), 3)]


def _draft_chunk(chunk: int, order: _Order, received: _Counts, group: ExpertGroup, request: PlanRequest) -> _Draft:
    counts_PL = received.expert_rows_PXL[:, chunk]
    near_received, far_received = received.near_PX[:, chunk], received.far_PXB[:, chunk]
    itinerary = Itinerary(
        near_sent=order.near_sent_XP[chunk].tolist(),
        near_received=near_received.tolist(),
        far_sent=order.far_sent_XPB[chunk].flatten().tolist(),
        far_received=far_received.flatten().tolist(),
        passed=[] if received.passed_PXB is None else received.passed_PXB[:, chunk].flatten().tolist(),
        fan=[] if received.fan_PXBG is None else received.fan_PXBG[:, chunk].flatten().tolist(),
    )
    near_entries = int(counts_PL[group.is_near].sum())
    layout, base_PL = _lay_out(counts_PL, request.padded_capacity, request.place_of_source)
    return _Draft(
        itinerary,
        (near_received.tolist(), far_received.sum(1).tolist()),
        (near_entries, int(counts_PL.sum()) - near_entries),
        layout,
        base_PL,
        counts_PL,
        group.is_near,
        request.row_order is None,
    )


def _plan_chunk(
    chunk: int,
    num_tokens: int,
    order: _Order,
    draft: _Draft,
    tables: list[torch.Tensor] | None,
    request: PlanRequest,
    device: torch.device,
) -> ChunkPlan:
    experts_per_rank = draft.counts_PL.shape[1]
    tokens, experts = (0, num_tokens), (0, experts_per_rank)
    total = experts_per_rank if request.chunk_by is ChunkBy.EXPERT else num_tokens
    first, last = (-(-place * total // request.num_chunks) for place in (chunk, chunk + 1))
    if request.chunk_by is ChunkBy.EXPERT:
        experts = (first, last)
    else:
        tokens = (first, last)
    copy = chunk if request.chunk_by is ChunkBy.EXPERT else 0

    def side(place: int, token: torch.Tensor, returns: torch.Tensor | None) -> SidePlan:
        return SidePlan(
            token.to(device),
            draft.received_rows[place],
            draft.num_entries[place],
            None if returns is None else returns[copy, slice(*tokens)],
            None if tables is None else tables[place],
        )

    near = side(0, order.near_token[chunk], order.near_return)
    far = side(1, order.far_token[chunk], order.far_return)
    layout = draft.layout
    if tables is not None and layout.padded_shape is None:
        layout = replace(layout, ends=tables[2])
    rows = None
    if request.row_order is not None:
        rows = plan_row_trip(request.row_order, chunk, draft.counts_PL, draft.base_PL, draft.is_near, device)
    return ChunkPlan(draft.itinerary, near, far, tokens, experts, draft.base_PL.flatten().tolist(), layout, rows)


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
