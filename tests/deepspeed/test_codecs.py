"""Training through DeepSpeed with codecs by link, with "auto", and with a guard that retreats."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from planmoe_ds.recorder import Quality
from tests.deepspeed.training import Case, make_engine, train, train_engine, two_layers
from tests.harness.ranks import RankPool

pytestmark = pytest.mark.distributed

CASE = Case("codecs", two_layers(k=2, ep_size=2), steps=4)


def losses(values: dict[str, torch.Tensor]) -> list[float]:
    return [float(value) for name, value in values.items() if name.endswith(": loss")]


def train_with(section: dict[str, Any]) -> tuple[list[float], list[Quality]]:
    engine = make_engine(CASE, section)
    values = train_engine(engine, CASE, CASE.steps)
    return losses(values), engine.planmoe.recorder.take_qualities()


def train_both(section: dict[str, Any]) -> tuple[list[float], list[float], list[Quality]]:
    with_codecs, qualities = train_with(section)
    return losses(train(CASE)), with_codecs, qualities


def test_training_with_a_guard_that_retreats(ranks: RankPool) -> None:
    guard = {"interval": 2, "max_error": 0.03}  # int4 is worse, hadamard_int8 better
    section = {"compression": {"intra": "int4"}, "guard": guard}
    found = ranks.run(2, train_both, section, timeout=120)
    assert found[0][2] == found[1][2]
    for stock, guarded, qualities in found:
        assert guarded == pytest.approx(stock, rel=0.2)  # the first steps have int4
        retreats = {
            (item.layer, item.direction, item.step, item.codec, item.retreat) for item in qualities if item.retreat
        }
        assert retreats == {
            (layer, direction, 0, "int4", "hadamard_int8")
            for layer in (0, 1)
            for direction in ("dispatch", "combine", "gradients")
        }
        assert {item.codec for item in qualities if item.step == 2} == {"hadamard_int8"}


@pytest.mark.parametrize(
    "section",
    [
        {"compression": {"inter": "hadamard_int8", "intra": "none", "gradients": "int8"}, "ranks_per_node": 1},
        {"compression": "auto"},
        {"compression": "zfp:12", "comm": "pipe"},
    ],
    ids=str,
)
def test_training_with_codecs(ranks: RankPool, section: dict[str, Any]) -> None:
    for stock, lossy, _ in ranks.run(2, train_both, section, timeout=120):
        assert lossy == pytest.approx(stock, rel=0.03)


IN_BFLOAT16 = replace(CASE, config={"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}})


def waits_in_training(section: dict[str, Any]) -> set[str]:
    engine = make_engine(IN_BFLOAT16, section)
    engine.planmoe.recorder.start_trace()
    train_engine(engine, IN_BFLOAT16, 1)
    return {span.name for span in engine.planmoe.recorder.stop_trace() if span.lane == "wait"}


@pytest.mark.parametrize(
    ("link", "ranks_per_node", "agree"), [("inter", 2, False), ("inter", 1, True), ("intra", 2, True)]
)
def test_hosts_agree_where_rows_travel_that_may_be_refused(
    ranks: RankPool, link: str, ranks_per_node: int, agree: bool
) -> None:
    section = {"compression": {link: "lossless"}, "comm": "dedup", "ranks_per_node": ranks_per_node}
    for waits in ranks.run(2, waits_in_training, section, timeout=120):
        assert ("agree" in waits) is agree


def train_in_bfloat16(compression: str) -> dict[str, torch.Tensor]:
    section = {"compression": compression, "comm": "dedup", "chunks": 2, "ranks_per_node": 1}
    return train_engine(make_engine(IN_BFLOAT16, section), IN_BFLOAT16, IN_BFLOAT16.steps)


def test_e4m7_trains_as_no_codec_does(ranks: RankPool) -> None:
    with_codec, without = (ranks.run(2, train_in_bfloat16, name, timeout=120) for name in ("e4m7", "none"))
    for found, expected in zip(with_codec, without, strict=True):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
