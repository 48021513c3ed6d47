"""Sums that accelerators write with one kernel, the kernel replaced by one that says the same on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from planmoe_ds import sums
from planmoe_ds.backend import make_compressor

HIDDEN = 8
NO_ROWS = torch.empty(0, HIDDEN).view(torch.uint8)


def sum_rows(_codec: Any, wire: Any, dtype: Any, returns: Any, base: torch.Tensor | None, out: torch.Tensor) -> None:
    """See csrc/kernels/wire_rows.h; a base is float32."""
    assert base is None or base.dtype is torch.float32
    total = torch.zeros(out.shape) if base is None else base.clone()
    for token, rows in enumerate(returns.tolist()):
        for row in rows:
            if row >= 0:
                total[token] += wire.view(dtype)[row].float()
    out.copy_(total)


@pytest.fixture(autouse=True)
def _memory_holds_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(mode=True)
    yield
    torch.use_deterministic_algorithms(mode=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 2, 5])
@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_chunks_come_back_in_any_order(
    dtype: torch.dtype, num_tokens: int, by_token: bool, order: tuple[int, ...]
) -> None:
    """By token each token has a row in one chunk, otherwise one in every chunk."""
    none, chunks, wires = make_compressor("none"), [], []
    for number in range(3):
        span = (number * num_tokens // 3, (number + 1) * num_tokens // 3) if by_token else (0, num_tokens)
        num_rows = span[1] - span[0]
        returns = torch.arange(num_rows, dtype=torch.int32)[:, None]
        chunks.append(SimpleNamespace(tokens=span, near=SimpleNamespace(returns=returns), far=SimpleNamespace()))
        rows = torch.full((num_rows, HIDDEN), number + 1.0, dtype=dtype)
        wires.append(SimpleNamespace(near=rows.view(torch.uint8), far=NO_ROWS))
    wire = SimpleNamespace(
        stays_here=False, hidden=HIDDEN, dtype=dtype, wide_dtype=torch.float32,
        codecs=SimpleNamespace(near=none, far=none), plan=SimpleNamespace(chunks=chunks),
    )  # fmt: skip
    with patch.object(sums, "sum_rows", sum_rows), patch.object(sums, "sums_on_device", lambda *_: True):
        total: Any = sums.Sums(wire, num_tokens, 0, torch.zeros(num_tokens, HIDDEN, dtype=dtype))  # type: ignore[arg-type]
        for number in order:
            total.add(chunks[number], wires[number])
    found = total.values(dtype)[:, 0].tolist()
    expected = [6.0] * num_tokens
    if by_token:
        expected = [number + 1.0 for number, chunk in enumerate(chunks) for _ in range(*chunk.tokens)]
    assert found == expected
