"""Writes golden.bin: streams made by libzfp (through zfpy), with hashes of what they decode to.

Run it from the top of the repository as `python -m zfp.tests.make_golden`, where numpy and zfpy are installed.
The file, little-endian:
u32 pools, u32 values per pool, the pools' float32 values, u32 cases, then for each case
i32 dimensions, u32 width, u32 height, u32 pool, f64 rate, u64 hash without rounding, u64 hash with round-last,
u32 stream bytes, the stream. A case's values are the first width * height of its pool.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import zfpy

from zfp.tests.reference import decode

_POOL_SIZE = 512
_SHAPES = ((1,), (3,), (64,), (509,), (1, 1), (3, 5), (4, 4), (33, 4), (16, 16), (9, 22))  # (width,), (height, width)
_RATES = (2.25, 3.0, 5.3125, 8.0, 12.0625, 20.0, 32.0)


def pools() -> np.ndarray:
    """Six kinds of data, float32 [6, 512], none of which has a block that libzfp leaves undefined."""
    random = np.random.default_rng(20)
    normal = random.standard_normal(_POOL_SIZE)
    kinds = (
        normal,
        random.standard_t(1.3, _POOL_SIZE),
        normal * (random.random(_POOL_SIZE) < 0.05),
        np.round(3 * normal),
        np.sin(np.arange(_POOL_SIZE) / 9) + 10,
        random.choice((-1.0, 1.0), _POOL_SIZE) * 2.0 ** random.uniform(-97.9, 127, _POOL_SIZE),
    )
    return np.stack(kinds).astype(np.float32)


def hash_bytes(data: bytes) -> int:
    """64-bit FNV-1a."""
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value


def cases(values: np.ndarray) -> Iterator[bytes]:
    """Every case as the file holds it."""
    for pool, shape, rate in ((p, s, r) for p in range(len(values)) for s in _SHAPES for r in _RATES):
        field = values[pool, : np.prod(shape)].reshape(shape)
        stream = zfpy.compress_numpy(field, rate=rate, write_header=False)
        plain = zfpy._decompress(stream, zfpy.type_float, shape, rate=rate)
        if decode(stream, shape, rate, round_last=False).tobytes() != plain.tobytes():
            raise RuntimeError(f"the reference decoder and zfpy differ: pool {pool}, shape {shape}, rate {rate}")
        rounded = decode(stream, shape, rate, round_last=True)
        height = shape[0] if len(shape) == 2 else 1
        hashes = hash_bytes(plain.tobytes()), hash_bytes(rounded.tobytes())
        header = struct.pack("<iIIIdQQI", len(shape), shape[-1], height, pool, rate, *hashes, len(stream))
        yield header + stream


def main() -> None:
    """Write golden.bin beside this file."""
    values = pools()
    encoded = list(cases(values))
    head = struct.pack("<II", *values.shape) + values.tobytes() + struct.pack("<I", len(encoded))
    target = Path(__file__).with_name("golden.bin")
    target.write_bytes(head + b"".join(encoded))
    print(f"{target.name}: {len(encoded)} cases, {target.stat().st_size} bytes")


if __name__ == "__main__":
    main()
