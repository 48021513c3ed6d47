"""The quality guard on two ranks: what it measures, and that all ranks retreat in the same step."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.distributed as dist

from planmoe_ds.guard import Meter, finer
from planmoe_ds.recorder import Quality
from tests.engine.support import make_layer, routes_of, run_layer
from tests.harness.ranks import RankPool

HIDDEN, TOKENS = 256, 64


def test_every_codec_ends_at_none() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for name in (
            "int4",
            "fp8",
            "int8",
            "hadamard_int8",
            "bf16",
            "zfp",
            "zfp:4",
            "zfp:20",
            "e4m7",
            "lossless",
            "plugged-in",
        ):
            ladder = [name]
            while ladder[-1] != "none":
                ladder.append(finer(ladder[-1], dtype))
            assert len(ladder) <= 4
    assert finer("zfp:4", torch.float32) == "zfp:16"
    assert finer("hadamard_int8", torch.float32) == "bf16"
    assert finer("hadamard_int8", torch.bfloat16) == finer("e4m7", torch.bfloat16) == "none"


def test_meter_against_the_definition() -> None:
    from planmoe_ds.backend import make_compressor

    codec, rows = make_compressor("int8"), torch.randn(40, 200, generator=torch.Generator().manual_seed(1))
    decoded = torch.empty_like(rows)
    codec.decode(codec.encode(rows), decoded)
    expected = float((decoded - rows).double().norm() / rows.double().norm())
    meter = Meter()
    meter.measure(("dispatch", "far"), codec, rows[:15])
    meter.measure(("dispatch", "far"), codec, torch.full((2, 200), torch.nan))
    meter.measure(("dispatch", "far"), codec, rows[15:])
    meter.measure(("combine", "near"), make_compressor("none"), rows)
    meter.measure(("combine", "far"), codec, torch.zeros(3, 200))
    assert meter.take() == {("dispatch", "far"): pytest.approx(expected, rel=1e-9)}
    assert meter.take() == {}


def step(layer, rank: int, outliers: bool) -> tuple[torch.Tensor, int, torch.Tensor]:  # type: ignore[no-untyped-def]
    """One forward and backward; the output, the bytes that travelled and the tokens' gradient."""
    tokens = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(rank))
    if outliers:
        tokens[:, ::128] *= 100.0
    tokens.requires_grad_()
    expert_KT = torch.full((1, TOKENS), 1 - rank)
    layer.recorder.take()
    output = run_layer(layer, tokens, routes_of(expert_KT, 2), [torch.nn.Identity()])
    output.sum().backward()
    return output.detach(), layer.recorder.take().bytes_sent, tokens.grad


def retreat(comm: str) -> tuple[list[int], list[Quality], list[str]]:
    rank, lines = dist.get_rank(), []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("planmoe_ds").addHandler(handler)
    try:
        settings = {
            "comm": comm, "ranks_per_node": 1, "compression": {"inter": "int8"},
            "guard": {"interval": 2, "max_error": 0.02},
        }  # fmt: skip
        layer, sent = make_layer(settings), []
        # only rank 1 has outliers, from step 2 on
        sent += [step(layer, rank, outliers=rank == 1 and number >= 2)[1] for number in range(6)]
    finally:
        logging.getLogger("planmoe_ds").removeHandler(handler)
    return sent, layer.recorder.take_qualities(), lines


@pytest.mark.distributed
@pytest.mark.parametrize("comm", ["direct", "dedup"])
def test_all_ranks_retreat_in_the_same_step(ranks: RankPool, comm: str) -> None:
    (_, first, lines), (_, second, silent) = ranks.run(2, retreat, comm)
    assert first == second  # same steps, errors and retreats on both
    retreats = {
        (found.step, found.direction, found.link, found.codec, found.retreat) for found in first if found.retreat
    }
    assert retreats == {
        (2, "dispatch", "far", "int8", "hadamard_int8"),
        (4, "combine", "far", "int8", "hadamard_int8"),  # until then outputs are int8 numbers already: no error
    }
    measured = {(found.step, found.direction): found.error for found in first}
    assert measured[0, "dispatch"] < 0.01 < 0.02 < measured[2, "dispatch"]
    assert measured[4, "dispatch"] < 0.02  # the finer codec is good enough
    assert any("step 2, layer 0: dispatch between nodes, int8" in line and "hadamard_int8" in line for line in lines)
    assert silent == []


