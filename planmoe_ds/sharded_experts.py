"""Experts cut into shards: each of S ranks holds a share of every expert, and their outputs add up.

A shard is an expert of its own to the engine: a route to an expert becomes one route to each of its shards, so that
one dispatch and one combine do what an all-to-all, a gather and a reduce-scatter do elsewhere.

Shape legend: see plan.py; S shards of every expert.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from planmoe_ds.chunking import Chunking
from planmoe_ds.config import Exactness
from planmoe_ds.experts import Experts
from planmoe_ds.layer import ExpertParallelLayer, add_up
from planmoe_ds.plan import Routes
from planmoe_ds.rows import order_rows


def forward_sharded(
    layer: ExpertParallelLayer, tokens_TH: torch.Tensor, routes: Routes, experts: Experts, num_shards: int
) -> torch.Tensor:
    """ExpertParallelLayer.forward for experts that take weights; group rank r holds shard r % S of its experts."""
    assert experts.takes_weights
    num_holders = layer.group.size // num_shards
    if num_shards == 1:
        return layer.forward(tokens_TH, routes, experts)
    if layer.config.resolved_exactness is not Exactness.EXACT:
        return layer.forward(tokens_TH, _to_shards(routes, num_holders, num_shards), experts)
    # exact: first the shards' outputs are added, then the experts'
    order = order_rows(routes.expert_KT, routes.slot_KT, routes.num_experts, Chunking(1), num_holders)
    num_rows = order.token_N.shape[0]
    weights = torch.cat([routes.weight_KT.reshape(-1), routes.weight_KT.new_zeros(1)])
    route_N = order.row_of_route_KT.argsort()[:num_rows]
    row_routes = replace(
        routes,
        expert_KT=order.expert_N[None],
        slot_KT=torch.arange(num_rows, device=tokens_TH.device)[None],
        weight_KT=weights.index_select(0, route_N)[None],
    )
    rows_NH = tokens_TH.index_select(0, order.token_N)
    sums_NH = layer.forward(rows_NH, _to_shards(row_routes, num_holders, num_shards), experts)
    return add_up(sums_NH, order.token_N, tokens_TH.shape[0])


def place_of_source(num_holders: int, num_shards: int) -> tuple[int, ...] | None:
    """The order of ranks in which an expert's rows lie where they are gathered over the shards last, as in Megatron."""
    if num_shards == 1:
        return None
    return tuple(rank % num_shards * num_holders + rank // num_shards for rank in range(num_holders * num_shards))


def _to_shards(routes: Routes, num_holders: int, num_shards: int) -> Routes:
    """Routes [K, T] to E experts -> [K * S, T] to E * S shards, numbered as the ranks that hold them."""
    per_rank = routes.num_experts // num_holders
    holder = torch.div(routes.expert_KT, per_rank, rounding_mode="floor")
    shards = [
        torch.where(
            routes.expert_KT < 0, routes.expert_KT, routes.expert_KT + (holder * (num_shards - 1) + s) * per_rank
        )
        for s in range(num_shards)
    ]
    return replace(
        routes,
        expert_KT=torch.cat(shards),
        slot_KT=routes.slot_KT.repeat(num_shards, 1),
        weight_KT=routes.weight_KT.repeat(num_shards, 1),
        num_experts=routes.num_experts * num_shards,
    )
