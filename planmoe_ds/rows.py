"""Expert outputs that travel back one row per route, so that the source adds them in the framework's own order.

Shape legend: see plan.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from planmoe_ds.chunking import Chunking

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class RowOrder:
    """This rank's rows, sorted by chunk, expert, slot.

    token_N: int64, the token behind each row; expert_N: int64; row_of_route_KT: int64 [K * T], N where the route was
    dropped; place_KT: int32 [K, T], how many rows of the same chunk and expert come before; counts_XE: int64 on the
    CPU.
    """

    token_N: torch.Tensor
    expert_N: torch.Tensor
    row_of_route_KT: torch.Tensor
    place_KT: torch.Tensor
    counts_XE: torch.Tensor


def order_rows(
    expert_KT: torch.Tensor, slot_KT: torch.Tensor, num_experts: int, chunking: Chunking, num_ranks: int
) -> RowOrder:
    """Sort this rank's kept routes by chunk, expert and slot; a negative expert is a dropped route."""
    num_routes, num_tokens = expert_KT.shape
    num_chunks = chunking.num_chunks
    expert = expert_KT.reshape(-1).long()
    slot = slot_KT.reshape(-1).long()
    route = torch.arange(expert.shape[0], device=expert.device)
    chunk = chunking.of_routes(expert, num_tokens, num_experts // num_ranks)
    cell = chunk * num_experts + expert
    kept = expert >= 0
    counts = torch.bincount(cell[kept], minlength=num_chunks * num_experts)
    highest_slot = slot.max() + 1 if slot.numel() else 1
    key = torch.where(kept, cell * highest_slot + slot, torch.full_like(cell, torch.iinfo(torch.int64).max))
    order = torch.argsort(key)[: int(kept.sum())]
    row_of_route = torch.full_like(route, order.shape[0])
    row_of_route[order] = route[: order.shape[0]]
    first_row = counts.cumsum(0) - counts
    place = torch.where(kept, row_of_route - first_row[cell.clamp(min=0)], torch.zeros_like(cell))
    return RowOrder(
        token_N=order % max(num_tokens, 1),
        expert_N=expert[order],
        row_of_route_KT=row_of_route,
        place_KT=place.reshape(num_routes, num_tokens).int(),
        counts_XE=counts.reshape(num_chunks, num_experts).cpu(),
    )


@dataclass(frozen=True)
class RowSide:
    """A chunk's rows exchanged with the ranks of one side.

    row: int64, places of the rows among this rank's N; buffer_row: int64, places in the experts' buffer of the rows
    that peers want back; sent and received (as the rows leave for the experts): P numbers each.
    """

    row: torch.Tensor
    buffer_row: torch.Tensor
    sent: list[int]
    received: list[int]


@dataclass(frozen=True)
class RowTrip:
    """Both sides of a chunk."""

    near: RowSide
    far: RowSide


def plan_row_trip(
    order: RowOrder,
    chunk: int,
    received_PL: Integers,
    base_PL: Integers,
    is_near: NDArray[np.bool_],
    device: torch.device,
) -> RowTrip:
    """received_PL: rows from every source for every local expert; base_PL: where they start in the experts' buffer."""
    counts_XE = order.counts_XE.numpy()
    sent_PL = counts_XE[chunk].reshape(received_PL.shape)
    first_row = counts_XE[:chunk].sum()
    row_base_PL = (sent_PL.cumsum() - sent_PL.ravel()).reshape(sent_PL.shape) + first_row

    def side(chosen: NDArray[np.bool_]) -> RowSide:
        return RowSide(
            row=_runs(row_base_PL[chosen], sent_PL[chosen]).to(device),
            buffer_row=_runs(base_PL[chosen], received_PL[chosen]).to(device),
            sent=np.where(chosen, sent_PL.sum(1), 0).tolist(),
            received=np.where(chosen, received_PL.sum(1), 0).tolist(),
        )

    return RowTrip(side(is_near), side(~is_near))


def _runs(start: Integers, count: Integers) -> torch.Tensor:
    """start[0], start[0] + 1, … count[0] of them, then the next run."""
    counts = count.ravel()
    before = counts.cumsum() - counts
    return torch.from_numpy(np.repeat(start.ravel() - before, counts) + np.arange(counts.sum()))


def add_at(total: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Add rows [N, H] to those of `total` [T, H] at index, int64 [N], in their order, so with the same bits each time.

    On accelerators index_add_ would add in the order of arrival (atomics), where index_put_ sorts; on the CPU it is the
    other way round.
    """
    if total.device.type == "cpu":
        return total.index_add_(0, index, rows)
    return total.index_put_((index,), rows, accumulate=True)
