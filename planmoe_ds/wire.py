"""What travels: rows of a layer call on the wire, out to the experts and back.

A wire row holds the encoded values, padded to a multiple of eight bytes, then columns of numbers. Tokens carry the
weights, the expert numbers and, where outputs travel back row by row, the places of all their routes; gradients that
return carry those of the weights.

Shape legend: T tokens, K routes per token, H hidden size, N rows of this rank; see plan.py for the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from planmoe_ds.backend import (
    Compressor,
    RowRoutes,
    RowSums,
    Spread,
    aligned,
    dot_rows,
    find_experts,
    fold_rows,
    gather_bytes,
    make_compressor,
    pack_columns,
    spread_rows,
)
from planmoe_ds.codecs import LinkCodecs
from planmoe_ds.compression import NONE
from planmoe_ds.group import ExpertGroup, SidedArrival, SideRows, Sides
from planmoe_ds.plan import ChunkPlan, RoutingPlan, SidePlan
from planmoe_ds.rows import RowOrder

Launch = Callable[[], SidedArrival]  # starts an exchange of rows that are packed already
Pack = Callable[["Wire"], Launch]  # packs rows for a wire
_MOST_SHORT_IDS = 1 << 15
_PLACE_BYTES = 4
_DEVICE_BYTES = 16  # accelerators read that much at once, so rows there start at multiples of it
_NO_ROUTES = RowRoutes()  # ranks that pass rows on know them from the tokens' way out


@dataclass(frozen=True)
class TokenColumns:
    """What tokens carry beside their values: uint8 [T, width], by column: weights, places, expert numbers, padding.

    num_extra: columns of weight gradients that return, the first K of them in use.
    """

    bytes_T: torch.Tensor
    top_k: int
    weight_dtype: torch.dtype
    id_bytes: int
    has_places: bool
    num_extra: int

    @property
    def place_column(self) -> int:
        """Where the places start."""
        return self.top_k * self.weight_dtype.itemsize

    @property
    def id_column(self) -> int:
        """Where the expert numbers start."""
        return self.place_column + self.top_k * _PLACE_BYTES * self.has_places

    @property
    def width(self) -> int:
        """Bytes per token."""
        return self.bytes_T.shape[1]


def token_columns(
    expert_KT: torch.Tensor, weight_KT: torch.Tensor, num_experts: int, order: RowOrder | None
) -> TokenColumns:
    """The columns of all tokens of a layer call."""
    id_dtype = torch.int16 if num_experts <= _MOST_SHORT_IDS else torch.int32
    columns = [(weight_KT.detach(), weight_KT.element_size()), (expert_KT, id_dtype.itemsize)]
    if order is not None:
        columns.insert(1, (order.place_KT, _PLACE_BYTES))
    num_extra = top_k = expert_KT.shape[0]
    width = top_k * sum(size for _, size in columns)
    if expert_KT.device.type != "cpu":
        width = -(-width // _DEVICE_BYTES) * _DEVICE_BYTES
        num_extra = -(-top_k * 4 // _DEVICE_BYTES) * _DEVICE_BYTES // 4
    return TokenColumns(
        pack_columns(columns, width), top_k, weight_KT.dtype, id_dtype.itemsize, order is not None, num_extra
    )


def _bytes(values: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, bytes] of [rows, columns]; cloned, since view() wants the strides of a fresh tensor."""
    return values.clone(memory_format=torch.contiguous_format).view(torch.uint8)


@dataclass(frozen=True)
class Spreads:
    """Which rows of the experts' buffer the arrived rows of both sides feed."""

    near: Spread
    far: Spread


