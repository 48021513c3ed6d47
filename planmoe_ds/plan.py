"""Where every row of one layer call goes: computed once from the router's decision, never changed after.

Shape legend: T tokens, K routes per token, H hidden size, E experts in the group, L experts per rank, P ranks,
N rows this rank sends (one per kept route), R rows a chunk receives, C capacity (slots per expert and source rank).
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields

import torch

from planmoe_ds.config import ChunkBy
from planmoe_ds.errors import PlanMoEMismatchError
from planmoe_ds.group import ExpertGroup
from planmoe_ds.recorder import Label, Recorder

NO_ROUTE = -1  # expert index of a route that the router dropped


@dataclass(frozen=True)
class Routes:
    """The router's decision.

    expert_KT: integer, NO_ROUTE for dropped routes; slot_KT: integer place in the expert's capacity, unique per
    expert; weight_KT: floating point; num_experts: E; capacity: C.
    """

    expert_KT: torch.Tensor
    slot_KT: torch.Tensor
    weight_KT: torch.Tensor
    num_experts: int
    capacity: int


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
class ChunkPlan:
    """One chunk: rows first_row.. of the plan's N go out in send_rows, recv_rows come in, to `position_R`."""

    first_row: int
    num_rows: int
    send_rows: list[int]
    recv_rows: list[int]
    position_R: torch.Tensor | None  # int64, row of the buffer; None: received rows are the buffer
    layout: ExpertLayout


@dataclass(frozen=True)
class RoutingPlan:
    """All chunks of one layer call. Rows are sorted by chunk, expert, slot.

    token_N: int64, the token behind each row; row_of_route_KT: int64 [K * T], N where the route was dropped.
    """

    token_N: torch.Tensor
    row_of_route_KT: torch.Tensor
    chunks: tuple[ChunkPlan, ...]

    @property
    def num_rows(self) -> int:
        """N."""
        return self.token_N.shape[0]


@dataclass(frozen=True)
class RowOrder:
    """Local half of a plan: the order of this rank's rows and how many each chunk has per expert."""

    token_N: torch.Tensor
    row_of_route_KT: torch.Tensor
    counts_chunk_E: torch.Tensor  # int64


def order_rows(routes: Routes, num_chunks: int, chunk_by: ChunkBy, experts_per_rank: int) -> RowOrder:
    """Sort this rank's kept routes by chunk, expert and slot."""
    num_routes, num_tokens = routes.expert_KT.shape
    expert = routes.expert_KT.reshape(-1).long()
    slot = routes.slot_KT.reshape(-1).long()
    route = torch.arange(expert.shape[0], device=expert.device)
    if chunk_by is ChunkBy.TOKEN:
        chunk = (route % max(num_tokens, 1)) * num_chunks // max(num_tokens, 1)
    else:
        chunk = expert % experts_per_rank * num_chunks // experts_per_rank
    cell = chunk * routes.num_experts + expert
    kept = expert != NO_ROUTE
    counts = torch.bincount(cell[kept], minlength=num_chunks * routes.num_experts)
    key = cell * max(routes.capacity, num_routes * num_tokens) + slot
    key = torch.where(kept, key, torch.full_like(key, torch.iinfo(torch.int64).max))
    order = torch.argsort(key)[: int(kept.sum())]
    row_of_route = torch.full_like(route, order.shape[0])
    row_of_route[order] = route[: order.shape[0]]
    token = order % max(num_tokens, 1)
    return RowOrder(token, row_of_route, counts.reshape(num_chunks, routes.num_experts))


@dataclass(frozen=True)
class Header:
    """What the ranks of a group must have in common for one layer call; travels with the counts."""

    layer: int
    hidden_size: int
    bytes_per_value: int


def build_plan(
    order: RowOrder,
    group: ExpertGroup,
    header: Header,
    padded_capacity: int | None,
    recorder: Recorder,
    label: Label,
) -> RoutingPlan:
    """Agree on the counts with the group, then lay out every chunk.

    padded_capacity: slots per expert and source rank to re-create in the expert buffer, None for ragged buffers.
    Raises PlanMoEMismatchError when ranks are in different layers.
    """
    num_chunks, num_experts = order.counts_chunk_E.shape
    shape = (group.size, num_chunks, num_experts // group.size)
    sent = order.counts_chunk_E.reshape(num_chunks, group.size, -1).transpose(0, 1)
    mine = astuple(header)
    message = torch.cat([sent.new_tensor([mine]).expand(group.size, -1), sent.reshape(group.size, -1)], dim=1)
    ones = [1] * group.size
    arrival = group.exchange(message, ones, ones)
    if arrival.exchange is not None:
        recorder.wait(arrival.exchange, label)
    both = torch.stack([message, arrival.rows]).cpu()  # the one host copy of a layer call
    _check_headers(both[1, :, : len(mine)].tolist(), header, group)
    sent_PXL, received_PXL = (both[side, :, len(mine) :].reshape(shape) for side in (0, 1))
    chunks = []
    first_row = 0
    for chunk in range(num_chunks):
        plan = _plan_chunk(sent_PXL[:, chunk], received_PXL[:, chunk], first_row, padded_capacity, order.token_N.device)
        first_row += plan.num_rows
        chunks.append(plan)
    return RoutingPlan(order.token_N, order.row_of_route_KT, tuple(chunks))


def _check_headers(received: list[list[int]], mine: Header, group: ExpertGroup) -> None:
    headers = [Header(*values) for values in received]
    for name in (field.name for field in fields(Header)):
        values = [getattr(header, name) for header in headers]
        if any(value != getattr(mine, name) for value in values):
            who = ", ".join(f"rank {rank}: {value}" for rank, value in zip(group.global_ranks, values, strict=True))
            raise PlanMoEMismatchError(f"ranks of one expert-parallel group disagree on {name}: {who}")


def _plan_chunk(
    sent_PL: torch.Tensor, received_PL: torch.Tensor, first_row: int, padded_capacity: int | None, device: torch.device
) -> ChunkPlan:
    num_sources, num_local = received_PL.shape
    counts = received_PL.reshape(-1)
    start = counts.cumsum(0) - counts  # of each (source, expert) run among the received rows
    padded_shape = None
    if padded_capacity is None:
        by_expert = received_PL.t().reshape(-1)
        target = (by_expert.cumsum(0) - by_expert).reshape(num_local, num_sources).t().reshape(-1)
    else:
        capacity = max(padded_capacity, int(counts.max()))
        target = torch.arange(num_sources * num_local) * capacity
        padded_shape = (num_sources, num_local, capacity)
    layout = ExpertLayout(tuple(received_PL.sum(0).tolist()), padded_shape)
    total = int(counts.sum())
    moved = bool(((target != start) & (counts > 0)).any()) or layout.num_rows != total
    position = None
    if moved:
        position = (torch.repeat_interleave(target - start, counts) + torch.arange(total)).to(device)
    return ChunkPlan(
        first_row=first_row,
        num_rows=int(sent_PL.sum()),
        send_rows=sent_PL.sum(1).tolist(),
        recv_rows=received_PL.sum(1).tolist(),
        position_R=position,
        layout=layout,
    )
