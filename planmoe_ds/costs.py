"""What moving bytes costs on a cluster's links: the alpha-beta model, its fit to measurements, and their cache."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from planmoe_ds.errors import first_problem
from planmoe_ds.topology import LinkClass, Topology

_Finite = Field(allow_inf_nan=False)
_SETTINGS = ("NCCL_", "GLOO_", "CUDA_DEVICE_MAX_CONNECTIONS")  # beginnings of variables that links' costs depend on
_NO_SETTINGS = ("NCCL_DEBUG", "NCCL_COMM_ID", "NCCL_TOPO_DUMP", "NCCL_GRAPH_DUMP")  # but not on these


class StaleCacheError(ValueError):
    """A cache file that cannot be used; the message names the file and why."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class LinkCost(_Record):
    """Seconds of an exchange over one class of links: alpha + beta * bytes that its busiest rank sends there."""

    alpha_seconds: Annotated[float, _Finite, Field(ge=0)]
    beta_seconds_per_byte: Annotated[float, _Finite, Field(gt=0)]
    worst_error: Annotated[float, _Finite, Field(ge=0)]  # largest |fit - measured| / measured

    def seconds(self, num_bytes: float) -> float:
        """Predicted duration; nothing to send takes no time."""
        return self.alpha_seconds + self.beta_seconds_per_byte * num_bytes if num_bytes > 0 else 0.0


class ClusterCosts(_Record):
    """Costs of both classes of links, each class alone and with the other busy; None: no such links here.

    `direct_overlap`: how much of the shorter class's time a single exchange over both classes hides (1: all of it).
    """

    version: Literal[1] = 1
    fingerprint: str
    backend: str
    node_of_rank: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    intra: LinkCost | None
    inter: LinkCost | None
    intra_while_both: LinkCost | None
    inter_while_both: LinkCost | None
    direct_overlap: Annotated[float, _Finite, Field(ge=0, le=1)] | None

    @model_validator(mode="after")
    def _complete(self) -> ClusterCosts:
        topology = Topology(tuple(self.node_of_rank))
        has = {link: topology.has(link) for link in LinkClass}
        both = all(has.values())
        for name, expected in (
            ("intra", has[LinkClass.INTRA]),
            ("inter", has[LinkClass.INTER]),
            ("intra_while_both", both),
            ("inter_while_both", both),
            ("direct_overlap", both),
        ):
            if (getattr(self, name) is not None) != expected:
                wanted = "given" if expected else "null"
                raise ValueError(f"{name} must be {wanted} for {topology.describe()}")
        return self


def fit_link_cost(num_bytes: Sequence[float], seconds: Sequence[float]) -> LinkCost:
    """Weighted least squares over exchanges of several sizes; alpha is not negative.

    Raises ValueError unless there are two different sizes and every number is positive.
    """
    if len(num_bytes) != len(seconds) or len(set(num_bytes)) < 2:
        raise ValueError(f"a fit needs two different sizes or more, got {len(set(num_bytes))}")
    if min(*num_bytes, *seconds) <= 0:
        raise ValueError(f"sizes and times must be positive, got {list(num_bytes)} bytes in {list(seconds)} s")
    # Errors weigh 1 / time: absolute ones would let the largest exchange alone speak, relative ones the smallest.
    xx, xy, yy, x1, y1 = (
        sum(size**power / time * time**with_time for size, time in zip(num_bytes, seconds, strict=True))
        for power, with_time in ((2, 0), (1, 0), (0, 0), (1, 1), (0, 1))
    )
    determinant = xx * yy - xy * xy
    alpha, beta = (xx * y1 - xy * x1) / determinant, (yy * x1 - xy * y1) / determinant
    if alpha < 0:
        alpha, beta = 0.0, x1 / xx
    if beta <= 0:  # times that do not grow: no more than the largest exchange says
        alpha, beta = 0.0, max(time / size for size, time in zip(num_bytes, seconds, strict=True))
    worst = max(abs((alpha + beta * size) / time - 1) for size, time in zip(num_bytes, seconds, strict=True))
    return LinkCost(alpha_seconds=alpha, beta_seconds_per_byte=beta, worst_error=worst)


def network_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that decide which links, and how much of them, NCCL and gloo use."""
    chosen = sorted(name for name in environment if name.startswith(_SETTINGS) and not name.startswith(_NO_SETTINGS))
    return {name: environment[name] for name in chosen}


def fingerprint(
    hostnames: Sequence[str],
    topology: Topology,
    backend: str,
    device: str,
    settings: Sequence[Mapping[str, str]] = (),
) -> str:
    """Sixteen hexadecimal digits that change with what costs depend on.

    The hosts, the ranks' places on them, the backend, the device, and every rank's network_settings.
    """
    facts = [list(hostnames), list(topology.node_of_rank), backend, device, [dict(each) for each in settings]]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def cache_path(mark: str, environment: Mapping[str, str]) -> Path:
    """Where the costs of the cluster with this fingerprint are kept: the user's XDG cache folder."""
    folder = environment.get("XDG_CACHE_HOME", "")
    root = Path(folder) if Path(folder).is_absolute() else Path.home() / ".cache"
    return root / "planmoe" / f"links-{mark}.json"


def load_costs(path: Path, mark: str) -> ClusterCosts | None:
    """The costs kept at `path`, None when there are none; StaleCacheError says why a file cannot be used."""
    try:
        content: Any = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StaleCacheError(f"{path} cannot be read: {error}") from error
    try:
        costs = ClusterCosts.model_validate(content)
    except ValidationError as error:
        raise StaleCacheError(f"{path}: {first_problem(error)}") from None
    if costs.fingerprint != mark:
        raise StaleCacheError(f"{path}: fingerprint {costs.fingerprint}, this cluster's is {mark}")
    return costs


def save_costs(costs: ClusterCosts, path: Path) -> None:
    """Write whole or not at all; OSError when the folder cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # in the same file system: the rename is atomic
        draft = Path(folder) / path.name
        draft.write_text(costs.model_dump_json(indent=1))
        draft.replace(path)