@dataclass(frozen=True)
class Wire:
    """One direction's encoding of a layer call's rows: H values of `dtype`.

    stays_here: this rank is alone and no direction of the call encodes anything, so rows are not copied to a wire:
    row t is token t. measure: called with the link ("near", "far", "inner"), its codec and the rows that it encodes, if
    quality is asked.
    """

    group: ExpertGroup
    plan: RoutingPlan
    codecs: LinkCodecs
    hidden: int
    dtype: torch.dtype
    stays_here: bool = False
    measure: Callable[[str, Compressor, torch.Tensor], None] | None = None

    def raw(self) -> Wire:
        """The same without codecs."""
        return replace(self, codecs=LinkCodecs.everywhere(NONE))

    def send_tokens(self, chunk: ChunkPlan, tokens: torch.Tensor, columns: TokenColumns | None) -> Launch:
        """Pack a chunk's tokens [T, H] to be sent; without columns they go where the last ones with columns went."""
        if self.stays_here:
            rows = tokens.view(torch.uint8)
            return partial(SidedArrival, Sides(rows, rows[:0]), None)
        self._measure_rows(tokens, chunk.near.token, chunk.far.token)
        send = Sides(
            self._token_rows(chunk.near, tokens, columns, self.codecs.near),
            self._token_rows(chunk.far, tokens, columns, self.codecs.far),
        )
        routes = _NO_ROUTES if columns is None else self._routes(chunk, columns, self.codecs.far)
        return partial(self.group.dispatch, send, chunk.itinerary, routes)

    def find_spreads(self, chunk: ChunkPlan, rows: Sides, columns: TokenColumns) -> Spreads:
        """Read the columns of arrived tokens."""
        if self.stays_here:
            everyone = replace(chunk.near, received_rows=[rows.near.shape[0]])
            return Spreads(
                self._find_spread(chunk, everyone, columns.bytes_T, columns, 0),
                self._find_spread(chunk, chunk.far, columns.bytes_T[:0], columns, 0),
            )
        return Spreads(
            self._find_spread(chunk, chunk.near, rows.near, columns, self.values_width(self.codecs.near)),
            self._find_spread(chunk, chunk.far, rows.far, columns, self.values_width(self.codecs.far)),
        )

    def spread(self, chunk: ChunkPlan, rows: Sides, spreads: Spreads, weighted: bool) -> torch.Tensor:
        """Arrived rows -> the experts' buffer [rows, H], times the routes' weights if `weighted`."""
        buffer = self._new_buffer(chunk, rows.near.device)
        spread_rows(self.codecs.near, rows.near, spreads.near, weighted, buffer)
        spread_rows(self.codecs.far, rows.far, spreads.far, weighted, buffer)
        return buffer

    def route_weights(self, chunk: ChunkPlan, spreads: Spreads, columns: TokenColumns) -> torch.Tensor:
        """The weight of the route behind each row of the experts' buffer, [rows]; zero in empty slots."""
        sides = (spreads.near, spreads.far)
        weights = sides[0].weight.new_zeros(chunk.layout.num_rows)
        for side in sides:
            weights[side.target] = side.weight
        return weights.to(columns.weight_dtype)

    def by_route(self, spreads: Spreads, values: torch.Tensor, num_extra: int) -> Sides:
        """Values of the buffer's rows, [rows], by arrived row and route, [*, num_extra], zero from column K on."""

        def side(spread: Spread) -> torch.Tensor:
            result = values.new_zeros((spread.start.shape[0] - 1, num_extra))
            result[spread.source, spread.route] = values[spread.target]
            return result

        return Sides(side(spreads.near), side(spreads.far))

    def dots(self, rows: Sides, spreads: Spreads, outputs: torch.Tensor, top_k: int) -> Sides:
        """Products of arrived rows with the experts' outputs [rows, H], by arrived row and route, [*, K]."""
        return Sides(
            dot_rows(self.codecs.near, rows.near, spreads.near, outputs, top_k),
            dot_rows(self.codecs.far, rows.far, spreads.far, outputs, top_k),
        )

    def send_sums(
        self, chunk: ChunkPlan, rows: torch.Tensor, spreads: Spreads, weighted: bool, extra: Sides | None = None
    ) -> Launch:
        """Pack the sums of each arrived row's expert outputs [rows, H] for their way back, with `extra` columns."""
        if self.stays_here:
            totals = rows.new_empty((spreads.near.start.shape[0] - 1, self.hidden)).view(torch.uint8)
            fold_rows(self.codecs.near, rows, spreads.near, weighted, totals)
            return partial(SidedArrival, Sides(totals, totals[:0], None if extra is None else extra.near), None)
        inner = self.codecs.inner if self.group.comm.passes_on else self.codecs.far
        self._measure_sums(chunk, rows, spreads, weighted)
        send = Sides(
            self._sum_rows(
                chunk.near, rows, spreads.near, weighted, self.codecs.near, None if extra is None else extra.near
            ),
            self._sum_rows(chunk.far, rows, spreads.far, weighted, inner, None if extra is None else extra.far),
        )
        num_extra = 0 if extra is None else extra.near.shape[1]
        extra_bytes = 0 if extra is None else num_extra * extra.near.element_size()
        sums = RowSums(inner=inner, outer=self.codecs.far, hidden=self.hidden, dtype=self.dtype, extra=num_extra)
        far_width = self.values_width(self.codecs.far) + extra_bytes
        return partial(self.group.combine, send, chunk.itinerary, sums, far_width)

    def send_rows_out(self, chunk: ChunkPlan, rows_NH: torch.Tensor) -> Launch:
        """Pack a chunk's rows, one per route, for their way to the experts."""
        assert chunk.rows is not None
        near, far = chunk.rows.near, chunk.rows.far
        self._measure_rows(rows_NH, near.row, far.row)
        send = Sides(self.codecs.near.encode(rows_NH, near.row), self.codecs.far.encode(rows_NH, far.row))
        sent, received = SideRows(near.sent, far.sent), SideRows(near.received, far.received)
        return partial(self.group.exchange_sides, send, sent, received)

    def place_rows(self, chunk: ChunkPlan, rows: Sides) -> torch.Tensor:
        """Arrived rows -> the experts' buffer [rows, H]."""
        assert chunk.rows is not None
        buffer = self._new_buffer(chunk, rows.near.device)
        self.codecs.near.decode(rows.near, buffer, chunk.rows.near.buffer_row)
        self.codecs.far.decode(rows.far, buffer, chunk.rows.far.buffer_row)
        return buffer

    def send_rows_back(self, chunk: ChunkPlan, rows: torch.Tensor, extra: torch.Tensor | None = None) -> Launch:
        """Pack the experts' outputs [rows, H] for their way back, one row per route, each with its `extra` number."""
        assert chunk.rows is not None
        near, far = chunk.rows.near, chunk.rows.far
        self._measure_rows(rows, near.buffer_row, far.buffer_row)
        send = Sides(self.codecs.near.encode(rows, near.buffer_row), self.codecs.far.encode(rows, far.buffer_row))
        if extra is not None:
            numbers = (_bytes(extra[side.buffer_row].unsqueeze(1)) for side in (near, far))
            send = Sides(*(torch.cat(pair, dim=1) for pair in zip((send.near, send.far), numbers, strict=True)))
        sent, received = SideRows(near.received, far.received), SideRows(near.sent, far.sent)
        return partial(self.group.exchange_sides, send, sent, received)

    def collect_rows(
        self, chunk: ChunkPlan, rows: Sides, result_NH: torch.Tensor, extra_N: torch.Tensor | None
    ) -> None:
        """Returned rows, and their extra numbers -> their places among this rank's rows."""
        assert chunk.rows is not None
        for wire, side, codec in (
            (rows.near, chunk.rows.near, self.codecs.near),
            (rows.far, chunk.rows.far, self.codecs.far),
        ):
            width = wire.shape[1] if extra_N is None else wire.shape[1] - extra_N.element_size()
            if extra_N is not None:
                extra_N[side.row] = _bytes(wire[:, width:]).view(extra_N.dtype).squeeze(1)
            codec.decode(wire[:, :width].contiguous(), result_NH, side.row)

    @property
    def wide_dtype(self) -> torch.dtype:
        """Of sums."""
        return torch.float64 if self.dtype is torch.float64 else torch.float32

    def token_width(self, columns: TokenColumns) -> int:
        """Bytes of a token between nodes."""
        return self.values_width(self.codecs.far) + columns.width

    def values_width(self, codec: Compressor) -> int:
        """Bytes of a row's values with the padding after them."""
        return aligned(codec.row_bytes(self.hidden, self.dtype))

    def _measure_rows(self, rows: torch.Tensor, near: torch.Tensor, far: torch.Tensor) -> None:
        if self.measure is not None:
            self.measure("near", self.codecs.near, rows.index_select(0, near))
            self.measure("far", self.codecs.far, rows.index_select(0, far))

    def _measure_sums(self, chunk: ChunkPlan, rows: torch.Tensor, spreads: Spreads, weighted: bool) -> None:
        if self.measure is None:
            return
        self.measure("near", self.codecs.near, self._exact_sums(chunk.near, rows, spreads.near, weighted))
        far = self._exact_sums(chunk.far, rows, spreads.far, weighted)
        self.measure("far", self.codecs.far, far)
        if self.group.comm.passes_on:
            self.measure("inner", self.codecs.inner, far)

    def _exact_sums(self, side: SidePlan, rows: torch.Tensor, spread: Spread, weighted: bool) -> torch.Tensor:
        """What _sum_rows encodes, [rows, H]."""
        sums = torch.empty((side.num_received, self.hidden), dtype=rows.dtype, device=rows.device)
        fold_rows(make_compressor(NONE), rows, spread, weighted, sums.view(torch.uint8))
        return sums

    def _new_buffer(self, chunk: ChunkPlan, device: torch.device) -> torch.Tensor:
        make = torch.empty if chunk.layout.padded_shape is None else torch.zeros
        return make((chunk.layout.num_rows, self.hidden), dtype=self.dtype, device=device)

    def _token_rows(
        self, side: SidePlan, tokens: torch.Tensor, columns: TokenColumns | None, codec: Compressor
    ) -> torch.Tensor:
        width = self.values_width(codec)
        wire = self.group.buffer(side.token.shape[0], width + (0 if columns is None else columns.width))
        codec.encode_into(tokens, side.token, wire)
        if columns is not None:
            gather_bytes(columns.bytes_T, side.token, wire[:, width:])
        return wire

    def _sum_rows(
        self,
        side: SidePlan,
        rows: torch.Tensor,
        spread: Spread,
        weighted: bool,
        codec: Compressor,
        extra: torch.Tensor | None,
    ) -> torch.Tensor:
        width = self.values_width(codec)
        as_bytes = None if extra is None else extra.view(torch.uint8)
        wire = self.group.buffer(side.num_received, width + (0 if as_bytes is None else as_bytes.shape[1]))
        fold_rows(codec, rows, spread, weighted, wire)
        if as_bytes is not None:
            gather_bytes(as_bytes, None, wire[:, width:])
        return wire

    def _routes(self, chunk: ChunkPlan, columns: TokenColumns, codec: Compressor) -> RowRoutes:
        offset = self.values_width(codec) + columns.id_column
        return self.plan.routes(chunk, offset, columns.top_k, columns.id_bytes)

    def _find_spread(
        self, chunk: ChunkPlan, side: SidePlan, rows: torch.Tensor, columns: TokenColumns, first: int
    ) -> Spread:
        return find_experts(
            rows=rows,
            routes=self.plan.routes(chunk, first + columns.id_column, columns.top_k, columns.id_bytes),
            first_id=self.plan.first_expert,
            num_entries=side.num_entries,
            weight_offset=first,
            weight_dtype=columns.weight_dtype,
            row_dtype=self.dtype,
            base=chunk.base_PL,
            source_rows=side.received_rows,
            place_offset=first + columns.place_column if columns.has_places else -1,
            table=side.table,
            num_places=chunk.layout.num_rows,
        )
