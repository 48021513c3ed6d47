"""Plans over generated routings, checked against the plainest loops that say the same."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from planmoe_ds.backend import RowRoutes, TokenOrder, find_experts, order_tokens
from planmoe_ds.chunking import Chunking, chunking_of
from planmoe_ds.config import ChunkBy, parse_config
from planmoe_ds.connect import connect
from planmoe_ds.counts import Talk
from planmoe_ds.errors import PlanMoEMismatchError
from planmoe_ds.headers import Header
from planmoe_ds.plan import NO_ROUTE, BufferRequest, _lay_out, build_plan
from planmoe_ds.recorder import Label, Recorder
from planmoe_ds.topology import Topology
from tests.harness.ranks import RankPool

TOPOLOGIES = [(0,), (0, 0), (0, 1), (0, 0, 1), (0, 1, 1), (0, 0, 1, 1), (0, 1, 0, 1), (2, 0, 0, 0), (0, 1, 1, 2, 2, 2)]


@dataclass(frozen=True)
class Case:
    """One rank's routing on a cluster."""

    nodes: tuple[int, ...]
    rank: int
    per_rank: int
    num_chunks: int
    chunk_by: ChunkBy
    num_pieces: int  # 0: nothing is passed on
    rows_per_piece: int
    expert_KT: torch.Tensor

    @property
    def topology(self) -> Topology:
        return Topology.from_labels(self.nodes)

    @property
    def first_hops(self) -> list[int]:
        """Every rank itself; where rows are passed on, the rank in this one's place on the node of a far rank."""
        topology, hops = self.topology, []
        for peer, node in enumerate(topology.node_of_rank):
            mates = topology.ranks_on(node)
            passes_on = self.num_pieces > 0 and self.rank not in mates
            hops.append(mates[topology.local_rank(self.rank) % len(mates)] if passes_on else peer)
        return hops

    def chunk_of(self, token: int, expert: int) -> int:
        if self.chunk_by is ChunkBy.EXPERT:
            return expert % self.per_rank * self.num_chunks // self.per_rank
        if self.chunk_by is ChunkBy.SOURCE:
            place = sorted(set(self.nodes)).index if len(set(self.nodes)) > 1 else int
            of_rank = self.nodes if len(set(self.nodes)) > 1 else range(len(self.nodes))
            ring = len(set(of_rank))
            distance = (place(of_rank[expert // self.per_rank]) - place(of_rank[self.rank])) % ring
            return distance * self.num_chunks // ring
        return token * self.num_chunks // self.expert_KT.shape[1]


@st.composite
def routings(draw: st.DrawFn) -> Case:
    nodes = draw(st.sampled_from(TOPOLOGIES))
    per_rank = draw(st.integers(1, 4))
    shape = (draw(st.integers(1, 3)), draw(st.integers(0, 14)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    highest = draw(st.sampled_from([1, len(nodes) * per_rank]))  # all to one expert, or to any
    return Case(
        nodes=nodes,
        rank=draw(st.integers(0, len(nodes) - 1)),
        per_rank=per_rank,
        num_chunks=draw(st.integers(1, 5)),
        chunk_by=draw(st.sampled_from(list(ChunkBy))),
        num_pieces=draw(st.sampled_from([0, 1, 3, 8])),
        rows_per_piece=draw(st.integers(1, 4)),
        expert_KT=torch.randint(NO_ROUTE, highest, shape, generator=generator),
    )


def run_order(case: Case) -> TokenOrder:
    return order_tokens(
        expert=case.expert_KT,
        num_experts=len(case.nodes) * case.per_rank,
        **chunking_of(case.chunk_by, case.num_chunks, case.nodes, case.rank).settings(),
        rank=case.rank,
        node_of_rank=list(case.nodes),
        first_hop=case.first_hops,
        num_pieces=case.num_pieces,
        rows_per_piece=case.rows_per_piece,
    )


def check_chunk(case: Case, order: TokenOrder, chunk: int) -> None:
    """The chunk's lists and counts, rebuilt token by token."""
    topology, num_ranks, num_pieces = case.topology, len(case.nodes), max(1, case.num_pieces)
    near_ranks = topology.ranks_on(topology.node_of_rank[case.rank])
    expert_rows = [0] * (num_ranks * case.per_rank)
    wanted_by = []  # per token: the ranks of its experts
    for token in range(case.expert_KT.shape[1]):
        ranks = set()
        for expert in case.expert_KT[:, token].tolist():
            if expert != NO_ROUTE and case.chunk_of(token, expert) == chunk:
                expert_rows[expert] += 1
                ranks.add(expert // case.per_rank)
        wanted_by.append(ranks)
    assert order.expert_rows[chunk].tolist() == expert_rows

    near_token, far_token, near_sent = [], [], [0] * num_ranks
    far_sent, far_final = ([[0] * num_pieces for _ in range(num_ranks)] for _ in range(2))
    fan = [[[0] * max(topology.ranks_per_node) for _ in range(num_pieces)] for _ in range(num_ranks)]
    for hop in range(num_ranks):
        for_hop = [
            (token, [rank for rank in ranks if case.first_hops[rank] == hop]) for token, ranks in enumerate(wanted_by)
        ]
        rows = [(token, ranks) for token, ranks in for_hop if ranks]
        if hop in near_ranks:
            near_token += [token for token, _ in rows]
            near_sent[hop] = len(rows)
            continue
        far_token += [token for token, _ in rows]
        pieces = min(max(len(rows) // case.rows_per_piece, 1), num_pieces)
        for place, (_, ranks) in enumerate(rows):
            piece = place * pieces // len(rows)
            far_sent[hop][piece] += 1
            for rank in ranks:
                far_final[rank][piece] += 1
                fan[hop][piece][topology.local_rank(rank)] += 1
    assert order.near_token[chunk].tolist() == near_token
    assert order.far_token[chunk].tolist() == far_token
    assert order.near_sent[chunk].tolist() == near_sent
    assert order.far_sent[chunk].tolist() == far_sent
    assert order.far_final[chunk].tolist() == far_final
    assert order.fan[chunk].tolist() == fan


@settings(max_examples=400)
@given(routings())
def test_tokens_are_ordered_and_counted(case: Case) -> None:
    order = run_order(case)
    assert len(order.near_token) == len(order.far_token) == case.num_chunks
    for chunk in range(case.num_chunks):
        check_chunk(case, order, chunk)


@pytest.mark.parametrize(
    ("expert", "num_experts", "words"),
    [
        (torch.zeros(1, 2, dtype=torch.int32), 4, "contiguous int64"),
        (torch.zeros(2, dtype=torch.int64), 4, "contiguous int64"),
        (torch.zeros(3, 2, dtype=torch.int64).t(), 4, "contiguous int64"),
        (torch.zeros(1, 2, dtype=torch.int64), 3, "3 experts cannot be divided among 2 ranks"),
        (torch.tensor([[4]]), 4, "expert index 4 is too large, there are 4 experts"),
    ],
)
def test_bad_routings(expert: torch.Tensor, num_experts: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        order_tokens(
            expert=expert, num_experts=num_experts, **Chunking(1).settings(), rank=0, node_of_rank=[0, 0],
            first_hop=[0, 1], num_pieces=0, rows_per_piece=1,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("chunk_of_rank", "first_hop", "words"),
    [
        ([0], [0, 1], "chunk_of_rank has 1 numbers, there are 2 ranks"),
        ([0, 2], [0, 1], "rank 1 has chunk 2, there are 2"),
        ([0, 1], [0, 0], "rank 1 has chunk 1, rank 0, to which its rows go first, has 0"),
    ],
)
def test_bad_chunks(chunk_of_rank: list[int], first_hop: list[int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        order_tokens(
            expert=torch.zeros(1, 2, dtype=torch.int64), num_experts=2, num_chunks=2, chunk_by_expert=False,
            chunk_of_rank=chunk_of_rank, rank=0, node_of_rank=[0, 0], first_hop=first_hop, num_pieces=0,
            rows_per_piece=1,
        )  # fmt: skip


ID_DTYPES = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class Arrived:
    """Rows that one rank received; [R, K] throughout."""

    source_rows: list[int]
    expert: torch.Tensor
    weight: torch.Tensor
    place: torch.Tensor
    per_rank: int
    rank: int
    experts: tuple[int, int]  # of the chunk
    base: list[int]
    id_bytes: int

    def message(self) -> torch.Tensor:
        """Eight bytes of values, then weights, places and expert numbers."""
        values = torch.full((self.expert.shape[0], 8), 255, dtype=torch.uint8)
        columns = [self.weight, self.place.int(), self.expert.to(ID_DTYPES[self.id_bytes])]
        return torch.cat([values, *(column.view(torch.uint8) for column in columns)], dim=1)

    def entries(self, with_places: bool) -> list[tuple[int, int, int]]:
        """Row of the buffer, route and arrived row of everything this rank's experts get."""
        found, seen = [], dict.fromkeys(range(len(self.base)), 0)
        source_of_row = [source for source, count in enumerate(self.source_rows) for _ in range(count)]
        for row, source in enumerate(source_of_row):
            for route, expert in enumerate(self.expert[row].tolist()):
                local = expert - self.rank * self.per_rank
                if expert < 0 or not 0 <= local < self.per_rank or not self.experts[0] <= local < self.experts[1]:
                    continue
                cell = source * self.per_rank + local
                after_base = int(self.place[row, route]) if with_places else seen[cell]
                seen[cell] += 1
                found.append((self.base[cell] + after_base, route, row))
        return found

    def spread(self, num_entries: int, with_places: bool):  # type: ignore[no-untyped-def]
        """What find_experts makes of them."""
        top_k = self.expert.shape[1]
        routes = RowRoutes(
            offset=8 + 8 * top_k,
            top_k=top_k,
            id_bytes=self.id_bytes,
            experts_per_rank=self.per_rank,
            first_expert=self.experts[0],
            last_expert=self.experts[1],
        )
        return find_experts(
            rows=self.message(), routes=routes, first_id=self.rank * self.per_rank, num_entries=num_entries,
            weight_offset=8, weight_dtype=torch.float32, row_dtype=torch.bfloat16, base=self.base,
            source_rows=self.source_rows, place_offset=8 + 4 * top_k if with_places else -1,
        )  # fmt: skip


@st.composite
def arrivals(draw: st.DrawFn) -> Arrived:
    source_rows = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    num_ranks, per_rank, top_k = len(source_rows), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    shape = (sum(source_rows), top_k)
    first = draw(st.integers(0, per_rank))
    return Arrived(
        source_rows=source_rows,
        expert=torch.randint(NO_ROUTE, num_ranks * per_rank, shape, generator=generator),
        weight=torch.rand(shape, generator=generator),
        place=torch.randint(0, 1000, shape, generator=generator),
        per_rank=per_rank,
        rank=draw(st.integers(0, num_ranks - 1)),
        experts=(first, draw(st.integers(first, per_rank))),
        base=torch.randint(0, 1000, (num_ranks * per_rank,), generator=generator).tolist(),
        id_bytes=draw(st.sampled_from([2, 4])),
    )


@settings(max_examples=300)
@given(arrivals(), st.booleans())
def test_arrived_rows_find_their_experts(arrived: Arrived, with_places: bool) -> None:
    expected = arrived.entries(with_places)
    spread = arrived.spread(len(expected), with_places)
    assert spread.target.tolist() == [target for target, _, _ in expected]
    assert spread.route.tolist() == [route for _, route, _ in expected]
    assert spread.source.tolist() == [row for _, _, row in expected]
    assert spread.weight.tolist() == [float(arrived.weight[row, route]) for _, route, row in expected]
    before = [sum(row < first for _, _, row in expected) for first in range(arrived.expert.shape[0] + 1)]
    assert spread.start.tolist() == before


@settings(max_examples=50)
@given(arrivals(), st.sampled_from([-1, 1]))
def test_rows_that_were_not_announced_are_refused(arrived: Arrived, error: int) -> None:
    announced = len(arrived.entries(with_places=False)) + error
    if announced >= 0:
        with pytest.raises(RuntimeError, match="announced"):
            arrived.spread(announced, with_places=False)


@settings(max_examples=200)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 10**6), st.booleans())
def test_layouts(num_sources: int, num_local: int, seed: int, padded: bool) -> None:
    counts = np.random.default_rng(seed).integers(0, 4, (num_sources, num_local))
    capacity = 5
    layout, base = _lay_out(counts, capacity if padded else None)
    for source in range(num_sources):
        for expert in range(num_local):
            before = int(counts[:, :expert].sum()) + int(counts[:source, expert].sum())
            assert base[source, expert] == ((source * num_local + expert) * capacity if padded else before)
    assert layout.rows_of_expert == tuple(counts.sum(0).tolist())
    assert layout.num_rows == (num_sources * num_local * capacity if padded else int(counts.sum()))


def test_sources_in_another_order() -> None:
    counts = np.array([[2, 1], [3, 0], [1, 4]])
    layout, base = _lay_out(counts, None, (2, 0, 1))  # rank 1's rows first, then rank 2's, then rank 0's
    assert layout.rows_of_expert == (6, 5)
    assert base.tolist() == [[4, 10], [0, 6], [3, 6]]


def test_a_source_with_more_rows_than_the_capacity_is_not_cut_off() -> None:
    layout, base = _lay_out(np.array([[9, 1]]), 4)
    assert layout.padded_shape == (1, 2, 9)
    assert base.tolist() == [[0, 9]]


def launch_in_order(orders: list[str]) -> str:
    """Launch exchanges of the groups "pair", ranks 0 and 1, and "all"; then plan a layer call of "all"."""
    rank = dist.get_rank()
    mine = {"all": [0, 1, 2]} if rank == 2 else {"pair": [0, 1], "all": [0, 1, 2]}
    device = torch.device("cpu")
    groups = connect(mine, parse_config({"comm": "direct"}), device)
    arrivals = []
    for letter in orders[rank]:
        group = groups["pair" if letter == "p" else "all"]
        ones = [1] * group.size
        arrivals.append(group.exchange(torch.zeros(group.size, 4), ones, ones))
    for arrival in arrivals:
        assert arrival.exchange is not None
        arrival.exchange.wait()
    talk = Talk(
        num_experts=3, chunking=Chunking(1), row_bytes=16, notes=(), group=groups["all"], recorder=Recorder(device),
        header=Header(layer=7, hidden_size=4, routes_per_token=1, num_experts=3),
        label=Label("plan", 7, -1, "forward"),
    )  # fmt: skip
    try:
        build_plan(torch.tensor([[0, 1, 2]]), talk, BufferRequest())
    except PlanMoEMismatchError as error:
        return str(error)
    return ""


@pytest.mark.distributed
def test_launches_in_another_order_are_refused(ranks: RankPool) -> None:
    assert ranks.run(3, launch_in_order, ["ppa", "ppa", "a"]) == [""] * 3
    for orders in (["pa", "ap", "a"], ["ppa", "pap", "a"]):
        first, second, third = ranks.run(3, launch_in_order, orders)
        assert "before layer 7, rank 0 launched the exchanges that it shares with ranks [1] in another order" in first
        assert "before layer 7, rank 1 launched the exchanges that it shares with ranks [0] in another order" in second
        assert third == ""  # it launched what it shares with either in one order
