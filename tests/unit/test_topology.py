"""Ranks to nodes: from labels, launchers' variables, the config; over real ranks."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from planmoe_ds.errors import PlanMoEConfigError, PlanMoEMismatchError
from planmoe_ds.topology import LinkClass, Place, Topology, find_topology, given_topology, my_place, topology_of
from tests.harness.ranks import RankPool


def test_uneven_nodes_in_any_order() -> None:
    topology = Topology.from_labels(["b", "a", "b", "b", "a", "c"])
    assert topology.node_of_rank == (0, 1, 0, 0, 1, 2)
    assert (topology.num_ranks, topology.num_nodes, topology.ranks_per_node) == (6, 3, (3, 2, 1))
    assert topology.ranks_on(1) == (1, 4)
    assert [topology.local_rank(rank) for rank in range(6)] == [0, 0, 1, 2, 1, 0]
    assert topology.link(0, 3) is LinkClass.INTRA
    assert topology.link(0, 4) is LinkClass.INTER
    assert topology.peers(0, LinkClass.INTRA) == (False, False, True, True, False, False)
    assert topology.peers(0, LinkClass.INTER) == (False, True, False, False, True, True)
    assert topology.describe() == "3 nodes of 3, 2 and 1 ranks"


def test_a_group_s_topology() -> None:
    topology = Topology((0, 0, 1, 1, 2, 2))
    assert topology.subset([3, 5, 2]).node_of_rank == (0, 1, 0)
    assert topology.subset([4, 5]) == Topology((0, 0))


def test_link_classes_that_exist() -> None:
    assert [Topology((0, 0)).has(link) for link in LinkClass] == [True, False]
    assert [Topology((0, 1)).has(link) for link in LinkClass] == [False, True]
    assert [Topology((0, 1, 1)).has(link) for link in LinkClass] == [True, True]
    assert [Topology((0,)).has(link) for link in LinkClass] == [False, False]


def test_descriptions() -> None:
    assert Topology((0,)).describe() == "1 node of 1 rank"
    assert Topology((0, 0, 1, 1)).describe() == "2 nodes of 2 ranks"


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12))
def test_peers_of_both_classes_and_oneself_are_everybody(labels: list[int]) -> None:
    topology = Topology.from_labels(labels)
    for rank in range(topology.num_ranks):
        intra, inter = (topology.peers(rank, link) for link in LinkClass)
        assert [a + b for a, b in zip(intra, inter, strict=True)] == [peer != rank for peer in range(len(labels))]


def test_given_counts() -> None:
    assert given_topology(4, 2).node_of_rank == (0, 0, 1, 1)
    assert given_topology(5, 2).node_of_rank == (0, 0, 1, 1, 2)
    assert given_topology(4, [3, 1]).node_of_rank == (0, 0, 0, 1)


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ([2, 3], r"ranks_per_node is \[2, 3\], which adds up to 5; .* the 4 ranks"),
        ([5, -1], "positive counts"),
        ([], "positive counts"),
        (0, "ranks_per_node is 0, expected 1 or more"),
    ],
)
def test_counts_that_do_not_fit(counts: int | list[int], words: str) -> None:
    with pytest.raises(PlanMoEConfigError, match=words):
        given_topology(4, counts)


@pytest.mark.parametrize(
    ("environment", "number"),
    [
        ({}, ""),
        ({"GROUP_RANK": "3", "SLURM_NODEID": "1"}, "3"),
        ({"CROSS_RANK": "2"}, "2"),
        ({"SLURM_NODEID": "1"}, "1"),
        ({"GROUP_RANK": "", "SLURM_NODEID": "1"}, "1"),
    ],
)
def test_launchers_number_nodes(environment: dict[str, str], number: str) -> None:
    assert my_place(environment, "host").node_number == number


def test_launchers_count_ranks() -> None:
    assert my_place({"LOCAL_WORLD_SIZE": "4"}, "host").local_world_size == 4
    assert my_place({"LOCAL_WORLD_SIZE": "all"}, "host").local_world_size is None


def test_one_host_name_on_several_nodes() -> None:
    assert topology_of([Place("localhost", str(rank // 2), 2) for rank in range(4)]).node_of_rank == (0, 0, 1, 1)
    with pytest.raises(PlanMoEMismatchError, match=r"ranks 0, 1, 2, 3 all name the host 'localhost'.*ranks_per_node"):
        topology_of([Place("localhost", "", 2)] * 4)
    assert topology_of([Place("localhost", "", None)] * 4).num_nodes == 1


def nodes_found(ranks_per_node: int | list[int] | None) -> tuple[int, ...]:
    assert dist.is_initialized()
    return find_topology(ranks_per_node).node_of_rank


@pytest.mark.distributed
def test_over_ranks(ranks: RankPool) -> None:
    nodes = [{"GROUP_RANK": str(number), "LOCAL_WORLD_SIZE": "2"} for number in (0, 1, 1)]
    assert ranks.run(3, nodes_found, None, env=nodes) == [(0, 1, 1)] * 3
    assert ranks.run(3, nodes_found, [1, 2]) == [(0, 1, 1)] * 3
