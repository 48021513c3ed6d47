"""The CUDA row kernels against the CPU's, and against float64 sums."""

from __future__ import annotations

import pytest
import torch

from planmoe_ds.backend import compressor_names, dot_rows, fold_rows, make_compressor, spread_rows, sum_rows, unpack_add
from tests.gpu.support import DTYPES, HIDDEN, normal, random_routes, spread_of

pytestmark = pytest.mark.gpu
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# how far a sum that rounds otherwise may lead, by taking the next code
SLACK = {"none": 0.0, "bf16": 8e-3, "e4m7": 8e-3, "int8": 1e-2, "hadamard_int8": 1e-2, "fp8": 3e-2, "int4": 0.15}
codecs = pytest.mark.parametrize("name", [name for name in SLACK if name in compressor_names()])
dtypes = pytest.mark.parametrize("dtype", DTYPES)
sizes = pytest.mark.parametrize("hidden", HIDDEN)


def wire_for(name: str, rows: int, hidden: int, dtype: torch.dtype, extra: int, device: str) -> torch.Tensor:
    """Wire rows that lie `extra` bytes apart; poisoned."""
    width = make_compressor(name).row_bytes(hidden, dtype)
    return torch.full((rows, width + extra), 0xAB, dtype=torch.uint8, device=device)


@pytest.fixture(autouse=True)
def _no_dtypes_that_are_refused(request: pytest.FixtureRequest) -> None:
    values = getattr(request.node, "callspec", None)
    refused = {"bf16": (torch.float16,), "e4m7": (torch.float16, torch.float32)}
    if values is not None and values.params.get("dtype") in refused.get(values.params.get("name"), ()):
        pytest.skip(f"{values.params['name']} refuses {values.params['dtype']} rows")


def close(got: torch.Tensor, expected: torch.Tensor, rounding: float) -> None:
    got, expected = got.cpu().double(), expected.cpu().double()
    assert torch.isfinite(got).all()
    assert (got - expected).norm() <= rounding * expected.norm() + 1e-30


@codecs
@dtypes
@sizes
@pytest.mark.parametrize("extra", [0, 2, 16])
def test_pack_and_unpack_are_the_cpus(name: str, dtype: torch.dtype, hidden: int, extra: int) -> None:
    codec, rows = make_compressor(name), normal(37, hidden, dtype)
    index = torch.randperm(37, generator=torch.Generator().manual_seed(1))[:29]
    expected = wire_for(name, 29, hidden, dtype, extra, "cpu")
    codec.encode_into(rows, index, expected)
    wire = wire_for(name, 29, hidden, dtype, extra, "cuda")
    codec.encode_into(rows.cuda(), index.cuda(), wire)
    width = codec.row_bytes(hidden, dtype)
    assert torch.equal(wire.cpu()[:, :width], expected[:, :width])
    assert (wire.cpu()[:, width:] == 0xAB).all()
    out, back = (torch.full_like(rows, 5.0, device=device) for device in ("cuda", "cpu"))
    codec.decode(wire, out, index.cuda())
    codec.decode(expected, back, index)
    assert torch.equal(out.cpu(), back)


@codecs
@dtypes
@sizes
@pytest.mark.parametrize("weighted", [False, True])
def test_spread_fold_and_dot(name: str, dtype: torch.dtype, hidden: int, weighted: bool) -> None:
    codec, rows = make_compressor(name), normal(50, hidden, dtype)
    expert = random_routes(50, 3, 8)
    torch.manual_seed(2)
    weights = torch.rand(50, 3)
    plans = {device: spread_of(expert, 4, [20, 0, 30], device, weights) for device in ("cpu", "cuda")}
    for field in ("start", "target", "route", "source", "weight"):
        assert torch.equal(getattr(plans["cuda"], field).cpu(), getattr(plans["cpu"], field)), field
    entries = plans["cpu"].target.numel()
    results: dict[str, list[torch.Tensor]] = {}
    for device, plan in plans.items():
        wire = codec.encode(rows.to(device))
        buffer = torch.full((entries, hidden), 7.0, dtype=dtype, device=device)
        spread_rows(codec, wire, plan, weighted, buffer)
        values = normal(entries, hidden, dtype, 3).to(device)
        folded = wire_for(name, 50, hidden, dtype, 16, device)
        fold_rows(codec, values, plan, weighted, folded)
        sums = torch.full((50, hidden), 9.0, dtype=dtype, device=device)
        codec.decode(folded, sums)
        results[device] = [buffer, sums, dot_rows(codec, wire, plan, values, 3)]
    step = SLACK[name]
    for got, expected, slack in zip(results["cuda"], results["cpu"], [0.0, step, 1e-5], strict=True):
        close(got, expected, ROUNDING[dtype] + slack)
    missing = torch.ones(50, 3, dtype=torch.bool)
    missing[plans["cpu"].source, plans["cpu"].route] = False
    assert (results["cuda"][2].cpu()[missing] == 0).all()


