"""Stored costs: what is written comes back, and everything else is refused with the reason."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from planmoe_ds.scheduling.stored import StoredPlanError, load_plan, save_plan
from tests.scheduling.instances import random_chunks

CLUSTER = {"first host": "a", "nodes of the ranks": "0, 1"}
MODEL = {"hidden size": "96", "experts": "8", "top-k": "2"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    rng = random.Random(1)
    forward, backward = (random_chunks(rng, 3, backward=backward) for backward in (False, True))
    save_plan(tmp_path / "deep" / "plan.json", CLUSTER, MODEL, forward, backward)
    return tmp_path / "deep" / "plan.json"


def test_what_is_written_comes_back(path: Path) -> None:
    rng = random.Random(1)
    forward, backward = (random_chunks(rng, 3, backward=backward) for backward in (False, True))
    plan = load_plan(path, CLUSTER, MODEL, 3)
    assert plan is not None
    assert plan.costs(3) == (forward, backward)
    save_plan(path, CLUSTER, MODEL, forward, None)
    plan = load_plan(path, CLUSTER, MODEL)
    assert plan is not None
    assert plan.costs(3) == (forward, None)
    assert [file.name for file in path.parent.iterdir()] == ["plan.json"]


def test_no_plan(tmp_path: Path) -> None:
    assert load_plan(tmp_path / "plan.json", CLUSTER, MODEL) is None


@pytest.mark.parametrize(("name", "value"), [("hidden size", "128"), ("experts", "64"), ("top-k", "8")])
def test_plans_of_other_models_are_refused(path: Path, name: str, value: str) -> None:
    with pytest.raises(StoredPlanError, match=f"for another model: {name} is {value} and was {MODEL[name]}: delete"):
        load_plan(path, CLUSTER, {**MODEL, name: value})
    with pytest.raises(StoredPlanError, match="codecs is int8 and was not known"):
        load_plan(path, CLUSTER, {**MODEL, "codecs": "int8"})


def test_plans_of_other_clusters_are_refused(path: Path) -> None:
    with pytest.raises(StoredPlanError, match=r"another cluster: nodes of the ranks is 0, 0 and was 0, 1: delete"):
        load_plan(path, {**CLUSTER, "nodes of the ranks": "0, 0"}, MODEL)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 1}, "version"),
        ({"forward": []}, "forward"),
        ({"forward": [{"encode": 1}]}, "not the costs of a chunk"),
        ({"extra": 1}, "extra"),
        ({"cluster": None}, "cluster"),
    ],
)
def test_damaged_plans_are_refused(path: Path, change: dict[str, Any], words: str) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(StoredPlanError, match=words):
        load_plan(path, CLUSTER, MODEL, 3)
    path.write_text(path.read_text().replace("{", "[", 1))
    with pytest.raises(StoredPlanError, match="cannot be used"):
        load_plan(path, CLUSTER, MODEL, 3)


def test_negative_costs_are_refused(path: Path) -> None:
    content = json.loads(path.read_text())
    content["forward"][1]["expert"] = -1.0
    path.write_text(json.dumps(content))
    with pytest.raises(StoredPlanError, match=r"chunk 1: expert takes -1.0 seconds"):
        load_plan(path, CLUSTER, MODEL, 3)