def keep_nan(compression: str) -> torch.Tensor:
    layer = make_layer({"compression": compression, "guard": {"interval": 1, "max_error": 0.5}})
    rank = dist.get_rank()
    tokens = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(rank))
    tokens[1, 7], tokens[2, 9] = torch.nan, torch.inf
    expert_KT = torch.tensor([[0, 1, 0, 1]])
    with torch.no_grad():
        for _ in range(2):
            output = run_layer(layer, tokens, routes_of(expert_KT, 2), [torch.nn.Identity()])
    return torch.stack([torch.isfinite(output).all(1), ~torch.isfinite(output[:, 7]) | ~torch.isfinite(output[:, 9])])


@pytest.mark.distributed
@pytest.mark.parametrize("compression", ["bf16", "int8", "fp8", "hadamard_int8", "int4", "zfp"])
def test_nan_and_infinity_reach_the_output(ranks: RankPool, compression: str) -> None:
    for finite, damaged in ranks.run(2, keep_nan, compression):
        assert finite.tolist() == [True, False, False, True]
        assert damaged.tolist() == [False, True, True, False]


def leave_e4m7(wild_step: int) -> list[tuple[int, str, str | None]]:
    """Steps, directions and retreats that the guard tells; in one step rank 1's tokens do not fit."""
    guard = {"interval": 1, "max_error": 1e-30}
    layer = make_layer({"compression": "e4m7", "guard": guard, "chunks": 1})
    for step in range(4):
        spread = -60 * torch.rand(TOKENS, HIDDEN) if step == wild_step and dist.get_rank() == 1 else torch.zeros(1)
        tokens = (torch.randn(TOKENS, HIDDEN) * torch.exp2(spread)).bfloat16().requires_grad_()
        expert_KT = torch.randint(0, 2, (1, TOKENS))
        run_layer(layer, tokens, routes_of(expert_KT, 2), [torch.nn.Identity()]).sum().backward()
    return [(found.step, found.direction, found.retreat) for found in layer.recorder.take_qualities()]


@pytest.mark.distributed
def test_a_guard_of_hardly_any_error_leaves_e4m7_when_it_rounds(ranks: RankPool) -> None:
    assert ranks.run(2, leave_e4m7, 9) == [[], []]
    for found in ranks.run(2, leave_e4m7, 1):
        assert found[0] == (1, "dispatch", "none")
        assert all(retreat == "none" for _, _, retreat in found)


def count_far_rows() -> tuple[int, int]:
    from planmoe_ds import register_compressor
    from tests.contract.plugins import PythonBfloat16, plugged_in

    encoded = [0]

    class Counting(PythonBfloat16):
        def encode_tensor(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
            encoded[0] += rows.shape[0]
            return super().encode_tensor(rows, dtype)

    counts = []
    with plugged_in():
        register_compressor("counting")(Counting)
        for ranks_per_node in (2, 1):
            encoded[0] = 0
            layer = make_layer({"compression": {"inter": "counting"}, "ranks_per_node": ranks_per_node})
            step(layer, dist.get_rank(), outliers=False)
            counts.append(encoded[0])
    return counts[0], counts[1]


@pytest.mark.distributed
def test_codecs_between_nodes_cost_nothing_inside_one(ranks: RankPool) -> None:
    for on_one_node, on_two in ranks.run(2, count_far_rows):
        assert on_one_node == 0
        assert on_two > 0


def sums_error(sums: str) -> float:
    """Error of a layer's output where sums pass through a rank of the node, against no codec."""
    outputs = []
    for compression in ("none", {"inter": "int8", "sums": sums}):
        layer = make_layer({"comm": "dedup", "ranks_per_node": 2, "compression": compression})
        generator = torch.Generator().manual_seed(dist.get_rank())
        tokens = torch.randn(TOKENS, HIDDEN, generator=generator)
        expert_KT = torch.rand(TOKENS, 4, generator=generator).topk(2, dim=1).indices.t().contiguous()
        with torch.no_grad():
            outputs.append(run_layer(layer, tokens, routes_of(expert_KT, 4), [torch.nn.Identity()]))
    return float((outputs[1] - outputs[0]).norm() / outputs[0].norm())


@pytest.mark.distributed
def test_partial_sums_are_encoded_twice_only_if_told(ranks: RankPool) -> None:
    once, twice = (max(ranks.run(4, sums_error, sums)) for sums in ("none", "int4"))
    assert once < 0.012  # one int8 on the way out, one on the way back
    assert twice > 0.03
