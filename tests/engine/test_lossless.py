"""Codecs of 12.5 bits that change no bit: in every direction, and where rows do not fit."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from planmoe_ds import refusals
from planmoe_ds.group import ExpertGroup
from tests.engine.support import make_layer, routes_of, run_layer
from tests.harness.ranks import RankPool

HIDDEN, TOKENS = 256, 64
PLACES = ("tokens", "outputs", "output gradients", "token gradients")


def lossless_bytes(exactness: str, scattered: int) -> list[tuple[bool, int]]:
    """Whether the output is that of "none", and the bytes sent, for tokens that fit and for those that do not."""
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    fitting = torch.randn(TOKENS, HIDDEN, generator=generator).bfloat16()
    wild = torch.randint(0, 1 << 15, (TOKENS, HIDDEN), generator=generator).to(torch.int16).view(torch.bfloat16)
    wild = wild.nan_to_num(nan=1.0, posinf=2.0, neginf=3.0)
    expert_KT, found = torch.randint(0, 2, (1, TOKENS), generator=generator), []
    for tokens in (fitting, wild if rank == scattered else fitting, fitting):
        outputs, sent = [], []
        for compression in ("none", {"dispatch": "lossless"}):
            settings = {"compression": compression, "exactness": exactness, "chunks": 1}
            layer = make_layer(settings)
            with torch.no_grad():
                outputs.append(run_layer(layer, tokens, routes_of(expert_KT, 2), [torch.nn.Identity()]))
            sent.append(layer.recorder.take().bytes_sent)
        found.append((torch.equal(*outputs), sent[0] - sent[1]))
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("exactness", ["exact", "reordered"])
def test_lossless_is_exact_and_raw_where_one_rank_must(ranks: RankPool, exactness: str) -> None:
    for found in ranks.run(2, lossless_bytes, exactness, 1):
        assert [same for same, _ in found] == [True, True, True]
        assert found[0][1] > 0  # fewer bytes
        assert found[1][1] == 0  # all ranks send raw rows, though only rank 1 has to
        assert found[2][1] > 0


def beside_none(compression: object, comm: str, chunks: int) -> tuple[list[bool], float]:
    """Whether output and gradients are those of "none", bit for bit; the share of its bytes that travel."""
    rank, found, sent = dist.get_rank(), [], []
    for codecs in ("none", compression):
        torch.manual_seed(rank)
        settings = {"compression": codecs, "comm": comm, "chunks": chunks, "ranks_per_node": 2}
        layer = make_layer(settings)
        experts = [torch.nn.Linear(HIDDEN, HIDDEN).bfloat16() for _ in range(2)]
        tokens = torch.randn(TOKENS, HIDDEN).bfloat16().requires_grad_()
        weight_KT = torch.rand(2, TOKENS).requires_grad_()
        expert_KT = torch.rand(TOKENS, 8).topk(2, dim=1).indices.t().contiguous()
        output = run_layer(layer, tokens, routes_of(expert_KT, 8, weight_KT), experts)
        output.backward(torch.randn(TOKENS, HIDDEN).bfloat16())
        parameters = [parameter.grad for expert in experts for parameter in expert.parameters()]
        found.append([output.detach(), tokens.grad, weight_KT.grad, *parameters])
        sent.append(layer.recorder.take().bytes_sent)
    same = [
        torch.equal(one, other) and torch.equal(one.signbit(), other.signbit())
        for one, other in zip(*found, strict=True)
    ]
    return same, sent[1] / sent[0]


@pytest.mark.distributed
@pytest.mark.parametrize("codec", ["e4m7", "lossless"])
@pytest.mark.parametrize(("comm", "chunks", "most"), [("direct", 1, 0.8), ("dedup", 2, 0.82), ("hierarchical", 1, 0.8)])
def test_no_bit_of_rows_that_fit_changes(ranks: RankPool, codec: str, comm: str, chunks: int, most: float) -> None:
    for same, share in ranks.run(4, beside_none, codec, comm, chunks):
        assert all(same)
        assert share < most  # rows are 0.78; columns stay as they are, and dedup's parts of sums inside a node


class Scale(torch.autograd.Function):
    """Rows times one vector, their gradients times another."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, there: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(back)
        return rows * there

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad * ctx.saved_tensors[0], None, None


