"""A checkpoint written with planmoe loads without it, and the other way round, and training goes on the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.deepspeed.training import EXACT, Case, Values, difference, make_engine, train_engine, two_layers
from tests.harness.ranks import RankPool

pytestmark = pytest.mark.distributed

STOCK = None
STEPS = 2
ADAM = {"optimizer": {"type": "Adam", "params": {"lr": 1e-2, "torch_adam": True}}}
CASES = (
    Case("ZeRO-0", two_layers(k=2), ADAM),
    Case("ZeRO-1", two_layers(k=2, ep_size=2), {**ADAM, "zero_optimization": {"stage": 1}}),
    Case("ZeRO-2, bf16", config={**ADAM, "zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}),
)


def save_then_load(case: Case, folder: str, writer: Any, reader: Any) -> Values:
    """Two steps with `writer`, a checkpoint, two steps with `reader` from it."""
    engine = make_engine(case, writer)
    train_engine(engine, case, STEPS)
    engine.save_checkpoint(folder)
    dist.barrier()
    fresh = make_engine(case, reader)
    with torch.no_grad():
        for parameter in fresh.module.parameters():
            parameter.zero_()
    path, _ = fresh.load_checkpoint(folder)
    assert path is not None
    torch.manual_seed(70 + dist.get_rank())
    return train_engine(fresh, case, STEPS)


def compare_readers_and_writers(case: Case, folder: str) -> list[str]:
    """How each pairing of DeepSpeed alone and planmoe differs from DeepSpeed alone."""
    expected = save_then_load(case, f"{folder}/stock", STOCK, STOCK)
    pairs = {"written with": (EXACT, STOCK), "read with": (STOCK, EXACT), "both with": (EXACT, EXACT)}
    return [
        difference(expected, save_then_load(case, f"{folder}/{name}", writer, reader), 0.0)
        for name, (writer, reader) in pairs.items()
    ]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_checkpoints_of_both_are_one(ranks: RankPool, tmp_path: Any, case: Case) -> None:
    assert ranks.run(4, compare_readers_and_writers, case, str(tmp_path), timeout=120) == [[""] * 3] * 4
