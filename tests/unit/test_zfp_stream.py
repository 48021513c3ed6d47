"""The zfp codec in zfp/, through its C interface, against zfpy (byte for byte) and a plain reference decoder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from zfp.tests import reference
from zfp.tests.codec import KERNELS, Codec, CodecError, build_library

ROOT = Path(__file__).resolve().parents[2]
TINIEST = 2.0**-98  # blocks below it become zeros
SHAPES = ((1,), (7,), (64,), (515,), (1, 1), (3, 5), (4, 4), (64, 4), (130, 4), (17, 33), (40, 130))
RATES = (2.25, 3.0, 4.0, 5.3, 7.9, 8.0, 10.0625, 12.0, 16.0, 24.0, 31.5, 32.0)
KINDS: dict[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    "normal": lambda random, shape: random.standard_normal(shape),
    "heavy tails": lambda random, shape: random.standard_t(1.2, shape),
    "sparse": lambda random, shape: random.standard_normal(shape) * (random.random(shape) < 0.05),
    "constant": lambda _, shape: np.full(shape, -3.7),
    "integers": lambda random, shape: random.integers(-5, 6, shape),
    "smooth": lambda _, shape: np.sin(np.arange(np.prod(shape)) / 7).reshape(shape) + 3,
    "outlier channels": lambda random, shape: (
        random.standard_normal(shape) * (1 + 99 * (np.arange(shape[-1]) % 9 == 0))
    ),
    "every exponent": lambda random, shape: _signs(random, shape) * 2.0 ** random.uniform(-97.9, 127.9, shape),
    "smallest": lambda random, shape: _signs(random, shape) * TINIEST * random.uniform(1, 9, shape),
    "largest": lambda random, shape: random.uniform(-3.4e38, 3.4e38, shape),
}


def _signs(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return random.choice((-1.0, 1.0), shape)


def _field(kind: str, shape: tuple[int, ...]) -> np.ndarray:
    random = np.random.default_rng(len(kind) + sum(shape))
    return np.ascontiguousarray(KINDS[kind](random, shape), dtype=np.float32)


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.fixture(scope="module")
def codec() -> Codec:
    """The codec built from this checkout; built once, then only what changed."""
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake")
    return Codec(build_library(ROOT / "build" / "zfp"))


@pytest.fixture(params=[name for name in KERNELS if name != "automatic"])
def kernel(request: pytest.FixtureRequest, codec: Codec) -> str:
    """Every kernel this processor has."""
    if request.param not in codec.kernels():
        pytest.skip(f"this processor lacks {request.param}")
    return request.param


@pytest.mark.parametrize("kind", KINDS)
def test_same_bytes_as_libzfp(codec: Codec, kernel: str, kind: str) -> None:
    """Streams and, with rounding off, decoded values are those of libzfp."""
    zfpy = pytest.importorskip("zfpy")
    for shape in SHAPES:
        values = _field(kind, shape)
        for rate in RATES:
            stream = np.frombuffer(zfpy.compress_numpy(values, rate=rate, write_header=False), np.uint8)
            assert _same(codec.encode(values, rate, kernel), stream), (shape, rate)
            decoded = zfpy._decompress(stream.tobytes(), zfpy.type_float, shape, rate=rate)
            assert _same(codec.decode(stream, shape, rate, kernel, round_last=False), decoded), (shape, rate)


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "sparse", "smooth", "every exponent"])
def test_round_last_is_that_of_the_reference(codec: Codec, kernel: str, kind: str) -> None:
    """Decoding with the default rounding equals the bit-at-a-time reference decoder."""
    for shape in ((1,), (61,), (3, 5), (33, 4), (18, 22)):
        values = _field(kind, shape)
        for rate in RATES:
            stream = codec.encode(values, rate, kernel)
            expected = reference.decode(stream.tobytes(), shape, rate, round_last=True)
            assert _same(codec.decode(stream, shape, rate, kernel), expected), (shape, rate)


def test_round_last_gains_a_decibel_and_removes_the_bias(codec: Codec) -> None:
    """At rate 8 in 2-d the error falls by 1 dB or more, and its mean to nothing."""
    values = np.random.default_rng(5).standard_normal((16384, 4)).astype(np.float32)
    stream = codec.encode(values, 8)
    errors = [
        codec.decode(stream, values.shape, 8, round_last=rounding).astype(np.float64) - values
        for rounding in (False, True)
    ]
    plain, rounded = (np.mean(error**2) for error in errors)
    assert 10 * np.log10(plain / rounded) > 1.0
    assert 10 * np.log10(np.mean(values.astype(np.float64) ** 2) / rounded) > 36.0
    assert abs(np.mean(errors[1])) < 0.05 * np.sqrt(rounded)


def test_non_finite_blocks_are_nan_and_others_untouched(codec: Codec, kernel: str) -> None:
    """A block with an infinity or a NaN decodes to NaN; the other blocks decode as if it were not there."""
    values = _field("normal", (160, 4))
    clean = codec.decode(codec.encode(values, 8, kernel), values.shape, 8, kernel)
    for odd in (np.inf, -np.inf, np.nan):
        values[42, 3] = odd  # block 10: rows 40 to 43
        decoded = codec.decode(codec.encode(values, 8, kernel), values.shape, 8, kernel)
        assert np.isnan(decoded[40:44]).all()
        assert _same(np.delete(decoded, slice(40, 44), 0), np.delete(clean, slice(40, 44), 0))


def test_tiny_blocks_are_zero(codec: Codec, kernel: str) -> None:
    """A block below 2^-98 decodes to zeros, one that reaches it does not."""
    values = np.full((8, 4), np.nextafter(np.float32(TINIEST), np.float32(0)))
    values[4:] = TINIEST
    decoded = codec.decode(codec.encode(values, 16, kernel), values.shape, 16, kernel)
    assert not decoded[:4].any()
    np.testing.assert_allclose(decoded[4:], TINIEST, rtol=1e-3)


@pytest.mark.parametrize("rate", [4.0, 8.0, 12.0625])
def test_16_bit_values(codec: Codec, kernel: str, rate: float) -> None:
    """16-bit values have the stream of the same values in float32, and are rounded to nearest even when decoded."""
    for shape in ((130, 4), (17, 33), (515,)):
        half = _field("normal", shape).astype(np.float16)
        wide = half.astype(np.float32)
        stream = codec.encode(half, rate, kernel)
        assert _same(stream, codec.encode(wide, rate, kernel))
        decoded = codec.decode(stream, shape, rate, kernel)
        assert _same(codec.decode(stream, shape, rate, kernel, data_type="float16"), decoded.astype(np.float16))

        brain = (wide.view(np.uint32) >> 16).astype(np.uint16)
        stream = codec.encode(brain, rate, kernel)
        assert _same(stream, codec.encode((brain.astype(np.uint32) << 16).view(np.float32), rate, kernel))
        bits = codec.decode(stream, shape, rate, kernel).view(np.uint32)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        assert _same(codec.decode(stream, shape, rate, kernel, data_type="bfloat16"), nearest)


@pytest.mark.parametrize("hidden", [4, 16, 20, 64, 100, 1024])
def test_rows_are_independent_fields(codec: Codec, kernel: str, hidden: int) -> None:
    """Each row is libzfp's stream of the row as (hidden / 4, 4), and any rows decode without the others."""
    zfpy = pytest.importorskip("zfpy")
    values = _field("heavy tails", (7, hidden))
    for rate in (3.0, 8.0, 8.0625):
        stream = codec.encode_rows(values, rate, kernel)
        for row, row_stream in zip(values, stream, strict=True):
            expected = zfpy.compress_numpy(row.reshape(-1, 4), rate=rate, write_header=False)
            assert row_stream.tobytes() == expected
        decoded = codec.decode_rows(stream, hidden, rate, kernel=kernel)
        assert _same(codec.decode_rows(stream[2:5], hidden, rate, kernel=kernel), decoded[2:5])
    assert codec.row_bytes(1024, 8.0) == 1024
    assert codec.encode_rows(values[:0], 8.0, kernel).shape[0] == 0


