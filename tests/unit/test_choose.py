"""The choice of an all-to-all: expected copies, predictions by hand, reasons, ties, bad input."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planmoe_ds.choose import LayerTraffic, choose_comm, predict
from planmoe_ds.costs import ClusterCosts, LinkCost
from planmoe_ds.topology import LinkClass, Topology

TWO_BY_EIGHT = Topology.from_labels(rank // 8 for rank in range(16))
PCIE = 4096 * 4096 * 8 * 7 / 16 / 5e-3  # bytes/s of a rank: 5 ms for the flat all-to-all below
CARD = 12.5e9 / 8  # bytes/s of a rank: eight share 100 Gb/s
LAYER = LayerTraffic(tokens_per_rank=4096, row_bytes=4096, top_k=8, num_experts=16 * 1024)


def link(rate: float, alpha: float = 0.0) -> LinkCost:
    return LinkCost(alpha_seconds=alpha, beta_seconds_per_byte=1 / rate, worst_error=0.0)


def costs_of(
    topology: Topology, intra: float, inter: float, alpha: float = 0.0, overlap: float = 1.0, slowed: float = 1.0
) -> ClusterCosts:
    """Rates in bytes/s of a rank; `slowed`: how many times slower a class is while the other is busy."""
    has = {kind: topology.has(kind) for kind in LinkClass}
    both = all(has.values())
    return ClusterCosts(
        fingerprint="", backend="gloo", node_of_rank=list(topology.node_of_rank),
        intra=link(intra, alpha) if has[LinkClass.INTRA] else None,
        inter=link(inter, alpha) if has[LinkClass.INTER] else None,
        intra_while_both=link(intra / slowed, alpha) if both else None,
        inter_while_both=link(inter / slowed, alpha) if both else None,
        direct_overlap=overlap if both else None,
    )  # fmt: skip


@pytest.mark.parametrize(("num_nodes", "published"), [(2, 4.0), (4, 2.2), (8, 1.5)])
def test_the_published_gain_of_node_deduplication(num_nodes: int, published: float) -> None:
    """One copy between nodes for every expert over those of dedup: k / (N (1 - (1 - 1/N)^k)) for many experts."""
    topology = Topology.from_labels(rank // 8 for rank in range(8 * num_nodes))
    traffic = LayerTraffic(tokens_per_rank=4096, row_bytes=4096, top_k=8, num_experts=8 * num_nodes * 512)
    rows = predict("dedup", costs_of(topology, 1e12, CARD), topology, traffic).inter_rows
    gain = traffic.top_k * (1 - 1 / num_nodes) / rows
    assert gain == pytest.approx(8 / (num_nodes * (1 - (1 - 1 / num_nodes) ** 8)), rel=2e-3)
    assert gain == pytest.approx(published, abs=0.05)


def test_two_nodes_of_eight_and_one_card_each() -> None:
    choice = choose_comm(costs_of(TWO_BY_EIGHT, PCIE, CARD), TWO_BY_EIGHT, LAYER)
    assert choice.name == "dedup"
    once_per_rank = 16 / 8 * (1 - (1 - 1 / 16) ** 8)  # of once per expert
    assert choice.predictions["pipe"].seconds == pytest.approx(43e-3 * once_per_rank, rel=0.01)
    last_piece = 7 * 2 * (1 - (1 - 1 / 16) ** 8) * 4096 * 4096 / PCIE / 8
    assert choice.predictions["dedup"].seconds == pytest.approx(10.7e-3 + last_piece, rel=0.01)
    assert choice.predictions["hierarchical"].seconds == pytest.approx(53e-3 * once_per_rank, rel=0.01)  # 2D: 14/16
    assert choice.reason == (
        "dedup: 11.7 ms predicted against direct's 34.6 ms, because each token crosses between nodes once instead of "
        "3.2 times"
    )


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_the_chance_of_a_node_by_counting(top_k: int, experts_of_node: int, others: int) -> None:
    num_experts = experts_of_node + others + top_k
    traffic = LayerTraffic(tokens_per_rank=1, row_bytes=1, top_k=top_k, num_experts=num_experts)
    picks = list(itertools.combinations(range(num_experts), top_k))
    wanted = sum(any(expert < experts_of_node for expert in pick) for pick in picks)
    assert traffic.chance_of_any(experts_of_node) == pytest.approx(wanted / len(picks))


def simulate(topology: Topology, traffic: LayerTraffic, name: str) -> tuple[float, float]:
    """Rows per token on the busiest rank inside a node and between nodes, by sending many random tokens one by one."""
    sent = {kind: [0] * topology.num_ranks for kind in LinkClass}
    received = {kind: [0] * topology.num_ranks for kind in LinkClass}

    def send(rank: int, peer: int) -> None:
        if rank != peer:
            sent[topology.link(rank, peer)][rank] += 1
            received[topology.link(rank, peer)][peer] += 1

    generator = random.Random(3)
    per_rank = traffic.num_experts // topology.num_ranks
    for _, rank in itertools.product(range(traffic.tokens_per_rank), range(topology.num_ranks)):
        owners = [expert // per_rank for expert in generator.sample(range(traffic.num_experts), traffic.top_k)]
        node, place = topology.node_of_rank[rank], topology.local_rank(rank)
        if name == "dedup":
            for target in {topology.node_of_rank[owner] for owner in owners}:
                mates = topology.ranks_on(target)
                hop = rank if target == node else mates[place % len(mates)]
                send(rank, hop)
                for owner in set(owners) & set(mates):
                    send(hop, owner)
        for owner in set(owners):
            if name == "hierarchical":
                mates = topology.ranks_on(node)
                hop = owner if owner in mates else mates[topology.local_rank(owner) % len(mates)]
                send(rank, hop)
                send(hop, owner)
            elif name in ("direct", "pipe"):
                send(rank, owner)
    intra, inter = (max(*sent[kind], *received[kind]) / traffic.tokens_per_rank for kind in LinkClass)
    return intra, inter


@pytest.mark.parametrize("name", ["direct", "pipe", "hierarchical", "dedup"])
@pytest.mark.parametrize("counts", [(2, 2), (1, 1, 1), (3, 1), (3, 2, 1)], ids=str)
def test_rows_are_those_of_random_tokens(name: str, counts: tuple[int, ...]) -> None:
    topology = Topology.from_labels(node for node, count in enumerate(counts) for _ in range(count))
    experts = topology.num_ranks * 3
    traffic = LayerTraffic(tokens_per_rank=1500, row_bytes=1, top_k=4, num_experts=experts)
    found = predict(name, costs_of(topology, 1e9, 1e9), topology, traffic)
    assert (found.intra_rows, found.inter_rows) == pytest.approx(simulate(topology, traffic, name), rel=0.06)


def test_start_ups_overlap_and_slowed_links() -> None:
    topology = Topology((0, 0, 1, 1))
    traffic = LayerTraffic(tokens_per_rank=1000, row_bytes=1000, top_k=2, num_experts=4)  # c = 0.5 copies per rank
    costs = costs_of(topology, 1e9, 1e9, alpha=1e-3, overlap=0.5, slowed=2.0)
    seconds = {name: predict(name, costs, topology, traffic).seconds for name in ("direct", "pipe", "dedup")}
    intra, inter = 1e-3 + 0.5e6 * 2e-9, 1e-3 + 1e6 * 2e-9
    assert seconds["pipe"] == pytest.approx(inter)
    assert seconds["direct"] == pytest.approx(inter + 0.5 * intra)
    # A rank is wanted with 1 - C(3,2)/C(4,2) = 1/2; own copies and passed ones: 2 * 1/2. A node with 1 - 1/6.
    # Both legs carry 1e6 and 0.833e6 bytes in seven pieces of 128 KiB, each with a start-up; the shorter leg shows one.
    assert seconds["dedup"] == pytest.approx(7e-3 + 1e6 * 2e-9 + 1e-3 + 5 / 6 * 1e6 * 2e-9 / 7)
    alone = predict("hierarchical", costs, topology, traffic).seconds
    assert alone == pytest.approx(1e-3 + 1e6 * 1e-9 + 1e-3 + 1e6 * 1e-9)  # one link at a time


def test_one_node() -> None:
    topology = Topology((0, 0))
    choice = choose_comm(costs_of(topology, 1e9, 1e9), topology, LAYER)
    assert (choice.name, choice.reason) == ("direct", "direct: one node: nothing crosses between nodes")
    assert choice.predictions == {}


def test_a_tie_goes_to_the_simpler_one() -> None:
    pcie_twice = costs_of(TWO_BY_EIGHT, PCIE, CARD, overlap=0.9)
    exact = choose_comm(pcie_twice, TWO_BY_EIGHT, LAYER, exact=True)
    assert exact.predictions["direct"].seconds > exact.predictions["pipe"].seconds
    assert exact.name == "direct"
    assert "within 3% of pipe's 34.6 ms and simpler" in exact.reason
    one_copy = LayerTraffic(tokens_per_rank=4096, row_bytes=4096, top_k=1, num_experts=64)
    equal = choose_comm(costs_of(TWO_BY_EIGHT, 1e12, CARD), TWO_BY_EIGHT, one_copy)
    assert equal.reason == "direct: 5.37 ms predicted, the simplest of equals"


def test_exact_results_leave_dedup_out_and_say_so() -> None:
    choice = choose_comm(costs_of(TWO_BY_EIGHT, PCIE, CARD, overlap=0.0), TWO_BY_EIGHT, LAYER, exact=True)
    assert "dedup" not in choice.predictions
    assert choice.reason == (
        "pipe: 34.6 ms predicted against direct's 38.7 ms, because the links inside and between nodes are busy at "
        "once; dedup is left out, it adds up in another order than exact results need"
    )


def test_passing_on_over_slow_links_inside_nodes_loses() -> None:
    choice = choose_comm(costs_of(TWO_BY_EIGHT, 1e8, CARD), TWO_BY_EIGHT, LAYER)
    assert choice.name == "direct"
    assert "against dedup's" in choice.reason
    assert "travels inside nodes 2.8 times instead of 5.6 times" in choice.reason
    assert choose_comm(costs_of(TWO_BY_EIGHT, 1e7, CARD), TWO_BY_EIGHT, LAYER).reason.startswith("direct: 4.74 s ")


def test_only_registered_ones_are_chosen() -> None:
    costs = costs_of(TWO_BY_EIGHT, PCIE, CARD)
    assert choose_comm(costs, TWO_BY_EIGHT, LAYER, ["pipe", "somebody's own"]).reason == (
        "pipe: 34.6 ms predicted, nothing else to choose from"
    )
    with pytest.raises(ValueError, match="no all-to-all to choose from"):
        choose_comm(costs, TWO_BY_EIGHT, LAYER, ["somebody's own"])
    with pytest.raises(ValueError, match="no all-to-all to choose from"):
        choose_comm(costs, TWO_BY_EIGHT, LAYER, ["dedup"], exact=True)


@pytest.mark.parametrize("top_k", [1, 2, 6, 8])
@pytest.mark.parametrize("counts", [(1, 1), (2, 2, 2), (4, 2)], ids=str)
def test_more_bytes_never_take_less_time(top_k: int, counts: tuple[int, ...]) -> None:
    topology = Topology.from_labels(node for node, count in enumerate(counts) for _ in range(count))
    costs = costs_of(topology, 1e9, 1e8, alpha=1e-4)
    for name in ("direct", "pipe", "dedup", "hierarchical"):
        few, many = (
            predict(name, costs, topology, LayerTraffic(
                tokens_per_rank=tokens, row_bytes=2048, top_k=top_k, num_experts=4 * topology.num_ranks
            ))
            for tokens in (64, 128)
        )  # fmt: skip
        twice = 2 * few.seconds * (1 + 1e-9)  # dedup: as many more pieces, each with its start-up
        assert 0 < few.seconds < many.seconds
        assert many.seconds <= twice if name == "dedup" else many.seconds < twice


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokens_per_rank": 0}, "tokens_per_rank is 0, expected 1 or more"),
        ({"tokens_per_rank": -1}, "tokens_per_rank is -1"),
        ({"row_bytes": -4}, "row_bytes is -4"),
        ({"row_bytes": float("nan")}, "row_bytes is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"num_pieces": 0}, "num_pieces is 0"),
        ({"top_k": 9, "num_experts": 8}, "top_k is 9, more than the 8 experts"),
    ],
)
def test_traffic_of_no_layer(changes: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LayerTraffic(**{"tokens_per_rank": 1, "row_bytes": 1, "top_k": 1, "num_experts": 1, **changes})


def test_what_cannot_be_predicted() -> None:
    costs = costs_of(TWO_BY_EIGHT, PCIE, CARD)
    odd = LayerTraffic(tokens_per_rank=1, row_bytes=1, top_k=1, num_experts=24)
    with pytest.raises(ValueError, match="num_experts is 24, expected a multiple of the 16 ranks"):
        predict("pipe", costs, TWO_BY_EIGHT, odd)
    with pytest.raises(ValueError, match="all-to-all is 'pip', predictions are for direct, pipe, dedup, hierarchical"):
        predict("pip", costs, TWO_BY_EIGHT, LAYER)
    one_node = costs_of(Topology((0, 0)), PCIE, CARD)
    with pytest.raises(ValueError, match=r"2 nodes of 8 ranks need costs for .*inter.* measured on 1 node of 2 ranks"):
        predict("pipe", one_node, TWO_BY_EIGHT, LAYER)


def test_a_group_with_one_rank_per_node_needs_no_costs_inside() -> None:
    rail = TWO_BY_EIGHT.subset([0, 8])
    choice = choose_comm(costs_of(TWO_BY_EIGHT, PCIE, CARD), rail, LAYER)
    assert choice.predictions["dedup"].intra_rows == 0
    assert choice.name == "direct"  # with one rank on a node, once to each rank is once to each node