class Scaling(nn.Module):
    """An expert whose outputs, and gradients, may have exponents far apart."""

    def __init__(self, there: torch.Tensor, back: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("there", there)
        self.register_buffer("back", back)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return Scale.apply(rows, self.there, self.back)  # type: ignore[no-any-return,no-untyped-call]


def step_where(
    layer: Any, wild: str, recompute: bool = False, rank: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output and gradients of a step in which, on one rank, rows of one place do not fit."""
    torch.manual_seed(dist.get_rank())
    far_apart = torch.exp2(-60 * torch.rand(HIDDEN)).bfloat16()
    scales = dict.fromkeys(PLACES, torch.ones(HIDDEN, dtype=torch.bfloat16))
    if dist.get_rank() == rank and wild:
        scales[wild] = far_apart
    tokens = (torch.randn(TOKENS, HIDDEN).bfloat16() * scales["tokens"]).requires_grad_()
    weight_KT = torch.rand(2, TOKENS).requires_grad_()
    expert_KT = torch.rand(TOKENS, 8).topk(2, dim=1).indices.t().contiguous()
    experts = [Scaling(scales["outputs"], scales["token gradients"]) for _ in range(8 // dist.get_world_size())]

    def run(tokens: torch.Tensor, weight_KT: torch.Tensor) -> torch.Tensor:
        return run_layer(layer, tokens, routes_of(expert_KT, 8, weight_KT), experts)

    output = checkpoint(run, tokens, weight_KT, use_reentrant=False) if recompute else run(tokens, weight_KT)
    output.backward(torch.randn(TOKENS, HIDDEN).bfloat16() * scales["output gradients"])
    assert tokens.grad is not None
    assert weight_KT.grad is not None
    return output.detach(), tokens.grad, weight_KT.grad


@contextmanager
def pausing(passes: int) -> Iterator[list[str]]:
    """Refusals are followed by so many passes without the codec; gives what is logged about them."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger, level, before = logging.getLogger("planmoe_ds"), logging.INFO, refusals.PAUSE
    logger.addHandler(handler)
    logger.setLevel(level)
    refusals.PAUSE = passes
    refusals._told.clear()
    try:
        yield messages
    finally:
        refusals.PAUSE = before
        logger.removeHandler(handler)


def with_misfits(
    settings: dict[str, object], compression: object, recompute: bool, ask_hosts: bool = True
) -> dict[str, tuple[bool, int]]:
    """For rows that do not fit in each place: whether all bits are those without a codec; bytes sent beyond those.

    ask_hosts: ranks agree apart from their exchanges.
    """
    layers = [
        make_layer({"ranks_per_node": 2, "chunks": 1, **settings, "compression": codecs})
        for codecs in ("none", compression)
    ]
    assert layers[1].group.hosts.over_gloo is not None
    if not ask_hosts:
        layers[1].group.hosts.over_gloo = None
    found = {}
    for wild in ("", *PLACES):
        results, sent = [], []
        for layer in layers:
            layer.recorder.take()
            with pausing(0):
                results.append(step_where(layer, wild, recompute))
            sent.append(layer.recorder.take().bytes_sent)
        same = all(torch.equal(one, other) for one, other in zip(*results, strict=True))
        found[wild] = same and all(values.isfinite().all() for values in results[1]), sent[1] - sent[0]
    return found


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("settings", "compression", "recompute"),
    [
        ({"comm": "direct", "exactness": "exact"}, "lossless", False),
        ({"comm": "pipe", "chunks": 3}, "lossless", False),
        ({"comm": "hierarchical"}, {"inter": "lossless"}, True),
        ({"comm": "dedup"}, {"inter": "lossless"}, False),
        ({"comm": "dedup", "chunks": 2, "scheduler": "sequential"}, {"inter": "lossless", "sums": "lossless"}, True),
    ],
    ids=str,
)
def test_lossless_changes_no_bit_whatever_does_not_fit(
    ranks: RankPool, settings: dict[str, object], compression: object, recompute: bool
) -> None:
    for found in ranks.run(4, with_misfits, settings, compression, recompute):
        assert all(same for same, _ in found.values()), found
        assert found[""][1] < 0  # fewer bytes
        assert all(found[place][1] > found[""][1] for place in PLACES), found
        assert found["tokens"][1] > found["outputs"][1]  # these experts' outputs do not fit then, either


@pytest.mark.distributed
def test_hosts_may_agree_apart_from_exchanges(ranks: RankPool) -> None:
    settings = {"comm": "dedup", "chunks": 2}
    within, apart = (
        ranks.run(4, with_misfits, settings, {"inter": "lossless"}, False, ask_hosts) for ask_hosts in (False, True)
    )
    assert all(same for found in apart for same, _ in found.values())
    assert within == apart


def two_in_flight(retain: bool) -> bool:
    """Two forwards, then two backwards (twice with `retain`), rows of the first not fitting: the gradients of none."""
    rank, found = dist.get_rank(), []
    for compression in ("none", {"inter": "lossless"}):
        torch.manual_seed(rank)
        layer = make_layer({"ranks_per_node": 1, "chunks": 2, "comm": "dedup", "compression": compression})
        batches = []
        for spread in (-60.0 * rank, 0.0):
            scale = torch.exp2(spread * torch.rand(HIDDEN)).bfloat16()
            tokens = (torch.randn(TOKENS, HIDDEN).bfloat16() * scale).requires_grad_()
            weight_KT = torch.rand(2, TOKENS).requires_grad_()
            expert_KT = torch.rand(TOKENS, 4).topk(2, dim=1).indices.t().contiguous()
            experts = [Scaling(torch.ones_like(scale), scale) for _ in range(2)]
            with pausing(0):
                output = run_layer(layer, tokens, routes_of(expert_KT, 4, weight_KT), experts)
            batches.append((output, torch.randn(TOKENS, HIDDEN).bfloat16() * scale, tokens, weight_KT))
        for output, grad, *_ in batches:
            with pausing(0):
                output.backward(grad, retain_graph=retain)
                if retain:
                    output.backward(grad)
        found.append([values for _, _, tokens, weight_KT in batches for values in (tokens.grad, weight_KT.grad)])
    return all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.distributed
@pytest.mark.parametrize("retain", [False, True])
def test_several_calls_in_flight(ranks: RankPool, retain: bool) -> None:
    assert ranks.run(2, two_in_flight, retain) == [True, True]


def host_seconds_of_slow_answers(seconds: float) -> list[float]:
    """What is measured of the host in a scheduler's first steps, where every question to the other hosts takes long."""
    layer = make_layer({"compression": "lossless", "comm": "direct", "chunks": 2, "scheduler": "optimal"})
    answer, found = ExpertGroup.any_rank_says, []

    def answer_late(*arguments: Any) -> bool:
        time.sleep(seconds)
        return answer(*arguments)

    with patch.object(ExpertGroup, "any_rank_says", answer_late):
        for _ in range(4):
            step_where(layer, "")
            measurement = layer._decided[1].measurement if layer._decided is not None else None
            found += [] if measurement is None else [measurement.host_seconds]
    return found


@pytest.mark.distributed
def test_waiting_for_answers_is_no_work_of_the_host(ranks: RankPool) -> None:
    for found in ranks.run(2, host_seconds_of_slow_answers, 0.5):
        assert found
        assert min(found) > 0
        assert min(found) < 0.4, found  # were answers counted, none would be


def sent_by_step(names: list[str], pause: int) -> tuple[list[int], list[str]]:
    """What steps send beyond a step without codecs, one place's rows not fitting in each; and what is logged."""
    layers = [
        make_layer({"compression": codecs, "comm": "direct", "ranks_per_node": 1, "chunks": 1})
        for codecs in ("none", "lossless")
    ]
    sent = []
    with pausing(pause) as messages:
        for wild in names:
            of_layer = []
            for layer in layers:
                layer.recorder.take()
                step_where(layer, wild, rank=0)
                of_layer.append(layer.recorder.take().bytes_sent)
            sent.append(of_layer[1] - of_layer[0])
    return sent, messages


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("wild", "refused_rows"),
    [
        ("outputs", ["the experts' outputs"]),
        ("token gradients", ["the tokens' gradients"]),
        ("output gradients", ["gradients of the outputs", "the tokens' gradients"]),
    ],
)
def test_what_was_refused_is_not_tried_again_at_once(ranks: RankPool, wild: str, refused_rows: list[str]) -> None:
    for rank, (sent, messages) in enumerate(ranks.run(2, sent_by_step, ["", wild, wild, "", "", wild], 3)):
        fits, refused, paused, still_paused, last_paused, again = sent
        assert fits < 0
        assert refused > 0
        assert fits < paused < 0  # the other ways have fewer bytes
        assert paused == still_paused == last_paused
        assert again == refused
        assert len(messages) == (len(refused_rows) if rank == 0 else 0)  # once
        for what, message in zip(refused_rows, messages, strict=False):
            assert f"layer 0: {what} did not fit" in message


