"""Rows, and what a codec makes of them."""

from __future__ import annotations

import math

import torch

from planmoe_ds.backend import make_compressor


def normal(rows: int, hidden: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The same for the same shape."""
    return torch.randn(rows, hidden, generator=torch.Generator().manual_seed(rows * 1000 + hidden)).to(dtype)


def round_trip(name: str, rows: torch.Tensor) -> torch.Tensor:
    """Rows [R, H] through a codec and back."""
    codec = make_compressor(name)
    out = torch.full_like(rows, math.inf)
    codec.decode(codec.encode(rows), out)
    return out
