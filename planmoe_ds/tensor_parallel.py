"""Tensor-parallel ranks hold the same tokens: each sends its share of the capacity slots and they gather the results.

Shape legend: K routes per token, T tokens, N rows of this rank, A rows of all ranks of the tensor-parallel group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from planmoe_ds.chunking import Chunking
from planmoe_ds.errors import PlanMoEMismatchError
from planmoe_ds.group import ExpertGroup
from planmoe_ds.headers import AGREEMENT_PHASE, pass_phase
from planmoe_ds.plan import NO_ROUTE, Routes
from planmoe_ds.rows import RowOrder, add_at, order_rows
from planmoe_ds.trace import Phase


@dataclass(frozen=True)
class TensorParallelSplit:
    """A layer's tensor-parallel group, of two ranks or more."""

    group: ExpertGroup
    layer: int

    def check_alike(self, routes: Routes) -> None:
        """PlanMoEMismatchError unless all ranks send as many tokens to the same experts; every rank calls this.

        What a rank gets from the others is laid out by its own routes.
        """
        what = f"layer {self.layer} forward, comparing the routes of tensor-parallel ranks"
        with self.group.working(what, AGREEMENT_PHASE):
            told = self.group.told_by_all(_fingerprint(routes), what).tolist()
            holders: dict[tuple[int, ...], list[int]] = {}
            for rank, numbers in zip(self.group.global_ranks, told, strict=True):
                holders.setdefault(tuple(numbers), []).append(rank)
            if len(holders) > 1:
                ways = "; ".join(f"one way on ranks {ranks}" for ranks in holders.values())
                raise PlanMoEMismatchError(
                    f"layer {self.layer}: tensor-parallel ranks must route the same tokens to the same experts, but "
                    f"they differ: {ways}. Give them the same batch, and the same seed where the router draws noise"
                )

    def parts(self, routes: Routes) -> list[Routes]:
        """Every rank's share of the routes; each rank computes all of them from the same decision."""
        return [self._part(routes, rank) for rank in range(self.group.size)]

    def orders(self, routes: Routes) -> list[RowOrder]:
        """Every rank's rows, as if in one chunk: ranks of other expert-parallel groups may have other chunks."""
        return [
            order_rows(part.expert_KT, part.slot_KT, part.num_experts, Chunking(1), 1) for part in self.parts(routes)
        ]

    def own_part(self, routes: Routes) -> Routes:
        """This rank's share."""
        return self._part(routes, self.group.rank)

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
        assert routes.capacity is not None
        share = -(-routes.capacity // self.group.size)
        owned = torch.div(routes.slot_KT, share, rounding_mode="floor") == rank
        expert = torch.where(owned, routes.expert_KT, torch.full_like(routes.expert_KT, NO_ROUTE))
        slot = torch.where(owned, routes.slot_KT - rank * share, torch.zeros_like(routes.slot_KT))
        return replace(routes, expert_KT=expert, slot_KT=slot, capacity=share)


def _fingerprint(routes: Routes) -> torch.Tensor:
    """int64 [3] that other routes hardly have: K, T, and what experts and slots are mixed to, modulo 2**64."""
    numbers = torch.cat([routes.expert_KT.reshape(-1), routes.slot_KT.reshape(-1)]).long()
    places = torch.arange(numbers.shape[0], device=numbers.device)
    mixed = (numbers + 2) * 6364136223846793005 + places * 1442695040888963407
    shape = torch.tensor(routes.expert_KT.shape, device=numbers.device)
    return torch.cat([shape, ((mixed * mixed) ^ (mixed >> 17)).sum().view(1)])


@dataclass(frozen=True)
class OwnRows:
    """Rows [N, H] that one rank sends, as tokens that have one route each."""

    rows: torch.Tensor
    routes: Routes


class _GatherRows(torch.autograd.Function):
    """rows [N, H] of every rank -> [A, H] on every rank; the gradient, equal on all ranks, is sliced."""

    @staticmethod
    def forward(ctx, rows, counts: tuple[int, ...], split: TensorParallelSplit):  # type: ignore[no-untyped-def]
        ctx.first = sum(counts[: split.group.rank])
        ctx.num_rows = counts[split.group.rank]
        return _all_rows(rows, counts, split, "forward")

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad[ctx.first : ctx.first + ctx.num_rows], None, None


def gather_rows(rows: torch.Tensor, orders: list[RowOrder], split: TensorParallelSplit) -> torch.Tensor:
    """Rows [N, H] -> the rows of all ranks of the tensor-parallel group, in rank order, [A, H]."""
    counts = tuple(order.token_N.shape[0] for order in orders)
    return _GatherRows.apply(rows, counts, split)  # type: ignore[no-untyped-call]


class _OwnRows(torch.autograd.Function):
    """tokens [T, H] -> the rows this rank sends [N, H]; the gradient of a token is summed over all ranks' rows."""

    @staticmethod
    def forward(ctx, tokens, orders: list[RowOrder], split: TensorParallelSplit):  # type: ignore[no-untyped-def]
        ctx.orders, ctx.split, ctx.num_tokens = orders, split, tokens.shape[0]
        return tokens.index_select(0, orders[split.group.rank].token_N)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        counts = tuple(order.token_N.shape[0] for order in ctx.orders)
        grads_AH = _all_rows(grad, counts, ctx.split, "backward")
        by_expert = torch.argsort(torch.cat([order.expert_N for order in ctx.orders]), stable=True)
        token_A = torch.cat([order.token_N for order in ctx.orders])
        grad_tokens = grads_AH.new_zeros((ctx.num_tokens, grads_AH.shape[1]))
        return add_at(grad_tokens, token_A[by_expert], grads_AH[by_expert]), None, None


def _all_rows(rows: torch.Tensor, counts: tuple[int, ...], split: TensorParallelSplit, phase: Phase) -> torch.Tensor:
    what = f"layer {split.layer} {phase}, the exchange of rows between tensor-parallel ranks"
    with split.group.working(what, pass_phase(split.layer, phase)):
        sent = [counts[split.group.rank]] * split.group.size
        arrival = split.group.exchange(rows.repeat(split.group.size, 1), sent, list(counts))
        assert arrival.exchange is not None
        with split.group.waiting(arrival.exchange, what):
            arrival.exchange.wait()
    return arrival.rows


def own_rows(tokens: torch.Tensor, orders: list[RowOrder], routes: Routes, split: TensorParallelSplit) -> OwnRows:
    """Tokens [T, H] and their routes -> the rows this rank sends."""
    order, part = orders[split.group.rank], split.own_part(routes)
    rows = _OwnRows.apply(tokens, orders, split)  # type: ignore[no-untyped-call]
    slot = torch.zeros_like(order.expert_N)
    kept = order.row_of_route_KT < order.token_N.shape[0]
    slot[order.row_of_route_KT[kept]] = part.slot_KT.reshape(-1)[kept].to(slot.dtype)
    weight = routes.weight_KT.detach().new_ones((1, rows.shape[0]))
    return OwnRows(rows, replace(part, expert_KT=order.expert_N[None], slot_KT=slot[None], weight_KT=weight))
