"""Generated exchanges, drawn where the test runs so that all ranks see the same, and what they must cost."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from hypothesis import strategies as st

from planmoe_ds.backend import Comm, ExchangeSpec, make_comm
from planmoe_ds.compression import AUTO
from planmoe_ds.connect import num_links
from planmoe_ds.topology import Topology
from tests.engine.support import rank_device

Matrix = list[list[int]]
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]


@dataclass(frozen=True)
class Part:
    """rows[i][j] rows of `width` values travel from rank i to rank j."""

    rows: Matrix
    width: int


@dataclass(frozen=True)
class Case:
    """One exchange of several parts."""

    parts: tuple[Part, ...]
    dtype: torch.dtype


@st.composite
def matrices(draw: st.DrawFn, size: int) -> Matrix:
    """Rows from rank i to rank j: uniform, skewed, with a silent or a deaf rank, everything to one rank, or nothing."""
    kind = draw(st.sampled_from(["uniform", "skewed", "silent rank", "deaf rank", "one target", "nothing"]))
    if kind == "nothing":
        return [[0] * size for _ in range(size)]
    row = st.lists(st.integers(0, 5), min_size=size, max_size=size)
    matrix = draw(st.lists(row, min_size=size, max_size=size))
    chosen = draw(st.integers(0, size - 1))

    def count(source: int, target: int) -> int:
        if (kind == "silent rank" and source == chosen) or (kind == "deaf rank" and target == chosen):
            return 0
        if kind == "one target" and target != chosen:
            return 0
        return matrix[source][target] * (20 if kind == "skewed" and target == chosen else 1)

    return [[count(source, target) for target in range(size)] for source in range(size)]


def cases(size: int) -> st.SearchStrategy[Case]:
    """Exchanges of one or two parts between `size` ranks."""
    part = st.builds(Part, matrices(size), st.sampled_from([1, 3, 64]))
    return st.builds(Case, st.lists(part, min_size=1, max_size=2).map(tuple), st.sampled_from(DTYPES))


def new_groups(timeout_ms: int = 0) -> list[dist.ProcessGroup]:
    """What an all-to-all over the whole world is made from; collective."""
    timeout = timedelta(milliseconds=timeout_ms) if timeout_ms else None
    return [dist.new_group(timeout=timeout) for _ in range(num_links(AUTO))]


def new_comm(name: str, nodes: tuple[int, ...] | None = None, timeout_ms: int = 0) -> Comm:
    """The all-to-all `name` over the world, by default on one node; collective."""
    node_of_rank = [0] * dist.get_world_size() if nodes is None else list(nodes)
    return make_comm(name, new_groups(timeout_ms), node_of_rank, rank_device(), timeout_ms)


def specs(case: Case, seed: int) -> list[tuple[torch.Tensor, list[int], torch.Tensor, list[int]]]:
    """This rank's buffers and counts of every part."""
    rank, result = dist.get_rank(), []
    generator = torch.Generator().manual_seed(seed * 100 + rank)
    for part in case.parts:
        send_rows, recv_rows = part.rows[rank], [row[rank] for row in part.rows]
        send = torch.randint(0, 100, (sum(send_rows), part.width), generator=generator)
        recv = torch.zeros(sum(recv_rows), part.width)
        result.append((send.to(rank_device(), case.dtype), send_rows, recv.to(rank_device(), case.dtype), recv_rows))
    return result


def start(comm: Comm, parts: list[tuple[torch.Tensor, list[int], torch.Tensor, list[int]]]):  # type: ignore[no-untyped-def]
    """As one exchange."""
    return comm.start(*parts[0]) if len(parts) == 1 else comm.start_parts([ExchangeSpec(*part) for part in parts])


def bytes_sent(name: str, nodes: tuple[int, ...], rank: int, case: Case) -> int:
    """To other ranks: every row once, and in the hierarchical all-to-all once per hop that is not within a rank."""
    topology = Topology.from_labels(nodes)
    size = case.dtype.itemsize
    two_hops = name == "hierarchical" and topology.num_nodes > 1 and max(topology.ranks_per_node) > 1

    def first_hop(source: int, target: int) -> int:
        mates = topology.ranks_on(topology.node_of_rank[source])
        if not two_hops or target in mates:
            return target
        return mates[topology.local_rank(target) % len(mates)]

    total = 0
    for part in case.parts:
        for source, row in enumerate(part.rows):
            for target, count in enumerate(row):
                hops = [source, first_hop(source, target), target]
                sent = sum(hops[i] == rank != hops[i + 1] for i in range(2))
                total += sent * count * part.width * size
    if two_hops:  # the counts, int64, for every rank of another node
        mates = topology.ranks_on(topology.node_of_rank[rank])
        for target in range(len(nodes)):
            total += 8 * len(case.parts) * (target not in mates and first_hop(rank, target) != rank)
    return total
