"""Plans over generated routings, checked against the plainest loops that say the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from planmoe_ds.config import ChunkBy
from planmoe_ds.plan import NO_ROUTE, ChunkPlan, Routes, _plan_chunk, order_rows
from tests.engine.support import slots_of

shapes = st.tuples(st.integers(1, 3), st.integers(0, 12), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]))


@settings(max_examples=200, deadline=None)
@given(shapes, st.integers(1, 5), st.sampled_from(list(ChunkBy)), st.integers(0, 10**6))
def test_rows_are_sorted_and_complete(
    shape: tuple[int, int, int, int], num_chunks: int, chunk_by: ChunkBy, seed: int
) -> None:
    num_routes, num_tokens, num_ranks, per_rank = shape
    num_experts = num_ranks * per_rank
    generator = torch.Generator().manual_seed(seed)
    expert = torch.randint(NO_ROUTE, num_experts, (num_routes, num_tokens), generator=generator, dtype=torch.int32)
    slot = slots_of(expert, num_experts)
    routes = Routes(expert, slot, torch.ones(expert.shape), num_experts, num_routes * num_tokens + 1)
    order = order_rows(routes, num_chunks, chunk_by, per_rank)

    def chunk_of(token: int, chosen: int) -> int:
        if chunk_by is ChunkBy.TOKEN:
            return token * num_chunks // num_tokens
        return chosen % per_rank * num_chunks // per_rank

    kept = []
    for route in range(num_routes):
        for token in range(num_tokens):
            chosen = int(expert[route, token])
            if chosen != NO_ROUTE:
                kept.append(
                    (chunk_of(token, chosen), chosen, int(slot[route, token]), token, route * num_tokens + token)
                )
    kept.sort()
    assert order.token_N.tolist() == [entry[3] for entry in kept]
    row_of_route = [len(kept)] * (num_routes * num_tokens)
    for row, entry in enumerate(kept):
        row_of_route[entry[4]] = row
    assert order.row_of_route_KT.tolist() == row_of_route
    counts = [[sum(e[0] == c and e[1] == x for e in kept) for x in range(num_experts)] for c in range(num_chunks)]
    assert order.counts_chunk_E.tolist() == counts


def positions(plan: ChunkPlan, total: int) -> list[int]:
    return list(range(total)) if plan.position_R is None else plan.position_R.tolist()


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 10**6), st.booleans())
def test_received_rows_go_to_their_expert(num_sources: int, num_local: int, seed: int, padded: bool) -> None:
    counts = torch.randint(0, 4, (num_sources, num_local), generator=torch.Generator().manual_seed(seed))
    capacity = 5
    plan = _plan_chunk(counts, counts, 7, capacity if padded else None, torch.device("cpu"))
    expected = []
    for source in range(num_sources):
        for expert in range(num_local):
            for place in range(int(counts[source, expert])):
                if padded:
                    expected.append((source * num_local + expert) * capacity + place)
                else:
                    before = int(counts[:, :expert].sum()) + int(counts[:source, expert].sum())
                    expected.append(before + place)
    assert positions(plan, int(counts.sum())) == expected
    assert plan.first_row == 7
    assert plan.recv_rows == counts.sum(1).tolist()
    assert plan.layout.rows_of_expert == tuple(counts.sum(0).tolist())
    assert plan.layout.num_rows == (num_sources * num_local * capacity if padded else int(counts.sum()))


def test_a_source_with_more_rows_than_the_capacity_is_not_cut_off() -> None:
    counts = torch.tensor([[9, 1]])
    plan = _plan_chunk(counts, counts, 0, 4, torch.device("cpu"))
    assert plan.layout.padded_shape == (1, 2, 9)
    assert positions(plan, 10) == [*range(9), 9]


@pytest.mark.parametrize("chunk_by", list(ChunkBy))
def test_all_tokens_to_one_expert(chunk_by: ChunkBy) -> None:
    expert = torch.full((1, 6), 3)
    routes = Routes(expert, slots_of(expert, 4), torch.ones(1, 6), 4, 6)
    order = order_rows(routes, 2, chunk_by, 2)
    assert order.counts_chunk_E.sum(0).tolist() == [0, 0, 0, 6]
    expected = [3, 3] if chunk_by is ChunkBy.TOKEN else [0, 6]
    assert order.counts_chunk_E[:, 3].tolist() == expected
