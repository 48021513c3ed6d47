"""Rows that travel back one per route, over generated routings, against the plainest loops that say the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from planmoe_ds.chunking import Chunking, chunking_of
from planmoe_ds.config import ChunkBy
from planmoe_ds.rows import Integers, RowSide, order_rows, plan_row_trip
from tests.engine.support import slots_of

DROPPED = -1
shapes = st.tuples(st.integers(1, 3), st.integers(0, 12), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]))


@settings(max_examples=200)
@given(shapes, st.integers(1, 5), st.sampled_from(list(ChunkBy)), st.integers(0, 10**6))
def test_rows_are_sorted_and_complete(
    shape: tuple[int, int, int, int], num_chunks: int, chunk_by: ChunkBy, seed: int
) -> None:
    num_routes, num_tokens, num_ranks, per_rank = shape
    num_experts = num_ranks * per_rank
    generator = torch.Generator().manual_seed(seed)
    expert = torch.randint(DROPPED, num_experts, (num_routes, num_tokens), generator=generator, dtype=torch.int32)
    slot = slots_of(expert, num_experts)
    chunking = chunking_of(chunk_by, num_chunks, range(num_ranks), 0)
    order = order_rows(expert, slot, num_experts, chunking, num_ranks)

    def chunk_of(token: int, chosen: int) -> int:
        if chunk_by is ChunkBy.TOKEN:
            return token * num_chunks // num_tokens
        if chunk_by is ChunkBy.SOURCE:
            return chosen // per_rank * num_chunks // num_ranks
        return chosen % per_rank * num_chunks // per_rank

    kept = []
    for route in range(num_routes):
        for token in range(num_tokens):
            chosen = int(expert[route, token])
            if chosen != DROPPED:
                kept.append((chunk_of(token, chosen), chosen, int(slot[route, token]), token, route))
    kept.sort()
    assert order.token_N.tolist() == [entry[3] for entry in kept]
    assert order.expert_N.tolist() == [entry[1] for entry in kept]
    row_of_route = [len(kept)] * (num_routes * num_tokens)
    place = [[0] * num_tokens for _ in range(num_routes)]
    seen: dict[tuple[int, int], int] = {}
    for row, (chunk, chosen, _, token, route) in enumerate(kept):
        row_of_route[route * num_tokens + token] = row
        place[route][token] = seen.setdefault((chunk, chosen), 0)
        seen[chunk, chosen] += 1
    assert order.row_of_route_KT.tolist() == row_of_route
    assert order.place_KT.tolist() == place
    counts = [[seen.get((chunk, chosen), 0) for chosen in range(num_experts)] for chunk in range(num_chunks)]
    assert order.counts_XE.tolist() == counts


@pytest.mark.parametrize("chunk_by", list(ChunkBy))
def test_all_tokens_to_one_expert(chunk_by: ChunkBy) -> None:
    expert = torch.full((1, 6), 3)
    order = order_rows(expert, slots_of(expert, 4), 4, chunking_of(chunk_by, 2, (0, 1), 0), 2)
    assert order.counts_XE.sum(0).tolist() == [0, 0, 0, 6]
    assert order.counts_XE[:, 3].tolist() == ([3, 3] if chunk_by is ChunkBy.TOKEN else [0, 6])


@settings(max_examples=100)
@given(st.lists(st.booleans(), min_size=1, max_size=4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 10**6))
def test_both_sides_of_a_trip(near: list[bool], per_rank: int, num_chunks: int, seed: int) -> None:
    num_ranks, generator = len(near), torch.Generator().manual_seed(seed)
    expert = torch.randint(DROPPED, num_ranks * per_rank, (2, 9), generator=generator)
    order = order_rows(
        expert, slots_of(expert, num_ranks * per_rank), num_ranks * per_rank, Chunking(num_chunks), num_ranks
    )
    received = torch.randint(0, 4, (num_ranks, per_rank), generator=generator).numpy()
    base = torch.randint(0, 1000, (num_ranks, per_rank), generator=generator).numpy()
    for chunk in range(num_chunks):
        trip = plan_row_trip(order, chunk, received, base, np.array(near), torch.device("cpu"))
        check_side(trip.near, near, order.counts_XE, chunk, received, base)
        check_side(trip.far, [not inside for inside in near], order.counts_XE, chunk, received, base)


def check_side(
    side: RowSide,
    chosen: list[bool],
    counts_XE: torch.Tensor,
    chunk: int,
    received_PL: Integers,
    base_PL: Integers,
) -> None:
    num_ranks, per_rank = received_PL.shape
    rows, buffer_rows, sent, received = [], [], [0] * num_ranks, [0] * num_ranks
    row = int(counts_XE[:chunk].sum())
    for peer in range(num_ranks):
        for place in range(per_rank):
            for _ in range(int(counts_XE[chunk, peer * per_rank + place])):
                if chosen[peer]:
                    rows.append(row)
                    sent[peer] += 1
                row += 1
            for arrived in range(int(received_PL[peer, place])):
                if chosen[peer]:
                    buffer_rows.append(int(base_PL[peer, place]) + arrived)
                    received[peer] += 1
    assert side.row.tolist() == rows
    assert side.buffer_row.tolist() == buffer_rows
    assert (side.sent, side.received) == (sent, received)
