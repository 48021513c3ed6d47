"""Where every row of one layer call goes: computed once from the router's decision, never changed after.

Shape legend: T tokens, K routes per token, H hidden size, E experts in the group, L experts per rank, P ranks,
X chunks, B pieces of a message between nodes, G most ranks on a node, N rows of this rank (one per kept route),
C capacity (slots per expert and source rank). Near ranks are on this rank's node, far ones on others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from planmoe_ds.backend import Itinerary, RowRoutes, routes_on_device
from planmoe_ds.chunking import Chunking
from planmoe_ds.config import ChunkBy
from planmoe_ds.counts import Agreement, Talk
from planmoe_ds.group import ExpertGroup
from planmoe_ds.rows import Integers, RowOrder, RowTrip, plan_row_trip

NO_ROUTE = -1  # expert index of a route that the router dropped


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


def find_routes(routing_map: torch.Tensor, probs: torch.Tensor, top_k: int) -> Routes:
    """The router's decision as a mask [T, E] and probs [T, E] -> routes [K, T], experts in ascending order.

    Megatron adds a token's outputs in the order of the experts, and keeps tokens in order before an expert.
    """
    num_tokens, num_experts = routing_map.shape
    from_last = torch.arange(num_experts, 0, -1, device=routing_map.device)
    found = torch.where(routing_map, from_last, 0).topk(min(top_k, num_experts), dim=1).values
    expert_TK = torch.where(found > 0, num_experts - found, NO_ROUTE)
    weight_TK = probs.gather(1, expert_TK.clamp(min=0))
    slot_KT = torch.arange(num_tokens, device=routing_map.device).expand(expert_TK.shape[1], -1)
    return Routes(expert_TK.t(), slot_KT, weight_TK.t(), num_experts, None)


@dataclass(frozen=True)
class ExpertLayout:
    """How a chunk's rows lie in the experts' input buffer.

    rows_of_expert: L numbers, ragged layout (experts one after the other); padded_shape: (P, L, C) or None. A padded
    buffer has the shape the framework's own dispatch gives, with zeros in the empty slots.
    """

    rows_of_expert: tuple[int, ...]
    padded_shape: tuple[int, int, int] | None
    ends: torch.Tensor | None = None  # int32 [L] on the accelerator, where each expert's rows end, if ragged

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
class BufferRequest:
    """How rows are to lie before the experts, and how outputs travel back."""

    padded_capacity: int | None = None  # slots per expert and source rank to re-create in the buffer; None: ragged
    row_order: RowOrder | None = None  # set: expert outputs travel back row by row
    place_of_source: tuple[int, ...] | None = None  # of each source's rows among those for an expert; None: by rank


def build_plan(expert_KT: torch.Tensor, talk: Talk, buffer: BufferRequest) -> RoutingPlan:
    """Order this rank's tokens, agree on the counts with the group, then lay out every chunk; see Talk for errors."""
    agreed = talk.agree(expert_KT)
    chunks, size = range(talk.chunking.num_chunks), talk.group.size
    drafts = [_draft_chunk(chunk, agreed, talk.group, buffer) for chunk in chunks]
    device = expert_KT.device
    tables = _upload(drafts, device) if routes_on_device(expert_KT) else [None] * len(drafts)
    num_tokens, experts_per_rank = expert_KT.shape[1], talk.num_experts // size
    planned = [
        _plan_chunk(_Share.of(talk.chunking, chunk, num_tokens, experts_per_rank), agreed, draft, table, buffer, device)
        for chunk, draft, table in zip(chunks, drafts, tables, strict=True)
    ]
    return RoutingPlan(tuple(planned), talk.group.rank * experts_per_rank, experts_per_rank, agreed.notes)


@dataclass(frozen=True)
class _Share:
    """Which tokens and local experts a chunk has, and which copy of the tokens' returns is its."""

    chunk: int
    tokens: tuple[int, int]
    experts: tuple[int, int]
    copy: int

    @classmethod
    def of(cls, chunking: Chunking, chunk: int, num_tokens: int, experts_per_rank: int) -> _Share:
        tokens, experts = (0, num_tokens), (0, experts_per_rank)
        if chunking.by is ChunkBy.TOKEN:
            tokens = chunking.range_of(chunk, num_tokens)
        elif chunking.by is ChunkBy.EXPERT:
            experts = chunking.range_of(chunk, experts_per_rank)
        return cls(chunk, tokens, experts, 0 if chunking.divides_tokens else chunk)


