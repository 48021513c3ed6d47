"""What single codecs promise beyond the contract of all."""

from __future__ import annotations

import math

import pytest
import torch

from planmoe_ds.backend import fold_rows, make_compressor
from tests.contract.rows import normal, round_trip
from tests.gpu.support import random_routes, spread_of


def test_fp8_codes_are_those_of_torch() -> None:
    rows = normal(16, 128)
    rows[:, 0] = 448.0  # so that the scale is one
    rows[:, 1:] *= torch.logspace(-4, 2, 127)
    wire = make_compressor("fp8").encode(rows.clamp(-448, 448))
    expected = rows.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(wire[:, :128], expected.view(torch.uint8))
    every = torch.arange(256, dtype=torch.uint8).view(2, 128)
    out = torch.empty(2, 128)
    make_compressor("fp8").decode(torch.cat([every, torch.ones(2, 1).view(torch.uint8)], dim=1), out)
    assert torch.equal(out.nan_to_num(nan=-1.0), every.view(torch.float8_e4m3fn).float().nan_to_num(nan=-1.0))


def test_bf16_rounds_as_torch_does() -> None:
    rows = torch.cat([normal(8, 200), normal(8, 200) * 1e38, normal(8, 200) * 1e-40])
    assert torch.equal(round_trip("bf16", rows), rows.bfloat16().float())


def test_lossless_carries_every_bit_or_says_that_it_cannot() -> None:
    codec = make_compressor("lossless")
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    narrow = every.view(-1, 128)  # one exponent per row, NaN, infinities and subnormals among them
    relu = normal(64, 1000).clamp(min=0).bfloat16()
    outliers = normal(64, 1000)
    outliers[:, ::100] *= 1e6
    for rows in (narrow, relu, outliers.bfloat16()):
        assert not codec.misfits(rows)
        back, numbers = round_trip("lossless", rows), ~rows.isnan()
        assert torch.equal(back[numbers].view(torch.int16), rows[numbers].view(torch.int16))
        assert back[~numbers].isnan().all()
    scattered = every[torch.randperm(1 << 16, generator=torch.Generator().manual_seed(1))].view(-1, 128)
    assert codec.misfits(scattered)
    assert not codec.misfits(scattered[:0])
    mixed, out = torch.cat([relu[:3, :128], scattered[:5], relu[3:6, :128]]).contiguous(), torch.empty(11, 128)
    assert not codec.take_refused()
    wire = codec.encode(mixed)
    assert codec.take_refused()
    assert not codec.take_refused()
    out = torch.empty_like(mixed)
    codec.decode(wire, out)
    assert out[3:8].isnan().all()
    assert torch.equal(out[[0, 1, 2, 8, 9, 10]], mixed[[0, 1, 2, 8, 9, 10]])


def test_e4m7_rounds_off_the_small_values_of_blocks_that_do_not_fit() -> None:
    spread = torch.linspace(-30, 0, 64)[:, None] * torch.rand(64, 1000, generator=torch.Generator().manual_seed(2))
    rows = (normal(64, 1000) * torch.exp2(spread)).bfloat16()  # from 30 exponents and more in a row to a normal one's
    codec, lossless = make_compressor("e4m7"), make_compressor("lossless")
    back, num_exact = round_trip("e4m7", rows), 0
    for start in range(0, 1000, 128):
        block, decoded = rows[:, start : start + 128], back[:, start : start + 128]
        error, largest = (decoded.double() - block.double()).abs(), block.double().abs().amax(1, keepdim=True)
        assert (error <= largest.log2().floor().exp2() * 2.0**-14).all()
        fits = torch.tensor([not lossless.misfits(row[None].contiguous()) for row in block])
        assert torch.equal(decoded[fits], block[fits])
        assert not (decoded[~fits] == block[~fits]).all(1).any()
        num_exact += int(fits.sum())
    assert 100 < num_exact < 400
    assert torch.equal(codec.encode(rows[-8:]), lossless.encode(rows[-8:]))
    rows[0, 200] = math.inf
    damaged = round_trip("e4m7", rows[:1])[0]
    assert damaged[128:256].isnan().all()
    assert torch.equal(damaged[256:], back[0, 256:])


def test_sums_of_one_row_are_the_row() -> None:
    values = normal(40, 300, torch.bfloat16).where(torch.arange(300) % 3 > 0, -0.0)
    spread = spread_of(torch.arange(40)[:, None] % 4, 4, [40], "cpu")
    for name in ("e4m7", "lossless", "none"):
        codec = make_compressor(name)
        wire = torch.zeros(40, codec.row_bytes(300, torch.bfloat16), dtype=torch.uint8)
        fold_rows(codec, values, spread, False, wire)
        assert torch.equal(wire, codec.encode(values, spread.target))


@pytest.mark.parametrize("name", ["e4m7", "none"])
def test_sums_are_rounded_to_bfloat16_before_they_are_encoded(name: str) -> None:
    codec, values = make_compressor(name), normal(96, 300, torch.bfloat16)
    spread = spread_of(random_routes(32, 3, 3, drop=0.0), 3, [32], "cpu")
    wire = torch.zeros(32, codec.row_bytes(300, torch.bfloat16), dtype=torch.uint8)
    fold_rows(codec, values, spread, True, wire)
    out = torch.empty(32, 300, dtype=torch.bfloat16)
    codec.decode(wire, out)
    first, second, third = (values.float()[spread.target] * spread.weight[:, None]).view(32, 3, 300).unbind(1)
    assert torch.equal(out, (first + second + third).bfloat16())
