"""Which all-to-all is fastest for a layer on a cluster: predicted from measured link costs, by pure functions.

Routing is taken as uniform: every token picks top_k different experts, each set of them equally likely. A prediction is
the duration of one dispatch, of all tokens at once. It counts wires only: no copies inside a rank, no codecs.

Legend: N nodes, G_n ranks of node n, R ranks in all; a rail joins a rank to one of each other node (local index modulo
the other node's ranks).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from planmoe_ds.costs import ClusterCosts, LinkCost
from planmoe_ds.topology import LinkClass, Topology

TIE = 0.03  # predictions this close are equal: the simpler all-to-all is taken
PIECE_BYTES = 1 << 17  # dedup does not cut messages between nodes into smaller pieces than this,
DEVICE_PIECE_BYTES = 1 << 22  # nor than this on accelerators, where every piece costs launches
SERIAL_COMMS = ("hierarchical",)  # whose legs inside nodes and between them follow each other


@dataclass(frozen=True, kw_only=True)
class LayerTraffic:
    """What one MoE layer sends; ValueError for what no layer can send.

    `row_bytes`: of one token's row on the wire, which goes once to every rank that has an expert for it. `num_pieces`:
    into how many dedup cuts a message between nodes at most, to pass the first ones on while the others arrive.
    """

    tokens_per_rank: int
    row_bytes: int
    top_k: int
    num_experts: int
    num_pieces: int = 8

    def __post_init__(self) -> None:
        for name in ("tokens_per_rank", "row_bytes", "top_k", "num_experts", "num_pieces"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 or more")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k is {self.top_k}, more than the {self.num_experts} experts (num_experts)")

    def chance_of_any(self, num_experts: int) -> float:
        """Probability that a token picks at least one of these `num_experts` experts."""
        others = self.num_experts - num_experts
        return 1 - math.comb(others, self.top_k) / math.comb(self.num_experts, self.top_k)


@dataclass(frozen=True)
class Prediction:
    """Seconds of one dispatch; rows per token that the busiest rank carries inside its node and between nodes."""

    seconds: float
    intra_rows: float
    inter_rows: float


@dataclass(frozen=True)
class Choice:
    """The chosen all-to-all, a sentence that says why, and all predictions by name (none where nothing is compared)."""

    name: str
    reason: str
    predictions: Mapping[str, Prediction]


def choose_comm(
    costs: ClusterCosts,
    topology: Topology,
    traffic: LayerTraffic,
    names: Collection[str] | None = None,
    *,
    exact: bool = False,
) -> Choice:
    """The fastest of `names` (default: all that can be predicted; others are passed over) for a group of ranks.

    `exact` leaves out dedup, which adds up in another order. Within 3 % the simpler one is taken. Raises ValueError as
    `predict` does, and when nothing in `names` can be predicted.
    """
    candidates = [name for name in _PREDICTORS if (names is None or name in names) and not (exact and name == "dedup")]
    if not candidates:
        raise ValueError(f"no all-to-all to choose from: {names} has none of {', '.join(_PREDICTORS)}")
    if topology.num_nodes == 1:
        return Choice(candidates[0], f"{candidates[0]}: one node: nothing crosses between nodes", {})
    predictions = {name: predict(name, costs, topology, traffic) for name in candidates}
    best = min(candidates, key=lambda name: predictions[name].seconds)
    limit = predictions[best].seconds * (1 + TIE)
    chosen = next(name for name in candidates if predictions[name].seconds <= limit)
    reason = _why(chosen, best, predictions)
    if exact and (names is None or "dedup" in names):
        reason += "; dedup is left out, it adds up in another order than exact results need"
    return Choice(chosen, reason, predictions)


def predict(name: str, costs: ClusterCosts, topology: Topology, traffic: LayerTraffic) -> Prediction:
    """One dispatch over a group of ranks with an all-to-all known by name.

    Raises ValueError for an unknown name, experts that do not divide by the ranks, and costs that lack a class of links
    which the group has.
    """
    if name not in _PREDICTORS:
        raise ValueError(f"all-to-all is '{name}', predictions are for {', '.join(_PREDICTORS)}")
    if traffic.num_experts % topology.num_ranks != 0:
        raise ValueError(f"num_experts is {traffic.num_experts}, expected a multiple of the {topology.num_ranks} ranks")
    both = all(topology.has(link) for link in LinkClass)
    wanted = [f"{link.value}{suffix}" for link in LinkClass if topology.has(link) for suffix in _suffixes(both)]
    missing = [cost for cost in wanted if getattr(costs, cost) is None]
    if missing:
        raise ValueError(
            f"{topology.describe()} need costs for {', '.join(missing)}; the costs given were measured on "
            f"{Topology(tuple(costs.node_of_rank)).describe()}: run `planmoe probe` with the ranks of this job"
        )
    return _PREDICTORS[name](_Wires(costs, both), _Rows(topology, traffic))


def _suffixes(both: bool) -> tuple[str, ...]:
    return ("", "_while_both") if both else ("",)


def least_piece(device: str) -> int:
    """Bytes of the smallest piece into which dedup cuts a message between nodes, on a type of device."""
    return PIECE_BYTES if device == "cpu" else DEVICE_PIECE_BYTES


class _Wires:
    """Seconds of a leg's bytes on each class of links, alone or with the other class busy."""

    def __init__(self, costs: ClusterCosts, both: bool) -> None:
        self.intra, self.inter = costs.intra, costs.inter
        self.least_piece = least_piece("cuda" if costs.backend == "nccl" else "cpu")
        self.busy_intra = costs.intra_while_both if both else costs.intra
        self.busy_inter = costs.inter_while_both if both else costs.inter
        self.direct_overlap = 1.0 if costs.direct_overlap is None else costs.direct_overlap


