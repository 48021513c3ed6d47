"""Stock DeepSpeed and Megatron without their all-to-alls: a bound for benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


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


@contextmanager
def without_megatron_all_to_all(*, active: bool) -> Iterator[None]:
    """Stock's all-to-all becomes a local copy of the right size: same compute, wrong tokens."""
    import torch
    from megatron.core.transformer.moe import token_dispatcher

    original = token_dispatcher.all_to_all

    def copy(_group: Any, rows: Any, output_splits: Any = None, _input_splits: Any = None, **_: Any) -> Any:
        num_rows = rows.shape[0] if output_splits is None else int(sum(output_splits))
        return rows.index_select(0, torch.arange(num_rows, device=rows.device) % max(rows.shape[0], 1))

    if active:
        token_dispatcher.all_to_all = copy
    try:
        yield
    finally:
        token_dispatcher.all_to_all = original
