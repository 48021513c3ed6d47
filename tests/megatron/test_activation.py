"""activate(): mistakes told at the start, checkpoints in both directions, the dispatcher's stages one by one."""

from __future__ import annotations

import functools
import types
from typing import Any
from unittest.mock import patch

import pytest

from tests.harness.ranks import RankPool
from tests.megatron.cases import EXACT, Case

pytestmark = pytest.mark.distributed

SHORT = Case("EP2", ranks=2, expert=2, steps=2)


def start_model(settings: dict[str, Any], section: object) -> None:
    """Build the short case's model with other settings and activate planmoe."""
    from tests.megatron import training

    training.start(SHORT)
    config = training.make_config(SHORT)
    chunks = training.make_chunks(SHORT, config)
    for layer in chunks[0].modules():
        if hasattr(layer, "token_dispatcher"):
            for name, value in settings.items():
                setattr(layer.config, name, value)
    training.activate(chunks, section)


def start_dense_model() -> None:
    """A model without MoE layers."""
    import torch

    from tests.megatron import training

    training.start(SHORT)
    training.activate(torch.nn.Linear(2, 2))


def mistakes(outcomes: list[Any]) -> str:
    assert all(outcome.failed for outcome in outcomes)
    return "\n".join(outcome.message for outcome in outcomes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fp8": "hybrid", "overlap_moe_expert_parallel_comm": True}, "overlap_moe_expert_parallel_comm"),
        ({"moe_token_dispatcher_type": "allgather"}, "set it to 'alltoall'"),
    ],
)
def test_unsupported_config(megatron_ranks: RankPool, settings: dict[str, Any], message: str) -> None:
    outcomes = megatron_ranks.run(2, start_model, settings, True, expect_failure=True)
    assert message in mistakes(outcomes)


def start_undescribed() -> None:
    """Rank 1 alone finds that its ranks do not lie as planmoe needs them."""
    import torch.distributed as dist

    from planmoe_ds.errors import PlanMoEConfigError
    from planmoe_ds.integrations import megatron

    def fail(*_: object) -> None:
        raise PlanMoEConfigError("let 'tp' come before 'ep'")

    with patch.object(megatron, "_expert_ranks", fail if dist.get_rank() == 1 else megatron._expert_ranks):
        start_model({}, True)


def test_what_one_rank_alone_refuses_is_told_to_all(megatron_ranks: RankPool) -> None:
    arguments: list[tuple[dict[str, Any], object]] = [({}, True), ({"moe_token_dispatcher_type": "allgather"}, True)]
    told = megatron_ranks.run(2, start_model, per_rank_args=arguments, expect_failure=True)
    assert all("set it to 'alltoall'" in outcome.message for outcome in told), mistakes(told)
    told = megatron_ranks.run(2, start_undescribed, expect_failure=True)
    assert all("let 'tp' come before 'ep'" in outcome.message for outcome in told), mistakes(told)


def test_unknown_key(megatron_ranks: RankPool) -> None:
    outcomes = megatron_ranks.run(2, start_model, {}, {"chunk": 2}, expect_failure=True)
    assert "did you mean 'chunks'" in mistakes(outcomes)


def test_no_moe_layer(megatron_ranks: RankPool) -> None:
    assert "no MoE layer" in mistakes(megatron_ranks.run(2, start_dense_model, expect_failure=True))


def test_ranks_told_different_things(megatron_ranks: RankPool) -> None:
    arguments = [({}, {"chunks": 1}), ({}, {"chunks": 2})]
    outcomes = megatron_ranks.run(2, start_model, per_rank_args=arguments, expect_failure=True)
    assert "ranks disagree on planmoe.chunks: 1 on ranks [0]; 2 on ranks [1]" in mistakes(outcomes)


