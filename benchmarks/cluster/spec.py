"""What an emulated cluster looks like."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass

SKIP = 77  # exit code: this machine cannot emulate a cluster
TIMED_OUT = 124  # exit code
_UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
MAX_NODES = 200  # addresses in one /24 network


def bits_per_second(rate: str) -> float:
    """The rate `400mbit`, `2.5gbit`, … in bits per second; ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", rate)
    if match is None or float(match[1]) == 0:
        raise ValueError(f"rate is {rate!r}, expected a positive number and kbit, mbit or gbit, such as '400mbit'")
    return float(match[1]) * _UNITS[match[2]]


@dataclass(frozen=True, kw_only=True)
class ClusterSpec:
    """Nodes, their ranks and the rates of their links.

    `ranks_per_node` has one entry per node. `inter` is the rate of every node's network card, each way. `intra` is the
    rate at which the ranks of one node reach each other, all of them together. None leaves a link unrated.
    Raises ValueError for what cannot be built.
    """

    ranks_per_node: tuple[int, ...]
    inter: str | None = "400mbit"
    intra: str | None = "2gbit"

    def __post_init__(self) -> None:
        if not 1 <= len(self.ranks_per_node) <= MAX_NODES:
            raise ValueError(f"the cluster has {len(self.ranks_per_node)} nodes, expected 1 to {MAX_NODES}")
        if min(self.ranks_per_node) < 1:
            raise ValueError(f"ranks_per_node is {list(self.ranks_per_node)}, every node needs at least one rank")
        for rate in (self.inter, self.intra):
            if rate is not None:
                bits_per_second(rate)

    @classmethod
    def even(cls, num_nodes: int, ranks_per_node: int, inter: str | None, intra: str | None) -> ClusterSpec:
        """A cluster whose nodes all have `ranks_per_node` ranks."""
        return cls(ranks_per_node=(ranks_per_node,) * num_nodes, inter=inter, intra=intra)

    @property
    def world_size(self) -> int:
        """Ranks on all nodes together."""
        return sum(self.ranks_per_node)

    @property
    def node_of_rank(self) -> list[int]:
        """Index of every rank's node; ranks are numbered node after node."""
        return [node for node, count in enumerate(self.ranks_per_node) for _ in range(count)]

    def to_json(self) -> str:
        """One line that `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ClusterSpec:
        """The spec that `to_json` wrote."""
        fields = json.loads(text)
        return cls(**{**fields, "ranks_per_node": tuple(fields["ranks_per_node"])})
