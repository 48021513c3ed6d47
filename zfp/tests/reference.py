"""A slow, plain decoder of fixed-rate zfp streams: the oracle for round-last decoding, apart from the codec."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

_NEGABINARY = 0xAAAAAAAA
_ORDER = {1: (0, 1, 2, 3), 2: (0, 1, 4, 5, 2, 8, 6, 9, 3, 12, 10, 7, 13, 11, 14, 15)}


def decode(stream: bytes, shape: tuple[int, ...], rate: float, *, round_last: bool) -> np.ndarray:
    """Decode a stream of float32 values, of `rate` bits each, into an array of `shape`, (width,) or (height, width)."""
    size = 4 ** len(shape)
    block_bits = math.floor(size * rate + 0.5)
    bits = np.unpackbits(np.frombuffer(stream, np.uint8), bitorder="little").tolist()
    counts = [-(-length // 4) for length in shape]
    padded = np.zeros([4 * count for count in counts], np.float32)
    for index, place in enumerate(np.ndindex(*counts)):
        block = _decode_block(bits[index * block_bits : (index + 1) * block_bits], len(shape), round_last)
        window = tuple(slice(4 * position, 4 * position + 4) for position in place)
        padded[window] = block.reshape([4] * len(shape))
    return padded[tuple(slice(length) for length in shape)]


def _decode_block(bits: list[int], dimensions: int, round_last: bool) -> np.ndarray:
    size = 4**dimensions
    if bits[0] == 0:
        return np.zeros(size, np.float32)
    exponent = sum(bit << i for i, bit in enumerate(bits[1:9]))
    if exponent == 0:
        return np.full(size, np.nan, np.float32)
    coefficients = _decode_planes(iter(bits[9:]), len(bits) - 9, size, round_last)
    values = [0] * size
    for coefficient, index in zip(coefficients, _ORDER[dimensions], strict=True):
        values[index] = _signed((coefficient ^ _NEGABINARY) - _NEGABINARY)
    for stride in (4, 1) if dimensions == 2 else (1,):
        starts = range(0, size, 4) if stride == 1 else range(4)
        for start in starts:
            _inverse_lift(values, start, stride)
    with np.errstate(over="ignore", under="ignore"):
        scale = np.float32(math.ldexp(1.0, exponent - 157))
        return np.array(values, np.int64).astype(np.float32) * scale


def _decode_planes(bits: Iterator[int], budget: int, size: int, round_last: bool) -> list[int]:
    """Read bit planes, one bit at a time, until `budget` is spent."""
    coefficients = [0] * size
    state = _State(budget)
    plane = 32
    while plane > 0 and state.budget > 0:
        plane -= 1
        for j in _decode_plane(bits, size, state):
            coefficients[j] |= 1 << plane
    planes = 32 - plane
    if round_last and 0 < planes < 31:
        for j in range(size):
            coefficients[j] += (0x2AAAAAAA if j < state.known else 0x55555555) >> planes
    return coefficients


@dataclass
class _State:
    budget: int  # bits left
    significant: int = 0  # leading coefficients that some plane so far has touched
    known: int = 0  # leading coefficients whose bit of the last plane was read


def _decode_plane(bits: Iterator[int], size: int, state: _State) -> list[int]:
    """Coefficients whose bit of this plane is set."""
    state.known = min(state.significant, state.budget)
    state.budget -= state.known
    found = [j for j in range(state.known) if next(bits)]
    while state.significant < size and state.budget > 0:
        state.budget -= 1
        if not next(bits):
            state.known = size
            break
        while state.significant < size - 1 and state.budget > 0:
            state.budget -= 1
            if next(bits):
                break
            state.significant += 1
        found.append(state.significant)
        state.significant += 1
        state.known = state.significant
    return found


def _inverse_lift(values: list[int], start: int, stride: int) -> None:
    x, y, z, w = (values[start + i * stride] for i in range(4))
    y = _signed(y + (w >> 1))
    w = _signed(w - (y >> 1))
    y = _signed(y + w)
    w = _signed(2 * w - y)
    z = _signed(z + x)
    x = _signed(2 * x - z)
    y = _signed(y + z)
    z = _signed(2 * z - y)
    w = _signed(w + x)
    x = _signed(2 * x - w)
    for i, value in enumerate((x, y, z, w)):
        values[start + i * stride] = value


def _signed(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31
