"""How planmoe is switched on and off, and that it leaves DeepSpeed alone when off."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import MOELayer
from torch import nn

import planmoe_ds
from planmoe_ds.errors import PlanMoEConfigError
from tests.deepspeed.import_orders import train_after_imports
from tests.deepspeed.model import HIDDEN, TinyModel
from tests.deepspeed.training import (
    EXACT,
    Case,
    batch,
    difference,
    make_config,
    make_engine,
    train,
    train_engine,
    two_layers,
)
from tests.harness.ranks import RankPool

pytestmark = pytest.mark.distributed

TWO_RANKS = two_layers(k=2, ep_size=2)
DROP_IN = Case("drop-in", TWO_RANKS, make_moe=planmoe_ds.MoE)


def test_order_of_imports(ranks: RankPool) -> None:
    orders = [["planmoe_ds", "initialize"], ["initialize", "planmoe_ds"]]
    results = ranks.run(2, train_after_imports, True, per_rank_args=[(order,) for order in orders], bare=True)
    assert [is_on for is_on, _ in results] == [True, True]
    assert results[0][1] == results[1][1]


def test_imported_on_one_rank_only_and_off(ranks: RankPool) -> None:
    orders = [["planmoe_ds", "initialize"], ["initialize"]]
    results = ranks.run(2, train_after_imports, None, per_rank_args=[(order,) for order in orders], bare=True)
    assert [is_on for is_on, _ in results] == [False, False]


def train_off(section: Any) -> str:
    """How training with planmoe off differs from training without a section; the layers must be DeepSpeed's own."""
    case = Case("off", TWO_RANKS)
    expected = train(case)
    engine = make_engine(case, section)
    assert not hasattr(engine, "planmoe")
    assert [type(layer) for layer in engine.module.moe_layers()] == [MOELayer] * 2
    return difference(expected, train_engine(engine, case, case.steps), 0.0)


@pytest.mark.parametrize("section", [False, None, {"enabled": False, "chunks": 4}], ids=str)
def test_off_is_deepspeed_itself(ranks: RankPool, section: Any) -> None:
    assert ranks.run(2, train_off, section) == [""] * 2


def names_and_types(section: Any) -> None:
    """Names of parameters, the state and what isinstance says are the same with planmoe as without."""
    case = Case("names", TWO_RANKS)
    stock, engine = make_engine(case), make_engine(case, section)
    assert engine.planmoe.num_layers == 2
    assert list(engine.module.state_dict()) == list(stock.module.state_dict())
    assert [name for name, _ in engine.module.named_modules()] == [name for name, _ in stock.module.named_modules()]
    assert all(isinstance(layer, MOELayer) for layer in engine.module.moe_layers())
    assert all(isinstance(block.moe, MoE) for block in engine.module.blocks)


@pytest.mark.parametrize("section", [True, {"chunks": 4}, {}], ids=str)
def test_on_keeps_names_and_types(ranks: RankPool, section: Any) -> None:
    ranks.run(2, names_and_types, section)


def config_by_path(folder: str) -> list[str]:
    """How a config read from a file differs from a dict, as config= and as args.deepspeed_config."""
    case = Case("file", TWO_RANKS)
    path = Path(folder) / f"config{dist.get_rank()}.json"
    path.write_text(json.dumps(make_config(case, EXACT)))
    expected = train(case, EXACT)
    problems = []
    for options in ({"config": str(path)}, {"args": argparse.Namespace(deepspeed_config=str(path))}):
        engine = make_engine(case, options=options)
        assert engine.planmoe.config.chunks == 1
        problems.append(difference(expected, train_engine(engine, case, case.steps), 0.0))
    return problems


def test_config_in_a_file(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(2, config_by_path, str(tmp_path)) == [["", ""]] * 2


def train_drop_in() -> list[str]:
    """How planmoe_ds.MoE differs from DeepSpeed's MoE: with the same section, without any, and switched off."""
    stock = Case("stock", TWO_RANKS)
    on, off = make_engine(DROP_IN), make_engine(DROP_IN, planmoe=False)
    assert hasattr(on, "planmoe")
    assert not hasattr(off, "planmoe")
    return [
        difference(train(stock, EXACT), train(DROP_IN, EXACT), 0.0),
        difference(train(stock, True), train_engine(make_engine(DROP_IN), DROP_IN, DROP_IN.steps), 0.0),
        difference(train(stock), train_engine(make_engine(DROP_IN, planmoe=False), DROP_IN, DROP_IN.steps), 0.0),
    ]


def test_drop_in_layer(ranks: RankPool) -> None:
    assert ranks.run(2, train_drop_in) == [[""] * 3] * 2


def call_too_early() -> None:
    """Use the drop-in layer before anything has set it up."""
    planmoe_ds.MoE(HIDDEN, nn.Linear(HIDDEN, HIDDEN), num_experts=2)(torch.zeros(4, HIDDEN))


def test_drop_in_layer_before_initialize(ranks: RankPool) -> None:
    (outcome,) = ranks.run(1, call_too_early, expect_failure=True)
    assert outcome.error == "PlanMoEError"
    assert "deepspeed.initialize" in outcome.message


def train_without_engine() -> str:
    """How a model that never meets deepspeed.initialize differs from one that does."""
    engine = make_engine(Case("engine", TWO_RANKS))
    torch.manual_seed(0)
    model = TinyModel(TWO_RANKS, make_moe=planmoe_ds.MoE).to(engine.device)
    for block in model.blocks:
        block.moe.set_deepspeed_parallelism()
    session = planmoe_ds.activate(model, EXACT)
    assert session is not None
    assert session.num_layers == 2
    model.load_state_dict(engine.module.state_dict())
    tokens, _ = batch(engine)
    results = []
    for network in (engine.module, model):
        torch.manual_seed(5)
        loss, output = network(tokens)
        loss.backward()
        grads = {name: value.grad for name, value in network.named_parameters()}
        results.append({"loss": loss.detach(), "output": output.detach(), **grads})
    return difference(*results, 0.0)


def test_activate_says_that_it_needs_process_groups() -> None:
    with pytest.raises(PlanMoEConfigError, match=r"activate needs process groups: first call deepspeed.init_distr"):
        planmoe_ds.activate(nn.Linear(2, 2))


def test_activate_without_an_engine(ranks: RankPool) -> None:
    assert ranks.run(2, train_without_engine) == [""] * 2


def train_two_engines() -> list[str]:
    """How two engines that take turns differ from each on its own; one has planmoe, the other has not."""
    case = Case("two", TWO_RANKS, steps=2)
    alone = [train(case, EXACT), train(case)]
    engines = [make_engine(case, EXACT), make_engine(case)]
    together = []
    for engine in reversed(engines):
        torch.manual_seed(7 + dist.get_rank())
        together.insert(0, train_engine(engine, case, case.steps))
    return [difference(*pair, 0.0) for pair in zip(alone, together, strict=True)]


def test_two_engines_in_one_process(ranks: RankPool) -> None:
    assert ranks.run(2, train_two_engines) == [["", ""]] * 2


def install_again() -> bool:
    """Whether installing the hook once more leaves the engine as it was."""
    from planmoe_ds.integrations.deepspeed_hook import install

    before = deepspeed.DeepSpeedEngine._configure_distributed_model
    install(importlib.import_module("deepspeed.runtime.engine"))
    return deepspeed.DeepSpeedEngine._configure_distributed_model is before


def test_the_hook_is_installed_once(ranks: RankPool) -> None:
    assert ranks.run(1, install_again) == [True]