def of_other_dtypes(dtype: torch.dtype, output_dtype: torch.dtype, exactness: str) -> list[tuple[torch.Tensor, int]]:
    """Output and bytes sent with and without lossless, of tokens and experts' outputs of these dtypes."""
    found = []
    for compression in ("none", "lossless"):
        layer = make_layer({"compression": compression, "chunks": 1, "exactness": exactness})
        torch.manual_seed(dist.get_rank())
        tokens = torch.randn(TOKENS, HIDDEN).to(dtype).requires_grad_()
        expert = nn.Linear(HIDDEN, HIDDEN, dtype=output_dtype)
        runner = nn.Sequential(Cast(output_dtype), expert)
        output = run_layer(layer, tokens, routes_of(torch.arange(TOKENS)[None] % 2, 2), [runner])
        output.sum().backward()
        found.append((output.detach(), layer.recorder.take().bytes_sent))
    return found


class Cast(nn.Module):
    """To another dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.to(self.dtype)


@pytest.mark.distributed
@pytest.mark.parametrize("exactness", ["exact", "reordered"])
@pytest.mark.parametrize("output_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_other_dtypes_travel_as_they_are(
    ranks: RankPool, dtype: torch.dtype, output_dtype: torch.dtype, exactness: str
) -> None:
    for (plain, plain_bytes), (lossless, lossless_bytes) in ranks.run(
        2, of_other_dtypes, dtype, output_dtype, exactness
    ):
        assert torch.equal(plain, lossless)
        if torch.bfloat16 in (dtype, output_dtype):
            assert lossless_bytes < plain_bytes
        else:
            assert lossless_bytes == plain_bytes
