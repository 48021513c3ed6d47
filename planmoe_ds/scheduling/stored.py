"""Costs that were learnt, kept as JSON for the next run on the same cluster with the same model."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from planmoe_ds.errors import first_problem
from planmoe_ds.scheduling.graph import ChunkCosts, ExchangeCosts, layer_graph

_ADVICE = "delete it, or name another folder"


class StoredPlanError(ValueError):
    """A stored plan that cannot be used; the message names the file and why."""


class StoredPlan(BaseModel):
    """Costs of a layer's chunks; `cluster`, `model`: what they were measured on, name by name compared word by word."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[3] = 3
    cluster: dict[str, str]
    model: dict[str, str]
    forward: Annotated[tuple[dict[str, Any], ...], Field(min_length=1)]
    backward: tuple[dict[str, Any], ...] | None

    def costs(self, num_chunks: int | None = None) -> tuple[list[ChunkCosts], list[ChunkCosts] | None]:
        """As the planner learnt them; ValueError for costs that no task has, or not of the number of chunks named."""
        forward = _read(self.forward)
        backward = None if self.backward is None else _read(self.backward)
        lengths = {len(forward), len(backward or forward)}
        wanted = len(forward) if num_chunks is None else num_chunks
        if lengths != {wanted}:
            raise ValueError(f"it has costs of {max(lengths)} chunks instead of {wanted}")
        timed = [chunk.weights is not None for chunk in forward], [chunk.weights is None for chunk in backward or ()]
        if any(timed[0] + timed[1]):
            raise ValueError("weight gradients take time backward, in every chunk, and only there")
        return forward, backward


def _exchanges(chunk: dict[str, Any]) -> dict[str, Any]:
    """A chunk's fields with its exchanges as ExchangeCosts."""
    return {name: ExchangeCosts(**value) if isinstance(value, dict) else value for name, value in chunk.items()}


def _read(chunks: tuple[dict[str, Any], ...]) -> list[ChunkCosts]:
    try:
        found = [ChunkCosts(**_exchanges(chunk)) for chunk in chunks]
        layer_graph(found)
    except TypeError as error:
        raise ValueError(f"not the costs of a chunk: {error}") from None
    return found


def save_plan(
    path: Path,
    cluster: Mapping[str, str],
    model: Mapping[str, str],
    forward: list[ChunkCosts],
    backward: list[ChunkCosts] | None,
) -> None:
    """Write whole or not at all; OSError when the folder cannot be written."""
    plan = StoredPlan(
        cluster=dict(cluster),
        model=dict(model),
        forward=tuple(map(asdict, forward)),
        backward=None if backward is None else tuple(map(asdict, backward)),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # in the same file system: the rename is atomic
        draft = Path(folder) / path.name
        draft.write_text(json.dumps(plan.model_dump(), indent=1))
        draft.replace(path)


def load_plan(
    path: Path, cluster: Mapping[str, str], model: Mapping[str, str], num_chunks: int | None = None
) -> StoredPlan | None:
    """The plan kept at `path`, for so many chunks if any number is named; None without one.

    StoredPlanError says why a file cannot be used: not a plan, or one of another cluster or model.
    """
    try:
        plan = StoredPlan.model_validate(json.loads(path.read_text()))
        plan.costs(num_chunks)
    except FileNotFoundError:
        return None
    except RecursionError:
        raise StoredPlanError(f"{path} cannot be used: it is nested too deeply for a plan: {_ADVICE}") from None
    except ValidationError as error:
        raise StoredPlanError(f"{path}: {first_problem(error)}: {_ADVICE}") from None
    except (OSError, ValueError) as error:
        raise StoredPlanError(f"{path} cannot be used: {error}: {_ADVICE}") from error
    for what, stored, wanted in (("cluster", plan.cluster, cluster), ("model", plan.model, model)):
        differences = [
            f"{name} is {wanted.get(name, 'not known')} and was {stored.get(name, 'not known')}"
            for name in {**stored, **wanted}
            if stored.get(name) != wanted.get(name)
        ]
        if differences:
            raise StoredPlanError(f"{path} is a plan for another {what}: {'; '.join(differences)}: {_ADVICE}")
    return plan