class _Rows:
    """Expected rows per token that the busiest rank sends or receives."""

    def __init__(self, topology: Topology, traffic: LayerTraffic) -> None:
        self.bytes_per_row = traffic.tokens_per_rank * traffic.row_bytes
        self.num_pieces = traffic.num_pieces
        self.num_ranks = topology.num_ranks
        self.ranks_on = topology.ranks_per_node
        per_rank = traffic.num_experts // topology.num_ranks
        self.copies = traffic.chance_of_any(per_rank)
        self.node_wanted = [traffic.chance_of_any(per_rank * count) for count in self.ranks_on]

    def on_rail(self, node: int, index: int) -> int:
        """Ranks of other nodes whose rail to `node` ends at its rank with this local index."""
        here = self.ranks_on[node]
        return sum(len(range(index, count, here)) for other, count in enumerate(self.ranks_on) if other != node)

    def busiest(self, rows: Callable[[int, int], float]) -> float:
        """The largest `rows(node, local index)`."""
        return max(rows(node, index) for node, count in enumerate(self.ranks_on) for index in range(count))


def _seconds(cost: LinkCost | None, num_bytes: float) -> float:
    return 0.0 if cost is None else cost.seconds(num_bytes)


def _direct(wires: _Wires, rows: _Rows) -> Prediction:
    """One exchange; the classes of links overlap as far as the probe saw them overlap."""
    return _flat(wires, rows, wires.direct_overlap)


def _pipe(wires: _Wires, rows: _Rows) -> Prediction:
    """Two exchanges at once."""
    return _flat(wires, rows, overlap=1.0)


def _flat(wires: _Wires, rows: _Rows, overlap: float) -> Prediction:
    """Every copy straight to the rank of its expert."""
    intra = rows.copies * (max(rows.ranks_on) - 1)
    inter = rows.copies * (rows.num_ranks - min(rows.ranks_on))
    legs = (
        _seconds(wires.busy_intra, intra * rows.bytes_per_row),
        _seconds(wires.busy_inter, inter * rows.bytes_per_row),
    )
    return Prediction(max(legs) + (1 - overlap) * min(legs), intra, inter)