def test_a_large_row_does_not_damage_its_neighbours(codec: Codec) -> None:
    """Scaling one row by 2^40 leaves the decoded bytes of the others as they were."""
    values = _field("normal", (5, 64))
    before = codec.decode_rows(codec.encode_rows(values, 6), 64, 6)
    values[2] *= 2.0**40
    after = codec.decode_rows(codec.encode_rows(values, 6), 64, 6)
    assert _same(np.delete(after, 2, 0), np.delete(before, 2, 0))
    assert _same(after[2], before[2] * np.float32(2.0**40))


@pytest.mark.parametrize("rate", [0.0, -8.0, 0.5, 33.0, np.nan, np.inf])
def test_bad_rate(codec: Codec, rate: float) -> None:
    """A rate out of range is refused."""
    with pytest.raises(CodecError, match="rate is out of range"):
        codec.encode(np.zeros((4, 4), np.float32), rate)


@pytest.mark.parametrize("hidden", [0, 2, 18, 1023])
def test_bad_hidden(codec: Codec, hidden: int) -> None:
    """A row length that is not a positive multiple of 4 is refused."""
    with pytest.raises(CodecError, match="positive multiple of 4"):
        codec.encode_rows(np.zeros((3, hidden), np.float32), 8)


def test_small_buffer(codec: Codec) -> None:
    """Encoding into too few bytes writes none."""
    stream = np.full(15, 0xAA, np.uint8)
    with pytest.raises(CodecError, match="too small"):
        codec.encode_into(np.ones((4, 4), np.float32), 8, stream)
    assert (stream == 0xAA).all()


@pytest.mark.parametrize("size", [0, 1, 248, 255, 257, 512])
def test_truncated_stream(codec: Codec, size: int) -> None:
    """A stream of any length but the right one is refused."""
    stream = np.resize(codec.encode(_field("normal", (16, 16)), 8), size)
    with pytest.raises(CodecError, match="truncated"):
        codec.decode(stream, (16, 16), 8)


def test_corrupt_stream(codec: Codec, kernel: str) -> None:
    """Bits set where every encoder leaves zeros are found."""
    values = _field("normal", (164, 4))
    values[100:104] = 0
    stream = codec.encode(values, 8, kernel).copy()
    stream[25 * 16 + 9] = 4
    with pytest.raises(CodecError, match="corrupt"):
        codec.decode(stream, values.shape, 8, kernel)


def test_random_streams_never_crash(codec: Codec, kernel: str) -> None:
    """Random bytes decode, or are found corrupt, as with the scalar kernel."""
    random = np.random.default_rng(9)
    for _ in range(300):
        rate = random.integers(9, 513) / 16
        shape = (int(random.integers(1, 60)), int(random.integers(1, 9)))
        stream = random.integers(0, 256, codec.stream_bytes(shape, rate), np.uint8)
        assert _outcome(codec, stream, shape, rate, kernel) == _outcome(codec, stream, shape, rate, "scalar")


def _outcome(codec: Codec, stream: np.ndarray, shape: tuple[int, ...], rate: float, kernel: str) -> bytes | str:
    try:
        return codec.decode(stream, shape, rate, kernel).tobytes()
    except CodecError as error:
        return str(error)
