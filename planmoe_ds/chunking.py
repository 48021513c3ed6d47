"""What a layer's rows are divided by to make chunks.

Shape legend: see plan.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from planmoe_ds.config import ChunkBy


@dataclass(frozen=True)
class Chunking:
    """How many chunks, and of what; chunk_of_rank: by source, which chunk the rows for every rank are in."""

    num_chunks: int
    by: ChunkBy = ChunkBy.TOKEN
    chunk_of_rank: tuple[int, ...] = ()

    @property
    def divides_tokens(self) -> bool:
        """Whether all rows of a token are in one chunk."""
        return self.by is ChunkBy.TOKEN

    def settings(self) -> dict[str, Any]:
        """As the compiled ordering of tokens takes it."""
        return {
            "num_chunks": self.num_chunks,
            "chunk_by_expert": self.by is ChunkBy.EXPERT,
            "chunk_of_rank": list(self.chunk_of_rank),
        }

    def of_routes(self, expert: torch.Tensor, num_tokens: int, experts_per_rank: int) -> torch.Tensor:
        """The chunk of every route; expert: int64 [K * T], route after route, any value where it was dropped."""
        if self.by is ChunkBy.TOKEN:
            token = torch.arange(expert.shape[0], device=expert.device) % max(num_tokens, 1)
            return token * self.num_chunks // max(num_tokens, 1)
        if self.by is ChunkBy.EXPERT:
            return expert % experts_per_rank * self.num_chunks // experts_per_rank
        chunk_of_rank = torch.tensor(self.chunk_of_rank, device=expert.device)
        return chunk_of_rank[expert.clamp(min=0) // experts_per_rank]

    def range_of(self, chunk: int, total: int) -> tuple[int, int]:
        """Which of `total` tokens or experts a chunk has, where chunks divide them."""
        first, last = (-(-place * total // self.num_chunks) for place in (chunk, chunk + 1))
        return first, last


def chunking_of(by: ChunkBy, num_chunks: int, node_of_rank: Sequence[int], rank: int) -> Chunking:
    """Chunks as seen by one rank.

    By source a rank sends the rows for its own node in the first chunk and those for nodes further on in later ones, so
    that every rank has something to compute while the rest travels; inside one node it is ranks instead of nodes. So a
    chunk's rows come from few sources, and a layer's exchanges have no more messages than with one chunk. Ranks of one
    node share a chunk, as they do a row that travels there once.
    """
    if by is not ChunkBy.SOURCE:
        return Chunking(num_chunks, by)
    nodes = sorted(set(node_of_rank))
    place = [nodes.index(node) for node in node_of_rank] if len(nodes) > 1 else list(range(len(node_of_rank)))
    ring = max(place) + 1
    distances = [(other - place[rank]) % ring for other in place]
    return Chunking(num_chunks, by, tuple(distance * num_chunks // ring for distance in distances))
