"""What the all-to-all benchmark exchanges: rows from every rank to every rank."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

KIB = 1024
EXPERTS_PER_RANK = 8
TOKENS_PER_RANK = 256


@dataclass(frozen=True)
class Case:
    """One exchange: `rows[i][j]` rows of `row_bytes` bytes go from rank i to rank j.

    Routed cases have one row per route, as stock dispatchers send them; experts[i] are rank i's routes, [K, T].
    """

    name: str
    rows: list[list[int]]
    row_bytes: int
    pair_bytes: int | None = None  # bytes from every rank to every rank where they are all equal
    experts: list[torch.Tensor] | None = field(default=None, compare=False)
    experts_per_rank: int = EXPERTS_PER_RANK

    @property
    def largest_bytes(self) -> int:
        """What the rank that sends most sends, itself included."""
        return max(sum(row) for row in self.rows) * self.row_bytes


def even_case(world_size: int, pair_bytes: int) -> Case:
    """`pair_bytes` from every rank to every rank."""
    row_bytes = min(pair_bytes, KIB)
    count = pair_bytes // row_bytes
    return Case(size_name(pair_bytes), [[count] * world_size] * world_size, row_bytes, pair_bytes)


def routed_case(world_size: int, top_k: int, skewed: bool, row_bytes: int = 4 * KIB) -> Case:
    """Every rank's tokens go to `top_k` different experts each; skewed: expert e is 1/(e+1) as popular as the first."""
    num_experts = world_size * EXPERTS_PER_RANK
    generator = torch.Generator().manual_seed(top_k)
    popularity = -torch.arange(1, num_experts + 1).log() if skewed else torch.zeros(num_experts)
    rows, experts = [], []
    for _ in range(world_size):
        uniform = torch.rand(TOKENS_PER_RANK, num_experts, generator=generator)
        score = popularity - (-uniform.log()).log()  # its k largest are a draw without replacement
        experts.append(score.topk(top_k, dim=1).indices.t().contiguous())
        rows.append(torch.bincount(experts[-1].flatten() // EXPERTS_PER_RANK, minlength=world_size).tolist())
    return Case(f"{'skewed' if skewed else 'uniform'} k={top_k}", rows, row_bytes, experts=experts)


def make_cases(world_size: int, pair_sizes: list[int], top_ks: list[int]) -> list[Case]:
    """The even cases by size, then the routed ones; the same on every rank."""
    routed = [routed_case(world_size, top_k, skewed) for skewed in (False, True) for top_k in top_ks]
    return [even_case(world_size, size) for size in pair_sizes] + routed


def size_name(size: int) -> str:
    """`size` bytes in words."""
    return f"{size // KIB**2} MiB" if size >= KIB**2 else f"{size // KIB} KiB"