@dataclass(frozen=True)
class _Draft:
    """A chunk in numbers, all on the CPU."""

    itinerary: Itinerary
    received_rows: tuple[list[int], list[int]]  # near, far
    num_entries: tuple[int, int]
    layout: ExpertLayout
    base_PL: Integers
    counts_PL: Integers
    is_near: NDArray[np.bool_]
    counted: bool  # a row's place among those of its source and expert is counted by the receiver

    def table(self, side: int) -> Integers:
        """See ArrivedRows in csrc/kernels/routing.h."""
        received = np.array(self.received_rows[side])
        base = self.base_PL
        if self.counted and len(received) > 1:
            counts = np.where((self.is_near if side == 0 else ~self.is_near)[:, None], self.counts_PL, 0)
            base = base - (counts.cumsum(0) - counts)
        return np.concatenate([base.ravel(), received.cumsum() - received])

    def ends(self) -> Integers:
        """Where every expert's rows end in a ragged buffer: int32 numbers, two in each of the result's."""
        rows = self.layout.rows_of_expert
        ends = np.zeros(len(rows) + len(rows) % 2, dtype=np.int32)
        np.cumsum(rows, out=ends[: len(rows)])
        return ends.view(np.int64)


def _upload(drafts: list[_Draft], device: torch.device) -> list[list[torch.Tensor]]:
    """Every chunk's tables, near and far, and ends, in one copy that the host does not wait for."""
    parts = [part for draft in drafts for part in (draft.table(0), draft.table(1), draft.ends())]
    sizes = [len(part) for part in parts]
    numbers = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=True)
    np.concatenate(parts, out=numbers.numpy())
    uploaded = numbers.to(device, non_blocking=True).split(sizes)
    return [list(uploaded[first : first + 3]) for first in range(0, len(parts), 3)]


def _draft_chunk(chunk: int, agreed: Agreement, group: ExpertGroup, buffer: BufferRequest) -> _Draft:
    order, received = agreed.order, agreed.received
    counts_PL = received.expert_rows_PXL[:, chunk]
    near_received, far_received = received.near_PX[:, chunk], received.far_PXB[:, chunk]
    itinerary = Itinerary(
        near_sent=order.near_sent_XP[chunk].tolist(),
        near_received=near_received.tolist(),
        far_sent=order.far_sent_XPB[chunk].ravel().tolist(),
        far_received=far_received.ravel().tolist(),
        passed=[] if received.passed_PXB is None else received.passed_PXB[:, chunk].ravel().tolist(),
        fan=[] if received.fan_PXBG is None else received.fan_PXBG[:, chunk].ravel().tolist(),
    )
    is_near = group.is_near.numpy()
    near_entries = int(counts_PL[is_near].sum())
    layout, base_PL = _lay_out(counts_PL, buffer.padded_capacity, buffer.place_of_source)
    return _Draft(
        itinerary,
        (near_received.tolist(), far_received.sum(1).tolist()),
        (near_entries, int(counts_PL.sum()) - near_entries),
        layout,
        base_PL,
        counts_PL,
        is_near,
        buffer.row_order is None,
    )


def _plan_chunk(
    share: _Share,
    agreed: Agreement,
    draft: _Draft,
    tables: list[torch.Tensor] | None,
    buffer: BufferRequest,
    device: torch.device,
) -> ChunkPlan:
    def side(place: int, token: torch.Tensor, returns: torch.Tensor | None) -> SidePlan:
        return SidePlan(
            token.to(device),
            draft.received_rows[place],
            draft.num_entries[place],
            None if returns is None else returns[share.copy, slice(*share.tokens)],
            None if tables is None else tables[place],
        )

    order = agreed.order
    near = side(0, order.near_token[share.chunk], order.near_return)
    far = side(1, order.far_token[share.chunk], order.far_return)
    layout = draft.layout
    if tables is not None and layout.padded_shape is None:
        layout = replace(layout, ends=tables[2].view(torch.int32)[: len(layout.rows_of_expert)])
    rows = None
    if buffer.row_order is not None:
        rows = plan_row_trip(buffer.row_order, share.chunk, draft.counts_PL, draft.base_PL, draft.is_near, device)
    base_PL = draft.base_PL.ravel().tolist()
    return ChunkPlan(draft.itinerary, near, far, share.tokens, share.experts, base_PL, layout, rows)


def _lay_out(
    counts_PL: Integers, padded_capacity: int | None, place_of_source: tuple[int, ...] | None = None
) -> tuple[ExpertLayout, Integers]:
    """The buffer's layout, and where each source's rows for each expert start in it, [P, L]."""
    num_sources, num_local = counts_PL.shape
    if place_of_source is not None:
        place = np.array(place_of_source)
        layout, base_PL = _lay_out(counts_PL[place.argsort()], padded_capacity)
        return layout, base_PL[place]
    rows_of_expert = tuple(counts_PL.sum(0).tolist())
    if padded_capacity is None:
        by_expert = counts_PL.T.ravel()
        base = (by_expert.cumsum() - by_expert).reshape(num_local, num_sources).T
        return ExpertLayout(rows_of_expert, None), base
    capacity = max(padded_capacity, int(counts_PL.max()))
    base = np.arange(num_sources * num_local).reshape(num_sources, num_local) * capacity
    return ExpertLayout(rows_of_expert, (num_sources, num_local, capacity)), base
