"""Which rank is on which node: from the launcher's variables and the hosts' names, or as the config says."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch.distributed as dist

from planmoe_ds.errors import PlanMoEConfigError, PlanMoEMismatchError

# How launchers number the nodes: torchrun, deepspeed, srun. Two nodes may have one host name (containers).
_NODE_VARIABLES = ("GROUP_RANK", "CROSS_RANK", "SLURM_NODEID")


class LinkClass(str, Enum):
    """The wires between two ranks."""

    INTRA = "intra"  # inside one node
    INTER = "inter"  # between nodes


@dataclass(frozen=True)
class Topology:
    """Nodes of a set of ranks: `node_of_rank[rank]` counts from 0 in the order of each node's first rank.

    Nodes may have different numbers of ranks, in any order.
    """

    node_of_rank: tuple[int, ...]

    @classmethod
    def from_labels(cls, labels: Iterable[object]) -> Topology:
        """Ranks with equal labels share a node."""
        listed = list(labels)
        index = {label: number for number, label in enumerate(dict.fromkeys(listed))}
        return cls(tuple(index[label] for label in listed))

    @property
    def num_ranks(self) -> int:
        """Ranks on all nodes together."""
        return len(self.node_of_rank)

    @property
    def num_nodes(self) -> int:
        """Nodes that have a rank."""
        return len(set(self.node_of_rank))

    @property
    def ranks_per_node(self) -> tuple[int, ...]:
        """Number of ranks of every node."""
        return tuple(self.node_of_rank.count(node) for node in range(self.num_nodes))

    def ranks_on(self, node: int) -> tuple[int, ...]:
        """The ranks of a node, ascending."""
        return tuple(rank for rank, place in enumerate(self.node_of_rank) if place == node)

    def local_rank(self, rank: int) -> int:
        """Place of a rank among those of its node."""
        return self.ranks_on(self.node_of_rank[rank]).index(rank)

    def link(self, rank: int, peer: int) -> LinkClass:
        """The class of the link between two ranks."""
        return LinkClass.INTRA if self.node_of_rank[rank] == self.node_of_rank[peer] else LinkClass.INTER

    def peers(self, rank: int, link: LinkClass) -> tuple[bool, ...]:
        """For every rank whether it is another one that `rank` reaches over this class of links."""
        return tuple(peer != rank and self.link(rank, peer) is link for peer in range(self.num_ranks))

    def has(self, link: LinkClass) -> bool:
        """Whether any two ranks are joined by this class of links."""
        return self.num_nodes > 1 if link is LinkClass.INTER else self.num_ranks > self.num_nodes

    def subset(self, ranks: Sequence[int]) -> Topology:
        """The topology of a group: its rank i is `ranks[i]` here."""
        return Topology.from_labels(self.node_of_rank[rank] for rank in ranks)

    def describe(self) -> str:
        """A line such as "3 nodes of 4, 4 and 2 ranks"."""
        counts = self.ranks_per_node
        nodes = f"{self.num_nodes} node" + "s" * (self.num_nodes > 1)
        if len(set(counts)) == 1:
            each = f"{counts[0]} rank" + "s" * (counts[0] > 1)
            return f"{nodes} of {each}"
        return f"{nodes} of {', '.join(str(count) for count in counts[:-1])} and {counts[-1]} ranks"


def given_topology(world_size: int, ranks_per_node: int | Sequence[int]) -> Topology:
    """Ranks numbered node after node: the same count on each (the last may have fewer), or one count per node.

    Raises PlanMoEConfigError when the counts do not fit the world.
    """
    if isinstance(ranks_per_node, int):
        if ranks_per_node < 1:
            raise PlanMoEConfigError(f"ranks_per_node is {ranks_per_node}, expected 1 or more")
        return Topology(tuple(rank // ranks_per_node for rank in range(world_size)))
    counts = list(ranks_per_node)
    if min(counts, default=0) < 1 or sum(counts) != world_size:
        raise PlanMoEConfigError(
            f"ranks_per_node is {counts}, which adds up to {sum(counts)}; expected positive counts, one per node, that "
            f"add up to the {world_size} ranks of the job"
        )
    return Topology.from_labels(node for node, count in enumerate(counts) for _ in range(count))


def find_topology(ranks_per_node: int | Sequence[int] | None = None) -> Topology:
    """The nodes of all ranks of the world; collective, unless `ranks_per_node` gives them.

    Raises PlanMoEConfigError (see `given_topology`), and PlanMoEMismatchError when ranks of several nodes cannot be
    told apart.
    """
    if ranks_per_node is not None:
        return given_topology(dist.get_world_size(), ranks_per_node)
    places: list[Place] = [Place("", "", None)] * dist.get_world_size()
    dist.all_gather_object(places, my_place(os.environ, socket.gethostname()))
    return topology_of(places)


@dataclass(frozen=True)
class Place:
    """What a rank knows of its node: host name, the launcher's number for the node, its number of ranks there."""

    hostname: str
    node_number: str
    local_world_size: int | None


def my_place(environment: Mapping[str, str], hostname: str) -> Place:
    """This rank's place, from the variables that its launcher set."""
    number = next((environment[name] for name in _NODE_VARIABLES if environment.get(name)), "")
    size = environment.get("LOCAL_WORLD_SIZE", "")
    return Place(hostname, number, int(size) if size.isdigit() else None)


def topology_of(places: Sequence[Place]) -> Topology:
    """Ranks share a node when host name and node number agree; PlanMoEMismatchError when the launcher counts fewer."""
    topology = Topology.from_labels((place.hostname, place.node_number) for place in places)
    for node, count in enumerate(topology.ranks_per_node):
        ranks = topology.ranks_on(node)
        stated = places[ranks[0]].local_world_size
        if stated is not None and count > stated:
            raise PlanMoEMismatchError(
                f"ranks {', '.join(str(rank) for rank in ranks)} all name the host '{places[ranks[0]].hostname}', but "
                f"their launcher put {stated} on a node (LOCAL_WORLD_SIZE): several nodes share a host name. Give "
                "the nodes different names, or say how many ranks each has with ranks_per_node"
            )
    return topology