def _dedup(wires: _Wires, rows: _Rows) -> Prediction:
    """One row per token and node over the rail, piece by piece, passed on while more arrive.

    Every piece pays its start-ups. The slower leg counts, and one piece on the other: the inter leg's last piece still
    has to be passed on, the intra leg's first one has to arrive.
    """

    def intra_rows(node: int, index: int) -> float:
        passed_for = rows.on_rail(node, index)
        sent = (rows.ranks_on[node] - 1) * (1 + passed_for)
        return rows.copies * max(sent, rows.num_ranks - 1 - passed_for)

    def inter_rows(node: int, index: int) -> float:
        sent = sum(rows.node_wanted) - rows.node_wanted[node]
        return max(sent, rows.node_wanted[node] * rows.on_rail(node, index))

    intra, inter = rows.busiest(intra_rows), rows.busiest(inter_rows)
    message_bytes = inter * rows.bytes_per_row / max(1, len(rows.ranks_on) - 1)
    num_pieces = max(1, min(rows.num_pieces, math.ceil(message_bytes / wires.least_piece)))
    pieces = (
        _seconds(wires.busy_intra, intra * rows.bytes_per_row / num_pieces),
        _seconds(wires.busy_inter, inter * rows.bytes_per_row / num_pieces),
    )
    return Prediction(num_pieces * max(pieces) + min(pieces), intra, inter)


def _hierarchical(wires: _Wires, rows: _Rows) -> Prediction:
    """Every copy to the rank of its own node on the destination's rail, then, when all are there, between nodes."""

    def intra_rows(node: int, index: int) -> float:
        served = 1 + rows.on_rail(node, index)
        return rows.copies * max(rows.num_ranks - served, (rows.ranks_on[node] - 1) * served)

    def inter_rows(node: int, index: int) -> float:
        sent = rows.ranks_on[node] * rows.on_rail(node, index)
        return rows.copies * max(sent, rows.num_ranks - rows.ranks_on[node])

    intra, inter = rows.busiest(intra_rows), rows.busiest(inter_rows)
    seconds = _seconds(wires.intra, intra * rows.bytes_per_row) + _seconds(wires.inter, inter * rows.bytes_per_row)
    return Prediction(seconds, intra, inter)


_PREDICTORS: dict[str, Callable[[_Wires, _Rows], Prediction]] = {  # the simplest first
    "direct": _direct,
    "pipe": _pipe,
    "dedup": _dedup,
    "hierarchical": _hierarchical,
}


def _why(chosen: str, best: str, predictions: Mapping[str, Prediction]) -> str:
    mine = predictions[chosen]
    predicted = f"{chosen}: {in_words(mine.seconds)} predicted"
    if best != chosen:
        return f"{predicted}, within {TIE:.0%} of {best}'s {in_words(predictions[best].seconds)} and simpler"
    slower = [name for name, other in predictions.items() if other.seconds > mine.seconds * (1 + TIE)]
    if not slower:
        return f"{predicted}, " + ("the simplest of equals" if len(predictions) > 1 else "nothing else to choose from")
    rival_name = min(slower, key=lambda name: predictions[name].seconds)
    rival = predictions[rival_name]
    reason = f"{predicted} against {rival_name}'s {in_words(rival.seconds)}"
    if mine.inter_rows < rival.inter_rows * (1 - TIE):
        crossings = f"{_times(mine.inter_rows)} instead of {_times(rival.inter_rows)}"
        return f"{reason}, because each token crosses between nodes {crossings}"
    if mine.intra_rows < rival.intra_rows * (1 - TIE):
        hops = f"{_times(mine.intra_rows)} instead of {_times(rival.intra_rows)}"
        return f"{reason}, because each token travels inside nodes {hops}"
    if rival_name == "hierarchical" or chosen == "pipe":
        return f"{reason}, because the links inside and between nodes are busy at once"
    return reason


def _times(count: float) -> str:
    return "once" if abs(count - 1) < 0.05 else f"{count:.1f} times"


def in_words(seconds: float) -> str:
    """Three digits and a unit."""
    return f"{seconds:.3g} s" if seconds > 0.999 else f"{seconds * 1e3:.3g} ms"
