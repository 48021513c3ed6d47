"""A model and a cluster as the adviser sees them: validated sections of JSON files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from planmoe_ds.costs import ClusterCosts, LinkCost
from planmoe_ds.errors import PlanMoEConfigError, first_problem
from planmoe_ds.topology import Topology

_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelShape(_Section):
    """What the adviser has to know of a model.

    `load`: tokens that every expert of a recorded batch got; `expert_parallel_size`: ranks that share a layer's
    experts, all of the cluster by default.
    """

    tokens_per_rank: _Count = 4096
    hidden_size: _Count = 2048
    inner_size: _Count = 8192
    num_experts: _Count = 64
    top_k: _Count = 2
    num_moe_layers: _Count = 1
    bytes_per_value: _Count = 2
    load: tuple[float, ...] | None = None
    expert_parallel_size: _Count | None = None

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
    """A cluster that need not exist: rates per GPU inside a node and per node between nodes, each way.

    The links inside a node are NVLink between H200s, the codecs an H200's, as measured (docs/benchmarks.md).
    """

    num_nodes: _Count = 2
    gpus_per_node: _Count = 8
    intra_gigabytes_per_second: _Positive = 300.0
    inter_gigabits_per_second: _Positive = 100.0
    intra_microseconds: _Positive = 100.0
    inter_microseconds: _Positive = 30.0
    teraflops: _Positive = 150.0  # of an expert's GEMMs, per GPU
    codec_gigabytes_per_second: _Positive = 2500.0  # of values read or written

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

    @property
    def num_gpus(self) -> int:
        """On all nodes."""
        return self.num_nodes * self.gpus_per_node


def _link(microseconds: float, seconds_per_byte: float) -> LinkCost:
    return LinkCost(alpha_seconds=microseconds * 1e-6, beta_seconds_per_byte=seconds_per_byte, worst_error=0.0)


_Model = TypeVar("_Model", bound=BaseModel)


def load_shape(path: Path, kind: type[_Model]) -> _Model:
    """A shape or measured costs from a JSON file; PlanMoEConfigError names the file, the key and why it is refused."""
    try:
        return kind.model_validate(json.loads(path.read_text()))
    except OSError as error:
        raise PlanMoEConfigError(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        is_unknown = error.errors()[0]["type"] == "extra_forbidden"
        hint = f"; known keys: {', '.join(kind.model_fields)}" if is_unknown else ""
        raise PlanMoEConfigError(f"{path}: {first_problem(error)}{hint}") from None
    except ValueError as error:
        raise PlanMoEConfigError(f"{path} is not JSON: {error}") from error