@codecs
@dtypes
@pytest.mark.parametrize("hidden", [1, 129, 1000])
@pytest.mark.parametrize("narrow", [False, True])
def test_sums_of_returned_rows(name: str, dtype: torch.dtype, hidden: int, narrow: bool) -> None:
    codec, rows = make_compressor(name), normal(40, hidden, dtype)
    returns = torch.full((25, 3), -1, dtype=torch.int32)
    for token in range(25):
        places = torch.randperm(40, generator=torch.Generator().manual_seed(token))[: token % 4].int()
        returns[token, : len(places)] = places
    wire = codec.encode(rows.cuda())
    decoded = torch.empty(rows.shape, dtype=dtype if name in ("none", "e4m7") else torch.float32)
    codec.decode(wire.cpu(), decoded)
    base = normal(25, hidden, torch.float32, 4)
    expected = base.double()
    for token in range(25):
        for place in returns[token][returns[token] >= 0].tolist():
            expected[token] += decoded[place].double()
    out = torch.full((25, hidden), 3.0, dtype=dtype if narrow else torch.float32, device="cuda")
    sum_rows(codec, wire, dtype, returns.cuda(), base.cuda(), out)
    close(out, expected, ROUNDING[dtype if narrow else torch.float32])
    again = base.cuda()
    sum_rows(codec, wire, dtype, returns.cuda(), again, again)
    close(again, expected, ROUNDING[torch.float32])


@codecs
@dtypes
def test_adding_rows_in_place(name: str, dtype: torch.dtype) -> None:
    codec, rows, index = make_compressor(name), normal(9, 200, dtype), torch.tensor([4, 1, 8, 0, 2, 3, 5, 6, 7])
    sums = {device: normal(9, 200, torch.float32, 5).to(device) for device in ("cpu", "cuda")}
    for device, total in sums.items():
        unpack_add(codec, codec.encode(rows.to(device)), dtype, index.to(device), total, distinct=True)
    assert torch.equal(sums["cuda"].cpu(), sums["cpu"])


