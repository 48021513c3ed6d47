"""Ranks that do different things: one PlanMoEMismatchError on every rank, naming who has what."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

import planmoe_ds.layer as layer_module
from planmoe_ds.tensor_parallel import TensorParallelSplit
from tests.engine.support import drop_groups, rank_device, routes_of, run_layer
from tests.faults.layers import HIDDEN, NUM_EXPERTS, Model, batch, in_backward, notice, seconds_until_error
from tests.harness.ranks import RankPool

pytestmark = pytest.mark.distributed

ODD = 2  # the rank that does something else
SECONDS = 8.0


def skip_a_layer(model: Model) -> None:
    tokens, experts = batch()
    if dist.get_rank() == ODD:
        model.layer(1, tokens, experts)
    else:
        model.forward(tokens, experts)


def swap_layers(model: Model) -> None:
    tokens, experts = batch()
    order = (1, 0) if dist.get_rank() == ODD else (0, 1)
    for index in order:
        model.layer(index, tokens, experts)


def evaluate_alone(model: Model) -> None:
    tokens, experts = batch()
    with torch.set_grad_enabled(dist.get_rank() != ODD):
        model.forward(tokens, experts)


def evaluate_before_backward(model: Model) -> None:
    tokens, experts = batch()
    output = model.forward(tokens, experts)
    if dist.get_rank() == ODD:
        with torch.no_grad():
            model.forward(tokens, experts)
    output.sum().backward()


def call_once_more(model: Model) -> None:
    tokens, experts = batch()
    model.layer(0, tokens, experts)
    if dist.get_rank() == ODD:
        model.layers[0]._num_calls += 1
    model.layer(0, tokens, experts)


def another_top_k(model: Model) -> None:
    model.forward(*batch(top_k=3 if dist.get_rank() == ODD else 2))


def another_number_of_chunks(model: Model) -> None:
    layer = model.layers[0]
    layer.group.__dict__["counts_width"] = 128  # activate() makes it wide enough for any number of chunks
    if dist.get_rank() == ODD:
        model.layers[0] = dataclasses.replace(layer, config=layer.config.model_copy(update={"chunks": 3}))
    model.layer(0, *batch())


def another_dtype(model: Model) -> None:
    tokens, experts = batch()
    if dist.get_rank() == ODD:
        tokens = tokens.detach().bfloat16()
    model.layer(0, tokens, experts)


def another_hidden_size(model: Model) -> None:
    tokens, experts = batch()
    if dist.get_rank() == ODD:
        tokens = torch.cat([tokens, tokens], dim=1)
    model.layer(0, tokens, experts)


def another_config(model: Model) -> None:
    if dist.get_rank() == ODD:
        model.layers[0].config = model.layers[0].config.model_copy(update={"timeout_seconds": 31.0})
    model.forward(*batch())


def another_version(model: Model) -> None:
    with patch.object(layer_module, "__version__", "9.9" if dist.get_rank() == ODD else "0.1.0"):
        model.forward(*batch())


def another_job(model: Model) -> None:
    if dist.get_rank() == ODD:
        model.layers[0].group.__dict__["job"] ^= 1
    model.forward(*batch())


def other_routes_of_a_tensor_parallel_rank(model: Model) -> None:
    """As many rows, but not for the same tokens."""
    group = model.layers[0].group
    routes = routes_of(torch.tensor([[0, 1, 2, 3]]).roll(int(dist.get_rank() == ODD), 1).to(rank_device()), NUM_EXPERTS)
    TensorParallelSplit(group, layer=0).check_alike(routes)


CASES: dict[Any, list[str]] = {
    skip_a_layer: ["disagree on the layer they are in: rank 0: 0; rank 1: 0; rank 2: 1; rank 3: 0", "same order"],
    swap_layers: ["disagree on the layer they are in: rank 0: 0; rank 1: 0; rank 2: 1; rank 3: 0"],
    evaluate_alone: ["disagree on what they do", "rank 2: without gradients; rank 3: with gradients"],
    evaluate_before_backward: ["rank 2 waits in layer 0 forward, plan", "layer 1 backward, dispatch of chunk 0"],
    call_once_more: ["how often they called the layer: rank 0: 1; rank 1: 1; rank 2: 2; rank 3: 1"],
    another_top_k: ["disagree on routes_per_token: rank 0: 2; rank 1: 2; rank 2: 3; rank 3: 2"],
    another_number_of_chunks: ["disagree on num_chunks: rank 0: 2; rank 1: 2; rank 2: 3; rank 3: 2"],
    other_routes_of_a_tensor_parallel_rank: ["one way on ranks [0, 1, 3]; one way on ranks [2]", "the same batch"],
    another_dtype: ["disagree on dtype: rank 0: float32; rank 1: float32; rank 2: bfloat16; rank 3: float32"],
    another_hidden_size: [f"disagree on hidden_size: rank 0: {HIDDEN}; rank 1: {HIDDEN}; rank 2: {2 * HIDDEN}"],
    another_config: ["disagree on planmoe's settings or version: rank 0: digest", "Install one planmoe_ds everywhere"],
    another_job: ["disagree on the job they belong to: rank 0: ", "Give every job a store of its own"],
    another_version: ["disagree on planmoe's settings or version: rank 0: digest"],
}


Found = tuple[float, str, str]  # seconds, class, message


def run_case(case: Any, settings: dict[str, object]) -> Found:
    """One case, in processes of its own."""
    model = Model(settings)
    dist.barrier()
    return seconds_until_error(lambda: (case(model), notice(model)))


def run_cases(settings: dict[str, object]) -> dict[str, Found]:
    """Every case, one after the other: a job's other groups go on working after one met an error."""
    found = {}
    for case in CASES:
        found[case.__name__] = run_case(case, settings)
        dist.barrier()
        drop_groups()
    return found