def start_job(arguments: dict[str, Any]) -> None:
    """What Megatron's initialize_megatron() does, patched, with these global arguments."""
    import sys

    from tests.megatron import on_cpu  # noqa: F401

    sys.modules["megatron.training.global_vars"] = types.SimpleNamespace(  # type: ignore[assignment]
        _GLOBAL_ARGS=types.SimpleNamespace(**arguments)
    )
    from megatron.core import parallel_state

    import megatron_patches

    parallel_state.destroy_model_parallel()
    megatron_patches.apply()
    try:
        parallel_state.initialize_model_parallel(expert_model_parallel_size=2)
    finally:
        megatron_patches.remove()
        del sys.modules["megatron.training.global_vars"]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"planmoe": {}}, {"planmoe": None}, "ranks disagree on planmoe.enabled: True on ranks [0]; False"),
        ({"planmoe": True}, {"planmoe": None}, "ranks disagree on planmoe.enabled: True on ranks [0]; False"),
        ({"planmoe": {"comm": "pipe"}}, {"planmoe": {"comm": "direct"}}, "disagree on planmoe.comm"),
        ({"planmoe": {}, "seq_length": 8}, {"planmoe": {}, "seq_length": 9}, "disagree on --seq-length: 8"),
    ],
)
def test_ranks_with_different_flags(
    megatron_ranks: RankPool, first: dict[str, Any], second: dict[str, Any], message: str
) -> None:
    outcomes = megatron_ranks.run(2, start_job, per_rank_args=[(first,), (second,)], expect_failure=True)
    assert message in mistakes(outcomes)


def test_the_flag_alone_starts(megatron_ranks: RankPool) -> None:
    megatron_ranks.run(2, start_job, {"planmoe": True})


def exchange_checkpoints(case: Case) -> dict[str, str]:
    """Train with one dispatcher, continue with the other."""
    from tests.megatron import training

    def continued(first: Any, second: Any) -> Any:
        training.start(case)
        chunks = training.make_chunks(case, training.make_config(case))
        if first is not None:
            training.activate(chunks, first)
        training.run_steps(case, chunks[0].config, chunks)
        saved = chunks[0].state_dict()
        training.start(case)
        chunks = training.make_chunks(case, training.make_config(case))
        if second is not None:
            training.activate(chunks, second)
        chunks[0].load_state_dict(saved, strict=True)
        return training.run_steps(case, chunks[0].config, chunks)

    stock = continued(None, None)
    return {
        "planmoe to alltoall": training.difference(stock, continued(EXACT, None), 0.0),
        "alltoall to planmoe": training.difference(stock, continued(None, EXACT), 0.0),
    }


def test_checkpoints(megatron_ranks: RankPool) -> None:
    for results in megatron_ranks.run(2, exchange_checkpoints, SHORT, timeout=90):
        assert results == {"planmoe to alltoall": "", "alltoall to planmoe": ""}


def run_stages() -> float:
    """Largest difference between six stages called by hand and the layer's forward, after activate()."""
    import torch

    from tests.megatron import training

    training.start(SHORT)
    chunks = training.make_chunks(SHORT, training.make_config(SHORT))
    session = training.activate(chunks, {"chunks": 2})
    assert session is not None
    assert chunks[0].planmoe is session
    assert session.num_layers == 2
    layer = next(module for module in chunks[0].modules() if hasattr(module, "token_dispatcher"))
    hidden = torch.randn(6, 2, 16, device=training.DEVICE)
    expected, _ = layer(hidden)
    dispatcher = layer.token_dispatcher
    probs, routing_map = layer.router(hidden)
    tokens, probs = dispatcher.dispatch_preprocess(hidden, routing_map, probs)
    tokens, probs = dispatcher.token_dispatch(tokens, probs)
    output, _ = layer.experts(*dispatcher.dispatch_postprocess(tokens, probs))
    output = dispatcher.combine_postprocess(dispatcher.token_combine(dispatcher.combine_preprocess(output)))
    return float((output - expected).abs().max())


def test_stages_one_by_one(megatron_ranks: RankPool) -> None:
    assert max(megatron_ranks.run(2, run_stages)) < 1e-6


def use_spec() -> str:
    """What a layer built from a spec says before it is set up; then it works."""
    import torch
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.spec_utils import build_module

    from planmoe_ds.integrations.megatron import with_planmoe
    from tests.megatron import training

    training.start(SHORT)
    config = training.make_config(SHORT)
    spec = with_planmoe(get_moe_module_spec(use_te=False, num_experts=8, moe_grouped_gemm=False))
    is_partial = isinstance(spec, functools.partial)  # 0.19 and later
    layer = (spec(config=config) if is_partial else build_module(spec, config=config)).to(training.DEVICE)
    layer.set_layer_number(1)
    hidden = torch.randn(4, 2, 16, device=training.DEVICE)
    try:
        layer(hidden)
    except training.PlanMoEError as error:
        message = str(error)
    training.activate(layer)
    layer(hidden)[0].sum().backward()
    return message


def test_spec(megatron_ranks: RankPool) -> None:
    for message in megatron_ranks.run(2, use_spec):
        assert "called before it was set up: call planmoe_ds.integrations.megatron.activate(model)" in message
