"""Stored costs: what is written comes back, and everything else is refused with the reason."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from planmoe_ds.scheduling.stored import StoredPlanError, load_plan, save_plan
from tests.scheduling.instances import random_chunks


@pytest.fixture
def path(tmp_path: Path) -> Path:
    rng = random.Random(1)
    forward, backward = (random_chunks(rng, 3, backward=backward) for backward in (False, True))
    save_plan(tmp_path / "deep" / "plan.json", "two nodes", "gpt", forward, backward)
    return tmp_path / "deep" / "plan.json"


def test_what_is_written_comes_back(path: Path) -> None:
    rng = random.Random(1)
    forward, backward = (random_chunks(rng, 3, backward=backward) for backward in (False, True))
    plan = load_plan(path, "two nodes", "gpt", 3)
    assert plan is not None
    assert plan.costs(3) == (forward, backward)
    save_plan(path, "two nodes", "gpt", forward, None)
    plan = load_plan(path, "two nodes", "gpt", 3)
    assert plan is not None
    assert plan.costs(3) == (forward, None)
    assert [file.name for file in path.parent.iterdir()] == ["plan.json"]


def test_no_plan(tmp_path: Path) -> None:
    assert load_plan(tmp_path / "plan.json", "two nodes", "gpt", 3) is None


def test_plans_of_others_are_refused(path: Path) -> None:
    with pytest.raises(StoredPlanError, match="plan for cluster 'two nodes', this is 'three nodes'"):
        load_plan(path, "three nodes", "gpt", 3)
    with pytest.raises(StoredPlanError, match="plan for model 'gpt', this is 'bert'"):
        load_plan(path, "two nodes", "bert", 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "version"),
        ({"forward": []}, "forward"),
        ({"forward": [{"encode": 1}]}, "not the costs of a chunk"),
        ({"extra": 1}, "extra"),
        ({"cluster": None}, "cluster"),
    ],
)
def test_damaged_plans_are_refused(path: Path, change: dict[str, Any], words: str) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(StoredPlanError, match=words):
        load_plan(path, "two nodes", "gpt", 3)
    path.write_text(path.read_text().replace("{", "[", 1))
    with pytest.raises(StoredPlanError, match="cannot be used"):
        load_plan(path, "two nodes", "gpt", 3)


def test_negative_costs_are_refused(path: Path) -> None:
    content = json.loads(path.read_text())
    content["forward"][1]["expert"] = -1.0
    path.write_text(json.dumps(content))
    with pytest.raises(StoredPlanError, match=r"chunk 1: expert takes -1.0 seconds"):
        load_plan(path, "two nodes", "gpt", 3)
