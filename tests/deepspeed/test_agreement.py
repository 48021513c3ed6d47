"""Ranks that were told different things all stop at the start, with one sentence that names the ranks and the key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from tests.deepspeed.training import Case, make_engine, two_layers
from tests.harness.ranks import RankPool

pytestmark = pytest.mark.distributed

ODD_RANK = 2
COMMON = {"chunks": 2, "comm": "pipe"}
PATIENCE_SECONDS = 30


@dataclass(frozen=True)
class Disagreement:
    """What rank 2 is told differently, and what the message must name besides the ranks."""

    key: str
    section: Any = None  # instead of COMMON
    config: Mapping[str, Any] = field(default_factory=dict)
    layers: tuple[Mapping[str, Any], ...] = two_layers(k=2)

    def __str__(self) -> str:
        return f"{self.key}: {self.section or dict(self.config) or self.layers[-1]}"


DISAGREEMENTS = (
    Disagreement("planmoe.chunks", {**COMMON, "chunks": 4}),
    Disagreement("planmoe.comm", {**COMMON, "comm": "direct"}),
    Disagreement("planmoe.compression", {**COMMON, "compression": "int8"}),
    Disagreement("planmoe.compression", {**COMMON, "compression": {"gradients": "int8"}}),
    Disagreement("planmoe.chunk_by", {**COMMON, "chunk_by": "expert"}),
    Disagreement("planmoe.exactness", {**COMMON, "exactness": "exact"}),
    Disagreement("planmoe.ranks_per_node", {**COMMON, "ranks_per_node": 2}),
    Disagreement("planmoe.enabled", section=False),
    Disagreement("planmoe.enabled", {**COMMON, "enabled": False}),
    Disagreement("gradient_accumulation_steps", config={"gradient_accumulation_steps": 2}),
    Disagreement("train_micro_batch_size_per_gpu", config={"train_micro_batch_size_per_gpu": 2}),
    Disagreement("zero_optimization.stage", config={"zero_optimization": {"stage": 1}}),
    Disagreement("bf16.enabled", config={"bf16": {"enabled": True}}),
    Disagreement("top-1", layers=two_layers(k=1)),
    Disagreement("capacity factor 2.0", layers=two_layers(k=2, capacity_factor=2.0)),
    Disagreement("drop_tokens False", layers=two_layers(k=2, drop_tokens=False)),
    Disagreement("hidden size", layers=({"k": 2, "ep_size": 4}, {"k": 2, "ep_size": 4, "hidden_size": 16})),
    Disagreement("4 experts", layers=two_layers(k=2, num_experts=4)),
    Disagreement("1 MoE layers", layers=two_layers(k=2)[:1]),
)
INVALID = (
    ("chunks = 0", {"chunks": 0}),
    ("chunkz", {"chunkz": 2}),
    ("planmoe", "yes please"),
    ("zip", {"compression": "zip"}),
)


def start(case: Case, section: Any) -> None:
    """Everything up to the first step."""
    make_engine(case, section)


def start_with_odd_rank(ranks: RankPool, odd: Disagreement) -> list[Any]:
    """Start four ranks, one of them with `odd`; returns their outcomes."""
    usual = Case("usual"), COMMON
    section = COMMON if odd.section is None else odd.section
    different = replace(usual[0], config=odd.config, layers=odd.layers), section
    arguments = [different if rank == ODD_RANK else usual for rank in range(4)]
    return ranks.run(4, start, per_rank_args=arguments, expect_failure=True, timeout=PATIENCE_SECONDS)


@pytest.mark.parametrize("odd", DISAGREEMENTS, ids=str)
def test_every_rank_names_the_ranks_and_the_key(ranks: RankPool, odd: Disagreement) -> None:
    outcomes = start_with_odd_rank(ranks, odd)
    assert [outcome.error for outcome in outcomes] == ["PlanMoEMismatchError"] * 4
    assert len({outcome.message for outcome in outcomes}) == 1
    message = outcomes[0].message
    assert odd.key in message
    assert "[0, 1, 3]" in message
    assert f"[{ODD_RANK}]" in message


@pytest.mark.parametrize(("key", "section"), INVALID, ids=[key for key, _ in INVALID])
def test_an_invalid_section_on_one_rank_stops_all(ranks: RankPool, key: str, section: Any) -> None:
    outcomes = start_with_odd_rank(ranks, Disagreement(key, section))
    errors = ["PlanMoEMismatchError"] * 4
    errors[ODD_RANK] = "PlanMoEConfigError"
    assert [outcome.error for outcome in outcomes] == errors
    assert all(key in outcome.message for outcome in outcomes)
    assert all(f"rank {ODD_RANK}" in outcome.message for outcome in outcomes if outcome.rank != ODD_RANK)


@pytest.mark.parametrize("section", [{"chunks": 0}, {"comm": "pip"}], ids=str)
def test_an_invalid_section_everywhere_is_a_config_error(ranks: RankPool, section: Any) -> None:
    outcomes = ranks.run(2, start, Case("wrong", two_layers(ep_size=2)), section, expect_failure=True)
    assert [outcome.error for outcome in outcomes] == ["PlanMoEConfigError"] * 2
    assert all(next(iter(section)) in outcome.message for outcome in outcomes)
