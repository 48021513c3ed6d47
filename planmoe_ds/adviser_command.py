"""`planmoe plan` and `planmoe simulate`: the adviser's predictions as a table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from planmoe_ds.adviser import Advice, advise
from planmoe_ds.costs import ClusterCosts
from planmoe_ds.errors import PlanMoEConfigError
from planmoe_ds.execution import load_routing
from planmoe_ds.shapes import ClusterShape, ModelShape, load_shape


def run(
    model: Path, cluster: Path, links: Path | None = None, trace: Path | None = None, *, lossy: bool, as_json: bool
) -> int:
    """Predict and print; returns the exit code.

    links: what `planmoe probe` measured, instead of the cluster's rates; trace: what save_trace() wrote, for the load.
    """
    try:
        shape = load_shape(model, ModelShape)
        if trace is not None:
            shape = ModelShape.model_validate({**shape.model_dump(), "load": load_routing(trace)})
        place = load_shape(cluster, ClusterShape)
        costs = None if links is None else load_shape(links, ClusterCosts)
        _check_same_cluster(place, costs, links)
        advice = advise(shape, place, lossy=lossy, costs=costs)
    except ValidationError as error:
        print(f"planmoe: {trace}: {error.errors()[0]['msg'].removeprefix('Value error, ')}", file=sys.stderr)
        return 2
    except (PlanMoEConfigError, ValueError) as error:
        print(f"planmoe: {error}", file=sys.stderr)
        return 2
    if as_json:
        print(json.dumps(as_dict(advice, shape)))
    else:
        print_advice(advice, shape, place, Console())
    return 0


def _check_same_cluster(cluster: ClusterShape, costs: ClusterCosts | None, links: Path | None) -> None:
    if costs is not None and tuple(costs.node_of_rank) != cluster.topology().node_of_rank:
        raise PlanMoEConfigError(
            f"{links} was measured on {len(set(costs.node_of_rank))} nodes with {len(costs.node_of_rank)} ranks, the "
            f"cluster has {cluster.num_nodes} nodes with {cluster.num_nodes * cluster.gpus_per_node}: measure there"
        )


def as_dict(advice: Advice, model: ModelShape) -> dict[str, object]:
    """What a program wants to know."""
    return {
        "planmoe": vars(advice.chosen.features),
        "layer_seconds": advice.chosen.seconds,
        "baseline_seconds": advice.baseline.seconds,
        "bound_seconds": advice.chosen.bound,
        "expert_seconds": advice.chosen.expert_seconds,
        "step_seconds_in_moe_layers": advice.chosen.seconds * model.num_moe_layers,
        "reasons": advice.reasons,
        "predictions": [
            {**vars(prediction.features), "seconds": prediction.seconds, "bound": prediction.bound}
            for prediction in advice.predictions
        ],
    }


def print_advice(advice: Advice, model: ModelShape, cluster: ClusterShape, console: Console) -> None:
    """A row per combination that was looked at, the choice and why."""
    title = f"one layer, forward and backward, {cluster.num_nodes} nodes of {cluster.gpus_per_node} GPUs"
    table = Table(title=title, title_justify="left")
    for heading in ("all-to-all", "codec", "chunks", "order", "ms", "bound", "against direct"):
        table.add_column(heading, justify="left" if heading in ("all-to-all", "codec", "order") else "right")
    for prediction in sorted(advice.predictions, key=lambda prediction: prediction.seconds):
        features = prediction.features
        table.add_row(
            features.comm, features.compression, str(features.chunks), features.scheduler,
            f"{prediction.seconds * 1e3:.2f}", f"{prediction.bound * 1e3:.2f}",
            f"{advice.baseline.seconds / prediction.seconds:.2f}x",
        )  # fmt: skip
    console.print(table)
    for reason in advice.reasons:
        console.print(reason, highlight=False, soft_wrap=True)
    step = advice.chosen.seconds * model.num_moe_layers * 1e3
    console.print(
        f"{model.num_moe_layers} layers: {step:.1f} ms per step; the experts alone "
        f"{advice.chosen.expert_seconds * model.num_moe_layers * 1e3:.1f} ms",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f'"planmoe": {json.dumps(vars(advice.chosen.features))}', highlight=False, soft_wrap=True)
