"""Every compressor, compiled or in Python, keeps its contract; a new codec adds one row to PROMISES."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from planmoe_ds.backend import (
    RowRoutes,
    compressor_names,
    dot_rows,
    find_experts,
    fold_rows,
    make_compressor,
    spread_rows,
    unpack_add,
)
from tests.contract.plugins import plugged_in
from tests.contract.rows import normal, round_trip

ALL = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Promise:
    """What a codec says of itself.

    max_error: ||decoded - x|| / ||x|| on normal data; bits: per value at 1280 values per row, None: the dtype's own;
    dtypes: that it takes, it refuses the others.
    """

    max_error: float
    bits: float | None
    dtypes: tuple[torch.dtype, ...] = ALL


PROMISES = {
    "none": Promise(0.0, None),
    "bf16": Promise(0.0022, 16, (torch.float32, torch.bfloat16)),
    "e4m7": Promise(0.0, 12.5, (torch.bfloat16,)),
    "fp8": Promise(0.03, 8.25),
    "hadamard_int8": Promise(0.009, 8.25),
    "int4": Promise(0.115, 4.125),
    "int8": Promise(0.008, 8.25),
    "lossless": Promise(0.0, 12.5, (torch.bfloat16,)),
    "zfp": Promise(0.02, 8),
    "zfp:16": Promise(0.0001, 16),
    "python-bf16": Promise(0.004, 16),
    "installed-copy": Promise(0.0, None),
}
DTYPES = list(ALL)
DTYPE_ERROR = {torch.float32: 0.0, torch.float16: 5e-4, torch.bfloat16: 4e-3}  # rounding of the output

codecs = pytest.mark.parametrize("name", sorted(PROMISES))
codecs_and_dtypes = pytest.mark.parametrize(
    ("name", "dtype"),
    [pytest.param(name, dtype, id=f"{name}-{dtype}") for name in sorted(PROMISES) for dtype in PROMISES[name].dtypes],
)


@pytest.fixture(autouse=True)
def _plugins(package: str) -> Iterator[None]:
    with plugged_in(package):
        yield


def first_dtype(name: str) -> torch.dtype:
    return PROMISES[name].dtypes[0]


def test_every_registered_codec_has_a_row() -> None:
    assert set(compressor_names()) == {name.partition(":")[0] for name in PROMISES}


@codecs_and_dtypes
@pytest.mark.parametrize("hidden", [1, 2, 127, 128, 129, 1000])
def test_round_trip_error(name: str, dtype: torch.dtype, hidden: int) -> None:
    rows = normal(64, hidden, dtype)
    error = (round_trip(name, rows) - rows).double().norm() / rows.double().norm()
    most = PROMISES[name].max_error
    assert error <= most + (DTYPE_ERROR[dtype] if most else 0.0)
    if make_compressor(name).lossless:
        assert torch.equal(round_trip(name, rows), rows)


@codecs
def test_size_is_known_beforehand(name: str) -> None:
    codec = make_compressor(name)
    for dtype in PROMISES[name].dtypes:
        for hidden in (1, 5, 128, 640):
            assert codec.encode(normal(3, hidden, dtype)).shape == (3, codec.row_bytes(hidden, dtype))
        assert codec.row_bytes(1280, dtype) * 8 / 1280 == (PROMISES[name].bits or 8 * dtype.itemsize)


@codecs_and_dtypes
def test_gather_and_scatter(name: str, dtype: torch.dtype) -> None:
    codec, rows = make_compressor(name), normal(10, 200, dtype)
    index = torch.tensor([7, 0, 3])
    assert torch.equal(codec.encode(rows, index), codec.encode(rows[index]))
    out = torch.full_like(rows, 5.0)
    codec.decode(codec.encode(rows, index), out, index)
    untouched = [place for place in range(10) if place not in index.tolist()]
    assert torch.equal(out[untouched], torch.full_like(out[untouched], 5.0))
    assert torch.equal(out[index], round_trip(name, rows[index]))


@codecs
def test_rows_are_independent(name: str) -> None:
    rows = normal(6, 300, first_dtype(name))
    rows[2] *= 1e6
    together = round_trip(name, rows)
    for place in range(6):
        assert torch.equal(together[place], round_trip(name, rows[place : place + 1])[0])


@codecs_and_dtypes
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_values_stay_non_finite(name: str, bad: float, dtype: torch.dtype) -> None:
    rows = normal(4, 256, dtype)
    rows[1, 130] = bad
    back = round_trip(name, rows)
    assert not torch.isfinite(back[1, 130])
    assert torch.isfinite(back[[0, 2, 3]]).all()


@codecs
def test_extremes(name: str) -> None:
    dtype = first_dtype(name)
    assert round_trip(name, torch.zeros(2, 128, dtype=dtype)).eq(0).all()
    assert make_compressor(name).encode(torch.zeros(0, 128, dtype=dtype)).shape[0] == 0
    assert round_trip(name, torch.zeros(0, 128, dtype=dtype)).shape == (0, 128)
    tiny = torch.full((1, 128), 1e-44, dtype=dtype)
    assert torch.isfinite(round_trip(name, tiny)).all()
    huge = torch.full((1, 128), 3e38, dtype=dtype)
    assert torch.isfinite(round_trip(name, huge)).all()


@codecs
@pytest.mark.parametrize(
    ("rows", "index", "words"),
    [
        (torch.zeros(3), None, "2-d"),
        (torch.zeros(4, 6).t(), None, "contiguous"),
        (torch.zeros(2, 4, dtype=torch.int32), None, "floating point"),
        (torch.zeros(2, 4), torch.tensor([0, 2]), "there are 2 rows"),
        (torch.zeros(2, 4), torch.tensor([-1]), "there are 2 rows"),
        (torch.zeros(2, 4), torch.tensor([0], dtype=torch.int32), "int64"),
    ],
)
def test_bad_rows(name: str, rows: torch.Tensor, index: torch.Tensor | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_compressor(name).encode(rows.to(first_dtype(name)) if rows.is_floating_point() else rows, index)


@codecs
def test_bad_wire(name: str) -> None:
    codec = make_compressor(name)
    two, three = (torch.zeros(rows, 128, dtype=first_dtype(name)) for rows in (2, 3))
    wire = codec.encode(two)
    with pytest.raises(ValueError, match="wire must be"):
        codec.decode(wire[:, :-1].contiguous(), two)
    with pytest.raises(ValueError, match="wire has 2 rows, expected 3"):
        codec.decode(wire, three)
    with pytest.raises(ValueError, match="wire has 2 rows, expected 1"):
        codec.decode(wire, three, torch.tensor([0]))


@codecs
@pytest.mark.parametrize("dtype", [torch.float64, *ALL])
def test_other_dtypes_are_refused(name: str, dtype: torch.dtype) -> None:
    if dtype in PROMISES[name].dtypes or PROMISES[name].bits is None:
        return
    codec, rows, one = make_compressor(name), torch.ones(1, 4, dtype=dtype), torch.zeros(1, dtype=torch.int64)
    wire = torch.zeros(1, codec.row_bytes(4, dtype), dtype=torch.uint8)
    spread = find_experts(
        rows=torch.zeros(1, 2, dtype=torch.uint8),
        routes=RowRoutes(offset=0, top_k=1, id_bytes=2, experts_per_rank=1, last_expert=1),
        first_id=0, num_entries=1, weight_offset=-1, weight_dtype=torch.float32, row_dtype=dtype,
        base=[0], source_rows=[1],
    )  # fmt: skip
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    for use in (
        lambda: codec.encode(rows),
        lambda: codec.decode(wire, rows),
        lambda: unpack_add(codec, wire, dtype, one, rows.to(wide)),
        lambda: spread_rows(codec, wire, spread, False, rows),
        lambda: fold_rows(codec, rows, spread, False, wire),
        lambda: dot_rows(codec, wire, spread, rows, 1),
    ):
        with pytest.raises(ValueError, match=r"takes .* rows, got "):
            use()


@codecs
def test_any_wire_decodes_or_is_refused(name: str) -> None:
    codec, dtype = make_compressor(name), first_dtype(name)
    generator = torch.Generator().manual_seed(7)
    for hidden in (1, 100, 128, 1000):
        width = codec.row_bytes(hidden, dtype)
        for most in (1, 16, 256):
            wire = torch.randint(0, most, (3, width), generator=generator, dtype=torch.uint8)
            out = torch.empty(3, hidden, dtype=dtype)
            try:
                codec.decode(wire, out)
            except ValueError as error:
                assert "corrupt" in str(error)  # noqa: PT017


@pytest.mark.parametrize("name", ["hadamard_int8", "int4"])
def test_hadamard_keeps_its_error_whatever_the_data(name: str) -> None:
    rows, most = normal(64, 512), PROMISES[name].max_error * 1.35
    outliers = rows.clone()
    outliers[:, ::100] *= 100
    smooth = 10 + torch.linspace(0, 1, 512).repeat(64, 1)
    for data in (outliers, smooth, torch.ones(4, 512), torch.eye(128)):
        assert (round_trip(name, data) - data).norm() <= most * data.norm()


@pytest.mark.parametrize("name", ["zfp:0.5", "zfp:33", "zfp:-1", "zfp:nan", "zfp:eight", "zfp:8bits"])
def test_bad_rates(name: str) -> None:
    rate = name.partition(":")[2]
    with pytest.raises(ValueError, match=rf"the rate of zfp is '{rate}', expected a number from 1 to 32"):
        make_compressor(name)


def test_settings_where_none_belong() -> None:
    with pytest.raises(ValueError, match="'int8' takes no setting, got 'int8:4'"):
        make_compressor("int8:4")
    with pytest.raises(ValueError, match="'zfp:' lacks a setting"):
        make_compressor("zfp:")
    with pytest.raises(ValueError, match="'python-bf16' takes no setting, got 'python-bf16:2'"):
        make_compressor("python-bf16:2")


def test_unknown_name_lists_the_known_ones() -> None:
    known = ", ".join(compressor_names())
    assert known.startswith("bf16, e4m7, fp8, ")
    for name in ("int9", "int9:4"):
        with pytest.raises(ValueError, match=f"unknown compressor 'int9'; known: {known}"):
            make_compressor(name)


@pytest.mark.gpu
@codecs_and_dtypes
@pytest.mark.parametrize("hidden", [1, 129, 1000])
def test_cuda_decodes_what_the_cpu_does(name: str, dtype: torch.dtype, hidden: int) -> None:
    codec, rows = make_compressor(name), normal(64, hidden, dtype)
    rows[3, hidden // 2] = math.nan
    index = torch.arange(63, -1, -1)
    assert codec.encode(rows[:0].cuda()).shape == (0, codec.row_bytes(hidden, dtype))
    wire = codec.encode(rows.cuda(), index.cuda())
    out = torch.empty_like(rows, device="cuda")
    codec.decode(wire, out, index.cuda())
    expected = round_trip(name, rows)
    assert torch.equal(torch.isfinite(out.cpu()), torch.isfinite(expected))
    finite = torch.isfinite(expected)
    step = 0.0 if codec.lossless else float(rows[finite].abs().max()) / 127  # a tie may round the other way
    assert torch.allclose(out.cpu()[finite].float(), expected[finite].float(), rtol=1e-2, atol=step)
    swapped = torch.empty_like(rows)  # one side may be the other's peer: the bytes mean the same on both
    codec.decode(wire.cpu(), swapped, index)
    assert torch.allclose(swapped[finite].float(), expected[finite].float(), rtol=1e-2, atol=step)
