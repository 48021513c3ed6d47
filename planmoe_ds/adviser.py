"""Predicts a MoE layer's time for every feature on a cluster, from costs alone, and says which ones to switch on.

Exchanges cost what choose.py predicts from the links' alpha and beta, the experts their floating-point operations,
codecs the bytes they read; the schedules are those of scheduling/. A feature that does not gain at least 3 % stays off.

Legend: T tokens per rank, H hidden size, F inner size of an expert.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from planmoe_ds.choose import SERIAL_COMMS, TIE, LayerTraffic, predict
from planmoe_ds.costs import ClusterCosts, LinkCost
from planmoe_ds.errors import PlanMoEConfigError
from planmoe_ds.scheduling import ChunkCosts, ExchangeCosts, Schedule, layer_graph, solve, timetable
from planmoe_ds.scheduling.pipelined import PipelinedScheduler
from planmoe_ds.scheduling.sequential import SequentialScheduler
from planmoe_ds.topology import Topology

_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=1)]
CHUNKS = (1, 2, 4, 8)
COMMS = ("direct", "pipe", "dedup", "hierarchical")
CODEC_BYTES = {"none": None, "int8": 1 + 4 / 128}  # on the wire per value; None: as many as the value has
_SOLVER_SECONDS = 0.05


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelShape(_Section):
    """What the adviser has to know of a model; `load`: tokens that every expert of a recorded batch got."""

    tokens_per_rank: _Count = 4096
    hidden_size: _Count = 2048
    inner_size: _Count = 8192
    num_experts: _Count = 64
    top_k: _Count = 2
    num_moe_layers: _Count = 1
    bytes_per_value: _Count = 2
    load: tuple[float, ...] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ModelShape:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k is {self.top_k}, more than the {self.num_experts} experts")
        if self.load is not None and len(self.load) != self.num_experts:
            raise ValueError(f"load has {len(self.load)} numbers, expected one for each of {self.num_experts} experts")
        if self.load is not None and not (min(self.load) >= 0 and 0 < sum(self.load) < float("inf")):
            raise ValueError("load must be numbers of tokens, none negative and not all zero")
        return self

    def imbalance(self, num_ranks: int) -> float:
        """The busiest rank's load over the mean."""
        if self.load is None:
            return 1.0
        per_rank = self.num_experts // num_ranks
        loads = [sum(self.load[rank * per_rank : (rank + 1) * per_rank]) for rank in range(num_ranks)]
        return max(loads) * num_ranks / sum(loads)


class ClusterShape(_Section):
    """A cluster that need not exist: rates per GPU inside a node and per node between nodes, each way."""

    num_nodes: _Count = 2
    gpus_per_node: _Count = 8
    intra_gigabytes_per_second: _Positive = 25.0
    inter_gigabits_per_second: _Positive = 100.0
    intra_microseconds: _Positive = 10.0
    inter_microseconds: _Positive = 30.0
    teraflops: _Positive = 150.0  # of an expert's GEMMs, per GPU
    codec_gigabytes_per_second: _Positive = 500.0  # of values read or written

    def costs(self) -> ClusterCosts:
        """As a probe would find them."""
        topology = self.topology()
        intra = (
            _link(self.intra_microseconds, 1e-9 / self.intra_gigabytes_per_second) if self.gpus_per_node > 1 else None
        )
        beta = 8e-9 * self.gpus_per_node / self.inter_gigabits_per_second
        inter = _link(self.inter_microseconds, beta) if self.num_nodes > 1 else None
        both = intra is not None and inter is not None
        return ClusterCosts(
            fingerprint="simulated",
            backend="simulated",
            node_of_rank=list(topology.node_of_rank),
            intra=intra,
            inter=inter,
            intra_while_both=intra if both else None,
            inter_while_both=inter if both else None,
            direct_overlap=1.0 if both else None,
        )

    def topology(self) -> Topology:
        """Ranks node after node."""
        return Topology(tuple(node for node in range(self.num_nodes) for _ in range(self.gpus_per_node)))


def _link(microseconds: float, seconds_per_byte: float) -> LinkCost:
    return LinkCost(alpha_seconds=microseconds * 1e-6, beta_seconds_per_byte=seconds_per_byte, worst_error=0.0)


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
    topology = Topology(tuple(costs.node_of_rank))
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
    forward = _schedule([chunk] * features.chunks, features.scheduler)
    backward = _schedule([replace(chunk, weights=per_chunk[1])] * features.chunks, features.scheduler)
    return LayerPrediction(features, forward, backward, 3 * expert)


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
        once_per_rank=True,
    )
    found = predict(features.comm, costs, topology, traffic)
    legs = [
        0.0 if cost is None else cost.seconds(rows_per_token * tokens * row_bytes)
        for cost, rows_per_token in ((costs.intra, found.intra_rows), (costs.inter, found.inter_rows))
    ]
    serial = features.comm in SERIAL_COMMS
    shortest = sum(legs) if serial else max(legs)
    return ExchangeCosts(legs[0], legs[1], serial, max(0.0, found.seconds - shortest))


def _schedule(chunks: Sequence[ChunkCosts], scheduler: str) -> Schedule:
    graph = layer_graph(chunks)
    theirs = timetable(graph, PipelinedScheduler().order(graph))
    if scheduler == "optimal":
        return solve(graph, _SOLVER_SECONDS, [theirs.order])
    return theirs if scheduler == "pipelined" else timetable(graph, SequentialScheduler().order(graph))


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
    orders = [(1, "sequential"), (1, "optimal"), *itertools.product(CHUNKS[1:], ("pipelined", "optimal"))]
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


_Model = TypeVar("_Model", bound=BaseModel)


def load_shape(path: Path, kind: type[_Model]) -> _Model:
    """A shape or measured costs from a JSON file; PlanMoEConfigError names the file, the key and why it is refused."""
    try:
        return kind.model_validate(json.loads(path.read_text()))
    except OSError as error:
        raise PlanMoEConfigError(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"]) or "file"
        known = ", ".join(kind.model_fields)
        hint = f"; known keys: {known}" if problem["type"] == "extra_forbidden" else ""
        raise PlanMoEConfigError(f"{path}: {where}: {problem['msg'].removeprefix('Value error, ')}{hint}") from None
    except ValueError as error:
        raise PlanMoEConfigError(f"{path} is not JSON: {error}") from error
