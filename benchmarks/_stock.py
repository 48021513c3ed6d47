"""Stock DeepSpeed as a bound for benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_all_to_all(*, active: bool) -> Iterator[None]:
    """Stock's all-to-all becomes the identity: the same computing, wrong tokens."""
    from deepspeed.moe import sharded_moe

    original = sharded_moe._AllToAll
    if active:
        sharded_moe._AllToAll = type("Identity", (), {"apply": staticmethod(lambda _group, rows: rows.contiguous())})
    try:
        yield
    finally:
        sharded_moe._AllToAll = original
