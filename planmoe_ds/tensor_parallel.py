"""Tensor-parallel ranks hold the same tokens: each sends its share of the capacity slots and they gather the results.

Shape legend: K routes per token, T tokens, N rows of this rank, A rows of all ranks of the tensor-parallel group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from planmoe_ds.group import ExpertGroup
from planmoe_ds.plan import NO_ROUTE, Routes, RowOrder


@dataclass(frozen=True)
class TensorParallelSplit:
    """This rank's place in a tensor-parallel group of `size` ranks."""

    rank: int
    size: int
    group: ExpertGroup

    def parts(self, routes: Routes) -> list[Routes]:
        """Every rank's share of the routes; each rank computes all of them from the same decision."""
        return [self._part(routes, rank) for rank in range(self.size)]

    def own_part(self, routes: Routes) -> Routes:
        """This rank's share."""
        return self._part(routes, self.rank)

    def row_of_route(self, orders: list[RowOrder]) -> torch.Tensor:
        """int64 [K * T]: row of every route among the gathered rows [A], A where it was dropped."""
        total = sum(order.token_N.shape[0] for order in orders)
        result = torch.full_like(orders[0].row_of_route_KT, total)
        first = 0
        for order in orders:
            num_rows = order.token_N.shape[0]
            result = torch.where(order.row_of_route_KT < num_rows, order.row_of_route_KT + first, result)
            first += num_rows
        return result

    def _part(self, routes: Routes, rank: int) -> Routes:
        share = -(-routes.capacity // self.size)
        owned = torch.div(routes.slot_KT, share, rounding_mode="floor") == rank
        expert = torch.where(owned, routes.expert_KT, torch.full_like(routes.expert_KT, NO_ROUTE))
        slot = torch.where(owned, routes.slot_KT - rank * share, torch.zeros_like(routes.slot_KT))
        return replace(routes, expert_KT=expert, slot_KT=slot, capacity=share)


class _GatherRows(torch.autograd.Function):
    """rows [N, H] of every rank -> [A, H] on every rank; the gradient, equal on all ranks, is sliced."""

    @staticmethod
    def forward(ctx, rows, counts: tuple[int, ...], split: TensorParallelSplit):  # type: ignore[no-untyped-def]
        ctx.first = sum(counts[: split.rank])
        ctx.num_rows = counts[split.rank]
        send = rows.repeat(split.size, 1)
        arrival = split.group.exchange(send, [ctx.num_rows] * split.size, list(counts))
        if arrival.exchange is not None:
            arrival.exchange.wait()
        return arrival.rows

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad[ctx.first : ctx.first + ctx.num_rows], None, None


def gather_rows(rows: torch.Tensor, orders: list[RowOrder], split: TensorParallelSplit) -> torch.Tensor:
    """Rows [N, H] -> the rows of all ranks of the tensor-parallel group, in rank order, [A, H]."""
    counts = tuple(order.token_N.shape[0] for order in orders)
    return _GatherRows.apply(rows, counts, split)  # type: ignore[no-untyped-call]
