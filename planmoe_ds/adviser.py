"""Predicts a MoE layer's time for every feature on a cluster, from costs alone, and says which ones to switch on.

Exchanges cost what choose.py predicts from the links' alpha and beta, the experts their floating-point operations,
codecs the bytes they read; the schedules are those of scheduling/. A feature that does not gain at least 3 % stays off.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from planmoe_ds.choose import SERIAL_COMMS, TIE, LayerTraffic, predict
from planmoe_ds.choose_chunks import CANDIDATES, schedule_pass
from planmoe_ds.costs import ClusterCosts
from planmoe_ds.scheduling import ChunkCosts, ExchangeCosts, Schedule
from planmoe_ds.shapes import ClusterShape, ModelShape
from planmoe_ds.topology import Topology

COMMS = ("direct", "pipe", "dedup", "hierarchical")
CODEC_BYTES = {"none": None, "int8": 1 + 4 / 128}  # on the wire per value; None: as many as the value has


@dataclass(frozen=True)
class Features:
    """What can be switched on, by the names of the config."""

    comm: str = "direct"
    compression: str = "none"
    chunks: int = 1
    scheduler: str = "sequential"

    def __str__(self) -> str:
        return f"{self.comm}, {self.compression}, {self.chunks} chunks, {self.scheduler}"


@dataclass(frozen=True)
class LayerPrediction:
    """Seconds of a layer's forward and backward with some features, what no order can beat, and the experts' own."""

    features: Features
    forward: Schedule
    backward: Schedule
    expert_seconds: float

    @property
    def seconds(self) -> float:
        """Both passes."""
        return self.forward.makespan + self.backward.makespan

    @property
    def bound(self) -> float:
        """What no order can beat."""
        return self.forward.lower_bound + self.backward.lower_bound


@dataclass(frozen=True)
class Advice:
    """The features to use, a reason for every one that is on or off, and what was predicted."""

    chosen: LayerPrediction
    baseline: LayerPrediction
    reasons: tuple[str, ...]
    predictions: tuple[LayerPrediction, ...]


def predict_layer(
    model: ModelShape, cluster: ClusterShape, features: Features, costs: ClusterCosts | None = None
) -> LayerPrediction:
    """One layer's time; ValueError for shapes that do not fit together. costs: measured ones, not the cluster's."""
    costs = cluster.costs() if costs is None else costs
    topology = _group(model, Topology(tuple(costs.node_of_rank)))
    exchange = _exchange(model, costs, topology, features)
    skew = model.imbalance(topology.num_ranks)
    rows = model.tokens_per_rank * model.top_k * skew
    expert = 4 * rows * model.hidden_size * model.inner_size / (cluster.teraflops * 1e12)
    codec = 0.0
    if features.compression != "none":
        copies = min(model.top_k, topology.num_ranks)
        read = model.tokens_per_rank * copies * skew * model.hidden_size * model.bytes_per_value
        codec = read / (cluster.codec_gigabytes_per_second * 1e9)
    per_chunk = [value / features.chunks for value in (codec, expert)]
    chunk = ChunkCosts(per_chunk[0], exchange, per_chunk[0], per_chunk[1], per_chunk[0], exchange, per_chunk[0])
    forward = schedule_pass([chunk] * features.chunks, features.scheduler)
    backward = schedule_pass([replace(chunk, weights=per_chunk[1])] * features.chunks, features.scheduler)
    return LayerPrediction(features, forward, backward, 3 * expert)


def _group(model: ModelShape, cluster: Topology) -> Topology:
    """The ranks that share experts: the first ones; the other groups are like them and send at the same time."""
    size = cluster.num_ranks if model.expert_parallel_size is None else model.expert_parallel_size
    if cluster.num_ranks % size != 0:
        raise ValueError(f"expert_parallel_size is {size}, expected a divisor of the {cluster.num_ranks} ranks")
    if model.num_experts % size != 0:
        raise ValueError(
            f"num_experts is {model.num_experts}, expected a multiple of the {size} ranks that share a layer's "
            "experts: set expert_parallel_size"
        )
    return cluster.subset(range(size))


def _exchange(model: ModelShape, costs: ClusterCosts, topology: Topology, features: Features) -> ExchangeCosts:
    """One chunk's exchange of one direction."""
    if topology.num_ranks == 1:
        return ExchangeCosts()
    value_bytes = CODEC_BYTES[features.compression]
    row_bytes = round(model.hidden_size * (model.bytes_per_value if value_bytes is None else value_bytes))
    tokens = max(1, -(-round(model.tokens_per_rank * model.imbalance(topology.num_ranks)) // features.chunks))
    traffic = LayerTraffic(
        tokens_per_rank=tokens,
        row_bytes=row_bytes,
        top_k=model.top_k,
        num_experts=model.num_experts,
    )
    found = predict(features.comm, costs, topology, traffic)
    legs = [
        0.0 if cost is None else cost.seconds(rows_per_token * tokens * row_bytes)
        for cost, rows_per_token in ((costs.intra, found.intra_rows), (costs.inter, found.inter_rows))
    ]
    serial = features.comm in SERIAL_COMMS
    shortest = sum(legs) if serial else max(legs)
    return ExchangeCosts(legs[0], legs[1], serial, max(0.0, found.seconds - shortest))


def advise(
    model: ModelShape, cluster: ClusterShape, *, lossy: bool = False, costs: ClusterCosts | None = None
) -> Advice:
    """The features that pay: one after the other, each on only if it takes 3 % or more off the layer's time.

    lossy: whether codecs that lose precision may be chosen. costs: measured ones instead of the cluster's.
    """
    best = baseline = predict_layer(model, cluster, Features(), costs)
    seen = [baseline]
    reasons = []
    codecs = tuple(CODEC_BYTES) if lossy else ("none",)
    orders = [(1, "sequential"), (1, "optimal"), *itertools.product(CANDIDATES[1:], ("pipelined", "optimal"))]
    for name, options in (
        ("comm", [{"comm": comm} for comm in COMMS[1:]]),
        ("compression", [{"compression": codec} for codec in codecs[1:]]),
        ("chunks and scheduler", [{"chunks": chunks, "scheduler": order} for chunks, order in orders[1:]]),
    ):
        found = [predict_layer(model, cluster, replace(best.features, **option), costs) for option in options]
        seen += found
        rival = min(found, key=lambda prediction: prediction.seconds, default=None)
        reason, best = _decide(name, best, rival)
        reasons.append(reason)
    return Advice(best, baseline, tuple(reasons), tuple(seen))


def _decide(name: str, best: LayerPrediction, rival: LayerPrediction | None) -> tuple[str, LayerPrediction]:
    if rival is None:
        return f"{name}: stays as it is: lossy codecs were not allowed", best
    gain = best.seconds / rival.seconds - 1
    times = f"{rival.seconds * 1e3:.2f} ms instead of {best.seconds * 1e3:.2f} ms"
    if rival.seconds * (1 + TIE) < best.seconds:
        return f"{name}: on ({rival.features}): {times}, {gain:.0%} faster", rival
    verdict = "would lose" if gain < 0 else f"gains less than {TIE:.0%}"
    return f"{name}: off: the best other choice ({rival.features}) {verdict}: {times}", best
