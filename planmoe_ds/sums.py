"""What comes back to each token, added up: a layer call's result, or its gradient.

Shape legend: T tokens, H hidden size, K columns of a number per route; see plan.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from planmoe_ds.backend import Compressor, make_compressor, sum_rows, sums_on_device, unpack_add
from planmoe_ds.plan import ChunkPlan, SidePlan
from planmoe_ds.rows import add_at

if TYPE_CHECKING:
    from planmoe_ds.group import Sides
    from planmoe_ds.wire import Wire


class Sums:
    """Every token's total over the rows that return for it, in float32 (float64 for float64 rows) until complete.

    num_extra: columns of that dtype that travel behind the values. Accelerators with kernels for it write each total
    once, in its final dtype, where a token's rows are all in one chunk.
    """

    def __init__(self, wire: Wire, num_tokens: int, num_extra: int, like: torch.Tensor) -> None:
        self._wire = wire
        self._num_tokens = num_tokens
        self._num_extra = num_extra
        self._like = like
        self._values: torch.Tensor | None = None
        self._extra: torch.Tensor | None = None

    def add(self, chunk: ChunkPlan, rows: Sides) -> None:
        """Rows of a chunk that returned."""
        wire = self._wire
        if wire.stays_here:
            self._values, self._extra = rows.near.view(wire.dtype), rows.extra
        elif chunk.near.returns is not None and self._has_kernels:
            self._add_on_device(chunk, rows)
        else:
            self._add_rows(chunk, rows)

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """[T, H]."""
        return self._new_zeros(self._wire.hidden, dtype) if self._values is None else self._values.to(dtype)

    def extra(self) -> torch.Tensor:
        """[T, K]."""
        return self._new_zeros(self._num_extra, self._wire.wide_dtype) if self._extra is None else self._extra

    @property
    def _has_kernels(self) -> bool:
        codecs, dtype = self._wire.codecs, self._wire.dtype
        return all(sums_on_device(codec, dtype, self._like) for codec in (codecs.near, codecs.far))

    def _sides(self, chunk: ChunkPlan, rows: Sides) -> list[tuple[SidePlan, torch.Tensor, Compressor]]:
        codecs = self._wire.codecs
        return [(chunk.near, rows.near, codecs.near), (chunk.far, rows.far, codecs.far)]

    def _add_rows(self, chunk: ChunkPlan, rows: Sides) -> None:
        wide = self._wire.wide_dtype
        if self._values is None:
            self._values = self._new_zeros(self._wire.hidden, wide)
            self._extra = self._new_zeros(self._num_extra, wide)
        for side, wire, codec in self._sides(chunk, rows):
            unpack_add(codec, wire, self._wire.dtype, side.token, self._values)
            if self._num_extra and wire.shape[0] > 0:
                extra = self._extra_columns(wire, codec).clone(memory_format=torch.contiguous_format).view(wide)
                add_at(self.extra(), side.token, extra)

    def _add_on_device(self, chunk: ChunkPlan, rows: Sides) -> None:
        wide, (first, last), chunks = self._wire.wide_dtype, chunk.tokens, self._wire.plan.chunks
        every = (0, self._num_tokens)
        again = len(chunks) > 1 and all(other.tokens == every for other in chunks)  # they have the same tokens
        if self._values is None:
            self._values = self._new_empty(self._wire.hidden, wide if again else self._wire.dtype)
            self._extra = self._new_empty(self._num_extra, wide)
            base = extra_base = None
        elif again:
            base, extra_base = self._values, self._extra
        else:
            base = extra_base = None
        values, extra = self._values[first:last], self.extra()[first:last]
        sides = [parts for parts in self._sides(chunk, rows) if parts[1].shape[0] > 0] or self._sides(chunk, rows)[:1]
        plain = make_compressor("none")
        for place, (side, wire, codec) in enumerate(sides):
            assert side.returns is not None
            out = values
            if place < len(sides) - 1 and values.dtype != wide:
                out = torch.empty_like(values, dtype=wide)
            sum_rows(codec, wire, self._wire.dtype, side.returns, base, out)
            base = out
            if self._num_extra:
                sum_rows(plain, self._extra_columns(wire, codec), wide, side.returns, extra_base, extra)
                extra_base = extra

    def _extra_columns(self, wire: torch.Tensor, codec: Compressor) -> torch.Tensor:
        first = self._wire.values_width(codec)
        return wire[:, first : first + self._num_extra * self._wire.wide_dtype.itemsize]

    def _new_zeros(self, columns: int, dtype: torch.dtype) -> torch.Tensor:
        return self._like.new_zeros((self._num_tokens, columns), dtype=dtype)

    def _new_empty(self, columns: int, dtype: torch.dtype) -> torch.Tensor:
        return self._like.new_empty((self._num_tokens, columns), dtype=dtype)