@pytest.fixture(scope="module", params=["direct", "dedup"])
def outcomes(ranks: RankPool, request: pytest.FixtureRequest) -> list[dict[str, Found]]:
    """By rank, what each case ended with."""
    settings = {"comm": request.param, "ranks_per_node": 2}
    found: list[dict[str, Found]] = ranks.run(4, run_cases, settings, fresh=True, timeout=150)
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_every_rank_learns_what_differs(outcomes: list[dict[str, Found]], case: Any) -> None:
    for rank, found in enumerate(outcomes):
        seconds, kind, message = found[case.__name__]
        assert kind == "PlanMoEMismatchError", (rank, kind, message)
        assert seconds < SECONDS, (rank, seconds, message)
        if case in (skip_a_layer, swap_layers) and "ranks are in different places of one exchange" in message:
            assert "layer 1 forward" in message  # a watchdog found out first, since a rank's counts were late
            continue
        for words in CASES[case]:
            assert words in message, (rank, message)


def count_of_a_wide_layer() -> tuple[float, str, str]:
    """Layers of different numbers of experts still understand each other's headers."""
    model = Model()
    model.layers[0].group.__dict__["counts_width"] = 64
    tokens, experts = batch()
    if dist.get_rank() == 1:
        model.layers[1] = dataclasses.replace(model.layers[1], index=5)
        return seconds_until_error(lambda: model.layer(1, tokens, experts))
    return seconds_until_error(lambda: model.layer(0, tokens, experts))


def test_layers_of_other_sizes(ranks: RankPool) -> None:
    for _, kind, message in ranks.run(2, count_of_a_wide_layer, fresh=True):
        assert kind == "PlanMoEMismatchError"
        assert "the layer they are in: rank 0: 0; rank 1: 5" in message


def unaffected_gradient() -> float:
    tokens, experts = batch()
    in_backward(Model().forward(tokens, experts), lambda: None).sum().backward()
    assert tokens.grad is not None
    return float(tokens.grad.abs().sum())


def test_without_a_fault(ranks: RankPool) -> None:
    assert all(value > 0 for value in ranks.run(4, unaffected_gradient))


def with_another_capacity(settings: dict[str, object]) -> float:
    """How much a layer's output changes when one rank has twice the slots per expert."""
    model = Model(settings)
    tokens, experts = batch()
    routes = routes_of(experts, NUM_EXPERTS)
    usual = run_layer(model.layers[0], tokens, routes, model.experts[0])
    assert routes.capacity is not None
    factor = 2 if dist.get_rank() == ODD else 1
    routes = dataclasses.replace(routes, capacity=factor * routes.capacity)
    output = run_layer(model.layers[0], tokens, routes, model.experts[0])
    output.sum().backward()
    return float((output - usual).abs().max())


@pytest.mark.parametrize("settings", [{"exactness": "exact", "chunks": 1}, {}], ids=["padded", "ragged"])
def test_another_capacity_is_no_fault(ranks: RankPool, settings: dict[str, object]) -> None:
    """Empty slots do not travel: stock layers hang here (see docs/reliability.md)."""
    assert max(ranks.run(4, with_another_capacity, settings)) < 1e-6
