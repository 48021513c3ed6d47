"""Every compressor, compiled or in Python, keeps its contract; a new codec adds one row to MAX_ERROR."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from planmoe_ds.backend import compressor_names, make_compressor
from tests.contract.plugins import plugged_in

# ||decoded - x|| / ||x|| on normal data
MAX_ERROR = {"none": 0.0, "int8": 0.008, "python-bf16": 0.004, "installed-copy": 0.0}
# at 128 values per row; None: the dtype's own
BITS_PER_VALUE = {"none": None, "int8": 8.25, "python-bf16": 16, "installed-copy": None}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DTYPE_ERROR = {torch.float32: 0.0, torch.float16: 5e-4, torch.bfloat16: 4e-3}  # rounding of the output

codecs = pytest.mark.parametrize("name", sorted(MAX_ERROR))


@pytest.fixture(autouse=True)
def _plugins(package: str) -> Iterator[None]:
    with plugged_in(package):
        yield


def normal(rows: int, hidden: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, hidden, generator=torch.Generator().manual_seed(rows * 1000 + hidden)).to(dtype)


def round_trip(name: str, rows: torch.Tensor) -> torch.Tensor:
    codec = make_compressor(name)
    out = torch.full_like(rows, math.inf)
    codec.decode(codec.encode(rows), out)
    return out


def test_every_registered_codec_has_a_row() -> None:
    assert sorted(compressor_names()) == sorted(MAX_ERROR)


@codecs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1, 2, 127, 128, 129, 1000])
def test_round_trip_error(name: str, dtype: torch.dtype, hidden: int) -> None:
    rows = normal(64, hidden, dtype)
    error = (round_trip(name, rows) - rows).double().norm() / rows.double().norm()
    assert error <= MAX_ERROR[name] + (DTYPE_ERROR[dtype] if MAX_ERROR[name] else 0.0)
    if make_compressor(name).lossless:
        assert torch.equal(round_trip(name, rows), rows)


@codecs
def test_size_is_known_beforehand(name: str) -> None:
    codec = make_compressor(name)
    for dtype in DTYPES:
        for hidden in (1, 5, 128, 640):
            assert codec.encode(normal(3, hidden, dtype)).shape == (3, codec.row_bytes(hidden, dtype))
    bits = codec.row_bytes(1280, torch.float32) * 8 / 1280
    assert bits == (BITS_PER_VALUE[name] or 32)


@codecs
@pytest.mark.parametrize("dtype", DTYPES)
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
    rows = normal(6, 300)
    rows[2] *= 1e6
    together = round_trip(name, rows)
    for place in range(6):
        assert torch.equal(together[place], round_trip(name, rows[place : place + 1])[0])


@codecs
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_values_stay_non_finite(name: str, bad: float, dtype: torch.dtype) -> None:
    rows = normal(4, 256, dtype)
    rows[1, 130] = bad
    back = round_trip(name, rows)
    assert not torch.isfinite(back[1, 130])
    assert torch.isfinite(back[[0, 2, 3]]).all()


@codecs
def test_extremes(name: str) -> None:
    assert round_trip(name, torch.zeros(2, 128)).eq(0).all()
    assert make_compressor(name).encode(torch.zeros(0, 128)).shape[0] == 0
    assert round_trip(name, torch.zeros(0, 128)).shape == (0, 128)
    tiny = torch.full((1, 128), 1e-44)
    assert torch.isfinite(round_trip(name, tiny)).all()
    huge = torch.full((1, 128), 3e38)
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
        make_compressor(name).encode(rows, index)


@codecs
def test_bad_wire(name: str) -> None:
    codec = make_compressor(name)
    wire = codec.encode(torch.zeros(2, 128))
    with pytest.raises(ValueError, match="wire must be"):
        codec.decode(wire[:, :-1].contiguous(), torch.zeros(2, 128))
    with pytest.raises(ValueError, match="wire has 2 rows, expected 3"):
        codec.decode(wire, torch.zeros(3, 128))
    with pytest.raises(ValueError, match="wire has 2 rows, expected 1"):
        codec.decode(wire, torch.zeros(3, 128), torch.tensor([0]))


def test_int8_refuses_float64() -> None:
    with pytest.raises(ValueError, match="takes float32, float16 or bfloat16 rows, got Double"):
        make_compressor("int8").encode(torch.zeros(1, 4, dtype=torch.float64))


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown compressor 'int9'; known: installed-copy, int8, none, python-bf16"):
        make_compressor("int9")


@pytest.mark.gpu
@codecs
@pytest.mark.parametrize("dtype", DTYPES)
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
