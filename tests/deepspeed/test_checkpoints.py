"""A checkpoint written with planmoe loads without it, and the other way round, and training goes on the same."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

import planmoe_ds.watchdog as watchdog_module
from planmoe_ds.errors import PlanMoEConfigError, PlanMoEError
from planmoe_ds.stopping import Reason
from tests.deepspeed.model import TinyModel, tell_experts_apart
from tests.deepspeed.training import EXACT, Case, Values, batch, difference, make_engine, train_engine, two_layers
from tests.faults.layers import die, seconds_until_error
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


def save_after_a_fault(folder: str) -> tuple[str, list[str]]:
    """What save_checkpoint raises once a reason to stop is known, and the files that it left."""
    engine = make_engine(CASES[0], EXACT)
    group = next(layer.planmoe.group for layer in engine.module.modules() if hasattr(layer, "planmoe"))
    group.watchdog._monitor.reason = Reason(1, "error", "rank 1 was not heard of")
    with pytest.raises(PlanMoEError) as caught:
        engine.save_checkpoint(folder)
    return str(caught.value), [path.name for path in Path(folder).iterdir()]


def test_weights_that_may_come_from_ended_exchanges_are_not_saved(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(4, save_after_a_fault, str(tmp_path)) == [("rank 1 was not heard of", [])] * 4


def save_after_a_death(folder: str) -> tuple[str, list[str]]:
    """The same where rank 1 died in its second exchange; on GPUs the others' hosts run ahead and save at once."""
    with patch.object(watchdog_module, "SILENCE_SECONDS", 5.0):
        engine = make_engine(CASES[0], EXACT)
        comm = type(next(layer.planmoe.group.comm for layer in engine.module.modules() if hasattr(layer, "planmoe")))
        dispatch, numbers = comm.dispatch, count(1)

        def start_and_die(self: Any, *arguments: Any) -> Any:
            exchange = dispatch(self, *arguments)
            if dist.get_rank() == 1 and next(numbers) == 2:
                die()
            return exchange

        with patch.object(comm, "dispatch", start_and_die):
            seconds_until_error(lambda: engine(*batch(engine)))
        with pytest.raises(PlanMoEError) as caught:
            engine.save_checkpoint(folder)
    return str(caught.value), [path.name for path in Path(folder).iterdir()]


def test_weights_are_not_saved_after_a_rank_died(ranks: RankPool, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    if pytestconfig.getoption("--backend") == "nccl":
        pytest.skip(
            "a rank that is killed under CUDA's MPS takes all along: tests/faults/test_on_gpus.py has this test"
        )
    outcomes = ranks.run(4, save_after_a_death, str(tmp_path), expect_failure=True, fresh=True, timeout=60)
    for outcome in outcomes:
        if outcome.rank != 1:
            message, files = outcome.result
            assert "rank 1 " in message.splitlines()[0], message
            assert files == []


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


def load_with_another_size(config: dict[str, Any], folder: str, options: dict[str, Any]) -> list[str]:
    """A checkpoint of expert-parallel size 2 into engines of size 4: what load_checkpoint says, what it leaves."""
    two = Case("", two_layers(k=2, ep_size=2), config, prepare=shift)
    four = Case("", two_layers(k=2, ep_size=4), config)
    engine = make_engine(two, EXACT)
    train_engine(engine, two, 1)
    engine.save_checkpoint(folder, tag="first")
    dist.barrier()
    written = all_experts(engine, 2)
    fresh = make_engine(four, EXACT)
    try:
        fresh.load_checkpoint(folder, **options)
    except PlanMoEConfigError as error:
        return [str(error)]
    train_engine(fresh, four, 1)  # the optimizer's own copies of the weights must be the loaded ones
    moved = all_experts(fresh, 4)
    far = [name for name, value in written.items() if (moved[name] - value).abs().max() > 0.05]
    return [] if written.keys() == moved.keys() and not far else [f"not as written: {far}"]


def shift(model: TinyModel) -> None:
    """Weights that no fresh model has."""
    tell_experts_apart(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)


def all_experts(engine: Any, ep_size: int) -> Values:
    """Every expert's parameters by layer and number, on every rank."""
    mine: Values = {}
    for index, layer in enumerate(engine.module.moe_layers()):
        for local, expert in enumerate(layer.experts.deepspeed_experts):
            number = dist.get_rank() % ep_size * layer.num_local_experts + local
            for name, parameter in expert.named_parameters():
                mine[f"{index}.{number}.{name}"] = parameter.detach().clone()
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, mine)
    return {name: value for part in everybody for name, value in part.items()}


@pytest.mark.parametrize("stage", [0, 1])
def test_another_expert_parallel_size_is_refused_by_name(ranks: RankPool, tmp_path: Any, stage: int) -> None:
    config = {**ADAM, "zero_optimization": {"stage": stage}}
    for printed in ranks.run(4, load_with_another_size, config, str(tmp_path), {}, timeout=120):
        assert len(printed) == 1
        for words in (f"in {tmp_path}/first", "size 2, this run has 4", "load_module_only=True"):
            assert words in printed[0]


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("option", [{"load_module_only": True}, {"load_optimizer_states": False}], ids=str)
def test_weights_alone_load_with_another_size(
    ranks: RankPool, tmp_path: Any, stage: int, option: dict[str, bool]
) -> None:
    config = {**ADAM, "zero_optimization": {"stage": stage}}
    assert ranks.run(4, load_with_another_size, config, str(tmp_path), option, timeout=120) == [[]] * 4
