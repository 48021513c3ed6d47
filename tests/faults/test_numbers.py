"""Numbers that go wrong, loads that are extreme, tensors elsewhere: results stay right, and NaN is never hidden."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from planmoe_ds.backend import compressor_names
from planmoe_ds.errors import PlanMoEError
from planmoe_ds.experts import LocalExperts
from tests.engine.support import padded_runner, routes_of, run_layer
from tests.faults.layers import NUM_EXPERTS, Model, batch
from tests.harness.ranks import RankPool

pytestmark = pytest.mark.distributed

CODECS = sorted(compressor_names())


def poison(model: Model, value: float, what: str) -> tuple[bool, bool]:
    """Whether one bad number reaches this rank's results as a number that is not finite, and leaves others alone."""
    tokens, experts = batch()
    bad = dist.get_rank() == 1
    dtype = model.experts[0][0].weight.dtype
    tokens = tokens.detach().to(dtype)
    if what == "tokens" and bad:
        tokens[3, 5] = value
    tokens.requires_grad_()
    routes = routes_of(experts, NUM_EXPERTS)
    if what == "gates" and bad:
        routes.weight_KT[:, 3] = value
    output = run_layer(model.layers[0], tokens, routes, model.experts[0])
    if what in ("tokens", "gates"):
        rows = output
    else:
        grad = torch.ones_like(output)
        if bad:
            grad[3, 5] = value
        output.backward(grad)
        assert tokens.grad is not None
        rows = tokens.grad
    is_finite = rows.isfinite().all(1)
    others = torch.arange(len(rows)) != 3
    return bool(is_finite[3]) != bad, bool(is_finite[others].all())


def poison_all(codec: str, comm: str) -> dict[str, tuple[bool, bool]]:
    """Every bad number in every place."""
    model = Model({"compression": codec, "comm": comm, "ranks_per_node": 2})
    if codec in ("e4m7", "lossless"):  # which take bfloat16 alone
        model.experts = [[expert.bfloat16() for expert in experts] for experts in model.experts]
    values, places = (float("nan"), float("inf")), ("tokens", "gates", "gradients")
    return {f"{value} in {what}": poison(model, value, what) for value in values for what in places}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("comm", ["direct", "dedup"])
def test_what_is_not_finite_arrives_so(ranks: RankPool, codec: str, comm: str) -> None:
    for rank, found in enumerate(ranks.run(4, poison_all, codec, comm)):
        for case, (arrived, others_intact) in found.items():
            assert arrived, (case, rank)
            assert others_intact, (case, rank)


def extreme_loads() -> bool:
    """No tokens at all on rank 1, then everything to one expert; gradients flow."""
    model = Model({"comm": "dedup", "ranks_per_node": 2})
    tokens, experts = batch(0 if dist.get_rank() == 1 else 9)
    model.forward(tokens, experts).sum().backward()
    assert tokens.grad is not None
    assert tokens.grad.shape == tokens.shape
    tokens, experts = batch(9, top_k=1)
    model.forward(tokens, torch.full_like(experts, NUM_EXPERTS - 1)).sum().backward()
    assert tokens.grad is not None
    return bool(tokens.grad.isfinite().all())


def test_extreme_loads(ranks: RankPool) -> None:
    assert ranks.run(4, extreme_loads) == [True] * 4


def call_from_another_device() -> str:
    model = Model({"chunks": 1})
    tokens, experts = batch()
    local = LocalExperts(model.experts[1], padded_runner(model.experts[1]))
    try:
        model.layers[1].forward(tokens.to("meta"), routes_of(experts, NUM_EXPERTS), local)
    except PlanMoEError as error:
        return str(error)
    return ""


def test_tokens_on_another_device_than_the_layer_are_refused(ranks: RankPool) -> None:
    for message in ranks.run(2, call_from_another_device):
        assert "when layer 1 was on cpu, and its tokens are on meta: move the model to its device" in message