@dtypes
def test_not_finite_values_stay_so(dtype: torch.dtype) -> None:
    rows = normal(4, 300, dtype)
    rows[1, 5], rows[2, 290], rows[3, 140] = float("nan"), float("inf"), -float("inf")
    for name in ("none", "int8"):
        codec = make_compressor(name)
        wire = codec.encode(rows.cuda())
        assert torch.equal(wire.cpu(), codec.encode(rows)) or name == "none"
        out = torch.empty_like(rows, device="cuda")
        codec.decode(wire, out)
        assert not torch.isfinite(out[[1, 2, 3], [5, 290, 140]]).any()
        assert torch.isfinite(out[0]).all()


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Of bfloat16 numbers; a NaN is like any other."""
    return bool(((one.view(torch.int16) == other.view(torch.int16)) | (one.isnan() & other.isnan())).all())


@pytest.mark.parametrize("hidden", [1, 3, 127, 128, 129, 1000, 2048])
@pytest.mark.parametrize("extra", [0, 16])
@pytest.mark.parametrize("name", ["e4m7", "lossless"])
def test_bfloat16s_with_short_exponents_are_the_cpus(name: str, hidden: int, extra: int) -> None:
    codec = make_compressor(name)
    rows = normal(60, hidden, torch.bfloat16)
    rows[10:20, ::50] *= 1e6
    rows[20:30] = rows[20:30].clamp(min=0)
    rows[31, hidden // 2], rows[32, 0] = float("inf"), 1e-40
    if name == "e4m7":  # blocks that do not fit, with something that is not finite and without
        rows[33:43] *= torch.exp2(40 * torch.rand(hidden, generator=torch.Generator().manual_seed(2)) - 20).bfloat16()
        rows[38, hidden // 3] = float("nan")
    if name == "lossless":
        assert not codec.misfits(rows)
        assert not codec.misfits(rows.cuda())
    index = torch.randperm(60, generator=torch.Generator().manual_seed(1))[:50]
    width = codec.row_bytes(hidden, torch.bfloat16)
    padded = width + extra + -(width + extra) % 16
    wires = {device: torch.full((50, padded), 0xAB, dtype=torch.uint8, device=device) for device in ("cpu", "cuda")}
    for device, wire in wires.items():
        codec.encode_into(rows.to(device), index.to(device), wire)
    assert torch.equal(wires["cuda"].cpu(), wires["cpu"])
    out, back = (torch.zeros_like(rows, device=device) for device in ("cuda", "cpu"))
    codec.decode(wires["cuda"], out, index.cuda())
    codec.decode(wires["cpu"], back, index)
    assert same_bits(out.cpu()[index], back[index])
    assert name == "e4m7" or same_bits(back[index], rows[index])
    expert = random_routes(50, 3, 8)
    plan = spread_of(expert, 4, [20, 0, 30], "cuda")
    buffer = torch.zeros(plan.target.numel(), hidden, dtype=torch.bfloat16, device="cuda")
    spread_rows(codec, wires["cuda"], plan, False, buffer)
    assert same_bits(buffer.cpu()[plan.target.cpu()], back[index][plan.source.cpu()])


@sizes
@pytest.mark.parametrize("codec_name", ["e4m7", "lossless"])
def test_short_exponents_give_the_bits_of_none(hidden: int, codec_name: str) -> None:
    rows, values = (normal(50, hidden, torch.bfloat16, seed).cuda() for seed in (0, 3))
    plan = spread_of(random_routes(50, 3, 8), 4, [20, 0, 30], "cuda")
    values = values[torch.randint(0, 50, (plan.target.numel(),), generator=torch.Generator().manual_seed(4))]
    found = []
    for name in (codec_name, "none"):
        codec = make_compressor(name)
        folded = torch.zeros(50, codec.row_bytes(hidden, torch.bfloat16), dtype=torch.uint8, device="cuda")
        fold_rows(codec, values, plan, True, folded)
        sums = torch.zeros_like(rows)
        codec.decode(folded, sums)
        found.append([sums, dot_rows(codec, codec.encode(rows), plan, values, 3)])
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("hidden", [100, 128, 1000, 2048])
def test_wires_with_more_exponents_than_they_carry_become_nan(hidden: int) -> None:
    codec = make_compressor("e4m7")
    wire = codec.encode(normal(3, hidden, torch.bfloat16))
    wire[1, hidden : hidden + (hidden + 1) // 2] = 0xFF  # codes
    with pytest.raises(ValueError, match="corrupt"):
        codec.decode(wire, torch.zeros(3, hidden, dtype=torch.bfloat16))
    out = torch.zeros(3, hidden, dtype=torch.bfloat16, device="cuda")
    codec.decode(wire.cuda(), out)
    assert out.isnan().all(1).tolist() == [False, True, False]
    assert out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("hidden", [128, 200, 8192])
def test_lossless_rows_that_cannot_be_carried_are_not_finite(hidden: int) -> None:
    bits = torch.randint(-(1 << 15), 1 << 15, (40, hidden), generator=torch.Generator().manual_seed(1))
    rows = bits.to(torch.int16).view(torch.bfloat16)
    rows[:20] = normal(20, hidden, torch.bfloat16)
    codec = make_compressor("lossless")
    assert codec.misfits(rows.cuda())
    plan = spread_of(torch.arange(40)[:, None] % 4, 4, [40], "cuda")
    wires = {"pack": codec.encode(rows.cuda(), plan.target), "fold": torch.zeros_like(codec.encode(rows.cuda()))}
    assert codec.take_refused()
    assert not codec.take_refused()
    fold_rows(codec, rows.cuda(), plan, False, wires["fold"])
    assert codec.take_refused()
    assert torch.equal(wires["fold"], wires["pack"])
    assert torch.equal(wires["pack"].cpu(), codec.encode(rows, plan.target.cpu()))
    assert codec.take_refused()  # by the CPU
    out = torch.zeros_like(rows, device="cuda")
    codec.decode(wires["pack"], out, plan.target)
    assert torch.equal(out[:20].cpu(), rows[:20])
    assert not torch.isfinite(out[20:]).any()
    few = spread_of(torch.arange(20)[:, None] % 4, 4, [20], "cuda")
    fold_rows(codec, rows[:20].cuda(), few, False, torch.zeros_like(codec.encode(rows[:20].cuda())))
    assert not codec.take_refused()


def test_refusals_are_told_from_any_stream_and_mode() -> None:
    codec, bits = make_compressor("lossless"), torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    wild = bits[torch.randperm(1 << 16, generator=torch.Generator().manual_seed(1))].view(torch.bfloat16).view(-1, 256)
    rows, side = wild.cuda(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.inference_mode(), torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # so that it has to be waited for
        codec.encode(rows)
    assert codec.take_refused()
    assert not codec.take_refused()
    codec.encode(rows)
    assert codec.take_refused()
    codec.encode(wild)  # on the host
    assert codec.take_refused()


@dtypes
@pytest.mark.parametrize("name", ["zfp", "zfp:4", "zfp:12.5"])
@pytest.mark.parametrize("hidden", [3, 16, 1000, 2048])
def test_zfp_stays_on_the_card(name: str, hidden: int, dtype: torch.dtype) -> None:
    codec, rows = make_compressor(name), normal(50, hidden, dtype)
    index = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    wire = codec.encode(rows.cuda(), index.cuda())
    assert torch.equal(wire.cpu(), codec.encode(rows, index))
    weights = torch.rand(50, 3)
    plans = {device: spread_of(random_routes(50, 3, 8), 4, [20, 0, 30], device, weights) for device in ("cpu", "cuda")}
    entries = plans["cpu"].target.numel()
    results = {}
    for device, plan in plans.items():
        buffer = torch.zeros(entries, hidden, dtype=dtype, device=device)
        spread_rows(codec, wire.to(device), plan, True, buffer)
        values = normal(entries, hidden, dtype, 3).to(device)
        folded = torch.zeros(50, codec.row_bytes(hidden, dtype), dtype=torch.uint8, device=device)
        fold_rows(codec, values, plan, True, folded)
        sums = torch.zeros(50, hidden, dtype=dtype, device=device)
        codec.decode(folded, sums)
        results[device] = [buffer, sums, dot_rows(codec, wire.to(device), plan, values, 3)]
    for got, expected in zip(results["cuda"], results["cpu"], strict=True):
        close(got, expected, 2 * ROUNDING[dtype] + (1e-3 if dtype is torch.float32 else 0.0))


def test_more_than_two_to_the_31_values() -> None:
    rows, hidden = (1 << 20) + 3, 2049
    if torch.cuda.mem_get_info()[0] < 12 * rows * hidden:
        pytest.skip("needs 26 GB of memory on the card")
    values = torch.empty((rows, hidden), dtype=torch.bfloat16, device="cuda")
    values[-1] = torch.arange(hidden, device="cuda").bfloat16()
    index = torch.tensor([rows - 1, 0], device="cuda")
    values[0] = 1.0
    codec = make_compressor("none")
    wire = codec.encode(values, index)
    out = torch.empty((rows, hidden), dtype=torch.bfloat16, device="cuda")
    codec.decode(wire, out, index)
    assert torch.equal(out[-1], values[-1])
    assert torch.equal(out[0], values[0])


def test_bad_input() -> None:
    codec, rows = make_compressor("none"), torch.zeros(4, 8, device="cuda")
    with pytest.raises(ValueError, match="index is on cpu"):
        codec.encode(rows, torch.tensor([0]))
    with pytest.raises(ValueError, match="wire is on cpu"):
        codec.decode(torch.zeros(4, 32, dtype=torch.uint8), rows)
    plan = spread_of(random_routes(4, 2, 4), 4, [4], "cpu")
    with pytest.raises(ValueError, match="one device"):
        spread_rows(codec, codec.encode(rows), plan, False, rows)
    with pytest.raises(ValueError, match="float32, float16 or bfloat16"):
        make_compressor("int8").encode(rows.double())
    with pytest.raises(ValueError, match="returns must be"):
        sum_rows(codec, codec.encode(rows), torch.float32, torch.zeros(3, 1, dtype=torch.int32).cuda(), None, rows)
    with pytest.raises(ValueError, match="on an accelerator"):
        sum_rows(codec, codec.encode(rows.cpu()), torch.float32, torch.zeros(4, 1).int(), None, rows.cpu())


def test_empty_input() -> None:
    codec, rows = make_compressor("none"), torch.zeros(0, 8, device="cuda")
    assert codec.encode(rows).shape == (0, 32)
    plan = spread_of(random_routes(0, 2, 4), 4, [0], "cuda")
    assert plan.start.tolist() == [0]
    spread_rows(codec, codec.encode(rows), plan, True, rows)
    assert dot_rows(codec, codec.encode(rows), plan, rows, 2).shape == (0, 2)
