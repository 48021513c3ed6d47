"""Rows, routings and oracles for the kernels' tests."""

from __future__ import annotations

import torch

from planmoe_ds.backend import RowRoutes, Spread, find_experts

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HIDDEN = [1, 3, 8, 127, 128, 129, 1000, 2048]


def normal(rows: int, hidden: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Rows on the CPU."""
    return torch.randn(rows, hidden, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_routes(rows: int, top_k: int, num_experts: int, seed: int = 0, drop: float = 0.2) -> torch.Tensor:
    """int64 [rows, K], distinct experts per row, negative where dropped."""
    generator = torch.Generator().manual_seed(seed)
    expert = torch.rand(rows, num_experts, generator=generator).topk(top_k, dim=1).indices
    return torch.where(torch.rand(rows, top_k, generator=generator) < drop, -1, expert)


def spread_of(
    expert: torch.Tensor, per_rank: int, sources: list[int], device: str, weights: torch.Tensor | None = None
) -> Spread:
    """find_experts for rank 0 of rows that came from `sources`; columns: weights, then expert numbers."""
    rows, top_k = expert.shape
    weights = torch.rand(rows, top_k) if weights is None else weights
    columns = torch.empty(rows, 6 * top_k, dtype=torch.uint8)
    if rows > 0:
        columns = torch.cat([weights.view(torch.uint8), expert.to(torch.int16).view(torch.uint8)], dim=1)
    here = (expert >= 0) & (expert < per_rank)
    source = torch.repeat_interleave(torch.arange(len(sources)), torch.tensor(sources))
    counts = torch.zeros(len(sources), per_rank, dtype=torch.int64)
    for row, k in here.nonzero().tolist():
        counts[source[row], expert[row, k]] += 1
    by_expert = counts.t().reshape(-1)
    base = (by_expert.cumsum(0) - by_expert).reshape(per_rank, len(sources)).t()
    received = torch.tensor(sources)
    table = torch.cat([(base - (counts.cumsum(0) - counts)).flatten(), received.cumsum(0) - received])
    return find_experts(
        rows=columns.to(device),
        routes=RowRoutes(offset=4 * top_k, top_k=top_k, id_bytes=2, experts_per_rank=per_rank, last_expert=per_rank),
        first_id=0,
        num_entries=int(here.sum()),
        weight_offset=0,
        weight_dtype=torch.float32,
        row_dtype=torch.float32,
        base=base.flatten().tolist(),
        source_rows=sources,
        table=table.to(device),
    )
