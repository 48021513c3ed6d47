"""The CUDA routing kernels against the CPU's order_tokens and find_experts, over many shapes and clusters."""

from __future__ import annotations

import pytest
import torch

from planmoe_ds.backend import RowRoutes, find_experts, order_tokens, order_tokens_on_device, routes_on_device
from planmoe_ds.chunking import Chunking, chunking_of
from planmoe_ds.config import ChunkBy
from tests.gpu.support import random_routes, spread_of

pytestmark = pytest.mark.gpu
CLUSTERS = {
    "one rank": ([0], None),
    "one node": ([0, 0, 0, 0], None),
    "two nodes": ([0, 0, 1, 1], None),
    "two nodes, one copy": ([0, 0, 1, 1], [0, 1, 2, 2]),
    "rails": ([0, 0, 0, 1, 1, 1], [0, 1, 2, 4, 4, 4]),
    "70 ranks": ([rank // 8 for rank in range(70)], None),
}


def routing_tables(nodes: list[int], hops: list[int], rank: int, chunk_of_rank: tuple[int, ...]) -> torch.Tensor:
    lists = sorted(set(hops), key=lambda hop: (nodes[hop] != nodes[rank], hop))
    places = [nodes[:peer].count(node) for peer, node in enumerate(nodes)]
    padded = lists + [-1] * (len(nodes) - len(lists))
    chunks = [list(chunk_of_rank)] if chunk_of_rank else []
    return torch.tensor([[lists.index(hop) for hop in hops], padded, places, *chunks], dtype=torch.int32)


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("chunk_by", list(ChunkBy))
@pytest.mark.parametrize("num_chunks", [1, 3])
@pytest.mark.parametrize("num_tokens", [0, 1, 700, 3001])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_tokens_are_ordered_as_on_the_cpu(
    cluster: str, chunk_by: ChunkBy, num_chunks: int, num_tokens: int, dtype: torch.dtype
) -> None:
    nodes, hops = CLUSTERS[cluster]
    ranks, passes_on = len(nodes), hops is not None
    hops = list(range(ranks)) if hops is None else hops
    num_experts, rank = 4 * ranks, 1 % ranks
    expert_KT = random_routes(num_tokens, min(6, num_experts), num_experts).t()
    chunking = chunking_of(chunk_by, num_chunks, nodes, rank)
    settings = {
        "num_experts": num_experts,
        **chunking.settings(),
        "rank": rank,
        "node_of_rank": nodes,
        "first_hop": hops,
        "num_pieces": 8 if passes_on else 0,
        "rows_per_piece": 40,
    }
    expected = order_tokens(expert=expert_KT.long().contiguous(), **settings)
    pieces, group = (8 if passes_on else 1), max(nodes.count(node) for node in nodes)
    parts = [(num_chunks, 4), (num_chunks,), (num_chunks, pieces)]
    parts += [(num_chunks, pieces), (num_chunks, pieces, group)] if passes_on else []
    width = sum(torch.Size(part).numel() for part in parts)
    message = torch.zeros(ranks, 5 + width + 1, dtype=torch.int64, device="cuda")
    tables = routing_tables(nodes, hops, rank, chunking.chunk_of_rank)
    found = order_tokens_on_device(
        expert=expert_KT.to(dtype).cuda(), **settings, tables=tables.cuda(), message=message, first_column=5
    )
    counts = message.cpu()
    assert (counts[:, :5] == 0).all()
    assert counts[0, -1] == 0
    got = [part.reshape(ranks, *shape) for part, shape in zip(
        counts[:, 5:-1].split([torch.Size(part).numel() for part in parts], dim=1), parts, strict=True
    )]  # fmt: skip
    assert torch.equal(got[0], expected.expert_rows.reshape(num_chunks, ranks, 4).transpose(0, 1))
    assert torch.equal(got[1], expected.near_sent.t())
    assert torch.equal(got[2], expected.far_final.transpose(0, 1))
    if passes_on:
        assert torch.equal(got[3], expected.far_sent.transpose(0, 1))
        assert torch.equal(got[4], expected.fan.transpose(0, 1))
    lists = [part for pair in zip(expected.near_token, expected.far_token, strict=True) for part in pair]
    tokens = torch.cat(lists)
    assert torch.equal(found.tokens[: tokens.numel()].cpu(), tokens)
    check_returns(found.near_return, expected.near_token, chunking, num_tokens)
    if found.far_return is not None:
        check_returns(found.far_return, expected.far_token, chunking, num_tokens)


def check_returns(returns: torch.Tensor, token_lists: list[torch.Tensor], chunking: Chunking, num_tokens: int) -> None:
    """Every token's places in its chunk's list, in order, then -1."""
    expected: list[list[list[int]]] = [[[] for _ in range(num_tokens)] for _ in range(returns.shape[0])]
    for chunk, tokens in enumerate(token_lists):
        for place, token in enumerate(tokens.tolist()):
            expected[0 if chunking.divides_tokens else chunk][token].append(place)
    slots = returns.shape[2]
    padded = [[places + [-1] * (slots - len(places)) for places in copy] for copy in expected]
    assert torch.equal(returns.cpu(), torch.tensor(padded, dtype=torch.int32).reshape(returns.shape))


@pytest.mark.parametrize("rows", [0, 1, 100, 5000])
@pytest.mark.parametrize("per_rank", [1, 8, 64])
@pytest.mark.parametrize("top_k", [1, 2, 7])
def test_entries_are_the_cpus(rows: int, per_rank: int, top_k: int) -> None:
    expert = random_routes(rows, top_k, max(8, 2 * per_rank))
    torch.manual_seed(1)
    weights = torch.rand(rows, top_k)
    sources = [rows // 3, 0, rows - rows // 3]
    plans = [spread_of(expert, per_rank, sources, device, weights) for device in ("cpu", "cuda")]
    for name in ("start", "target", "route", "source", "weight"):
        assert torch.equal(getattr(plans[1], name).cpu(), getattr(plans[0], name)), name


def test_experts_chosen_twice_get_two_rows() -> None:
    plans = [
        spread_of(torch.tensor([[1, 1, 0]] * 40), 2, [40], device, torch.ones(40, 3)) for device in ("cpu", "cuda")
    ]
    assert torch.equal(plans[1].target.cpu(), plans[0].target)


@pytest.mark.parametrize("with_places", [False, True])
@pytest.mark.parametrize("announced", [0, 10, 4000])
@pytest.mark.parametrize("row_dtype", [torch.bfloat16, torch.float64])  # with kernels, and with torch's operations
def test_no_entry_leads_out_of_the_buffer(row_dtype: torch.dtype, announced: int, with_places: bool) -> None:
    rows, top_k, per_rank = 500, 4, 3
    anything = torch.randint(0, 256, (rows, 12 * top_k), generator=torch.Generator().manual_seed(3)).byte().cuda()
    anything[::2, -2 * top_k :] = 0  # half of the rows are for an expert that is here
    spread = find_experts(
        rows=anything,
        routes=RowRoutes(
            offset=10 * top_k, top_k=top_k, id_bytes=2, experts_per_rank=per_rank, last_expert=per_rank
        ),
        first_id=0, num_entries=announced, weight_offset=0, weight_dtype=torch.float32, row_dtype=row_dtype,
        base=[0, 2, 4, 1, 3, 5], source_rows=[200, 300], place_offset=4 * top_k if with_places else -1,
        table=torch.tensor([0, 2, 4, 1, 3, 5, 0, 200], device="cuda"), num_places=7,
    )  # fmt: skip
    assert spread.target.shape == (announced,)
    assert ((spread.target >= 0) & (spread.target < 7)).all()
    assert ((spread.source >= 0) & (spread.source < rows)).all()
    assert ((spread.route >= 0) & (spread.route < top_k)).all()
    assert ((spread.start >= 0) & (spread.start <= announced)).all()
    assert (spread.start.diff() >= 0).all()


def test_routes_to_missing_experts_are_counted() -> None:
    message = torch.zeros(1, 9, dtype=torch.int64, device="cuda")
    expert = torch.tensor([[0, 7, -1, 4]], device="cuda")
    order_tokens_on_device(
        expert=expert, num_experts=4, **Chunking(1).settings(), rank=0, node_of_rank=[0], first_hop=[0],
        num_pieces=0, rows_per_piece=1, tables=torch.zeros(3, 1, dtype=torch.int32, device="cuda"), message=message,
        first_column=0,
    )  # fmt: skip
    assert message[0, 6].item() == 2


def test_bad_input() -> None:
    assert routes_on_device(torch.zeros(1, device="cuda"))
    assert not routes_on_device(torch.zeros(1))
    settings = {
        "num_experts": 4, **Chunking(1).settings(), "rank": 0, "node_of_rank": [0], "first_hop": [0],
        "num_pieces": 0, "rows_per_piece": 1, "first_column": 0,
    }  # fmt: skip
    expert = torch.zeros(1, 3, dtype=torch.int64, device="cuda")
    tables = torch.zeros(3, 1, dtype=torch.int32, device="cuda")
    message = torch.zeros(1, 9, dtype=torch.int64, device="cuda")
    with pytest.raises(ValueError, match="message has 3 columns"):
        order_tokens_on_device(expert=expert, tables=tables, message=message[:, :3].contiguous(), **settings)
    with pytest.raises(ValueError, match="tables is on cpu"):
        order_tokens_on_device(expert=expert, tables=tables.cpu(), message=message, **settings)
    with pytest.raises(ValueError, match="int32 or int64"):
        order_tokens_on_device(expert=expert.float(), tables=tables, message=message, **settings)
    with pytest.raises(ValueError, match="no kernels"):
        order_tokens_on_device(expert=expert.cpu(), tables=tables, message=message, **settings)
    rows = torch.zeros(2, 6, dtype=torch.uint8, device="cuda")
    with pytest.raises(ValueError, match="table is on cpu"):
        find_experts(
            rows=rows, routes=RowRoutes(top_k=1, last_expert=1), first_id=0, num_entries=0, weight_offset=-1,
            weight_dtype=torch.float32, row_dtype=torch.float32, base=[0], source_rows=[2],
            table=torch.zeros(2, dtype=torch.int64),
        )  # fmt: skip
